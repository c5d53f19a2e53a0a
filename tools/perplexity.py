"""What packing does to a model's predictions, as `bminf eval --fidelity` measures it, in full.

With `--head` the output head is packed, too.

Each format is measured on the columns of the weights as they are, and on columns in random order:
weights that were once quantized themselves lie on a grid of neighbouring columns, which a format
with the same groups finds again and a native model does not have.

The formats of other libraries are measured in the same way (`--others`; tools/other_formats.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from benchmarks.harness import Group, Result, Settings, summary
from benchmarks.report import at, by_columns
from bminf.cli import models
from bminf.evaluation.fidelity import (
    FORMATS,
    WINDOW,
    Reader,
    Sample,
    mean_bits,
    name_of,
    repacked,
)
from bminf.models.evaluate import perplexity
from bminf.quantization.packed import FORMATS as FORMATS_BY_NAME
from bminf.quantization.packed import Format
from bminf.quantization.packing import DIVISORS
from tools.other_formats import OTHER_FORMATS, OtherFormat, possible

TOPICS = "pydoc_data.topics"

_SAME = ("model", "text_sha256", "window", "windows", "kl_windows", "seeds")
_SAME_NLL = 1e-3  # nats a token of a window, between one CPU and another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder, .gguf file or hub id; default: SmolLM2")
    add("--text", type=Path, metavar="FILE", help="default: the help topics of Python")
    add("--tokens", type=int, default=20_480, metavar="N", help="at most; default: 20480")
    add("--seeds", type=int, default=3, metavar="N", help="orders of the columns; default: 3")
    add("--others", action="store_true", help="measure what other libraries store, too")
    add("--formats", nargs="+", default=["*"], metavar="NAME",
        help="which are measured beside fp32, such as 'int4 g32*'; default: all")  # fmt: skip
    add("--divisors", nargs="+", type=float, default=DIVISORS, metavar="D",
        help="of the largest weight of a group, to choose an 8-bit scale from; one is no choice; "
        f"default: {' '.join(map(str, DIVISORS))}")  # fmt: skip
    add("--head", choices=sorted(FORMATS_BY_NAME), metavar="NAME",
        help="pack the output head as well, as int8 or int4; default: it stays")  # fmt: skip
    add("--keep", nargs="+", type=Path, default=[], metavar="FILE",
        help="results of earlier runs over the same text, of what is not measured now")  # fmt: skip
    parser.set_defaults(warmup=0, repeats=1, rounds=1)


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and a group for fp32 and for each format."""
    if (arguments.warmup, arguments.repeats, arguments.rounds) != (0, 1, 1):
        raise SystemExit("nothing is timed: each reading of the text is one sample")
    forms, others = chosen(arguments.formats, OTHER_FORMATS if arguments.others else ())
    models.quiet()
    source = arguments.model or models.packaged_model()
    text = "\n".join(topics.values())  # which every Python carries
    if arguments.text is not None:
        text = arguments.text.read_text(encoding="utf-8")
    ids = torch.tensor(models.load_tokenizer(source)(text)["input_ids"][: arguments.tokens])
    head = FORMATS_BY_NAME.get(arguments.head)
    reader = Reader(models.load_model(source, torch.float32), ids, head)
    parameters = {
        "model": Path(source).name.removesuffix(".gguf"),
        "linears": len(reader.linears),
        "weights": sum(linear.weight.numel() for linear in reader.linears),
        "text": TOPICS if arguments.text is None else "a file",
        "text_bytes": len(text.encode()),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": WINDOW,
        "windows": len(reader.plain["nll"]),
        "kl_windows": len(reader.plain["kl"]),
        "seeds": arguments.seeds,
        "divisors": list(arguments.divisors),
        "head": name_of(head),
    }
    seeds = range(arguments.seeds)
    groups: list[tuple[str, Group]] = [
        (name_of(form), partial(measure, reader, form, seeds, divisors=arguments.divisors))
        for form in (None, *forms)
    ]
    groups += [
        (other.name, partial(measure_other, reader, other, seeds))
        for other in possible(others, reader.linears)
    ]
    names = [name_of(None), *map(name_of, FORMATS), *(other.name for other in OTHER_FORMATS)]
    earlier = kept(arguments.keep, parameters, reader.plain)
    groups += [
        (name, partial(as_before, result))
        for name, result in earlier.items()
        if name not in dict(groups)
    ]
    return parameters, sorted(groups, key=lambda group: names.index(group[0]))


def kept(files: Sequence[Path], parameters: dict[str, Any], plain: Sample) -> dict[str, Result]:
    """Results of earlier runs by their names, the first of each, with the run that they are of.

    Raises SystemExit for a run with another model, another text, or another fp32.
    """
    found: dict[str, Result] = {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for key in _SAME:
            if content["parameters"][key] != parameters[key]:
                raise SystemExit(f"--keep {file}: {key} is {content['parameters'][key]!r}")
        if content["parameters"].get("head", name_of(None)) != parameters["head"]:
            raise SystemExit(f"--keep {file}: its head is packed otherwise")
        results = {result["name"]: result for result in content["results"]}
        before = results[name_of(None)]["samples"][0]["nll"]
        if max(abs(a - b) for a, b in zip(before, plain["nll"], strict=True)) > _SAME_NLL:
            raise SystemExit(f"--keep {file}: fp32 reads the text otherwise")
        run = {"commit": content["commit"], "date": content["date"]}
        for name, result in results.items():
            found.setdefault(name, {"kept_from": run, **result})
    return found


def as_before(result: Result, _: Settings) -> Iterator[list[Result]]:
    """A result that is kept."""
    yield [result]


def chosen(
    patterns: Sequence[str], others: Sequence[OtherFormat]
) -> tuple[list[Format], list[OtherFormat]]:
    """Those of FORMATS and of `others` whose names match one of the patterns.

    Raises SystemExit for a pattern that matches none.
    """
    names = [*map(name_of, FORMATS), *(other.name for other in others)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SystemExit(f"--formats {pattern!r} is none of: {', '.join(names)}")

    def is_chosen(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    forms = [form for form in FORMATS if is_chosen(name_of(form))]
    return forms, [other for other in others if is_chosen(other.name)]


def measure(
    reader: Reader,
    form: Format | None,
    seeds: Sequence[int],
    _: Settings,
    divisors: Sequence[float] = DIVISORS,
) -> Iterator[list[Result]]:
    """The samples of a format, or of fp32, and what they say of the columns' own order and of the
    permuted ones."""
    bits, samples = 32.0, [reader.plain]
    if form is not None:
        # Where a whole row shares a scale, the order of its columns changes nothing.
        orders = [None] if form.group_size is None else [None, *seeds]
        replace = partial(repacked, form=form, divisors=divisors)
        samples = [reader.read(seed, replace) for seed in orders]
        bits = mean_bits(reader.linears, form)
    entries = {"name": name_of(form), "format": form and form.to_json(), "bits_per_weight": bits}
    yield [entries | readings(samples, reader.plain)]


def measure_other(
    reader: Reader, other: OtherFormat, seeds: Sequence[int], _: Settings
) -> Iterator[list[Result]]:
    """The same of a format of another library, whose bits are counted from what it stores."""
    num_bytes: list[int] = []

    def replace(weight: torch.Tensor) -> torch.Tensor:
        stored = other.quantize(weight)
        num_bytes.append(stored.num_bytes)
        return stored.weight

    samples = [reader.read(seed, replace) for seed in (None, *seeds)]
    num_weights = len(samples) * sum(linear.weight.numel() for linear in reader.linears)
    entries = {
        "name": other.name,
        "library": {"name": other.library, "version": other.version},
        "bits_per_weight": 8 * sum(num_bytes) / num_weights,
    }
    yield [entries | readings(samples, reader.plain)]


def readings(samples: Sequence[Sample], plain: Sample) -> dict[str, Any]:
    """The samples, that of the columns' own order first, and what they say."""
    own, *permuted = samples
    return {
        "own_order": summaries([own], plain),
        "permuted": summaries(permuted or [own], plain),
        "samples": samples,
    }


def summaries(samples: Sequence[Sample], plain: Sample) -> dict[str, Any]:
    """Perplexity, that over the plain one, and KL."""
    found = [perplexity(sum(sample["nll"]), len(sample["nll"])) for sample in samples]
    of_plain = perplexity(sum(plain["nll"]), len(plain["nll"]))
    return {
        "perplexity": summary(found),
        "ratio": summary([value / of_plain for value in found]),
        "kl": summary([sum(sample["kl"]) / len(sample["kl"]) for sample in samples]),
    }


def table_parts(content: Result) -> Iterator[str]:
    """Perplexity against fp32, and KL, of each format in the columns' own order and permuted."""
    parameters = content["parameters"]
    tokens = parameters["windows"] * parameters["window"]
    head, is_permuted = parameters.get("head", name_of(None)), parameters["seeds"] > 0
    beside = "" if head == name_of(None) else f"beside a head in {head}, "
    permuted = f"; permuted: median (least to most) of {parameters['seeds']} orders"
    yield (
        f"{parameters['model']}, {parameters['weights'] / 1e6:.0f} M weights in "
        f"{parameters['linears']} linears, {beside}{tokens} tokens of text"
        f"{permuted if is_permuted else ''}:"
    )
    columns = {
        "library": at("library", "{name} {version}".format_map),
        "bits / weight": at("bits_per_weight", "{:.3f}".format),
        "perplexity": at("own_order.perplexity.median", "{:.3f}".format),
        "/ fp32": at("own_order.ratio.median", "{:.4f}".format),
        "KL": at("own_order.kl.median", "{:.4f}".format),
    }
    if is_permuted:
        columns["permuted, / fp32"] = at("permuted.ratio", _with_spread)
        columns["permuted, KL"] = at("permuted.kl", _with_spread)
    yield by_columns(columns, content["results"])


def _with_spread(values: dict[str, float]) -> str:
    least, median, most = (f"{values[key]:.3f}" for key in ("min", "median", "max"))
    return median if least == most else f"{median} ({least} to {most})"
