"""A table in Markdown, from what its JSON file holds and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bminf.cli.tables.cells import DOES_NOT_FIT, NOT_PUBLISHED, NOT_RUN, PUBLISHED
from bminf.cli.tables.published import published
from bminf.units import format_bytes

Result = dict[str, Any]
"""A cell, as a file has it."""
Content = dict[str, Any]
"""Of a file."""

_TITLES = {
    "ms_per_token": "Milliseconds a token, by the number of texts at once",
    "start_to_ready_s": "Start to ready, in seconds",
    "seconds": "Seconds, by what is done with so many tokens",
    "tokens_per_s": "Tokens a second",
    "pass_s": "Seconds that one step of all texts needs of the link / of device memory / of "
    "arithmetic, and what binds, by the number of texts at once",
    "rows_until_arithmetic": "Texts at once from which on arithmetic would bind, by the plan of "
    "the largest batch that fits",
}
_SHORT = (DOES_NOT_FIT, NOT_PUBLISHED)  # reasons that need no footnote
_SOURCES = {"bloom": "bloom", "glm130b": "seconds", "cpm2": "tokens_per_s_by_card"}


def markdown_of(content: Content) -> str:
    """Captions and tables."""
    return "\n\n".join(part.rstrip() for part in parts(content)) + "\n"


def parts(content: Content) -> Iterator[str]:
    """As benchmarks/report.py puts them into documents."""
    yield from _captions(content)
    for quantity in dict.fromkeys(one["quantity"] for one in content["results"]):
        results = [one for one in content["results"] if one["quantity"] == quantity]
        yield f"**{_TITLES[quantity]}**"
        yield _table(results)
        yield from _footnotes(results)
        yield from _compared(results)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def digits(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


# ---- a table -------------------------------------------------------------------------------------


def _table(results: Sequence[Result]) -> str:
    columns = list(dict.fromkeys(one["column"] for one in results))
    rows: dict[str, dict[str, Result]] = {}
    for one in results:
        rows.setdefault(one["row"], {})[one["column"]] = one
    reasons = _reasons(results)
    lines = [
        [row, _kind(own.values()), *(_cell(own[column], reasons) for column in columns)]
        for row, own in rows.items()
    ]
    return markdown(["", "", *columns], lines)


def _kind(cells: Iterable[Result]) -> str:
    """Of a row; what is not run in it says so by itself."""
    found = dict.fromkeys(one["kind"] for one in cells if one["kind"] != NOT_RUN)
    return ", ".join(found) or NOT_RUN


def _cell(one: Result, reasons: Sequence[str]) -> str:
    if one["kind"] == NOT_RUN:
        short = _short_reason(one)
        return short or f"({reasons.index(one['reason']) + 1})"
    if one["value"] is None:
        return "out of memory" if one["kind"] == PUBLISHED else ""
    if one["quantity"] == "pass_s":
        needs = [
            digits(one["details"]["pass"][f"{of}_s"]) for of in ("copy", "memory", "arithmetic")
        ]
        return f"{' / '.join(needs)} **{one['details']['binds']}**"
    if one["quantity"] == "rows_until_arithmetic":
        return f"{one['value']:.0f}"
    return digits(one["value"])


def _short_reason(one: Result) -> str | None:
    return next((short for short in _SHORT if one["reason"].startswith(short)), None)


def _reasons(results: Sequence[Result]) -> list[str]:
    """Those that need a footnote, in order."""
    left = [one for one in results if one["kind"] == NOT_RUN and not _short_reason(one)]
    return list(dict.fromkeys(one["reason"] for one in left))


def _footnotes(results: Sequence[Result]) -> Iterator[str]:
    reasons = _reasons(results)
    if reasons:
        yield "; ".join(f"({i}) not run: {reason}" for i, reason in enumerate(reasons, 1)) + "."


def _compared(results: Sequence[Result]) -> Iterator[str]:
    """What a row of several texts at once takes for a token, over one text alone."""
    measured = {
        one["column"]: one["value"]
        for one in results
        if one["quantity"] == "ms_per_token" and one["kind"] == "measured"
        and one["row"].startswith("bminf")
    }  # fmt: skip
    if "1" not in measured or len(measured) < 2:
        return
    ratios = [
        f"{measured['1'] / value:.3g} at {column}"
        for column, value in measured.items()
        if column != "1"
    ]
    yield f"Measured: a token of one text alone takes so many times as long: {', '.join(ratios)}."


# ---- captions ------------------------------------------------------------------------------------


def _captions(content: Content) -> Iterator[str]:
    own = content["parameters"]
    if own["table"] == "binds":
        yield _of_binds(content)
        return
    if own["is_measured"]:
        yield _measured(content)
    if own["num_layers"] != own["num_layers_of_all"] and own["is_measured"]:
        yield (
            f"Scaled: what was measured, times {own['scale']:.3g}: the weights of all "
            f"{own['num_layers_of_all']} layers over those of the {own['num_layers']} measured; a "
            "prediction, too."
        )
    yield _predicted(own)
    yield f"Published: {published()[_SOURCES[own['table']]]['source']}"


def _measured(content: Content) -> str:
    own, hardware = content["parameters"], content["hardware"]
    cpu = f"{hardware['cpu']}, {own['threads']} torch thread(s)"
    device = cpu if own["device"] == "cpu" else hardware["gpu"]["name"]
    limit = (
        "90% of what is free" if own["memory_limit"] is None else format_bytes(own["memory_limit"])
    )
    if own["streams_all"]:
        limit = "the least that each cell can have"
    head = own["head_quantization"]
    texts = f", {own['new_tokens']} greedy tokens of each text" if own["table"] == "bloom" else ""
    return (
        f"Measured: {own['measured_model']}, random weights, {own['quantization']}"
        f"{'' if head == 'none' else f', head {head}'}, the rest {own['dtype']}{texts}; {device}; "
        f"memory limit {limit}; mean of {own['runs']} run(s)."
    )


def _predicted(own: dict[str, Any]) -> str:
    card = own["card"]
    flops = card["flops"]
    arithmetic = f"{flops / 1e12:g} TFLOPS" if flops else "arithmetic is not counted"
    return (
        f"Predicted: {own['model']} on a {card['name']}, {card['usable']:.0%} of "
        f"{format_bytes(card['memory_bytes'])}, link {card['speeds']['link'] / 1e9:.3g} GB/s, "
        f"memory {card['speeds']['memory'] / 1e9:.4g} GB/s, {arithmetic}: bounds of the plan, of "
        "which kernels reach a part."
    )


def _of_binds(content: Content) -> str:
    own = content["parameters"]
    return (
        f"Predicted, with room for {own['length']} tokens of each text, half of them in the KV "
        "cache, on 90% of the card's memory, over its PCI Express bus: RTX 3090 (24 GB), RTX A6000 "
        "(48 GB), A100 (80 GB); the head in int8."
    )
