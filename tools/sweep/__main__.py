"""`python -m tools.sweep`: see tools/README.md."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.sweep.candidates import Candidate, candidates
from tools.sweep.check import NOT_BUILT, WRONG
from tools.sweep.pool import sweep

LIBRARIES = ("transformers", "diffusers", "timm")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no result is wrong, otherwise 1."""
    options = _parser().parse_args(arguments)
    chosen = [c for c in candidates(options.libraries) if _is_chosen(c, options.only)]
    chosen = chosen[options.part :: options.parts]
    results = _read(options.out)
    if options.resume:
        chosen = [c for c in chosen if _is_open(results.get(c.key))]
    num_done = 0
    began, quantization = time.monotonic(), options.quantization or False

    def report(candidate: Candidate, outcome: dict[str, Any]) -> None:
        nonlocal num_done
        num_done += 1
        results[candidate.key] = outcome
        took = f"{num_done}/{len(chosen)} {time.monotonic() - began:.0f} s"
        print(took, outcome["outcome"], candidate.key, outcome["reason"], flush=True)
        if options.out and num_done % 20 == 0:
            _write(options.out, results, quantization)

    sweep(chosen, options.workers, options.timeout, quantization, report)
    if options.out:
        _write(options.out, results, quantization)
    counts = Counter(outcome["outcome"] for outcome in results.values())
    print(dict(counts))
    return 1 if counts[WRONG] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=_installed())
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of family or class")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a first pass")
    parser.add_argument("--part", type=int, default=0, help="only every PARTS-th class")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file that the results are added to")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has built")
    return parser


def _installed() -> list[str]:
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def _is_chosen(candidate: Candidate, patterns: Sequence[str]) -> bool:
    names = (candidate.family, candidate.name)
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    return results


def _is_open(outcome: dict[str, Any] | None) -> bool:
    return outcome is None or outcome["outcome"] in (NOT_BUILT, WRONG)


def _write(path: Path, results: dict[str, Any], quantization: str | bool) -> None:
    import importlib.metadata as metadata

    versions = {name: metadata.version(name) for name in ("torch", *_installed())}
    document = {"versions": versions, "quantization": quantization, "results": results}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
