"""Tables of the GLM benchmark, out of the content of its JSON files: nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import model_table
from benchmarks.model_table import Result
from bminf.units import format_bytes

PUBLISHED_S = {
    "encode": {
        "8 x A100, fp16, SAT": {512: 0.145, 1024: 0.250, 2048: 0.453},
        "4 x RTX 3090, int4, FT": {128: 0.374, 512: 1.3},
    },
    "decode": {
        "8 x A100, fp16, SAT": {512: 45.21, 1024: 89.00, 2048: 179.22},
        "4 x RTX 3090, int4, FT": {128: 8.16, 512: 32.3, 1024: 66.5, 2048: 150.0},
    },
}
"""Seconds that GLM-130B's authors publish, in their own code (SwissArmyTransformer) and in
FasterTransformer: task -> machine -> tokens -> seconds."""

_MEASURED_HEAD = [
    "", "s", "tokens / s", "ms / step", "copied / step", "link GB/s", "of the bound",
    "blocks stay + stream", "peak memory", "published s of all layers",
]  # fmt: skip
_PREDICTED_HEAD = [
    "", "tokens / s", "ms / step", "copied / step", "link busy", "bound by",
    "blocks stay + stream",
]  # fmt: skip
_MEANING = (
    "Encode: one pass over so many tokens, half of the mask's cells hidden, and the logits of the "
    "last one; decode: so many tokens, a pass each; cola: rows x tokens in one pass, and a choice "
    "of two for each row. Of the bound: what it takes to bring the streamed bytes at the measured "
    "GB/s, over the time of a step."
)


def _measured_row(result: Result) -> list[str]:
    details, seconds = result["details"], model_table.mean_s(result)
    fraction = details["fraction_of_bound"]
    return [
        result["name"],
        f"{seconds:.3f}",
        f"{details['tokens_per_s']:.2f}",
        f"{seconds / details['steps'] * 1e3:.1f}",
        format_bytes(details["copied_bytes_per_step"]),
        model_table.gbps(details),
        "" if fraction is None else f"{fraction:.0%}",
        model_table.blocks(details),
        model_table.peak(result),
        _published(details),
    ]


def _published(details: dict[str, Any]) -> str:
    by_machine = PUBLISHED_S.get(details["task"], {})
    length = details["length"]
    found = {name: known[length] for name, known in by_machine.items() if length in known}
    return "; ".join(f"{seconds:g} ({name})" for name, seconds in found.items())


def _predicted_row(result: Result) -> list[str]:
    prediction, details = result["prediction"], result["details"]
    return [
        result["name"],
        f"{prediction['tokens_per_s']:.3f}",
        f"{prediction['pass_s'] * 1e3:.1f}",
        format_bytes(details["streamed_bytes_per_step"]),
        f"{prediction['link_busy']:.0%}",
        prediction["bound"],
        model_table.blocks(details),
    ]


def _caption(content: dict[str, Any], measured: Sequence[Result]) -> str:
    parameters = content["parameters"]
    return (
        f"{parameters['model']}, random weights, {parameters['dtype']} but for what is packed; "
        f"{model_table.device(content)}; mean of {len(measured[0]['samples'])} runs. {_MEANING}"
    )


def _predicted_caption(predicted: Sequence[Result]) -> str:
    details = predicted[0]["details"]
    return (
        f"Predicted for all of {details['model']}, {details['max_length']} tokens of cache, on a "
        f"{model_table.card(details)}."
    )


_TABLES = model_table.Tables(
    _MEASURED_HEAD, _measured_row, _caption, _PREDICTED_HEAD, _predicted_row, _predicted_caption
)
table, lines = _TABLES.table, _TABLES.lines
