"""The distributions that the sampler of BMInf 1.0.2 drew from, in half precision."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distribution import probabilities

from bminf.generation.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / os.environ.get("BMINF_GOLDEN", "../shared/golden") / "cpm2"
HALF = 2.0**-11  # the relative error of one rounding


def _tensors() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = FOLDER / "golden_bminf1.safetensors"
    return load_file(path) if path.exists() else {}


def _cases() -> list[dict[str, Any]]:
    path = FOLDER / "bminf1_golden.json"
    listed = json.loads(path.read_text()).get("sampler", []) if path.exists() else []
    return [
        case | {"logits": TENSORS["sampler_logits"][case["row"]]}
        for case in listed
        if "sampler_logits" in TENSORS
    ]


TENSORS = _tensors()
CASES = _cases()
STEPS = [case for case in CASES if case.get("argmax_tokens_of_3_steps")]
DISTRIBUTIONS = [case for case in CASES if f"sampler_{case['i']}_sorted_p_first" in TENSORS]


def _id(case: dict[str, Any]) -> str:
    return f"{case['i']}"


def _sampling(case: dict[str, Any], top_p: float | None) -> Sampling:
    given = case["kwargs"]
    return Sampling(
        temperature=given["temperature"],
        top_k=given["top_n"],
        top_p=top_p,
        frequency_penalty=given["frequency_penalty"],
        presence_penalty=given["presence_penalty"],
        banned_ids=tuple(given["filter_tokens"]),
        unpenalized_ids=tuple(given["no_penalty_tokens"]),
    )


def _distribution(case: dict[str, Any], ids: list[int], top_p: float | None) -> torch.Tensor:
    """Ours, (V,), after `ids` were seen."""
    logits, seen = case["logits"].unsqueeze(0), torch.tensor(ids, dtype=torch.int64)
    counts = torch.bincount(seen, minlength=logits.shape[1])
    counts[case["kwargs"]["no_penalty_tokens"]] = 0
    return probabilities(logits, counts.unsqueeze(0), _sampling(case, top_p))[0]


def _tolerance(case: dict[str, Any]) -> float:
    """The relative error of a probability: scores are rounded after the division and after each
    penalty, at the size they have there, and so is the largest of the sum; then the result is."""
    size = case["logits"].float().abs().max() / case["kwargs"]["temperature"]
    return 2 * 3 * float(size) * HALF + 4 * HALF


def _is_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Both (V,), in the order of size. What half precision lost is less than its sum can show."""
    lost = theirs == 0
    close = (ours - theirs).abs() <= tolerance * theirs + 2.0**-24
    return bool(close[~lost].all() and ours[lost].sum() <= 4 * HALF)


if DISTRIBUTIONS:

    @pytest.mark.parametrize("case", DISTRIBUTIONS, ids=_id)
    def test_golden_cpm2_distribution(case: dict[str, Any]) -> None:
        """Half precision may see a sum on the other side of top_p, if it comes that close."""
        top_p, theirs = case["kwargs"]["top_p"], TENSORS[f"sampler_{case['i']}_sorted_p_first"]
        shifts = [0.0] if top_p is None else [0.0, -4 * HALF, 4 * HALF]
        assert any(
            _is_close(
                _distribution(case, case["prompt"], top_p and min(1.0, top_p + shift)).sort()[0],
                theirs.sort()[0],
                _tolerance(case),
            )
            for shift in shifts
        )


if STEPS:

    @pytest.mark.parametrize("case", STEPS, ids=_id)
    def test_golden_cpm2_likeliest_tokens_of_some_steps(case: dict[str, Any]) -> None:
        """Each was taken, and counted for the next."""
        seen = list(case["prompt"])
        for token in case["argmax_tokens_of_3_steps"]:
            ours = _distribution(case, seen, case["kwargs"]["top_p"])
            assert ours[token] >= ours.max() * (1 - _tolerance(case))
            seen.append(token)


if not FOLDER.exists():

    @pytest.mark.skip(reason=f"there is no folder {FOLDER}; set BMINF_GOLDEN")
    def test_golden_cpm2_sampler() -> None: ...
