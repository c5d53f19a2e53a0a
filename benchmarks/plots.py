"""Pictures of results, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle

from benchmarks.by_size import Content, Variants, by_op, over_plain, ways_of

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
_STEP_X, _STEP_Y = 26, 22  # for twice the rows, and for twice the time
_MOST = 3  # doublings of torch's time, and halvings: what lies beyond is drawn at the edge
_MARGIN, _HEIGHT = 44, 200


def plot(content: Content, op: str) -> str:
    """An SVG picture: time over torch's by rows of activations, a panel for each shape."""
    sizes = by_op(content)[op]
    shapes = dict.fromkeys(shape for shape, _ in sizes)
    colors = dict(zip(ways_of(sizes), cycle(_COLORS), strict=False))
    width = round(_STEP_X * math.log2(max(num_rows for _, num_rows in sizes)))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="10" '
        f'viewBox="0 0 {(width + _MARGIN) * len(shapes)} {_HEIGHT}">',
        f"<title>{op}: time over that of torch without quantization, by rows</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, shape in enumerate(shapes):
        x, own = (
            (width + _MARGIN) * i,
            {m: each for (one, m), each in sizes.items() if one == shape},
        )
        lines.append(f'<g transform="translate({x + _MARGIN - 8} {_HEIGHT / 2 - 10})">')
        lines += [_text(width / 2, -_STEP_Y * _MOST - 8, "middle", shape)]
        lines += [*_panel(width, own, colors), "</g>"]
    names = [f'<tspan fill="{color}">■ {name}</tspan>' for name, color in colors.items()]
    lines.append(_text(8, _HEIGHT - 6, "start", "&#160; ".join(names)))
    return "\n".join([*lines, "</svg>\n"])


def _panel(width: int, by_rows: dict[int, Variants], colors: dict[str, str]) -> Iterator[str]:
    """For each variant its ratios by rows; one row in torch's time is at (0, 0)."""
    for power in range(-_MOST, _MOST + 1):
        y = -_STEP_Y * power
        yield f'<path d="M0 {y}h{width}" stroke="{"#ddd" if power else "#555"}"/>'
        yield _text(-4, y + 3, "end", f"{2.0**power:g}")
    for num_rows in by_rows:
        x = _STEP_X * math.log2(num_rows)
        yield _text(x, _STEP_Y * _MOST + 13, "middle", str(num_rows))
    for name, color in colors.items():
        points = []
        for num_rows, variants in by_rows.items():
            over = over_plain(name, variants)
            if over is not None:
                power = min(max(math.log2(over), -_MOST), _MOST)
                points.append(f"{_STEP_X * math.log2(num_rows):.1f},{-_STEP_Y * power:.1f}")
        yield f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}"/>'


def _text(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x:g}" y="{y}" text-anchor="{anchor}">{words}</text>'


_BAR, _STEP = 9, 12  # of the bars of levels: their thickness, and from one to the next
_LEVEL_COLORS = {"avx512": _COLORS[0], "avx2": _COLORS[2], "portable": _COLORS[3], "none": "#888"}


def levels_plot(content: Content, op: str) -> str:
    """An SVG picture of bars: how many times as fast as torch in float32, for the largest shape."""
    size, variants = next(iter(by_op(content)[op].items()))  # they begin with the largest
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="9" '
        f'viewBox="0 0 {_WIDTH + 330} {_STEP * len(variants) + 26}">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(8, 14, "start", f"{size[0]}, M={size[1]}: speed, that of torch in float32 = 1"),
    ]
    speeds = {name: 1 / (over_plain(name, variants) or math.inf) for name in variants}
    for i, (name, speed) in enumerate(speeds.items()):
        y, length = _STEP * i + 32, _WIDTH * speed / max(speeds.values())
        color = _LEVEL_COLORS.get(variants[name]["details"].get("level"), _COLORS[4])
        lines.append(_text(240, y, "end", name))
        lines.append(
            f'<path d="M246 {y - 3}h{length:.1f}" stroke="{color}" stroke-width="{_BAR}"/>'
        )
        lines.append(_text(round(250 + length, 1), y, "start", f"{speed:.2f}"))
    return "\n".join([*lines, "</svg>\n"])


_WIDTH, _DECADE = 260, 50  # of the plot of a table, and the height of ten times the value
_LINE = 16  # of its legend

Points = list[tuple[int, float]]
"""Of a row of a table: the number of a column, and the value."""


def table_plot(content: Content, quantity: str) -> str:
    """An SVG picture: the rows of one table by its columns, which are numbers; both logarithmic."""
    rows: dict[str, Points] = {}
    for result in content["results"]:
        if result["quantity"] == quantity and result["value"] is not None:
            rows.setdefault(result["row"], []).append((int(result["column"]), result["value"]))
    points = [point for row in rows.values() for point in row]
    low = math.floor(math.log10(min(value for _, value in points)))
    high = math.ceil(math.log10(max(value for _, value in points)))
    height = _DECADE * (high - low)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="10" '
        f'viewBox="0 0 {_WIDTH + 460} {max(height, _LINE * len(rows)) + 50}">',
        f"<title>{quantity}, by the number of texts at once</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<g transform="translate({_MARGIN} 16)">',
        *_axes(sorted({number for number, _ in points}), low, high),
    ]
    for i, (name, row) in enumerate(rows.items()):
        lines += _row_of_plot(i, name, [_place(n, v, points, high) for n, v in row])
    return "\n".join([*lines, "</g>", "</svg>\n"])


def _place(number: int, value: float, points: Points, high: int) -> tuple[float, float]:
    widest = math.log2(max(n for n, _ in points)) or 1.0
    return _WIDTH * math.log2(number) / widest, _DECADE * (high - math.log10(value))


def _axes(numbers: Sequence[int], low: int, high: int) -> Iterator[str]:
    for power in range(low, high + 1):
        y = _DECADE * (high - power)
        yield f'<path d="M0 {y}h{_WIDTH}" stroke="#ddd"/>'
        yield _text(-4, y + 3, "end", f"{10.0**power:g}")
    bottom = _DECADE * (high - low)
    for number in numbers:
        x, _ = _place(number, 1.0, [(numbers[-1], 1.0)], high)
        yield _text(round(x, 1), bottom + 13, "middle", str(number))
    yield _text(_WIDTH / 2, bottom + 28, "middle", "texts at once")


def _row_of_plot(i: int, name: str, places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """A line, its points, and its name; the colors come again, dashed."""
    color, dash = _COLORS[i % len(_COLORS)], ' stroke-dasharray="4 3"' if i >= len(_COLORS) else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>'
    sign = "◇" if dash else "■"
    yield _text(_WIDTH + 16, _LINE * i + 6, "start", f'<tspan fill="{color}">{sign} {name}</tspan>')
