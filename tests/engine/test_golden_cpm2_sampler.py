"""The distributions that the sampler of BMInf 1.0.2 drew from, in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from distribution import probabilities
from golden import GoldenSet, for_each, golden

from bminf.engine.sampling import Sampling

HALF = 2.0**-11  # the relative error of one rounding


def recorded(given: GoldenSet) -> dict[str, dict[str, Any]]:
    """Its cases by their number, each with its logits."""
    if "sampler_logits" not in given.tensors:
        return {}
    rows = given.tensors["sampler_logits"]
    return {
        str(case["i"]): case | {"logits": rows[case["row"]]}
        for case in given.bminf1.get("sampler", [])
    }


def with_distribution(given: GoldenSet) -> Iterator[str]:
    yield from (i for i in recorded(given) if f"sampler_{i}_sorted_p_first" in given.tensors)


def with_steps(given: GoldenSet) -> Iterator[str]:
    yield from (i for i, case in recorded(given).items() if case.get("argmax_tokens_of_3_steps"))


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


@for_each(("cpm2",), with_distribution)
def test_golden_cpm2_distribution(name: str, case: str) -> None:
    """Half precision may see a sum on the other side of top_p, if it comes that close."""
    one = recorded(golden(name))[case]
    top_p, theirs = one["kwargs"]["top_p"], golden(name).tensors[f"sampler_{case}_sorted_p_first"]
    shifts = [0.0] if top_p is None else [0.0, -4 * HALF, 4 * HALF]
    assert any(
        _is_close(
            _distribution(one, one["prompt"], top_p and min(1.0, top_p + shift)).sort()[0],
            theirs.sort()[0],
            _tolerance(one),
        )
        for shift in shifts
    )


@for_each(("cpm2",), with_steps)
def test_golden_cpm2_likeliest_tokens_of_some_steps(name: str, case: str) -> None:
    """Each was taken, and counted for the next."""
    one = recorded(golden(name))[case]
    seen = list(one["prompt"])
    for token in one["argmax_tokens_of_3_steps"]:
        ours = _distribution(one, seen, one["kwargs"]["top_p"])
        assert ours[token] >= ours.max() * (1 - _tolerance(one))
        seen.append(token)
