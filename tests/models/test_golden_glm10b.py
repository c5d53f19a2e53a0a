"""GLM-10B against its authors' own code: every reference tensor and case that the set holds, from
every folder, resident and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from golden import calls_of, cases, expect_streamed_is_resident, for_each, golden, largest
from golden_glm import TOLERANCE, GLMSet, head, run

from bminf.models.glm_text import Masked, prefix_lm_mask
from bminf.models.options import GLMOptions

NAMES = ("glm10b",)
FORWARD = "forward.safetensors"


@lru_cache(maxsize=8)
def loaded(name: str, folder: str) -> Any:
    return golden(name).load(folder)


def outputs(model: Any, given: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """Of a text and its answer, read at once and token by token."""
    ids, positions = given[f"{case}.tokens"], given[f"{case}.position_ids"]
    contexts, num_tokens = given[f"{case}.sep"].tolist(), ids.shape[1]
    hidden = torch.stack([prefix_lm_mask(num_tokens, context) for context in contexts])
    network = model.model
    with calls_of(network.layers) as calls:
        whole = head(model, run(model, ids, positions, hidden, network.new_cache(*ids.shape)))
    states = [calls[0][1][0], *(output for _, _, output in calls)]
    found = {"logits": whole, "hidden_states": torch.stack([state[0] for state in states])}
    if len(contexts) == 1:
        cache, begin = network.new_cache(*ids.shape), contexts[0]
        run(model, ids[:, :begin], positions[:, :, :begin], None, cache)
        steps = [
            run(model, ids[:, at : at + 1], positions[:, :, at : at + 1], None, cache)
            for at in range(begin, num_tokens)
        ]
        found["logits_incremental"] = head(model, torch.cat(steps, 1))
    return found


def references(given: GLMSet) -> Iterator[tuple[str, str, str]]:
    kinds = ("logits", "hidden_states", "logits_incremental")
    for folder in given.folders():
        for kind in kinds:
            yield from ((folder, case, kind) for case in given.cases(FORWARD, kind))


@for_each(NAMES, references)
def test_golden_glm10b_forward(name: str, case: tuple[str, str, str]) -> None:
    folder, text, kind = case
    given = golden(name).file(FORWARD)
    assert largest(outputs(loaded(name, folder), given, text)[kind], given[f"{text}.{kind}"]) <= (
        TOLERANCE
    )


def texts(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders():
        yield from ((folder, case["name"]) for case in given.json("generation.json"))


@for_each(NAMES, texts)
def test_golden_glm10b_fills_blanks(name: str, case: tuple[str, str]) -> None:
    folder, wanted = case
    (text,) = (c for c in golden(name).json("generation.json") if c["name"] == wanted)
    model = loaded(name, folder)
    arguments, context = text["args"], text["context"]
    beams = arguments["num_beams"]
    settings = GLMOptions(
        max_tokens=arguments["out_seq_length"],
        end_tokens=text["end_tokens"],
        num_beams=beams,
        **({"temperature": 0} if beams == 1 else {"length_penalty": arguments["length_penalty"]}),
    )
    names = {number: mask for mask, number in model.tokenizer.masks.items()}
    places = text["mask_positions"]
    masked = Masked(context, places, places, names[context[places[0]]])
    stop_ids = model._stop_ids(settings)
    output = list(context)
    for answer in model._fill(masked, settings, stop_ids):
        kept = answer[:-1] if answer[-1] in stop_ids else answer
        output += [model.tokenizer.sop_id, *kept]
    assert output == text["output"]


def every_way(given: GLMSet) -> Iterator[tuple[str, str]]:
    for folder in given.folders() if given.cases(FORWARD, "tokens") else ():
        yield from ((folder, way) for way in ("None", "int4", "int8"))


@for_each(NAMES, every_way)
def test_golden_glm10b_streamed_equals_resident(name: str, case: tuple[str, str]) -> None:
    (folder, way), given = case, golden(name)
    forward, texts = given.file(FORWARD), given.cases(FORWARD, "tokens")

    def all_outputs(model: Any) -> dict[str, torch.Tensor]:
        by_text = {text: outputs(model, forward, text) for text in texts}
        return {f"{text}.{key}": x for text, own in by_text.items() for key, x in own.items()}

    packing = {"quantization": None if way == "None" else way}
    expect_streamed_is_resident(given, folder, all_outputs, **packing)


def test_golden_glm10b_set_gives_tests() -> None:
    """A golden folder that none of the above looks into would be a test that cannot fail."""
    assert any([*cases(NAMES, of)] for of in (references, texts, every_way))
