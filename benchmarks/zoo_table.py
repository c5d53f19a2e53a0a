"""Tables of the zoo benchmark, out of the content of its JSON files: nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import model_table
from benchmarks.model_table import Result
from bminf.units import format_bytes

_MEASURED_HEAD = [
    "", "tokens / s", "ms / step", "copied / step", "link GB/s", "blocks stay + stream",
    "peak memory",
]  # fmt: skip
_PREDICTED_HEAD = [
    "", "tokens / s", "ms / step", "copied / step", "link busy", "blocks stay + stream",
    "published tokens / s",
]  # fmt: skip
_PUBLISHED = (
    "Published: measured by BMInf's authors with 8-bit weights, batch 1; 256 tokens through the "
    "encoder's layers and norm; 255 steps through the decoder's layers and norm, keys and values "
    "of 256 tokens projected anew in each step; no embedding, head or sampling."
)
_AT_MOST = (
    '"At most": the weights alone cannot come and be read any faster; what it takes to multiply '
    "all rows of the prompt is not predicted, and bounds an encoder."
)


def _measured_row(result: Result) -> list[str]:
    details = result["details"]
    return [
        result["name"],
        f"{details['tokens_per_s']:.1f}",
        f"{model_table.mean_s(result) / details['steps'] * 1e3:.1f}",
        format_bytes(details["copied_bytes_per_step"]),
        model_table.gbps(details),
        model_table.blocks(details),
        model_table.peak(result),
    ]


def _predicted_row(result: Result) -> list[str]:
    prediction, details = result["prediction"], result["details"]
    most, least = ("at most ", "at least ") if result["is_bound"] else ("", "")
    published = result["published_tokens_per_s"].items()
    return [
        result["name"],
        f"{most}{prediction['tokens_per_s']:.1f}",
        f"{least}{prediction['pass_s'] * 1e3:.1f}",
        format_bytes(details["streamed_bytes_per_step"]),
        f"{prediction['link_busy']:.0%}",
        model_table.blocks(details),
        ", ".join(f"{speed:g} ({version})" for version, speed in published),
    ]


def _caption(content: dict[str, Any], measured: Sequence[Result]) -> str:
    parameters = content["parameters"]
    return (
        f"{parameters['model']}, random weights, {parameters['dtype']} but for what is packed; "
        f"encoder: {parameters['prompt_length']} tokens, decoder: {parameters['steps']} steps; "
        f"{model_table.device(content)}; mean of {len(measured[0]['samples'])} runs:"
    )


def _predicted_caption(predicted: Sequence[Result]) -> str:
    details = predicted[0]["details"]
    return (
        f"Predicted for all of {details['model']} on a {model_table.card(details)}. "
        f"{_PUBLISHED} {_AT_MOST}"
    )


_TABLES = model_table.Tables(
    _MEASURED_HEAD, _measured_row, _caption, _PREDICTED_HEAD, _predicted_row, _predicted_caption
)
table, lines = _TABLES.table, _TABLES.lines
