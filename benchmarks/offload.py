"""The wrapper against accelerate's offloading: one model, one limit, the same greedy tokens."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import torch
import transformers

import bminf
from benchmarks.harness import Variant, Work
from bminf.cli import models
from bminf.cli.demo import half_limit
from bminf.offload.plan import least_budget

PROMPT = "Once upon a time, in a small village by the sea,"
PROMPT_FILE = "prompt_ids.json"
RANDOM_PROMPT_IDS = list(range(1, 13))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--model", choices=("smollm2", "random"), help="default: smollm2 where it is installed")
    add("--device", choices=("cpu", "cuda"), help="default: the CPU, then the GPU if there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--tokens", type=int, default=24, metavar="N", help="tokens to generate; default: 24")
    add("--threads", type=int, default=1, metavar="N", help="of torch on the CPU; default: 1")
    add("--memory-limit", metavar="SIZE", help="default: half the blocks fit")
    group = parser.add_argument_group("the random model, a Llama")
    group.add_argument("--hidden-size", type=int, default=512, metavar="N")
    group.add_argument("--layers", type=int, default=16, metavar="N")
    group.add_argument("--vocabulary", type=int, default=8192, metavar="N")


@dataclass(frozen=True)
class Setup:
    """What all variants on one device have in common."""

    folder: Path
    device: str
    dtype: torch.dtype
    tokens: int
    half_limit: int | str
    least_limit: int


@contextmanager
def prepare(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[list[Variant]]]]:
    """The parameters of the run, and the variants on each device."""
    models.quiet()
    name = arguments.model or _default_model()
    devices = [arguments.device] if arguments.device else _devices()
    parameters = {key: vars(arguments)[key] for key in ("dtype", "tokens", "memory_limit")}
    parameters |= {"model": name, "devices": devices, "threads": arguments.threads}
    if name == "random":
        parameters |= {key: vars(arguments)[key] for key in ("hidden_size", "layers", "vocabulary")}
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with TemporaryDirectory(prefix="bminf-benchmark-") as text:
            _save(Path(text), name, arguments)
            setups = [_setup(Path(text), device, arguments) for device in devices]
            yield parameters, [variants(setup) for setup in setups]
    finally:
        torch.set_num_threads(threads)


def _setup(folder: Path, device: str, arguments: argparse.Namespace) -> Setup:
    dtype = getattr(torch, arguments.dtype)
    model = bminf.wrapper(_load(folder, dtype), quantization=False, device=device)
    whole = bminf.plan_of(model)
    bminf.unwrap(model)
    half = arguments.memory_limit or half_limit(whole)
    return Setup(folder, device, dtype, arguments.tokens, half, least_budget(whole))


def variants(setup: Setup) -> list[Variant]:
    """The plain model first: its tokens are the reference."""
    place = "disk" if setup.device == "cpu" else "cpu"
    opened = {
        "plain": _plain,
        "bminf half resident": partial(_wrapped, half=True),
        f"accelerate half on {place}": partial(_device_map, place=place),
        "bminf all streamed": partial(_wrapped, half=False),
        f"accelerate all on {place}": partial(_offloaded, place=place),
    }
    return [
        Variant(f"{setup.device}: {name}", partial(open, setup), setup.device == "cuda")
        for name, open in opened.items()
    ]


def _default_model() -> str:
    return "random" if importlib.util.find_spec(models.PACKAGE) is None else "smollm2"


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _save(folder: Path, name: str, arguments: argparse.Namespace) -> None:
    """Writes model and prompt into `folder`."""
    if name == "random":
        sizes = (arguments.hidden_size, arguments.layers, arguments.vocabulary)
        save_random(folder, *sizes, dtype=getattr(torch, arguments.dtype))
        return
    # In a process of its own: what unpacking leaves behind would blur the memory measured later.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(save_smollm2, folder).result()


def save_smollm2(folder: Path) -> None:
    """Writes the packaged SmolLM2 as fp32 safetensors, and the ids of the prompt."""
    file = models.packaged_model()
    models.quiet()
    prompt_ids = models.load_tokenizer(file)(PROMPT)["input_ids"]
    (folder / PROMPT_FILE).write_text(json.dumps(prompt_ids))
    model = models.load_model(file, torch.float32)
    # transformers 5 takes what was unpacked from GGUF for a quantized model, and does not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def save_random(
    folder: Path, hidden_size: int, layers: int, vocabulary: int, dtype: torch.dtype
) -> None:
    """Writes a Llama with random weights, and the ids of a prompt."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        vocab_size=vocabulary,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    (folder / PROMPT_FILE).write_text(json.dumps(RANDOM_PROMPT_IDS))


def _load(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def _work(
    setup: Setup, model: Any, details: Callable[[Any], dict[str, Any]] = lambda model: {}
) -> Work:
    """Greedy generation of exactly `setup.tokens` ids."""
    prompt_ids = json.loads((setup.folder / PROMPT_FILE).read_text())
    prompt = torch.tensor([prompt_ids], device=setup.device)
    count = setup.tokens

    def run() -> list[int]:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        ids: list[int] = output[0].tolist()
        return ids

    return Work(run, lambda: {"tokens": count} | details(model))


@contextmanager
def _plain(setup: Setup) -> Iterator[Work]:
    yield _work(setup, _load(setup.folder, setup.dtype).to(setup.device))


@contextmanager
def _wrapped(setup: Setup, half: bool) -> Iterator[Work]:
    model = _load(setup.folder, setup.dtype)
    limit = setup.half_limit if half else setup.least_limit
    bminf.wrapper(model, quantization=False, memory_limit=limit, device=setup.device)
    try:
        yield _work(setup, model, _planned)
    finally:
        bminf.unwrap(model)


def _planned(model: Any) -> dict[str, Any]:
    plan, stats = bminf.plan_of(model), bminf.stats_of(model)
    return {
        "memory_limit": plan.budget,
        "planned_bytes": plan.total_bytes,
        "resident": len(plan.resident),
        "streamed": len(plan.streamed),
        "passes": stats.passes,
        "bytes_copied": stats.bytes_copied,
        "waited_s": stats.waited_s,
    }


@contextmanager
def _device_map(setup: Setup, place: str) -> Iterator[Work]:
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        num_layers = transformers.AutoConfig.from_pretrained(setup.folder).num_hidden_layers
        main = 0 if setup.device == "cuda" else "cpu"
        device_map = {"model.embed_tokens": main, "model.norm": main, "model.rotary_emb": main}
        device_map |= {"lm_head": main}
        for i in range(num_layers):
            device_map[f"model.layers.{i}"] = main if i < num_layers - num_layers // 2 else place
        options = {"device_map": device_map, "offload_folder": folder}
        yield _work(setup, _load(setup.folder, setup.dtype, **options))


@contextmanager
def _offloaded(setup: Setup, place: str) -> Iterator[Work]:
    model = _load(setup.folder, setup.dtype)
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        device = torch.device(setup.device)
        if place == "disk":
            accelerate.disk_offload(model, folder, execution_device=device)
        else:
            accelerate.cpu_offload(model, execution_device=device)
        yield _work(setup, model)
