"""A real model in 8 and 4 bits: what it costs in its predictions, and in bytes.

The text is Python's own documentation, which any installation has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bminf
from bminf.quantization.packed import Format, codes_of, dequantize
from bminf.quantization.packing import pack
from bminf.wrapping import plan_for

WINDOW = 384
NUM_WINDOWS = 2


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(smollm2_folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = topics["customization"]
    ids = AutoTokenizer.from_pretrained(smollm2_folder)(text, return_tensors="pt").input_ids[0]
    return ids[: NUM_WINDOWS * WINDOW].view(NUM_WINDOWS, WINDOW)


@torch.inference_mode()
def log_probs_of(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    for window in windows:
        yield model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1)


def perplexity(log_probs: list[torch.Tensor], windows: torch.Tensor) -> float:
    losses = [F.nll_loss(p, w[1:]) for p, w in zip(log_probs, windows, strict=True)]
    return math.exp(sum(map(float, losses)) / len(losses))


def divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> float:
    """KL(reference || given), nats a token."""
    return float(F.kl_div(log_probs, reference, reduction="batchmean", log_target=True))


@pytest.fixture(scope="module")
def plain(smollm2_folder: Path, windows: torch.Tensor) -> list[torch.Tensor]:
    return [p.half() for p in log_probs_of(load(smollm2_folder), windows)]


@pytest.fixture(scope="module")
def packed(smollm2_folder: Path) -> dict[str, Any]:
    """By what it is packed to; each keeps the activations that it was given last."""
    return {
        bits: bminf.wrapper(load(smollm2_folder), bits, memory_limit="4GB", device="cpu")
        for bits in ("int8", "int4")
    }


def taking(model: Any, activations: str) -> Any:
    for module in model.modules():
        if isinstance(module, bminf.QuantizedLinear):
            module.activations = activations
    return model


@pytest.mark.parametrize(
    ("quantization", "activations", "most", "most_kl"),
    [
        ("int8", "auto", 1.004, 0.005),
        ("int8", "int8", 1.035, 0.05),
        ("int4", "auto", 1.40, 0.4),
    ],
)
def test_perplexity(
    quantization: str,
    activations: str,
    most: float,
    most_kl: float,
    packed: dict[str, Any],
    windows: torch.Tensor,
    plain: list[torch.Tensor],
) -> None:
    given = list(log_probs_of(taking(packed[quantization], activations), windows))
    reference = [p.float() for p in plain]
    assert perplexity(given, windows) <= most * perplexity(reference, windows)
    kls = [divergence(p, r) for p, r in zip(given, reference, strict=True)]
    assert sum(kls) / len(kls) <= most_kl


def test_token_by_token_agrees_with_the_whole_window(
    packed: dict[str, Any], windows: torch.Tensor, plain: list[torch.Tensor]
) -> None:
    """Single rows take other operations than many rows do."""
    model = taking(packed["int8"], "auto")
    window = windows[1, :32]
    whole = next(log_probs_of(model, window[None]))
    cache, rows = None, []
    with torch.inference_mode():
        for token in window[:-1]:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].log_softmax(-1))
    given = torch.stack(rows)
    assert divergence(given, plain[1][:31].float()) <= 0.005
    ratio = perplexity([given], window[None]) / perplexity([whole], window[None])
    assert ratio == pytest.approx(1, abs=0.002)


def test_groups_of_32_with_a_minimum_hold_its_weights_exactly(smollm2_folder: Path) -> None:
    """They come from Q4_1, which is this format."""
    for name, weight in load(smollm2_folder).model.layers[7].named_parameters():
        if weight.dim() == 2:
            packed = pack(weight, Format(4, 32, has_minimum=True))
            assert torch.equal(dequantize(packed, torch.float32), weight), name
            assert int(codes_of(packed).max()) == 15


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.51), ("int4", 4.55 / 16)])
def test_streamed_blocks_are_as_small_as_promised(
    quantization: str, most: float, smollm2_folder: Path
) -> None:
    model = load(smollm2_folder)
    plan = plan_for(model, quantization)
    layer = model.model.layers[0]
    norms = sum(p.nbytes for p in layer.parameters() if p.dim() == 1)
    in_half = sum(2 * p.numel() for p in layer.parameters() if p.dim() == 2)
    assert all(block.nbytes - norms <= most * in_half for block in plan.blocks)
