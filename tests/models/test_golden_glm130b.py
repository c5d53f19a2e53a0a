"""GLM-130B against its authors' own code: every reference tensor and case that the set holds, from
every folder that holds the weights, resident and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from golden import calls_of, cases, expect_streamed_is_resident, for_each, golden, largest
from golden_glm import (
    HALF_TOLERANCE,
    LONG,
    TOLERANCE,
    GLMSet,
    at_context_end,
    batch_logits,
    blank_of_ids,
    head,
    rows,
    run,
)

from bminf.engine.glm_beam import glm_beam_search
from bminf.layers.rotary import rotary_table
from bminf.models.glm_text import GLMDecoder
from bminf.models.options import GLMOptions
from bminf.ops.dequantize import dequantize_weight

NAMES = ("glm130b",)
OWN_LINEARS = 0.03  # of logits, where the authors round dequantized weights to half, and we do not
BEAM_SCORES = 1e-4
RELATIVE = 1e-5  # of sums of losses and of log-probabilities

FORWARD, INCREMENTAL = "forward.safetensors", "incremental.safetensors"


@lru_cache(maxsize=16)
def loaded(name: str, folder: str, **arguments: Any) -> Any:
    return golden(name).load(folder, **arguments)


def precision_of(key: str) -> str:
    """Of the rotary table that a reference was made with."""
    return "float32" if "rope32" in key else "float16"


# ---- logits, states and caches -------------------------------------------------------------------


def forward_cases(given: GLMSet) -> Iterator[tuple[str, str, str]]:
    for folder in given.folders(packed=False):
        for key in given.file(FORWARD):
            case, _, kind = key.rpartition(".")
            if kind.startswith("logits"):
                yield folder, case, kind


@for_each(NAMES, forward_cases)
def test_golden_glm130b_forward(name: str, case: tuple[str, str, str]) -> None:
    folder, batch, kind = case
    given = golden(name).file(FORWARD)
    is_half = "fp16" in kind
    precision = precision_of(kind)
    dtype = torch.float16 if is_half else torch.float32
    model = loaded(name, folder, dtype=dtype, rotary_precision=precision)
    logits = batch_logits(model, given, batch)
    expected = given[f"{batch}.{kind}"]
    tolerance = HALF_TOLERANCE if is_half else TOLERANCE
    if kind.endswith("at_context_end"):
        assert largest(at_context_end(logits, given, batch), expected) <= tolerance
        return
    for row, length in rows(given, batch):
        assert largest(logits[row, :length], expected[row, :length]) <= tolerance


def incremental_cases(given: GLMSet) -> Iterator[tuple[str, str, str]]:
    for folder in given.folders(packed=False):
        for key in given.file(INCREMENTAL):
            case, _, kind = key.rpartition(".")
            if kind.startswith(("logits", "mems", "hidden")):
                yield folder, case, kind


@for_each(NAMES, incremental_cases)
def test_golden_glm130b_step_by_step(name: str, case: tuple[str, str, str]) -> None:
    folder, text, kind = case
    given = golden(name).file(INCREMENTAL)
    precision = precision_of(kind)
    model = loaded(name, folder, rotary_precision=precision)
    computed = step_by_step(model, given, text)[kind.removesuffix("_rope32")]
    expected = given[f"{text}.{kind}"]
    if kind == "logits_full_rope32":  # the last rows only
        computed = computed[:, -expected.shape[1] :]
    assert largest(computed, expected) <= TOLERANCE


def step_by_step(model: Any, given: dict[str, torch.Tensor], text: str) -> dict[str, torch.Tensor]:
    ids, positions = given[f"{text}.tokens"], given[f"{text}.position_ids"]
    hidden, begin = given[f"{text}.attention_mask"][:, 0], int(given[f"{text}.context_length"])
    network = model.model
    with calls_of(network.layers) as calls:
        full = head(model, run(model, ids, positions, hidden, network.new_cache(*ids.shape)))
    cache = network.new_cache(*ids.shape)
    first = run(model, ids[:, :begin], positions[:, :begin], hidden[:, :begin, :begin], cache)
    keys, values = (
        x[0, :, :, :begin].transpose(1, 2).flatten(2) for x in (cache.keys, cache.values)
    )
    found = {
        "logits_full": full,
        "hidden_states": torch.stack([x.transpose(0, 1) for _, _, x in calls]),
        "mems_after_prefill_layer0": torch.cat([keys, values], -1),
    }
    steps = [first[:, -1:]]
    for at in range(begin, ids.shape[1]):
        one = slice(at, at + 1)
        steps.append(run(model, ids[:, one], positions[:, one], hidden[:, one, : at + 1], cache))
    found["logits_incremental"] = head(model, torch.cat(steps, 1))
    return found


def long_cases(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders(packed=False):
        for key in given.file(LONG):
            if key.startswith("logits"):
                yield folder, key


@for_each(NAMES, long_cases)
def test_golden_glm130b_far_positions(name: str, case: tuple[str, str]) -> None:
    """A long text that ends in [gMASK], and sop behind it."""
    folder, key = case
    given = golden(name).file(LONG)
    precision = precision_of(key)
    ids = given["tokens"][0].tolist()
    model = loaded(name, folder, rotary_precision=precision, max_length=len(ids), max_batch_size=1)
    one = blank_of_ids(model, ids)
    with torch.inference_mode():
        decoder = GLMDecoder(model.model, model.model.new_cache(1, len(ids)), [one])
        x = model.model(
            given["tokens"],
            decoder._positions(0),
            decoder._cache,
            decoder._attention_mask(len(ids)),
        )
    expected = given[key]
    assert largest(head(model, x[:, -expected.shape[1] :]), expected) <= TOLERANCE


def tables(given: GLMSet) -> Iterator[str]:
    yield from (key for key in given.file(LONG) if key.startswith(("cos", "sin")))


@for_each(NAMES, tables)
def test_golden_glm130b_rotary_table(name: str, case: str) -> None:
    given = golden(name).file(LONG)
    expected, table_rows = given[case], given["table_rows"]
    dtype = torch.float16 if case.endswith("fp16") else torch.float32
    cos, sin = rotary_table(int(table_rows.max()) + 1, expected.shape[1], dtype)
    half = (cos if case.startswith("cos") else sin)[table_rows]
    if dtype == torch.float16:
        assert torch.equal(torch.cat([half, half], 1), expected)
    else:
        assert largest(torch.cat([half, half], 1), expected) <= TOLERANCE


# ---- quantized checkpoints -----------------------------------------------------------------------


def quantized_cases(given: GLMSet) -> Iterator[tuple[str, str, str]]:
    for key in given.file("quantized.safetensors"):
        prefix, _, rest = key.partition(".")
        folder, (batch, _, kind) = given.packed_folder(prefix), rest.partition(".")
        is_given = f"{batch}.tokens" in given.file(FORWARD)
        if folder is not None and is_given and kind.startswith("logits"):
            yield folder, key, batch


@for_each(NAMES, quantized_cases)
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_golden_glm130b_quantized(
    name: str, case: tuple[str, str, str], quantization: str | None
) -> None:
    """None: as the authors compute, weights times their scales, rounded to half, in a float
    product. int4: with linears of our own."""
    (folder, key, batch), given = case, golden(name)
    forward, is_half = given.file(FORWARD), "fp16" in key
    dtype = torch.float16 if is_half else torch.float32
    model = loaded(name, folder, quantization=quantization, dtype=dtype)
    logits = at_context_end(batch_logits(model, forward, batch), forward, batch)
    tolerance = TOLERANCE if quantization is None else OWN_LINEARS
    expected = given.file("quantized.safetensors")[key]
    assert largest(logits, expected) <= (HALF_TOLERANCE if is_half else tolerance)


def dequantized(given: GLMSet) -> Iterator[tuple[str, str]]:
    for key in given.file("quantized.safetensors"):
        prefix, _, kind = key.partition(".")
        folder = given.packed_folder(prefix)
        if folder is not None and kind == "layer0_qkv_dequantized_fp16":
            yield folder, key


@for_each(NAMES, dequantized)
def test_golden_glm130b_codes(name: str, case: tuple[str, str]) -> None:
    folder, key = case
    expected = golden(name).file("quantized.safetensors")[key]
    qkv = loaded(name, folder, quantization="int4").model.layers[0].attention.qkv
    assert torch.equal(dequantize_weight(qkv.packed, torch.float16)[: len(expected)], expected)


# ---- streamed as resident ------------------------------------------------------------------------


def every_way(given: GLMSet) -> Iterator[tuple[str, str]]:
    if not given.cases(FORWARD, "tokens"):
        return
    for folder in given.folders(packed=False):
        yield from ((folder, way) for way in ("None", "int4", "int4-row", "int8"))
    yield from ((folder, "int4") for folder in given.folders(packed=True))


@for_each(NAMES, every_way)
def test_golden_glm130b_streamed_equals_resident(name: str, case: tuple[str, str]) -> None:
    (folder, way), given = case, golden(name)
    forward, batches = given.file(FORWARD), given.cases(FORWARD, "tokens")
    packing = {"quantization": None if way == "None" else way, "head_quantization": "int8"}
    expect_streamed_is_resident(
        given, folder, lambda m: {batch: batch_logits(m, forward, batch) for batch in batches},
        **packing,
    )  # fmt: skip


# ---- texts ---------------------------------------------------------------------------------------


def texts(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders(packed=False):
        for case in given.json("generation_text.json"):
            yield folder, case["name"]


@for_each(NAMES, texts)
def test_golden_glm130b_fills_blanks(name: str, case: tuple[str, str]) -> None:
    folder, wanted = case
    (text,) = (c for c in golden(name).json("generation_text.json") if c["name"] == wanted)
    model = loaded(name, folder)
    settings = GLMOptions(
        out_seq_length=text["out_seq_length"],
        end_tokens=text["end_tokens"],
        **options_of(text["strategy"]),
    )
    masked, stop_ids = model._masked(text["text"]), model._stop_ids(settings)
    answers: list[list[int]] = []
    for call in text["result"]["calls"]:
        one = model._next_blank(masked, answers, stop_ids)
        assert [one.start_ids] == call["input"]
        within = model._within(settings, [one])
        expected = [beam[len(one.start_ids) :] for beam in call["output"][0]]
        if call["scores"] is None:
            found = model._answers([one], within, stop_ids)
        else:
            (beams,) = model._search([one], within, stop_ids)
            found = [list(beam.ids) for beam in beams]
            scores = torch.tensor([beam.score for beam in beams])
            assert largest(scores, torch.tensor(call["scores"][0])) <= BEAM_SCORES
        assert [without_end(ids, stop_ids) for ids in found] == [
            without_end(ids, stop_ids) for ids in expected
        ]
        answers.append(found[0])
    filled = model.fill_blank(text["text"], **keywords_of(settings))
    assert [blank["text"] for blank in filled] == text["result"]["blanks"][0]


def without_end(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    ids = ids[: ids.index(-1)] if -1 in ids else ids
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def options_of(strategy: dict[str, Any]) -> dict[str, Any]:
    """The authors' arguments under our names; without any it is greedy."""
    if not strategy:
        return {"temperature": 0}
    names = {"min_gen_length": "min_length"}
    return {names.get(name, name): value for name, value in strategy.items()}


def keywords_of(settings: GLMOptions) -> dict[str, Any]:
    return {n: v for n, v in vars(settings).items() if v != getattr(GLMOptions(), n)}


def batches(given: GLMSet) -> Iterator[tuple[str, int, str]]:
    for folder in given.folders(packed=False):
        for number, case in enumerate(given.json("generation_batch.json")):
            if f"{case['name']}.tokens" not in given.file(FORWARD):
                continue
            yield folder, number, f"{case['name']}-{case['kind']}"


@for_each(NAMES, lambda given: ((f, str(n), kind) for f, n, kind in batches(given)))
def test_golden_glm130b_batch(name: str, case: tuple[str, str, str]) -> None:
    """Texts of different lengths together. In the authors' batches the padding counts in the
    length that a beam's score is divided by."""
    folder, number, _ = case
    given = golden(name)
    batch, forward = given.json("generation_batch.json")[int(number)], given.file(FORWARD)
    tokens = forward[f"{batch['name']}.tokens"]
    contexts = [tokens[row, :length].tolist() for row, length in rows(forward, batch["name"])]
    model = loaded(name, folder)
    blanks = [blank_of_ids(model, context) for context in contexts]
    stop_ids = frozenset(batch["end_tokens"])
    if batch["kind"] == "greedy":
        settings = GLMOptions(
            max_tokens=batch["max_gen_length"], temperature=0, end_tokens=batch["end_tokens"]
        )
        found = model._answers(blanks, settings, stop_ids)
        assert [without_end(ids, stop_ids) for ids in found] == batch["output"]
        return
    with torch.inference_mode():
        decoder, start = model._decoder(blanks)
        beams = glm_beam_search(
            decoder, start, tokens.tolist(), int(batch["kind"].removeprefix("beam")), stop_ids,
            batch["max_gen_length"], is_deterministic=True, **beam_rules(batch),
        )  # fmt: skip
    ids = [[without_end(list(beam.ids), stop_ids) for beam in own] for own in beams]
    assert ids == batch["output"]
    scores = torch.tensor([[beam.score for beam in own] for own in beams])
    assert largest(scores, torch.tensor(batch["scores"])) <= BEAM_SCORES


def beam_rules(batch: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation sets where the case does not say it (section 6 of the facts)."""
    return {
        "length_penalty": batch.get("length_penalty", 1.0),
        "no_repeat_ngram_size": batch.get("no_repeat_ngram_size", 3),
    }


# ---- evaluation ----------------------------------------------------------------------------------


def choices(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders(packed=False):
        for case in given.json("eval.json"):
            if case.startswith("mc") and f"{case}.tokens" in given.file("eval.safetensors"):
                yield folder, case


@for_each(NAMES, choices)
def test_golden_glm130b_scores_choices(name: str, case: tuple[str, str]) -> None:
    folder, task = case
    given = golden(name)
    expected, inputs = given.json("eval.json")[task], given.file("eval.safetensors")
    model = loaded(name, folder)
    for row, own in enumerate(expected["choices"]):
        ids = inputs[f"{task}.tokens"][row].tolist()
        context = ids[: ids.index(model.tokenizer.sop_id)]
        texts = [[token] for token in own] if expected["is_single_token"] else own
        scores = torch.tensor(model.score(context, texts))
        reference = torch.tensor(expected["log_probs"][row])
        assert float(((scores - reference) / reference).abs().max()) <= RELATIVE
        assert int(scores.argmax()) == expected["prediction"][row]


def streams(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders(packed=False):
        for case in given.json("eval.json"):
            if case.startswith("lm"):
                yield folder, case


@for_each(NAMES, streams)
def test_golden_glm130b_losses(name: str, case: tuple[str, str]) -> None:
    folder, task = case
    expected = golden(name).json("eval.json")[task]
    model = loaded(name, folder, max_length=expected["max_seq_length"], max_batch_size=1)
    way = expected["generation_length"], expected["unidirectional"]
    losses = list(model._window_losses(model.tokenizer.encode(expected["text"]), *way))
    assert losses == pytest.approx(expected["losses"], rel=RELATIVE)
    assert model.perplexity(expected["text"], *way) == pytest.approx(
        expected["perplexity"], rel=RELATIVE
    )


def test_golden_glm130b_set_gives_tests() -> None:
    """A golden folder that none of the above looks into would be a test that cannot fail."""
    of_files = (forward_cases, incremental_cases, long_cases, tables, every_way)
    assert any([*cases(NAMES, of)] for of in (*of_files, texts, choices, streams))
