"""What a token costs on the CPU: models of transformers under the wrapper, in several formats, and
beside them llama.cpp.

Each variant runs in a process of its own, and they take turns: a prompt is read, and tokens are
written by generate(), the likeliest each time. What counts is CPU time, which other processes on
the machine disturb least.

llama.cpp comes with node-llama-cpp (`npm install --ignore-scripts node-llama-cpp` in any folder,
which `--llama-cpp` names) and reads the same weights from GGUF files that are written here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from benchmarks.harness import Group, Result, Settings, summary
from benchmarks.offload import save_smollm2
from benchmarks.report import ROOT, at, by_columns
from bminf.cli.tables.text import digits
from bminf.quantization.packed import INT4, INT8, Format
from bminf.units import format_bytes

FORMATS = {
    "int8": INT8,
    "int4": INT4,
    "int4 g32": Format(4, 32),
    "int4 g32, 8-bit scales": Format(4, 32, scale_bits=8),
}
HEAD = ", head too"
GGUF_KINDS = ("Q4_0", "Q8_0")
_LLAMA_CPP = "llama.cpp "
NAMES = (
    "float32",
    *(f"{name}{head}" for head in ("", HEAD) for name in FORMATS),
    *(f"{_LLAMA_CPP}{kind}" for kind in GGUF_KINDS),
)
_TITLES = {"smollm2": "SmolLM2-135M-Instruct", "random": "A Llama with random weights"}
_WORKER = Path(__file__).with_name("llama_cpp_worker.mjs")

Sample = dict[str, float]
"""CPU seconds: `prefill_s` of the prompt and the first token, `token_s` of each further one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case. The random Llama has by default TinyLlama's shape."""
    add = parser.add_argument
    add("--model", choices=("smollm2", "random"), default="smollm2")
    add("--hidden-size", type=int, default=2048, metavar="N", help="of the random Llama, as are:")
    add("--intermediate-size", type=int, default=5632, metavar="N")
    add("--layers", type=int, default=22, metavar="N")
    add("--heads", type=int, default=32, metavar="N")
    add("--key-value-heads", type=int, default=4, metavar="N")
    add("--vocabulary", type=int, default=32_000, metavar="N")
    add("--prompt-tokens", type=int, default=16, metavar="N")
    add("--tokens", type=int, default=32, metavar="N", help="that are written")
    add("--variants", nargs="+", default=["*"], metavar="NAME",
        help=f"such as 'int4*'; of {'; '.join(NAMES)}")  # fmt: skip
    add("--llama-cpp", type=Path, metavar="FOLDER", help="that has node_modules/node-llama-cpp")
    parser.set_defaults(warmup=1, repeats=1, rounds=5)


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and one group of all variants, which take turns."""
    if arguments.tokens < 2:
        raise SystemExit("--tokens: the first is the prompt's; give at least 2")
    names = chosen(arguments.variants, arguments.llama_cpp)
    work = Work(arguments.prompt_tokens, arguments.tokens, torch.get_num_threads())
    config = None if arguments.model == "smollm2" else config_of(arguments)
    parameters = asdict(work) | {"model": arguments.model, "variants": names, "device": "cpu"}
    if config is not None:
        parameters["config"] = config.to_diff_dict()
    return parameters, [("decoding", partial(measure, config, names, work, arguments.llama_cpp))]


def chosen(patterns: Sequence[str], llama_cpp: Path | None) -> list[str]:
    """Those of NAMES that match; llama.cpp only where there is one.   Raises SystemExit."""
    names = [name for name in NAMES if any(fnmatchcase(name, own) for own in patterns)]
    if not names:
        raise SystemExit(f"--variants: none of {'; '.join(NAMES)}")
    if llama_cpp is None:
        left_out = [name for name in names if name.startswith(_LLAMA_CPP)]
        print(*(f"left out: {name}: --llama-cpp names no folder" for name in left_out), sep="\n")
        return [name for name in names if name not in left_out]
    if shutil.which("node") is None or not (llama_cpp / "node_modules/node-llama-cpp").is_dir():
        raise SystemExit(
            f"--llama-cpp: node, or {llama_cpp}/node_modules/node-llama-cpp, is missing"
        )
    return names


def config_of(arguments: argparse.Namespace) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=2048,
    )


@dataclass(frozen=True)
class Work:
    """What each sample is."""

    prompt_tokens: int
    tokens: int
    threads: int


# ---- the model in files --------------------------------------------------------------------------


def save_elsewhere(
    folder: Path, config: transformers.LlamaConfig | None, kinds: Sequence[str]
) -> None:
    """In a process of its own, whose memory is free afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(save, folder, config, kinds).result()


def save(folder: Path, config: transformers.LlamaConfig | None, kinds: Sequence[str]) -> None:
    """The model as a folder of transformers, and in it a GGUF file of each of `kinds`.

    config: of a Llama with random weights, saved in bfloat16; None is SmolLM2, in float32.
    """
    if config is None:
        save_smollm2(str(folder))
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    if kinds:
        from tools.llama_gguf import write_gguf  # gguf is not installed where GPUs are measured

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for kind in kinds:
            write_gguf(model, gguf_in(folder, kind), kind)


def gguf_in(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.gguf"


# ---- processes that take turns -------------------------------------------------------------------


def measure(
    config: transformers.LlamaConfig | None, names: Sequence[str], work: Work,
    llama_cpp: Path | None, settings: Settings,
) -> Iterator[list[Result]]:  # fmt: skip
    """A result for each variant."""
    kinds = [name.removeprefix(_LLAMA_CPP) for name in names if name.startswith(_LLAMA_CPP)]
    with TemporaryDirectory(prefix="bminf-decoding-") as folder, ExitStack() as stack:
        save_elsewhere(Path(folder), config, kinds)
        found = [
            stack.enter_context(running(name, command_of(name, Path(folder), work, llama_cpp)))
            for name in names
        ]
        for number in range(settings.warmup + settings.rounds * settings.repeats):
            for variant in found:
                sample = variant.answer()
                if number >= settings.warmup:
                    variant.samples.append(sample)
    yield [variant.result() for variant in found]


@dataclass
class Variant:
    """A process, what it says of itself, and what it has measured."""

    name: str
    process: subprocess.Popen[str]
    details: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def answer(self) -> Any:
        """To a line.   Raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: there is no line to read
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} has ended; its error stands above")
        return json.loads(line)

    def result(self) -> Result:
        times = {key: summary([sample[key] for sample in self.samples]) for key in self.samples[0]}
        return {"name": self.name, "details": self.details, "samples": self.samples, **times}


@contextmanager
def running(name: str, command: Sequence[str]) -> Iterator[Variant]:
    """The process of a variant, ready; it ends at the end of its input."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        variant = Variant(name, process)
        variant.details = variant.answer()
        yield variant
    finally:
        process.communicate()


def command_of(name: str, folder: Path, work: Work, llama_cpp: Path | None) -> list[str]:
    numbers = [*map(str, (work.prompt_tokens, work.tokens, work.threads))]
    if name.startswith(_LLAMA_CPP):
        file = gguf_in(folder, name.removeprefix(_LLAMA_CPP))
        return ["node", str(_WORKER), str(llama_cpp), str(file), *numbers]
    form = FORMATS.get(name.removesuffix(HEAD))
    packing = "none" if form is None else json.dumps(form.to_json())
    what = [str(folder), packing, "head" if name.endswith(HEAD) else "blocks"]
    return [sys.executable, "-m", "tools.decoding_work", *what, *numbers]


# ---- the table -----------------------------------------------------------------------------------


def table_parts(content: Result) -> Iterator[str]:
    """CPU time of a token and of the prompt, and both over those of float32."""
    parameters, results = content["parameters"], content["results"]
    plain = next((result for result in results if result["name"] == "float32"), None)

    def over_plain(key: str) -> Callable[[Result], str]:
        return lambda result: (
            f"{result[key]['median'] / plain[key]['median']:.2f}" if plain is not None else ""
        )

    yield (
        f"{_TITLES[parameters['model']]}, {content['hardware']['cpu']}, "
        f"{parameters['threads']} thread(s); {parameters['tokens']} tokens behind a prompt of "
        f"{parameters['prompt_tokens']}; medians of {len(results[0]['samples'])} runs:"
    )
    columns = {
        "weights": at("details.weight_bytes", format_bytes),
        "CPU ms / token": at("token_s.median", lambda s: digits(s * 1e3)),
        "float32 = 1": over_plain("token_s"),
        "prompt, CPU ms": at("prefill_s.median", lambda s: digits(s * 1e3)),
        "float32 = 1 ": over_plain("prefill_s"),
    }
    yield by_columns(columns, results)
