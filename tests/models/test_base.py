"""bminf/models/base.py: what all models have in common for users."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import said_by
from scripted import Spied, say
from streaming import num_readers, settled_readers

import bminf
from bminf.engine.beam import beam_search
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, BudgetError, UnsupportedModelError
from bminf.models.prompt import Prompt
from bminf.offload import memory
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
ZOO = ["cpm1", "cpm2", "eva"]
GLMS = ["glm130b", "glm10b"]
CHINESE, ENGLISH = "今天天气很好", "the blocks of a layer wait"
SEVERAL = "the [MASK] of a layer [MASK] on the [MASK]."

each_model = pytest.mark.parametrize("name", [*ZOO, *GLMS, "bloom"])


def text_of(name: str) -> str:
    return ENGLISH if name in GLMS else CHINESE


def texts_of(name: str) -> list[str]:
    """Of different lengths, and for a GLM with different blanks."""
    if name in GLMS:
        blanks = ["the", "the blocks [sMASK]", "the blocks of a [MASK] wait on the host"]
        return [*blanks, f"{ENGLISH} {ENGLISH}"]
    return ["今天", "我们去公园散步吧，今天天气很好", "你是谁"]


# ---- options -------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["很", "好", "。", "我们"])
    assert model.generate("今天", stop_tokens=["。"], max_tokens=9, temperature=0) == ("很好", True)


@pytest.mark.parametrize("name", ["cpm1", *GLMS])
def test_banned_tokens_are_not_written(load: Loader, name: str) -> None:
    model, seen = load(name, max_batch_size=2), list[int]()
    model.tokenizer = Spied(model.tokenizer, seen)
    for options in ({"temperature": 0}, {"num_beams": 2}):
        model.generate(text_of(name), max_tokens=1, **options)
        first = seen[-1]
        banned = model.tokenizer.tokens([first])
        model.generate(text_of(name), max_tokens=1, banned_tokens=banned, **options)
        assert seen[-1] != first


@each_model
def test_a_seed_repeats(load: Loader, name: str) -> None:
    model = load(name)
    options = {"max_tokens": 12, "temperature": 9}  # some logits are large
    texts = [model.generate_batch([text_of(name)], seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@each_model
def test_top_k_of_1_is_greedy(load: Loader, name: str) -> None:
    model, text = load(name), text_of(name)
    greedy = model.generate(text, max_tokens=9, temperature=0)
    for options in ({"top_k": 1}, {"top_n": 1}):
        assert model.generate(text, max_tokens=9, **options) == greedy
    assert model.generate(text, 9, 1) == greedy


def test_positions_are_refused_before_anything_runs(load: Loader) -> None:
    model = load("cpm1")
    fed = say(model, ["很"])
    with pytest.raises(ArgumentError, match=r"max_length=256.*more positions"):
        model.generate("今天", max_tokens=256)
    assert fed == []


# ---- iterators -----------------------------------------------------------------------------------


@each_model
def test_the_pieces_are_the_text(load: Loader, name: str) -> None:
    model = load(name)
    for text in texts_of(name):
        for options in ({"seed": 5}, {"temperature": 0}):
            expected = model.generate_batch([text], max_tokens=20, **options)[0][0]
            pieces = list(model.generate_iter(text, max_tokens=20, **options))
            assert "".join(pieces) == expected and all(pieces)
            assert len(pieces) > 1 or name not in GLMS


def test_pieces_come_one_by_one(load: Loader) -> None:
    model = load("cpm2")
    fed = say(model, ["今天", "天气", "<eod>"])
    pieces = model.generate_iter("我们", temperature=0)
    assert fed == []
    assert next(pieces) == "今天" and len(fed) == 1


def test_stopping_early_leaves_the_model_usable(load: Loader) -> None:
    model = load("cpm1")
    whole = model.generate("今天", max_tokens=8, seed=1)
    pieces = model.generate_iter("我们去公园", max_tokens=8, seed=2)
    next(pieces)
    pieces.close()
    for _ in model.generate_iter("我们去公园", max_tokens=8, seed=2):
        break
    assert model.generate("今天", max_tokens=8, seed=1) == whole


@pytest.mark.parametrize("name", ["cpm1", *GLMS])
def test_an_iterator_left_behind_ends_when_another_text_needs_its_room(
    load: Loader, name: str
) -> None:
    model, text = load(name, max_length=64), text_of(name)
    most = 64 - len(model._prompt(text).start_ids) + 1
    uses = [lambda: model.generate(text, max_tokens=most, seed=1)]
    uses.append(lambda: model.logits(text))
    if name in GLMS:
        uses.append(lambda: model.score(text, ["the host"]))
        uses.append(lambda: model.perplexity(text, 12))
    for use in uses:
        pieces = model.generate_iter(text, temperature=0, max_tokens=8)
        next(pieces)
        use()
        with pytest.raises(UnsupportedModelError, match="another text was begun"):
            next(pieces)


@each_model
def test_iterators_go_on_side_by_side_while_there_is_room(load: Loader, name: str) -> None:
    model, texts = load(name, max_batch_size=4), texts_of(name)[:3]
    alone = [model.generate_batch([text], max_tokens=8, seed=4)[0][0] for text in texts]
    iterators = [model.generate_iter(text, max_tokens=8, seed=4) for text in texts]
    together, sweeps = [""] * 3, model.engine.stats.num_sweeps
    for _ in range(9):
        for i, pieces in enumerate(iterators):
            together[i] += next(pieces, "")
    assert together == alone
    assert model.engine.stats.num_sweeps - sweeps <= 8 + 2  # and not 8 for each


def test_an_iterator_at_its_end_does_not_mind_the_next_text(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["今天", "天气", "很"])
    pieces = model.generate_iter("我们", temperature=0, max_tokens=2)
    assert [next(pieces), next(pieces)] == ["今天", "天气"]
    model.generate("今天", max_tokens=1, seed=1)
    assert list(pieces) == []


def test_an_interrupt_leaves_the_model_usable(load: Loader) -> None:
    model = load("cpm2", memory_limit=load("cpm2").plan.least_limit)
    whole = model.generate("今天", max_tokens=6, seed=1)
    handle = model.model.decoder.layers[1].attention.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate("今天", max_tokens=6, seed=1)
    handle.remove()
    assert model.generate("今天", max_tokens=6, seed=1) == whole


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_threads_take_turns(load: Loader) -> None:
    model = load("cpm2")
    texts = ["今天", "我们去公园散步吧", "你是谁"]
    alone = [model.generate(text, max_tokens=10, seed=4) for text in texts]
    together: dict[str, Any] = {}

    def run(text: str) -> None:
        together[text] = model.generate(text, max_tokens=10, seed=4)

    threads = [threading.Thread(target=run, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[text] for text in texts] == alone


def test_two_models_at_once(load: Loader) -> None:
    limits = {name: load(name).plan.least_limit for name in GLMS}
    models = {name: load(name, memory_limit=limits[name]) for name in GLMS}
    alone = {name: models[name].generate(ENGLISH, max_tokens=8, seed=1)[0] for name in GLMS}
    pieces = {name: models[name].generate_iter(ENGLISH, max_tokens=8, seed=1) for name in GLMS}
    together = dict.fromkeys(GLMS, "")
    for _ in range(9):
        for name in GLMS:
            together[name] += next(pieces[name], "")
    assert together == alone and len(set(alone.values())) == 2


# ---- batches -------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("options", [{"temperature": 0}, {"num_beams": 3, "length_penalty": 0.5}])
def test_a_batch_gives_what_each_text_gives_alone(
    load: Loader, name: str, options: dict[str, Any]
) -> None:
    texts = texts_of(name)
    model = load(name, max_batch_size=3 * len(texts))
    together = model.generate_batch(texts, max_tokens=10, **options)
    alone = [model.generate_batch([text], max_tokens=10, **options)[0] for text in texts]
    assert together == alone


def test_a_row_that_ends_early_does_not_disturb_the_others(load: Loader) -> None:
    model = load("cpm1", max_batch_size=3)
    say(model, ["很", "<eod>"], ["好", "，", "我们", "<eod>"], ["<eod>"])
    answers = model.generate_batch(["今天天气", "今天", "我们去公园"], temperature=0)
    assert answers == [("很", True), ("好，我们", True), ("", True)]


@each_model
def test_logits_of_a_padded_row_are_those_of_the_row_alone(load: Loader, name: str) -> None:
    """Caches and masks, to rounding: a short row beside a long one, over several steps."""
    model, rows = load(name, max_batch_size=2), {}
    short, long = prompts_of(model, name)
    with torch.inference_mode():
        for prompts in ([short], [short, long]):
            decoder, start = model._decoder(prompts)
            steps = [decoder(start)[0]]
            for token in (15, 16, 17):
                steps.append(decoder(torch.full((len(prompts), 1), token))[0])
            rows[len(prompts)] = torch.stack(steps)
    assert torch.allclose(rows[1], rows[2], atol=2e-5)


def prompts_of(model: Any, name: str) -> list[Any]:
    if name in GLMS:
        return [model._prompt("a [MASK]."), model._prompt(f"the [MASK] wait, {ENGLISH}")]
    both = [*range(11, 14)], [*range(12, 24)]
    return [Prompt(ids, ids if name == "cpm1" else [1, 2]) for ids in both]


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_requests_of_ids_share_the_passes_of_texts(load: Loader, name: str) -> None:
    model, start = load(name, max_batch_size=3), None if name == "cpm1" else [1, 2]
    asked = [([11, 12, 13], 9), ([12] * 7, 12), ([15], 5)]

    def request(number: int) -> Request:
        ids, max_new_tokens = asked[number]
        return Request(ids, max_new_tokens, Sampling(0.0), start_ids=start, num_logprobs=1)

    alone = [request(number) for number in range(3)]
    for one in alone:
        model.engine.run([model.engine.add(one)])
    sweeps = model.stats.num_sweeps
    together = [model.engine.add(request(number)) for number in range(3)]
    pieces = model.generate_iter("今天", max_tokens=8, seed=1)
    first = next(pieces)
    model.engine.run(together)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for one, other in zip(alone, together, strict=True):
        expected = [told.logprob for told in one.logprobs]
        assert [told.logprob for told in other.logprobs] == pytest.approx(expected, abs=2e-5)
    assert model.stats.num_sweeps - sweeps <= 12 + 1
    assert first + "".join(pieces) == model.generate("今天", max_tokens=8, seed=1)[0]


def test_no_more_rows_than_logits_are_set_aside_for(load: Loader) -> None:
    """Eight, or max_batch_size if that is more; in the room of its tokens."""
    for max_batch_size, expected in ((1, 8), (12, 12)):
        model = load("cpm1", max_batch_size=max_batch_size)
        for _ in range(20):
            model.engine.add(Request([11], 2, Sampling(0.0)))
        model.engine.step()
        assert model.engine.num_running == expected


def test_requests_that_a_model_cannot_take_are_refused(load: Loader) -> None:
    glm, cpm2 = load("glm10b"), load("cpm2", max_length=20)
    with pytest.raises(ArgumentError, match=r"generate\(\) or fill_blank\(\)"):
        glm.engine.add(Request([5, 6]))
    with pytest.raises(ArgumentError, match="the prompt has 21 tokens"):
        cpm2.engine.add(Request([5] * 21, 5, start_ids=[1]))
    with pytest.raises(ArgumentError, match="max_length"):
        cpm2.engine.add(Request([5] * 5, 22, start_ids=[1]))
    with pytest.raises(ArgumentError, match="set when the model is loaded"):
        Engine(cpm2, max_length=30)


# ---- beams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_beams_find_a_text_at_least_as_likely_as_the_greedy_one(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=4)
    scores = [likelihood(model, num_beams) for num_beams in (1, 4)]
    assert scores[1] >= scores[0] - 1e-4


def likelihood(model: Any, num_beams: int) -> float:
    """The log-probability of the 6 tokens that are found, by teacher forcing."""

    ids = model.tokenizer.encode("今天天气很好")
    is_gpt = model.config.__class__.__name__ == "GPTConfig"
    start = ids if is_gpt else [1]
    with torch.inference_mode():
        decoder, fed = model._decoder([Prompt(ids, start)])
        (found,) = beam_search(decoder, fed, num_beams, (), 6, length_penalty=0.0)
    answer = list(found[0].ids)
    logits = model.logits([*start, *answer]) if is_gpt else model.logits(ids, [*start, *answer])
    steps = logits.log_softmax(-1)[len(start) - 1 : -1]
    score = float(steps.gather(1, torch.tensor(answer).unsqueeze(1)).sum())
    assert score == pytest.approx(found[0].score, abs=1e-3)
    return score


@pytest.mark.parametrize("name", [*ZOO, "glm10b"])
def test_a_beam_search_has_its_options(
    load: Loader, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they do is in engine/test_beam.py."""
    model, given = load(name, max_batch_size=2), dict[str, Any]()

    def search(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return beam_search(*arguments, **options)

    monkeypatch.setattr("bminf.models.base.beam_search", search)
    model.generate(text_of(name), max_tokens=6, num_beams=2, length_penalty=0.5)
    expected = {"num_beams": 2, "max_new_tokens": 6, "length_penalty": 0.5}
    assert {option: given[option] for option in expected} == expected


def test_beams_stop_where_the_text_ends(load: Loader) -> None:
    model = load("cpm1", max_batch_size=2)
    token_id = model.tokenizer.token_id

    def head(x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), model.config.vocab_size)
        logits[:, token_id("<eod>")] = 20
        return logits

    model.model.head = head
    assert model.generate("今天", num_beams=2) == ("", True)


# ---- what surrounds a model ----------------------------------------------------------------------

PACKINGS = [
    (None, None),
    ("int8", None),
    ("int4", "int8"),
    ("int4-row", "int8"),
    (Format(8, 32), None),
]


# Of each model two packings, of each packing two models.
PAIRS = [(name, *PACKINGS[(n + k) % 5]) for n, name in enumerate(ZOO + GLMS) for k in (0, 2)]


@pytest.mark.parametrize(("name", "quantization", "head"), PAIRS, ids=str)
def test_streamed_is_resident(load: Loader, name: str, quantization: Any, head: Any) -> None:
    """At the least limit, to the bit; with texts of different lengths."""
    settings = {"quantization": quantization, "max_batch_size": 4}
    if name in GLMS:
        settings["head_quantization"] = head
    elif quantization == "int4-row":
        settings["quantization"] = Format(4, 8, has_minimum=True)
    resident = load(name, **settings)
    limit = resident.plan.least_limit
    streamed = load(name, memory_limit=limit, **settings)
    assert not resident.plan.streamed and streamed.plan.total_bytes <= limit
    assert len(streamed.plan.streamed) > len(streamed.plan.resident)
    for options in ({"seed": 3}, {"num_beams": 2}, {"temperature": 0}):
        texts = [
            model.generate_batch(texts_of(name)[:2], max_tokens=8, **options)
            for model in (resident, streamed)
        ]
        assert texts[0] == texts[1]
    assert streamed.stats.bytes_copied > 0 == resident.stats.bytes_copied


@pytest.mark.parametrize("name", ["cpm1", "cpm2"])
def test_a_text_gives_back_first_what_the_last_one_left(
    load: Loader, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a text and not once a token: malloc walks through all that it keeps."""
    model = load(name)
    times: list[None] = []
    monkeypatch.setattr(memory, "trim", lambda: times.append(None))
    for _ in range(3):
        model.generate("今天", max_tokens=4)
    assert len(times) == 3


def test_stats_tell_what_was_done(load: Loader) -> None:
    model = load("cpm2", memory_limit=load("cpm2").plan.least_limit)
    say(model, ["今天"] * 9)
    model.generate("今天", max_tokens=9, temperature=0)
    stats, plan = model.stats, model.plan
    assert stats.num_tokens == 9 and stats.tokens_per_s > 0
    assert (stats.num_sweeps, stats.rows_per_sweep) == (9, 1.0)
    assert stats.bytes_copied > stats.streamed_bytes == plan.streamed_bytes > 0
    assert stats.resident_bytes == plan.resident_bytes
    # Two blocks are copied ahead before the first pass; the encoder's, in the first pass alone.
    copied = stats.prefill.bytes_copied + stats.decode.bytes_copied
    assert 0 < stats.bytes_copied - copied <= plan.slot_bytes
    per_token = sum(b.nbytes for b in plan.blocks if plan.uses[b.name] == 128)
    assert abs(stats.decode.bytes_copied - 8 * per_token) <= plan.slot_bytes
    assert stats.num_requests == 1 and min(stats.first_token_s, stats.prefill.seconds) > 0
    assert stats.prefill.bound in ("copying", "computing")
    assert bminf.plan_of(model.model) is plan
    assert bminf.stats_of(model.model).bytes_copied == model.stats.bytes_copied


@each_model
def test_a_model_can_be_closed(load: Loader, name: str) -> None:
    """What its methods say then is in test_calls.py."""
    limit, threads = load(name).plan.least_limit, settled_readers()
    with load(name, memory_limit=limit) as model:
        assert "on cpu" in repr(model)
        pieces = model.generate_iter(text_of(name), seed=1, max_tokens=9)
        next(pieces, None)
        assert num_readers() == threads + 1
    assert num_readers() == threads and "closed" in repr(model)
    with pytest.raises(UnsupportedModelError, match="closed"):
        next(pieces)
    model.close()


@pytest.mark.parametrize(
    ("name", "of_bfloat16", "of_float16"),
    [("cpm2", 0.2, 0.02), ("glm130b", 0.3, 0.05), ("glm10b", 0.3, 0.05)],
)
def test_half_precision_is_float32_to_its_rounding(
    load: Loader, name: str, of_bfloat16: float, of_float16: float
) -> None:
    given = ("今天天气", "很好") if name == "cpm2" else ("the blocks of a [MASK] wait on the host",)
    exact = load(name).logits(*given)
    for dtype, tolerance in ((torch.bfloat16, of_bfloat16), (torch.float16, of_float16)):
        assert torch.allclose(load(name, dtype=dtype).logits(*given), exact, atol=tolerance)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied(load: Loader, copy_of: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be copied or pickled"):
        copy_of(load("cpm1"))


def test_closing_that_was_interrupted_can_be_repeated(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = settled_readers()
    model = load("cpm2", memory_limit=load("cpm2").plan.least_limit)
    backend = model._scheduler.backend
    with monkeypatch.context() as patch:
        patch.setattr(backend, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.close()
    model.close()
    assert num_readers() == threads


def test_a_cache_that_cannot_be_had_leaves_nothing(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new_cache(*_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    limit, threads = load("cpm2").plan.least_limit, settled_readers()
    monkeypatch.setattr("bminf.arch.t5.T5.new_cache", new_cache)
    with pytest.raises(BudgetError, match="KV cache of max_batch_size=1"):
        load("cpm2", memory_limit=limit)
    assert num_readers() == threads


@each_model
def test_the_callers_default_device_changes_nothing(load: Loader, name: str) -> None:
    """Here one that has no values; what is made while loading, and while a text is generated."""
    text = text_of(name)
    uses: list[Callable[[Any], Any]] = [
        lambda model: model.generate(text, max_tokens=5, temperature=0),
        lambda model: model.generate(text, max_tokens=5, num_beams=2),
    ]
    if name in GLMS:
        uses.append(lambda model: model.logits(text).tolist())
        uses.append(lambda model: model.score(text, ["the host", "a layer"]))
        uses.append(lambda model: model.perplexity(text, generation_length=2))
        uses.append(lambda model: model.fill_blank(SEVERAL, max_tokens=2, temperature=0))
    if name == "glm130b":
        sampled = {"num_beams": 2, "deterministic": False, "seed": 1}
        uses.append(lambda model: model.generate(text, max_tokens=3, **sampled))
    expected = [use(load(name, quantization="int8", max_batch_size=2)) for use in uses]
    with torch.device("meta"):
        model = load(name, quantization="int8", max_batch_size=2)
        assert [use(model) for use in uses] == expected


def test_building_a_model_does_not_import_the_compiler_of_torch() -> None:
    """It would take a second, and 70 MB, for nothing."""
    program = (
        "import sys; from bminf.arch.registry import named; "
        "from bminf.models.source import meta_network\n"
        "for one in map(named, ('cpm1', 'cpm2')):\n"
        "    meta_network(one, next(iter(one.published.values())))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert said_by(program) == "False\n"
