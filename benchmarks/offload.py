"""The wrapper against accelerate's offloading: one model, one limit, the same greedy tokens."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import torch
import transformers

import bminf
from benchmarks.harness import Group, Result, Settings, Variant, Work, measure, plan_entries
from bminf.cli import models
from bminf.cli.demo import half_limit
from bminf.offload.plan import least_budget

PROMPT_IDS = range(1, 13)  # what is read makes no difference to the time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    add("--model", choices=("smollm2", "random"), help="default: smollm2 where it is installed")
    add("--device", choices=("cpu", "cuda"), help="default: the CPU, then the GPU if there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--tokens", type=int, default=24, metavar="N", help="tokens to generate; default: 24")
    add("--memory-limit", metavar="SIZE", help="default: half the blocks fit")
    group = parser.add_argument_group("the random model, a Llama")
    group.add_argument("--hidden-size", type=int, default=512, metavar="N")
    group.add_argument("--layers", type=int, default=16, metavar="N")
    group.add_argument("--vocabulary", type=int, default=8192, metavar="N")


@dataclass(frozen=True)
class Setup:
    """What all variants on one device have in common."""

    folder: str
    device: str
    dtype: torch.dtype
    tokens: int
    half_limit: int | str
    least_limit: int


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and a group for each device."""
    models.quiet()
    is_installed = importlib.util.find_spec(models.PACKAGE) is not None
    name = arguments.model or ("smollm2" if is_installed else "random")
    every = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [arguments.device] if arguments.device else every
    options = ["dtype", "tokens", "memory_limit"]
    options += ["hidden_size", "layers", "vocabulary"] if name == "random" else []
    parameters = {option: vars(arguments)[option] for option in options}
    groups = [(device, partial(_measured, name, device, arguments)) for device in devices]
    return parameters | {"model": name, "devices": devices}, groups


def _measured(
    name: str, device: str, arguments: argparse.Namespace, settings: Settings
) -> Iterator[list[Result]]:
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        if name == "random":
            save_random(folder, arguments)
        else:
            # In a process of its own: what unpacking leaves behind would blur the memory measured.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                pool.submit(save_smollm2, folder).result()
        yield measure(variants(_setup(folder, device, arguments)), settings)


def _setup(folder: str, device: str, arguments: argparse.Namespace) -> Setup:
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
        "bminf half resident": partial(_wrapped, limit=setup.half_limit),
        f"accelerate half on {place}": partial(_device_map, place=place),
        "bminf all streamed": partial(_wrapped, limit=setup.least_limit),
        f"accelerate all on {place}": partial(_offloaded, place=place),
    }
    return [
        Variant(f"{setup.device}: {name}", partial(open, setup), setup.device == "cuda")
        for name, open in opened.items()
    ]


def save_smollm2(folder: str) -> None:
    """Writes the packaged SmolLM2 as fp32 safetensors."""
    models.quiet()
    model = models.load_model(models.packaged_model(), torch.float32)
    # transformers 5 takes what was unpacked from GGUF for a quantized model, and does not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def save_random(folder: str, arguments: argparse.Namespace) -> None:
    """Writes a Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden_size // 64),
        vocab_size=arguments.vocabulary,
    )
    dtype = getattr(torch, arguments.dtype)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def _load(folder: str, dtype: torch.dtype, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def _work(
    setup: Setup, model: Any, details: Callable[[Any], dict[str, Any]] = lambda model: {}
) -> Work:
    """Greedy generation of exactly `setup.tokens` ids."""
    prompt = torch.tensor([[*PROMPT_IDS]], device=setup.device)
    options = {"max_new_tokens": setup.tokens, "min_new_tokens": setup.tokens,
               "do_sample": False, "pad_token_id": 0}  # fmt: skip

    def run() -> list[int]:
        mask = torch.ones_like(prompt)
        ids: list[int] = model.generate(prompt, attention_mask=mask, **options)[0].tolist()
        return ids

    return Work(run, lambda: {"tokens": setup.tokens} | details(model))


@contextmanager
def _plain(setup: Setup) -> Iterator[Work]:
    yield _work(setup, _load(setup.folder, setup.dtype).to(setup.device))


@contextmanager
def _wrapped(setup: Setup, limit: int | str) -> Iterator[Work]:
    model = _load(setup.folder, setup.dtype)
    bminf.wrapper(model, quantization=False, memory_limit=limit, device=setup.device)
    try:
        yield _work(setup, model, _planned)
    finally:
        bminf.unwrap(model)


def _planned(model: Any) -> dict[str, Any]:
    return plan_entries(bminf.plan_of(model)) | asdict(bminf.stats_of(model))


@contextmanager
def _device_map(setup: Setup, place: str) -> Iterator[Work]:
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        num_layers = transformers.AutoConfig.from_pretrained(setup.folder).num_hidden_layers
        others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        device_map = dict.fromkeys(others, 0 if setup.device == "cuda" else "cpu")
        for i in range(num_layers):
            is_half = i < num_layers - num_layers // 2
            device_map[f"model.layers.{i}"] = device_map["lm_head"] if is_half else place
        options = {"device_map": device_map, "offload_folder": folder}
        yield _work(setup, _load(setup.folder, setup.dtype, **options))


@contextmanager
def _offloaded(setup: Setup, place: str) -> Iterator[Work]:
    model = _load(setup.folder, setup.dtype)
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        own = (model, folder) if place == "disk" else (model,)
        offload = accelerate.disk_offload if place == "disk" else accelerate.cpu_offload
        offload(*own, execution_device=torch.device(setup.device))
        yield _work(setup, model)
