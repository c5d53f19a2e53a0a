"""`python -m tools.sweep`: see tools/README.md."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata as metadata
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.sweep.candidates import LIBRARIES, Candidate, candidates
from tools.sweep.check import NOT_BUILT, WRONG
from tools.sweep.processes import outcomes

SAVED_EVERY = 20  # outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no result is wrong, otherwise 1."""
    options = _parser().parse_args(arguments)
    quantization = options.quantization or False
    results = _read(options.out)
    chosen = _chosen(options, results)
    began = time.monotonic()
    found = outcomes(chosen, options.workers, options.timeout, quantization)
    for number, (candidate, outcome) in enumerate(found, 1):
        results[candidate.key] = asdict(outcome)
        took = f"{number}/{len(chosen)} {time.monotonic() - began:.0f} s"
        print(took, outcome.outcome, candidate.key, outcome.reason, flush=True)
        if number % SAVED_EVERY == 0:
            _write(options.out, results, quantization)
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


def _chosen(options: argparse.Namespace, results: Mapping[str, Any]) -> list[Candidate]:
    chosen = [c for c in candidates(options.libraries) if _is_chosen(c, options.only)]
    chosen = chosen[options.part :: options.parts]
    if not options.resume:
        return chosen
    built = {k for k, v in results.items() if v["outcome"] not in (NOT_BUILT, WRONG)}
    return [candidate for candidate in chosen if candidate.key not in built]


def _is_chosen(candidate: Candidate, patterns: Sequence[str]) -> bool:
    names = (candidate.family, candidate.name)
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    return results


def _write(path: Path | None, results: Mapping[str, Any], quantization: str | bool) -> None:
    if path is None:
        return
    versions = {name: metadata.version(name) for name in ("torch", *_installed())}
    document = {"versions": versions, "quantization": quantization, "results": results}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
