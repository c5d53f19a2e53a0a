"""The wrapper against accelerate's offloading: one model, one limit, the same greedy tokens."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from collections.abc import Iterator
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
from benchmarks.harness import Group, Result, Sample, Settings, Variant, Work, measure
from bminf.cli import models
from bminf.cli.demo import half_limit
from bminf.cli.tables.document import plan_entries
from bminf.offload.plan import least_budget

PROMPT_IDS = range(1, 13)  # what is read makes no difference to the time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this case."""
    add = parser.add_argument
    is_installed = importlib.util.find_spec(models.PACKAGE) is not None
    add("--model", choices=("smollm2", "random"), default="smollm2" if is_installed else "random",
        help="default: smollm2 where it is installed")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="default: the CPU, then the GPU if there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--tokens", type=int, default=24, metavar="N", help="tokens to generate; default: 24")
    add("--memory-limit", metavar="SIZE", help="default: half the blocks fit")
    for name, size in (("hidden-size", 512), ("layers", 16), ("vocabulary", 8192)):
        add(f"--{name}", type=int, default=size, metavar="N", help="of the random model, a Llama")


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, Group]]]:
    """The parameters of the run, and a group for each device."""
    models.quiet()
    every = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [arguments.device] if arguments.device else every
    names = ["model", "dtype", "tokens", "memory_limit"]
    names += ["hidden_size", "layers", "vocabulary"] if arguments.model == "random" else []
    parameters = {name: vars(arguments)[name] for name in names} | {"devices": devices}
    return parameters, [(device, partial(_measured, device, arguments)) for device in devices]


def _measured(
    device: str, arguments: argparse.Namespace, settings: Settings
) -> Iterator[list[Result]]:
    with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
        if arguments.model == "random":
            save_random(folder, arguments)
        else:
            # In a process of its own: what unpacking leaves behind would blur the memory measured.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                pool.submit(save_smollm2, folder).result()
        setup = Setup(folder, device, getattr(torch, arguments.dtype), arguments.tokens)
        yield measure(setup.variants(arguments.memory_limit), settings)


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


@dataclass(frozen=True)
class Setup:
    """What all variants on one device have in common."""

    folder: str
    device: str
    dtype: torch.dtype
    tokens: int

    def variants(self, memory_limit: str | None) -> list[Variant]:
        """The plain model first: its tokens are the reference."""
        model = bminf.wrapper(self._load(), quantization=False, device=self.device)
        whole = bminf.plan_of(model)
        bminf.unwrap(model)
        place = "disk" if self.device == "cpu" else "cpu"
        opened = {
            "plain": self._plain,
            "bminf half resident": partial(self._wrapped, memory_limit or half_limit(whole)),
            f"accelerate half on {place}": partial(self._device_map, place),
            "bminf all streamed": partial(self._wrapped, least_budget(whole)),
            f"accelerate all on {place}": partial(self._offloaded, place),
        }
        is_cuda = self.device == "cuda"
        return [Variant(f"{self.device}: {n}", one, is_cuda) for n, one in opened.items()]

    def _load(self, **options: Any) -> Any:
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(self.folder, dtype=self.dtype, **options).eval()

    def _work(self, model: Any) -> Work:
        """Greedy generation of exactly `tokens` ids."""
        prompt = torch.tensor([[*PROMPT_IDS]], device=self.device)
        options = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens,
                   "do_sample": False, "pad_token_id": 0}  # fmt: skip

        def run() -> list[int]:
            mask = torch.ones_like(prompt)
            ids: list[int] = model.generate(prompt, attention_mask=mask, **options)[0].tolist()
            return ids

        def details(_: list[Sample]) -> dict[str, Any]:
            plan, found = bminf.plan_of(model), {"tokens": self.tokens}
            return found | (plan_entries(plan) | asdict(bminf.stats_of(model)) if plan else {})

        return Work(run, details)

    @contextmanager
    def _plain(self) -> Iterator[Work]:
        yield self._work(self._load().to(self.device))

    @contextmanager
    def _wrapped(self, limit: int | str) -> Iterator[Work]:
        model = self._load()
        bminf.wrapper(model, quantization=False, memory_limit=limit, device=self.device)
        try:
            yield self._work(model)
        finally:
            bminf.unwrap(model)

    @contextmanager
    def _device_map(self, place: str) -> Iterator[Work]:
        num_layers = transformers.AutoConfig.from_pretrained(self.folder).num_hidden_layers
        here = 0 if self.device == "cuda" else "cpu"
        others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        device_map = dict.fromkeys(others, here)
        for i in range(num_layers):
            device_map[f"model.layers.{i}"] = here if i < num_layers - num_layers // 2 else place
        with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
            yield self._work(self._load(device_map=device_map, offload_folder=folder))

    @contextmanager
    def _offloaded(self, place: str) -> Iterator[Work]:
        model, device = self._load(), torch.device(self.device)
        with TemporaryDirectory(prefix="bminf-benchmark-") as folder:
            if place == "disk":
                accelerate.disk_offload(model, folder, execution_device=device)
            else:
                accelerate.cpu_offload(model, device)
            yield self._work(model)
