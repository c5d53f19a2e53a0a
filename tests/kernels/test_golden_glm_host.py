"""The golden GLMs through the CUDA kernels, compiled for the host: as on the CPU, to the rounding
of 16 bits, and the same bit for bit streamed as resident."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from golden import for_each, golden
from golden_glm import GLMSet, head, rows, run
from host_launcher import HostLauncher, served_by
from quantized_models import relative_error

from bminf.models.glm_text import prefix_lm_mask

NAMES = ("glm130b", "glm10b")
FORWARD = "forward.safetensors"
HALF_ROUNDING = 2**-11  # see test_golden_models_host.py
NUM_STEPS = 2  # a launch on the host takes as long as a hundred on a GPU


def ways(given: GLMSet) -> Iterator[tuple[str, str]]:
    """Packed here, from the first folder that is not packed; and all that are."""
    if not given.cases(FORWARD, "tokens"):
        return
    formats = ("int4-row", "int8") if given.name == "glm130b" else ("int4",)
    for folder in given.folders(packed=False)[:1]:
        yield from ((folder, way) for way in formats)
    yield from ((folder, "int4") for folder in given.folders(packed=True))


def few_logits(
    model: Any, given: dict[str, torch.Tensor], text: str, launcher: HostLauncher | None = None
) -> list[torch.Tensor]:
    """Of one text, and of some more tokens one by one, which launch the attention of each layer."""
    row, length = next(rows(given, text))
    ids = given[f"{text}.tokens"][row : row + 1]
    positions = given[f"{text}.position_ids"][row : row + 1]
    begin = min(length, ids.shape[1]) - NUM_STEPS
    cache = model.model.new_cache(*ids.shape)
    hidden = prefix_lm_mask(begin, begin - 1).unsqueeze(0)
    states = [run(model, ids[:, :begin], positions[..., :begin], hidden, cache)[:, -1:]]
    for at in range(begin, begin + NUM_STEPS):
        before = 0 if launcher is None else launcher.names.count("attention_decode")
        states.append(run(model, ids[:, at : at + 1], positions[..., at : at + 1], None, cache))
        if launcher is not None:
            launched = launcher.names.count("attention_decode") - before
            assert launched == model.config.num_hidden_layers
    return [head(model, x) for x in states]


@for_each(NAMES, ways)
def test_golden_glm_kernels_compute_what_the_cpu_does(name: str, case: tuple[str, str]) -> None:
    folder, quantization = case
    given, forward = golden(name), golden(name).file(FORWARD)
    text = given.cases(FORWARD, "tokens")[0]
    packing = {
        "quantization": quantization,
        "head_quantization": "int8",
        "activations": "float",  # a GPU without fast half precision would round those of a text
    }
    with given.load(folder, **packing) as model:
        reference, plan = few_logits(model, forward, text), model.plan
        launcher = HostLauncher(capability=61)
        with served_by(launcher):
            computed = few_logits(model, forward, text, launcher)
    assert {"layer_norm", "rotary_append"} < {*launcher.names}
    with given.load_streaming(folder, plan, **packing) as model:
        assert model.plan.streamed
        with served_by(HostLauncher(capability=61)):
            streamed = few_logits(model, forward, text)
    for expected, own, again in zip(reference, computed, streamed, strict=True):
        assert relative_error(own, expected) <= HALF_ROUNDING
        assert torch.equal(again, own)
