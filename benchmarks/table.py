"""`python -m benchmarks.table`: the README's tables of results, out of the JSON files.

Between the two comments `<!-- FILE.json -->` and `<!-- end -->` in README.md stands the table of
benchmarks/results/FILE.json. Nobody types a number.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bminf.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    """0, after the tables in README.md were renewed."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """`text` with the table of each marked file in its place."""
    return _MARKED.sub(lambda mark: f"<!-- {mark[1]} -->\n{_of_file(mark[1])}<!-- end -->", text)


def _of_file(name: str) -> str:
    path = ROOT / "benchmarks" / "results" / name
    return table(json.loads(path.read_text(encoding="utf-8")))


def table(content: dict[str, Any]) -> str:
    """A caption and a Markdown table of one run: the median of each variant, per token."""
    plain = content["results"][0]
    rows = [_row(result, plain) for result in content["results"]]
    head = ["", "ms / token", "CPU ms / token", "CPU, plain = 1", "peak memory"]
    lines = [head, ["---", *["---:"] * 4], *rows]
    return _caption(content) + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(result: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    tokens = result["details"]["tokens"]
    wall_s, cpu_s = (result[name]["median"] / tokens for name in ("wall_s", "cpu_s"))
    ratio = result["cpu_s"]["median"] / plain["cpu_s"]["median"]
    peak = result["peak_cuda_bytes"] or result["peak_rss_anon_bytes"]
    return [
        result["name"],
        f"{wall_s * 1e3:.1f}",
        f"{cpu_s * 1e3:.1f}",
        f"{ratio:.2f}",
        format_bytes(peak),
    ]


def _caption(content: dict[str, Any]) -> str:
    hardware, parameters = content["hardware"], content["parameters"]
    device = hardware["gpu"]["name"] if hardware["gpu"] else hardware["cpu"]
    return (
        f"{parameters['model']}, {parameters['dtype']}, {parameters['tokens']} tokens, "
        f"{parameters['threads']} torch thread(s), {device}, {hardware['cores']} cores; "
        f"median of {len(content['results'][0]['samples'])} runs:"
    )


if __name__ == "__main__":
    sys.exit(main())
