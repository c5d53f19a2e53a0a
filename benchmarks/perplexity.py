"""`python -m benchmarks.perplexity --out FILE.json`: what packing does to a model's predictions.

The weights of all linears but the output head are packed and unpacked again, and the model reads a
text: its perplexity, and how far its predictions are from those of fp32 (Kullback-Leibler).

Each format is measured on the columns of the weights as they are, and on columns in random order:
weights that were once quantised themselves lie on a grid of neighbouring columns, which a format
with the same groups finds again and a native model does not have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Settings, document, summary
from benchmarks.report import table
from bminf.cli import models
from bminf.progress import progress_bar
from bminf.quantization.packed import Format, dequantize, pack

WINDOW = 512
TOPICS = "pydoc_data.topics"
KL_STEP = 5  # of the windows, every fifth: the logits of fp32 are kept for these

FORMATS = (
    Format(8),
    Format(8, 128),
    Format(4, 16),
    Format(4, 32, has_minimum=True),
    Format(4, 32),
    Format(4, 64, has_minimum=True),
    Format(4, 64),
    Format(4, 128, has_minimum=True),
    Format(4, 128),
    Format(4, None, has_minimum=True),
    Format(4),
)


@dataclass(frozen=True)
class Sample:
    """One reading of the text.

    seed: of the order of the columns; None is their own.   nll: mean negative log-likelihood of the
    tokens of each window.   kl: mean KL(fp32 || this) over each fifth window, in nats.
    """

    seed: int | None
    nll: list[float]
    kl: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll) / len(self.nll))

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)


@dataclass(frozen=True)
class Result:
    """All that was measured of one format; `form` is None for fp32, which is `plain`.

    samples: the columns' own order first.
    """

    name: str
    form: Format | None
    bits_per_weight: float
    samples: list[Sample]
    plain: Sample

    def as_json(self) -> dict[str, Any]:
        """The samples, and what they say of the columns' own order and of the permuted ones."""
        own, *permuted = self.samples
        return {
            "name": self.name,
            "format": self.form and asdict(self.form),
            "bits_per_weight": self.bits_per_weight,
            "own_order": self._summaries([own]),
            "permuted": self._summaries(permuted or [own]),
            "samples": [asdict(sample) for sample in self.samples],
        }

    def _summaries(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {
            "perplexity": summary([sample.perplexity for sample in samples]),
            "ratio": summary([sample.perplexity / self.plain.perplexity for sample in samples]),
            "kl": summary([sample.mean_kl for sample in samples]),
        }


class Reader:
    """A model in fp32 and the windows of a text; `read` measures it with other weights."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self.model = model
        self.windows = windows
        self.linears = quantized_linears(model)
        self._references: list[torch.Tensor] = []
        self.plain = self._sample(None)

    def read(self, seed: int | None, replace: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        """With `replace(weight)` in place of each weight, columns in the order of `seed`.

        They are put back afterwards, which is the same as to permute the input alike.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        with restored(self.linears):
            for linear in self.linears:
                order = torch.arange(linear.in_features)
                if seed is not None:
                    order = torch.randperm(linear.in_features, generator=generator)
                linear.weight.data = replace(linear.weight.data[:, order])[:, order.argsort()]
            return self._sample(seed)

    @torch.inference_mode()
    def _sample(self, seed: int | None) -> Sample:
        sample = Sample(seed, [], [])
        for i, window in enumerate(self.windows):
            log_probs = self.model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            sample.nll.append(round(F.nll_loss(log_probs, window[1:]).item(), 6))
            if i % KL_STEP == 0:
                sample.kl.append(round(self._divergence(i // KL_STEP, log_probs), 6))
        return sample

    def _divergence(self, index: int, log_probs: torch.Tensor) -> float:
        """KL of the first reading, which is kept, against this one."""
        if index == len(self._references):
            self._references.append(log_probs)
        reference = self._references[index]
        return F.kl_div(log_probs, reference, reduction="batchmean", log_target=True).item()


def quantized_linears(model: Any) -> list[torch.nn.Linear]:
    """The linears of the blocks: all but the output head."""
    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


@contextmanager
def restored(linears: Sequence[torch.nn.Linear]) -> Iterator[None]:
    """The weights of `linears` are at the end what they were at the beginning."""
    weights = [linear.weight.data for linear in linears]
    try:
        yield
    finally:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.data = weight


def measure(reader: Reader, forms: Sequence[Format], seeds: Sequence[int]) -> list[Result]:
    """A result for fp32, then one for each format."""
    results = [Result("fp32", None, 32.0, [reader.plain], reader.plain)]
    for form in progress_bar(forms):
        # Where a whole row shares a scale, the order of its columns changes nothing.
        orders = [None] if form.group_size is None else [None, *seeds]
        samples = [reader.read(seed, partial(repacked, form=form)) for seed in orders]
        bits = mean_bits(reader.linears, form)
        results.append(Result(name_of(form), form, bits, samples, reader.plain))
    return results


def repacked(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """What is left of `weight` after it was packed and unpacked again."""
    return dequantize(pack(weight, form), weight.dtype)


def name_of(form: Format) -> str:
    group = "row" if form.group_size is None else f"g{form.group_size}"
    return f"int{form.bits} {group} {'minimum' if form.has_minimum else 'symmetric'}"


def mean_bits(linears: Sequence[torch.nn.Linear], form: Format) -> float:
    """Bits for a weight, scales and minima included, over all `linears`."""
    bits = sum(
        form.bits_per_weight(linear.in_features) * linear.weight.numel() for linear in linears
    )
    return bits / sum(linear.weight.numel() for linear in linears)


def read_text(file: Path | None) -> str:
    """The text of `file`; by default the help topics that every Python carries."""
    return "\n".join(topics.values()) if file is None else file.read_text(encoding="utf-8")


def windows_of(ids: Sequence[int], limit: int) -> torch.Tensor:
    """(windows, WINDOW): the first `limit` tokens, without a rest that fills no window."""
    count = min(len(ids), limit) // WINDOW
    if count == 0:
        raise ValueError(f"{min(len(ids), limit)} tokens do not fill a window of {WINDOW}")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the formats were measured and the file written."""
    arguments = _parser().parse_args(argv)
    models.quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        content = run(arguments)
    finally:
        torch.set_num_threads(threads)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(content))
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What goes into the JSON file."""
    source = arguments.model or models.packaged_model()
    text = read_text(arguments.text)
    ids = models.load_tokenizer(source)(text)["input_ids"]
    reader = Reader(models.load_model(source, torch.float32), windows_of(ids, arguments.tokens))
    results = measure(reader, FORMATS, range(arguments.seeds))
    parameters = {
        "model": Path(source).name.removesuffix(".gguf"),
        "linears": len(reader.linears),
        "weights": sum(linear.weight.numel() for linear in reader.linears),
        "text": TOPICS if arguments.text is None else "a file",
        "text_bytes": len(text.encode()),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": WINDOW,
        "windows": len(reader.windows),
        "kl_windows": len(reader.plain.kl),
        "seeds": arguments.seeds,
        "threads": arguments.threads,
    }
    # Nothing is timed: each reading of the text is one sample.
    return document("perplexity", parameters, Settings(warmup=0, repeats=1, rounds=1), results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="MODEL", help="folder, .gguf file or hub id; default: SmolLM2")
    add("--text", type=Path, metavar="FILE", help="default: the help topics of Python")
    add("--tokens", type=int, default=20_480, metavar="N", help="at most; default: 20480")
    add("--seeds", type=int, default=3, metavar="N", help="orders of the columns; default: 3")
    add("--threads", type=int, default=1, metavar="N", help="of torch; default: 1")
    add("--out", type=Path, metavar="FILE", help="the JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
