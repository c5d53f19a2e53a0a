"""bminf/evaluation/scorers.py: log-probabilities, compared with slow sums over logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_glm import scored_context, states
from tiny_models import make

import bminf
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.evaluation import scorers
from bminf.evaluation.scorers import Score, scorer_of

Loader = Callable[..., Any]
PAIRS = [
    ([5, 6, 7], [8]),
    ([5, 6, 7], [9, 10]),
    ([11], [12, 13, 14]),
    ([5, 6, 7], [15]),
    ([3], [4]),
]


class Words:
    """A tokenizer of numbers."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if add_special_tokens else []), *map(int, text.split())]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def by_hand(logits: torch.Tensor, ids: Sequence[int]) -> Score:
    """logits: (T, V), of which the last but one is before the last of `ids`."""
    steps = logits[-len(ids) - 1 : -1].double().log_softmax(-1)
    chosen = torch.tensor(ids)
    logprob = float(steps.gather(1, chosen[:, None]).sum())
    return Score(pytest.approx(logprob, rel=1e-5), bool((steps.argmax(-1) == chosen).all()))


@pytest.fixture
def llama() -> Any:
    return make("llama").eval()


def expected_of(model: Any, pairs: Sequence[Any], length: int = 10**6) -> list[Score]:
    found = []
    for context, ids in pairs:
        row = torch.tensor([[*context, *ids][-length - 1 :]])
        with torch.inference_mode():
            found.append(by_hand(model(row).logits[0], ids))
    return found


@pytest.mark.parametrize("at_once", [1, 7, 512])
def test_a_model_of_transformers(llama: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "_AT_ONCE", at_once)
    assert scorer_of(llama, Words()).score(PAIRS) == expected_of(llama, PAIRS)
    assert scorer_of(llama, Words()).score([]) == []


def test_the_most_probable_is_greedy(llama: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(2):
        with torch.inference_mode():
            ids = torch.cat([ids, llama(ids).logits[:, -1:].argmax(-1)], 1)
    answer = ids[0, 3:].tolist()
    good, bad = scorer_of(llama, Words()).score([([5, 6, 7], answer), ([5, 6, 7], [3, answer[1]])])
    assert good.is_greedy and not bad.is_greedy and good.logprob > bad.logprob


def test_choices_of_one_token_share_a_row(llama: Any) -> None:
    rows = []
    plain = llama.forward

    def counted(ids: torch.Tensor, **options: Any) -> Any:
        rows.append(tuple(ids.shape))
        return plain(ids, **options)

    scorer = scorer_of(llama, Words())
    llama.forward = counted
    scorer.score([([5, 6, 7], [n]) for n in range(3, 9)] + [([4, 5, 6], [7])])
    assert rows == [(2, 3)]


def test_what_is_too_long_loses_its_beginning(llama: Any) -> None:
    pairs = [([*range(3, 20)], [20, 21]), ([3], [4])]
    found = scorer_of(llama, Words(), 6).score(pairs)
    assert found == expected_of(llama, pairs, 6)
    with pytest.raises(ArgumentError, match="7 tokens to score; the most is 6"):
        scorer_of(llama, Words(), 6).score([([3], [4] * 7)])


def test_a_wrapped_model_scores_the_same_bits(llama: Any) -> None:
    plain = scorer_of(llama, Words(), 64).score(PAIRS)
    least = bminf.plan_for(llama, False, device="cpu").least_limit
    wrapped = bminf.wrapper(llama, False, least, "cpu")
    assert bminf.plan_of(wrapped).streamed
    assert scorer_of(wrapped, Words(), 64).score(PAIRS) == plain


def test_texts_are_generated_up_to_their_stops(llama: Any) -> None:
    scorer = scorer_of(llama, Words(), 32)
    whole = scorer.generate("5 6 7", {"max_tokens": 4})
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = llama.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert whole == Words().decode(plain[0, 4:].tolist())
    torch.manual_seed(0)
    sampled = scorer.generate("5 6 7", {"max_tokens": 4, "temperature": 5.0})
    assert len(sampled.split()) == 4
    stop = whole.split()[2]
    assert scorer.generate("5 6 7", {"max_tokens": 4, "stop": [stop]}) == whole[: whole.find(stop)]


def test_models_with_encoders_and_tokenizers_that_are_missing() -> None:
    with pytest.raises(UnsupportedModelError, match="has an encoder"):
        scorer_of(make("t5"), Words())
    with pytest.raises(ArgumentError, match="tokenizer is None"):
        scorer_of(make("llama"))


@pytest.mark.parametrize("name", ["cpm1", "bloom"])
def test_a_model_that_continues_texts(name: str, load: Loader) -> None:
    model = load(name, max_batch_size=2)
    scorer: Any = scorer_of(model)
    expected = []
    for context, ids in PAIRS:
        expected.append(by_hand(model.logits([*context, *ids]), ids))
    assert scorer.score(PAIRS) == expected
    text = "今天天气" if name == "cpm1" else "the layer"
    assert scorer.encode(text) == model.tokenizer.encode(text)
    answer = scorer.generate(text, {"max_tokens": 3, "temperature": 0})
    assert answer == model.generate(text, max_tokens=3, temperature=0)[0]


@pytest.mark.parametrize("name", ["cpm1", "bloom"])
def test_a_text_that_fills_a_built_in_model_is_scored_to_its_first_token(
    name: str, load: Loader
) -> None:
    """As windows of a long text are: one token of context, and as many as there is room for."""
    model = load(name, max_length=16)
    scorer: Any = scorer_of(model)
    room = 16 - 1  # the token before them, too
    assert scorer.max_length == room
    pairs = [([9], [*range(20, 20 + room)]), ([*range(3, 30)], [40, 41])]
    expected = [by_hand(model.logits([*context, *ids][-16:]), ids) for context, ids in pairs]
    assert scorer.score(pairs) == expected
    with pytest.raises(ArgumentError, match=f"{room + 1} tokens to score; the most is {room}"):
        scorer.score([([9], [4] * (room + 1))])


@pytest.mark.parametrize("name", ["glm130b", "glm10b"])
def test_a_glm_reads_its_context_in_both_directions(name: str, load: Loader) -> None:
    model = load(name)
    scorer: Any = scorer_of(model)
    texts = ["the host", "a layer of blocks", "on"]
    context = scored_context(model, "the blocks wait[MASK]")
    found = scorer.score_texts("the blocks wait", texts)
    for text, score in zip(texts, found, strict=True):
        ids = model.tokenizer.encode(text)
        steps = states(model, context, [model.tokenizer.sop_id, *ids[:-1]])
        assert score == by_hand(torch.cat([steps, steps[-1:]]), ids)
    answer = scorer.generate("the blocks", {"max_tokens": 3, "temperature": 0})
    assert answer == model.generate("the blocks", max_tokens=3, temperature=0)[0]


def test_a_glm_drops_the_beginning_and_parts_choices_that_do_not_fit(load: Loader) -> None:
    model = load("glm130b", max_length=16)
    scorer: Any = scorer_of(model)
    long = "the blocks of a layer wait on the host for the bus"
    kept = model.tokenizer.encode(long)[-(16 - 4 - 2) :]
    choices = [[60, 61, 62, 63], [64, 65, 66, 67], [68, 69, 70, 71]]
    found = scorer.score_ids(long, choices)
    alone = [scorer.score_ids(long, [one])[0] for one in choices]
    assert found == alone
    assert alone[0].logprob == pytest.approx(model.score(kept, [choices[0]])[0])
    with pytest.raises(ArgumentError):
        scorer.score_ids("the", [[60] * 40])


def test_a_glm_tells_the_probability_of_a_text(load: Loader) -> None:
    import math

    model = load("glm130b", max_length=40)
    text = "the blocks of a layer wait on the host"
    whole = scorer_of(model).whole(text)
    words = len(text.split(" "))
    assert math.exp(-whole / words) == pytest.approx(model.perplexity(text, 38), rel=1e-6)


def test_an_encoder_reads_the_context_and_a_decoder_what_follows(load: Loader) -> None:
    model = load("cpm2")
    scorer: Any = scorer_of(model)
    ids = model.tokenizer.encode("很好")
    logits = model.logits("今天天气", "很好")
    assert scorer.score_texts("今天天气", ["很好"]) == [by_hand(logits, ids)]
    with pytest.raises(UnsupportedModelError, match="needs a context"):
        scorer.whole("今天天气")


def test_positions_bound_the_length(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert scorer_of(model, Words()).max_length == 24
    assert scorer_of(model, Words(), 8).max_length == 8
