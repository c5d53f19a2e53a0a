"""Tables of the zoo benchmark, out of the content of its JSON files: nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.kernels_table import markdown
from bminf.units import format_bytes

Result = dict[str, Any]

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


def table(content: dict[str, Any]) -> str:
    """Captions and Markdown tables of one run."""
    measured, predicted = _split(content["results"])
    parts = []
    if measured:
        rows = [_measured_row(result) for result in measured]
        parts += [_caption(content, measured), markdown(_MEASURED_HEAD, rows)]
    rows = [_predicted_row(result) for result in predicted]
    parts += [_predicted_caption(predicted), markdown(_PREDICTED_HEAD, rows)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def lines(content: dict[str, Any]) -> list[str]:
    """The same rows as lines of text."""
    measured, predicted = _split(content["results"])
    found = []
    if measured:
        found += _aligned([_MEASURED_HEAD, *map(_measured_row, measured)])
    if predicted:
        found += ["", _predicted_caption(predicted)]
        found += _aligned([_PREDICTED_HEAD, *map(_predicted_row, predicted)])
    return found


def _split(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """What was measured, and what was predicted."""
    return (
        [result for result in results if "prediction" not in result],
        [result for result in results if "prediction" in result],
    )


def _measured_row(result: Result) -> list[str]:
    details = result["details"]
    wall_s = statistics.fmean(sample["wall_s"] for sample in result["samples"])
    peak = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    gbps = details["link_gbps"]
    return [
        result["name"],
        f"{details['tokens_per_s']:.1f}",
        f"{wall_s / details['steps'] * 1e3:.1f}",
        format_bytes(details["copied_bytes_per_step"]),
        "" if gbps is None else f"{gbps:.1f}",
        _blocks(details),
        "" if peak is None else format_bytes(peak),
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
        _blocks(details),
        ", ".join(f"{speed:g} ({version})" for version, speed in published),
    ]


def _blocks(details: dict[str, Any]) -> str:
    return f"{details['resident']} + {details['streamed']}"


def _caption(content: dict[str, Any], measured: Sequence[Result]) -> str:
    hardware, parameters = content["hardware"], content["parameters"]
    is_cuda = parameters["device"] == "cuda"
    device = (
        hardware["gpu"]["name"]
        if is_cuda
        else f"{hardware['cpu']}, {parameters['threads']} torch thread(s)"
    )
    return (
        f"{parameters['model']}, random weights, {parameters['dtype']} but for what is packed; "
        f"encoder: {parameters['prompt_length']} tokens, decoder: {parameters['steps']} steps; "
        f"{device}; mean of {len(measured[0]['samples'])} runs:"
    )


def _predicted_caption(predicted: Sequence[Result]) -> str:
    details = predicted[0]["details"]
    card = details["card"]
    return (
        f"Predicted for all of {details['model']} on a {card['name']}: memory limit "
        f"{format_bytes(card['memory_limit'])}, link {card['link_bytes_per_s'] / 1e9:g} GB/s, "
        f"memory {card['memory_bytes_per_s'] / 1e9:g} GB/s. {_PUBLISHED} {_AT_MOST}"
    )


def _aligned(rows: Sequence[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
