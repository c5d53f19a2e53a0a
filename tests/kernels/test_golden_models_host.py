"""The golden models through the CUDA kernels, compiled for the host: as on the CPU, to the rounding
of 16 bits, and the same bit for bit streamed as resident."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenSet, for_each, golden
from host_launcher import HostLauncher, served_by
from quantized_models import relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_golden_forward import MODELS, valid
from test_golden_quantized import settings

HALF_ROUNDING = 2**-11  # of a number to float16; the sums here are of many, and stay well below
NUM_STEPS = 3  # a launch on the host takes as long as a hundred on a GPU


def one_layout(given: GoldenSet) -> list[str]:
    """What is loaded from the others is the same: see test_golden_quantized.py."""
    return given.layouts()[-1:]


def few_outputs(
    name: str, model: Any, launcher: HostLauncher | None = None
) -> dict[str, torch.Tensor]:
    """Prefill, and some steps of decoding, which launch the attention of every layer."""
    given = golden(name).tensors
    found = {}
    with torch.inference_mode():
        if name == "cpm1":
            ids = given["input_ids"][:, : NUM_STEPS + 4]
            cache = model.model.new_cache(*ids.shape)
        else:
            prompts, ids = given["enc_input_ids"], given["dec_input_ids"][:, : NUM_STEPS + 4]
            cache = model.model.new_cache(len(ids), prompts.shape[1], ids.shape[1])
            encoded = model.model.encode(prompts, cache, given["enc_length"])
            found["encoder_output"] = valid(encoded, given["enc_length"])
        for begin, end in [(0, 4), *((4 + n, 5 + n) for n in range(NUM_STEPS))]:
            before = attentions(launcher)
            found[f"logits {begin}"] = model.model.head(model.model(ids[:, begin:end], cache))
            launched = attentions(launcher) - before
            per_layer = 1 if name == "cpm1" else 2  # to the prompt, too
            layers = model.config.num_hidden_layers
            assert launched == (0 if launcher is None else per_layer * layers)
    return found


def attentions(launcher: HostLauncher | None) -> int:
    return 0 if launcher is None else launcher.names.count("attention_decode")


@for_each(MODELS, one_layout)
@pytest.mark.parametrize(
    ("quantization", "activations"), [("int8", "float"), ("int8", "int8"), ("int4", "float")]
)
def test_golden_kernels_compute_what_the_cpu_does(
    name: str, case: str, quantization: str, activations: str
) -> None:
    given = golden(name)
    arguments = settings(given, case) | {"quantization": quantization, "activations": activations}
    with given.load(case, **arguments) as model:
        reference, plan = few_outputs(name, model), model.plan
        launcher = HostLauncher(capability=61)
        with served_by(launcher):
            computed = few_outputs(name, model, launcher)
    norm = "layer_norm" if name == "cpm1" else "rms_norm"
    assert {norm, "rotary_append"} < {*launcher.names}
    with given.load_streaming(case, plan, **arguments) as model:
        assert model.plan.streamed
        with served_by(HostLauncher(capability=61)):
            streamed = few_outputs(name, model)
    for key, x in computed.items():
        assert relative_error(x, reference[key]) <= HALF_ROUNDING, key
        assert torch.equal(streamed[key], x), key
