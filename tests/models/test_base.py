"""What generate(), fill_blank() and dialogue() make of the tokens that a model writes.

The models' heads are replaced by a script, so that what is tested is what happens around them.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from streaming import num_readers, settled_readers

import bminf
from bminf.errors import ArgumentError, BudgetError, UnsupportedModelError
from bminf.offload import memory

Loader = Callable[..., Any]


def say(model: Any, *answers: Sequence[str]) -> list[list[int]]:
    """Let `model` write these tokens, row by row, then <mask>; returns what it is fed each step.

    Rows that have ended leave the batch, so rows are told apart by what they were fed before.
    """
    token_id, fed = model.tokenizer.token_id, []
    scripts = [[token_id(token) for token in answer] for answer in answers]
    size, mask = model.config.vocab_size, token_id("<mask>")
    steps = itertools.count()

    def head(x: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        ends = model._end_ids()
        alive = [s for s in scripts if len(scripts) == 1 or not {*s[:step]} & {*ends}]
        logits = torch.zeros(len(x), size)
        for row, script in zip(logits, alive, strict=True):
            row[script[step] if step < len(script) else mask] = 50
        return logits

    original = type(model.model).forward

    def forward(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        fed.append(input_ids.tolist())
        return original(model.model, input_ids, *rest)

    model.model.head, model.model.forward = head, forward
    return fed


# ---- CPM-1 ---------------------------------------------------------------------------------------


def test_cpm1_gives_the_continuation_up_to_the_end(load: Loader) -> None:
    model = load("cpm1")
    fed = say(model, ["很", "好", "<eod>"])
    assert model.generate("今天天气", temperature=0) == ("很好", True)
    assert fed[0] == [model.tokenizer.encode("今天天气")]
    assert fed[1:] == [[[model.tokenizer.token_id("很")]], [[model.tokenizer.token_id("好")]]]


def test_cpm1_stops_at_max_tokens(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["很", "好", "，", "我们"])
    assert model.generate("今天天气", max_tokens=3, temperature=0) == ("很好，", False)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["很", "好", "。", "我们"])
    assert model.generate("今天", stop_tokens=["。"], max_tokens=9, temperature=0) == ("很好", True)


def test_banned_tokens_are_not_written(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["很", "<eod>"])
    text, _ = model.generate("今天", banned_tokens=["很"], temperature=0, max_tokens=1)
    assert "很" not in text


def test_an_unknown_token_is_never_written(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["<unk>", "<eod>"])
    text, stopped = model.generate("今天", temperature=0, max_tokens=2)
    assert stopped and "<unk>" not in text


def test_the_same_seed_gives_the_same_text(load: Loader) -> None:
    model = load("cpm1")
    options = {"max_tokens": 12, "temperature": 9}  # its logits are large
    texts = [model.generate("今天天气", seed=seed, **options)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_n_of_1_is_greedy(load: Loader) -> None:
    model = load("cpm1")
    greedy = model.generate("今天天气", max_tokens=12, temperature=0)
    assert model.generate("今天天气", max_tokens=12, top_n=1) == greedy
    assert model.generate("今天天气", max_tokens=12, top_k=1) == greedy


def test_penalties_count_the_prompt(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["今天", "<eod>"])
    text, _ = model.generate("今天", temperature=0, max_tokens=1, frequency_penalty=60)
    assert text != "今天"


def test_positions_are_refused_before_anything_runs(load: Loader) -> None:
    model = load("cpm1")
    fed = say(model, ["很"])
    with pytest.raises(ArgumentError, match=r"max_length=256.*more positions"):
        model.generate("今天", max_tokens=256)
    assert fed == []


# ---- iterators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_the_pieces_are_the_text(load: Loader, name: str) -> None:
    model = load(name)
    options = {"max_tokens": 20, "seed": 5}
    text, _ = model.generate_batch(["今天天气很好"], **options)[0]
    pieces = list(model.generate_iter("今天天气很好", **options))
    assert "".join(pieces) == text and all(pieces)


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


def test_an_iterator_left_behind_ends_when_another_text_begins(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["今天", "天气", "很", "好"])
    pieces = model.generate_iter("我们", temperature=0, max_tokens=8)
    next(pieces)
    model.generate("今天", max_tokens=2, seed=1)
    with pytest.raises(UnsupportedModelError, match="another text was begun"):
        next(pieces)


def test_an_interrupt_leaves_the_model_usable(load: Loader) -> None:
    model = load("cpm2", memory_limit=streaming_limit(load("cpm2")))
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


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_a_batch_gives_what_each_text_gives_alone(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=3)
    texts = ["今天", "我们去公园散步吧，今天天气很好", "你是谁"]
    together = model.generate_batch(texts, max_tokens=10, temperature=0)
    alone = [model.generate_batch([text], max_tokens=10, temperature=0)[0] for text in texts]
    assert together == alone


def test_a_row_that_ends_early_does_not_disturb_the_others(load: Loader) -> None:
    model = load("cpm1", max_batch_size=3)
    say(model, ["很", "<eod>"], ["好", "，", "我们", "<eod>"], ["<eod>"])
    answers = model.generate_batch(["今天天气", "今天", "我们去公园"], temperature=0)
    assert answers == [("很", True), ("好，我们", True), ("", True)]
    assert model.stats.num_tokens == 2 + 4 + 1  # with the stop tokens, and of no row that had ended


@pytest.mark.parametrize("name", ["cpm1", "cpm2"])
def test_logits_of_a_padded_row_are_those_of_the_row_alone(load: Loader, name: str) -> None:
    """Caches and masks, to rounding: a short row beside a long one, over several steps."""
    model = load(name, max_batch_size=2)
    short, long = ([*range(11, 14)], [*range(12, 24)])
    rows = {}
    with torch.inference_mode():
        for prompts in ([short], [short, long]):
            given = [prompt_of(model, ids) for ids in prompts]
            decoder, start = model._decoder(given)
            steps = [decoder(start)[0]]
            for token in (15, 16, 17):
                steps.append(decoder(torch.full((len(prompts), 1), token))[0])
            rows[len(prompts)] = torch.stack(steps)
    assert torch.allclose(rows[1], rows[2], atol=2e-5)


def prompt_of(model: Any, ids: list[int]) -> Any:
    from bminf.models.base import Prompt

    return Prompt(ids, ids if model.config.__class__.__name__ == "GPTConfig" else [1, 2])


# ---- beams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
def test_beams_find_a_text_at_least_as_likely_as_the_greedy_one(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=4)
    scores = [likelihood(model, num_beams) for num_beams in (1, 4)]
    assert scores[1] >= scores[0] - 1e-4


def likelihood(model: Any, num_beams: int) -> float:
    """The log-probability of the 6 tokens that are found, by teacher forcing."""
    from bminf.generation.beam import beam_search
    from bminf.models.base import Prompt

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


def test_beams_stop_where_the_text_ends(load: Loader) -> None:
    model = load("cpm1", max_batch_size=2)
    token_id = model.tokenizer.token_id

    def head(x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), model.config.vocab_size)
        logits[:, token_id("<eod>")] = 20
        return logits

    model.model.head = head
    assert model.generate("今天", num_beams=2) == ("", True)


# ---- CPM-2 ---------------------------------------------------------------------------------------


def test_cpm2_begins_with_the_sentinel_of_the_prompt(load: Loader) -> None:
    """The first token that the model writes is the first of the answer; BMInf 1.x dropped it."""
    model = load("cpm2")
    fed = say(model, ["很", "好", "<eod>"])
    assert model.generate("今天", max_tokens=3, temperature=0) == ("很好", True)
    token_id = model.tokenizer.token_id
    assert fed[0] == [[token_id("<s>"), token_id("<s_189>")]]
    prompt = model._prompt("今天")
    assert prompt.input_ids == [*model.tokenizer.encode("今天"), token_id("<s_189>")]


def test_cpm2_gives_as_many_tokens_as_asked_for(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["今天"] * 12)
    assert model.generate("今天", max_tokens=12, temperature=0) == ("今天" * 12, False)


def test_cpm2_ends_at_any_sentinel(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["很", "<s_3>", "好"])
    assert model.generate("今天", temperature=0) == ("很", True)


BLANKS = "今天<span>很好，我们<span>吧"


def test_fill_blank_gives_each_blank_its_text(load: Loader) -> None:
    model = load("cpm2")
    fed = say(model, ["天气", "<s_1>", "去", "公园", "<s_2>", "人"])
    assert model.fill_blank(BLANKS, temperature=0) == [
        {"position": 2, "text": "天气"},
        {"position": 13, "text": "去公园"},
    ]
    token_id, encode = model.tokenizer.token_id, model.tokenizer.encode
    assert fed[0] == [[token_id("<s>"), token_id("<s_0>")]]
    prompt = model._blanked(BLANKS, [2, 13], [token_id(f"<s_{k}>") for k in range(3)])
    assert prompt.input_ids == [
        *encode("今天"), token_id("<s_0>"), *encode("很好，我们"), token_id("<s_1>"), *encode("吧"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (["天气", "<eod>", "人"], ["天气", ""]),  # it ends early
        (["<s_1>", "公园", "<s_2>"], ["", "公园"]),
        (["天气", "<s_7>", "<s_0>", "好", "<s_1>", "人", "<s_2>"], ["天气好", "人"]),  # stray ones
        (["天气"] * 40, ["天气" * 6, ""]),  # max_tokens is for all blanks
    ],
)
def test_fill_blank_with_odd_answers(load: Loader, answer: list[str], texts: list[str]) -> None:
    model = load("cpm2")
    say(model, answer)
    filled = model.fill_blank(BLANKS, temperature=0, max_tokens=6 if len(answer) > 9 else 20)
    assert [blank["text"] for blank in filled] == texts


def test_fill_blank_at_some_of_the_places(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["公园", "<s_1>"])
    filled = model.fill_blank(BLANKS, spans_position=[13], temperature=0)
    assert filled == [{"position": 13, "text": "公园"}]


@pytest.mark.parametrize("positions", [[1], [2, 2], [2, 99], []])
def test_fill_blank_refuses_places_that_are_none(load: Loader, positions: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"blanks|spans_position"):
        load("cpm2").fill_blank(BLANKS, spans_position=positions)


@pytest.mark.parametrize("count", [0, 17])
def test_fill_blank_takes_1_to_16(load: Loader, count: int) -> None:
    model = load("cpm2")
    with pytest.raises(ArgumentError, match=f"{count} blanks; accepted: 1 to 16"):
        model.fill_blank("今天" + "<span>，" * count)
    say(model, ["天气", "<eod>"])
    assert len(model.fill_blank("今天" + "<span>，" * 16, temperature=0)) == 16


# ---- EVA -----------------------------------------------------------------------------------------


def test_dialogue_reads_all_utterances(load: Loader) -> None:
    model = load("eva")
    fed = say(model, ["我们", "去", "<sep>"])
    assert model.dialogue(["你是谁", "人"], temperature=0) == ("我们去", True)
    token_id, encode = model.tokenizer.token_id, model.tokenizer.encode
    sep, start = token_id("<sep>"), token_id("<s_0>")
    assert fed[0] == [[start]]
    assert model._prompt(["你是谁", "人"]).input_ids == [
        *encode("你是谁"), sep, *encode("人"), sep, start,
    ]  # fmt: skip
    assert model.generate(["你是谁", "人"], temperature=0, max_tokens=1)[0]


def test_dialogue_keeps_the_end_of_a_long_one(load: Loader) -> None:
    model = load("eva")
    seen = []
    original = type(model.model).encode

    def encode(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return original(model.model, input_ids, *rest)

    model.model.encode = encode
    utterances = ["今天天气很好"] * 9
    for length in (5, 12, None):
        model.dialogue(utterances, max_tokens=1, truncation_length=length, seed=0)
    assert [len(ids) for ids in seen] == [5, 12, len(seen[2])]
    assert seen[2][-12:] == seen[1] and len(seen[2]) > 40


def test_dialogue_refuses_a_str_and_nothing(load: Loader) -> None:
    model = load("eva")
    with pytest.raises(ArgumentError, match="give a list of utterances"):
        model.dialogue("你是谁")
    with pytest.raises(ArgumentError, match="at least one utterance"):
        model.dialogue([])
    with pytest.raises(ArgumentError, match="truncation_length=0"):
        model.dialogue(["你"], truncation_length=0)


def test_eva_has_defaults_of_its_own(load: Loader) -> None:
    model = load("eva")
    assert model.dialogue(["你是谁"], seed=3) == model.dialogue(
        ["你是谁"], 128, 10, None, 0.85, 0, 0, 256, seed=3
    )
    assert model._defaults.temperature == 0.85 and model._defaults.top_n == 10


# ---- what surrounds a model ----------------------------------------------------------------------


def streaming_limit(model: Any) -> int:
    plan = model.plan
    return int(
        plan.outside_bytes + plan.reserved_bytes + 2 * max(block.nbytes for block in plan.blocks)
    )


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "eva"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_streamed_texts_are_the_resident_ones(load: Loader, name: str, quantization: Any) -> None:
    resident = load(name, quantization=quantization, max_batch_size=2)
    limit = streaming_limit(resident)
    streamed = load(name, quantization=quantization, max_batch_size=2, memory_limit=limit)
    assert len(streamed.plan.streamed) > len(streamed.plan.resident)
    for options in ({"seed": 3}, {"num_beams": 2}, {"temperature": 0}):
        texts = [
            model.generate_batch(["今天天气很好"], max_tokens=12, **options)
            for model in (resident, streamed)
        ]
        assert texts[0] == texts[1]


def test_decoding_does_not_touch_the_cross_projections(load: Loader) -> None:
    """Their blocks are copied once a prompt, however many tokens are written."""
    model = load("cpm2", memory_limit=streaming_limit(load("cpm2")))
    assert {"cross_projections.layers.0", "decoder.layers.0"} & set(model.plan.streamed)
    calls = []
    for layer in model.model.cross_projections.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate("今天", max_tokens=9, temperature=0, banned_tokens=["<eod>"])
    assert len(calls) == len(model.model.cross_projections.layers)


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
    model = load("cpm2", memory_limit=streaming_limit(load("cpm2")))
    say(model, ["今天"] * 9)
    model.generate("今天", max_tokens=9, temperature=0)
    stats, plan = model.stats, model.plan
    assert stats.num_tokens == 9 and stats.tokens_per_s > 0
    assert stats.bytes_copied > stats.streamed_bytes == plan.streamed_bytes > 0
    assert stats.resident_bytes == plan.resident_bytes
    assert bminf.plan_of(model.model) is plan
    assert bminf.stats_of(model.model).bytes_copied == model.stats.bytes_copied


def test_a_model_can_be_closed(load: Loader) -> None:
    threads = settled_readers()
    with load("cpm2", memory_limit=streaming_limit(load("cpm2"))) as model:
        pieces = model.generate_iter("今天", seed=1, max_tokens=9)
        next(pieces, None)
        assert num_readers() == threads + 1
    assert num_readers() == threads
    for use in (lambda: model.generate("今天"), lambda: model.plan, lambda: next(pieces)):
        with pytest.raises(UnsupportedModelError, match="closed"):
            use()
    model.close()


def test_logits_score_a_text(load: Loader) -> None:
    model = load("cpm1")
    ids = model.tokenizer.encode("今天天气很好")
    logits = model.logits("今天天气很好")
    assert logits.shape == (len(ids), model.config.vocab_size) and logits.dtype == torch.float32
    assert torch.equal(model.logits(ids), logits)
    for same in (torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), numpy.array(ids)):
        assert torch.equal(model.logits(same), logits)
    greedy, _ = model.generate("今天天气很好", max_tokens=1, temperature=0)
    assert model.tokenizer.decode([int(logits[-1].argmax())]) == greedy


def test_logits_of_a_target_begin_after_the_start(load: Loader) -> None:
    model = load("cpm2")
    start, ids = model._start_ids(), model.tokenizer.encode("很好")
    logits = model.logits("今天", "很好")
    assert len(logits) == len(start) + len(ids)
    assert torch.equal(model.logits(model._prompt("今天").input_ids, [*start, *ids]), logits)


def test_half_precision_is_float32_to_its_rounding(load: Loader) -> None:
    exact = load("cpm2").logits("今天天气", "很好")
    for dtype, tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.02)):
        assert torch.allclose(
            load("cpm2", dtype=dtype).logits("今天天气", "很好"), exact, atol=tolerance
        )


def test_a_stop_token_is_no_part_of_a_blank(load: Loader) -> None:
    model = load("cpm2")
    say(model, ["天气", "。", "人"])
    filled = model.fill_blank(BLANKS, temperature=0, stop_tokens=["。"])
    assert [blank["text"] for blank in filled] == ["天气", ""]


def test_an_iterator_at_its_end_does_not_mind_the_next_text(load: Loader) -> None:
    model = load("cpm1")
    say(model, ["今天", "天气", "很"])
    pieces = model.generate_iter("我们", temperature=0, max_tokens=2)
    assert [next(pieces), next(pieces)] == ["今天", "天气"]
    model.generate("今天", max_tokens=1, seed=1)
    assert list(pieces) == []


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied(load: Loader, copy_of: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be copied or pickled"):
        copy_of(load("cpm1"))


def test_closing_that_was_interrupted_can_be_repeated(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = settled_readers()
    model = load("cpm2", memory_limit=streaming_limit(load("cpm2")))
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

    limit, threads = streaming_limit(load("cpm2")), settled_readers()
    monkeypatch.setattr("bminf.arch.t5.T5.new_cache", new_cache)
    with pytest.raises(BudgetError, match="KV cache of max_batch_size=1"):
        load("cpm2", memory_limit=limit)
    assert num_readers() == threads


def test_the_callers_default_device_changes_nothing(load: Loader) -> None:
    expected = load("cpm2", quantization="int8").generate("今天", max_tokens=5, temperature=0)
    with torch.device("meta"):
        model = load("cpm2", quantization="int8")
    assert model.generate("今天", max_tokens=5, temperature=0) == expected


def test_beams_leave_keys_of_the_prompt_where_they_are(load: Loader) -> None:
    """They are the same in all beams of a prompt; only another prompt moves them."""
    model = load("cpm2", max_batch_size=4)
    moved = []
    cache = model._cache.cross
    cache.select = lambda rows: moved.append(rows.tolist()) or type(cache).select(cache, rows)
    options = {"num_beams": 2, "max_tokens": 6, "banned_tokens": ["<eod>"]}
    model.generate_batch(["今天", "我们去公园"], **options)
    assert moved[0] == [0, 0, 1, 1] and len(moved) <= 2


def test_rows_of_another_prompt_read_its_keys(load: Loader) -> None:
    """As where two beams go on for the second of two prompts: as many rows as before."""
    cache = load("cpm2", max_batch_size=2)._cache
    cache.start(2, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    cache.cross.keys[:, 1] = 1
    cache.cross.advance(3)
    cache.select(torch.tensor([1, 1]))
    assert cache.cross.keys[:, :, :, :3].eq(1).all() and cache.cross_bias.eq(1).all()


def test_options_that_contradict_are_refused(load: Loader) -> None:
    model = load("cpm1", max_batch_size=2)
    for options in (
        {"top_n": 5, "top_k": 3},
        {"num_beams": 2, "seed": 0},
        {"num_beams": 2, "top_p": 0},
        {"num_beams": 2, "temperature": -1},
        {"num_beams": 2, "length_penalty": "x"},
        {"length_penalty": 2.0},
        {"num_beams": 2, "top_n": 5},
        {"temperature": "hot"},
    ):
        for generate in (model.generate, model.generate_iter):
            with pytest.raises(ArgumentError):
                generate("今天", max_tokens=3, **options)
    eva = load("eva", max_batch_size=2)
    with pytest.raises(ArgumentError, match="top_n is for sampling"):
        eva.dialogue(["你"], 5, top_n=3, num_beams=2)
    assert eva.generate("你", 5, top_k=3, seed=1) == eva.generate("你", 5, 3, seed=1)


def test_an_answer_may_be_as_long_as_max_length(load: Loader) -> None:
    """What the decoder begins with has room of its own."""
    model = load("cpm2", max_length=16)
    say(model, ["今天"] * 20)
    assert model.generate("今天", max_tokens=16, temperature=0) == ("今天" * 16, False)
    with pytest.raises(ArgumentError, match="max_tokens=17 are more than max_length=16"):
        model.generate("今天", max_tokens=17)


def test_a_dialogue_can_be_scored(load: Loader) -> None:
    model = load("eva")
    logits = model.logits(["今天", "天气"], "很好")
    ids = model._prompt(["今天", "天气"]).input_ids
    target = [*model._start_ids(), *model.tokenizer.encode("很好")]
    assert torch.equal(logits, model.logits(ids, target))


@pytest.mark.parametrize("name", ["cpm1", "cpm2"])
def test_building_a_model_does_not_import_the_compiler_of_torch(name: str) -> None:
    """It would take a second, and 70 MB, for nothing."""
    program = (
        "import sys; from bminf.arch.registry import named; "
        "from bminf.models.source import meta_network; "
        f"meta_network(named({name!r}), next(iter(named({name!r}).published.values()))); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "False\n", done.stderr
