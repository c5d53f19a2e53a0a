"""What other libraries take for BLOOM's table: as many layers, at the same memory limit.

They keep weights as floating point, and their limit is of weights alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bminf.cli.tables.asked import Asked
from bminf.cli.tables.cells import MEASURED, Cell, not_run
from bminf.offload.backends import device_for, free_budget

Prompts = Callable[[int, int], list[list[int]]]
"""Number of texts and size of the vocabulary -> ids of each."""

QUANTITY = "ms_per_token"
PLACES = ("cpu", "disk")

_MOST_DISK_SHARE = 0.4  # of what is free, of a folder and what is offloaded from it
_PAD = 0
_WARM_UP_TOKENS = 2


def peer_rows(asked: Asked, columns: list[str], prompts: Prompts) -> Iterator[Cell]:
    """accelerate's offloading to host memory and to disk, and ZeRO-Inference, which offloads all
    and knows no limit."""
    for place in PLACES:
        row = f"accelerate, {place} offload"
        yield from _row(asked, row, columns, prompts, _no_accelerate(asked, place), place)
    yield from _row(asked, "ZeRO-Inference", columns, prompts, _no_zero(asked), "zero")


def _no_accelerate(asked: Asked, place: str) -> str | None:
    """Why it is not run, if it is not."""
    if not asked.is_measured:
        return "--predict-only"
    missing = [name for name in ("transformers", "accelerate") if not is_installed(name)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if asked.device == "cpu" and place == "cpu":
        return "on a CPU host memory is the device: there is nowhere to offload to"
    return None


def _no_zero(asked: Asked) -> str | None:
    if not asked.is_measured:
        return "--predict-only"
    if not is_installed("deepspeed"):
        return "deepspeed not installed"
    return None if asked.device == "cuda" else "it needs a GPU"


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _row(
    asked: Asked, row: str, columns: list[str], prompts: Prompts, reason: str | None, place: str
) -> Iterator[Cell]:
    sizes = {str(number): number for number in asked.numbers}
    if reason is not None:
        yield from not_run(QUANTITY, row, columns, reason)
        return
    try:
        with _opened(asked, place) as model:
            cells = {
                column: _measure(asked, model, row, sizes[column], prompts) for column in sizes
            }
    except Exception as error:  # another library's, of any type: it costs its own row alone
        yield from not_run(QUANTITY, row, columns, f"{type(error).__name__}: {error}")
        return
    for column in columns:
        if column in cells:
            yield cells[column]
        else:
            yield from not_run(QUANTITY, row, [column], "not among --batch-sizes")


def _measure(asked: Asked, model: Any, row: str, batch_size: int, prompts: Prompts) -> Cell:
    _generate(model, prompts(batch_size, model.config.vocab_size), _WARM_UP_TOKENS, asked.device)
    seconds = [
        _generate(
            model, prompts(batch_size, model.config.vocab_size), asked.new_tokens, asked.device
        )
        for _ in range(asked.runs)
    ]
    ms = statistics.fmean(seconds) / (batch_size * asked.new_tokens) * 1e3
    details = {
        "seconds": seconds,
        "step_ms": ms * batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Cell(QUANTITY, row, str(batch_size), MEASURED, ms, details=details)


def _generate(model: Any, rows: list[list[int]], num_tokens: int, device: str) -> float:
    """Seconds that so many greedy tokens of each text take, which is padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[_PAD] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    start_s = time.perf_counter()
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, pad_token_id=_PAD,
    )  # fmt: skip
    assert found.shape[1] == longest + num_tokens
    found.cpu()  # all is computed when this is here
    return time.perf_counter() - start_s


# ---- opening a model -----------------------------------------------------------------------------


@contextmanager
def _opened(asked: Asked, place: str) -> Iterator[Any]:
    """Random weights, written to a folder and loaded from it."""
    from bminf.cli import models

    models.quiet()
    dtype = torch.float32 if asked.device == "cpu" else torch.float16
    with tempfile.TemporaryDirectory(prefix="bminf-table-") as parent:
        folder, offloaded = Path(parent) / "model", Path(parent) / "offloaded"
        _save_random(asked, folder, dtype)
        if place == "zero":
            yield _zero(folder, dtype)
        else:
            yield _accelerated(asked, folder, offloaded, dtype, place)


def _save_random(asked: Asked, folder: Path, dtype: torch.dtype) -> None:
    import transformers

    config = config_of(asked)
    nbytes = _num_parameters(config) * dtype.itemsize
    free = shutil.disk_usage(folder.parent).free
    if 2 * nbytes > _MOST_DISK_SHARE * free or nbytes > free_budget(torch.device("cpu")):
        raise MemoryError(f"{nbytes / 1e9:.1f} GB of weights have no room here twice")
    model = transformers.BloomForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder)


def config_of(asked: Asked) -> Any:
    """The model that is measured, for transformers."""
    import transformers

    own = asked.cut.config
    return transformers.BloomConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        n_layer=own.num_hidden_layers,
        n_head=own.num_attention_heads,
    )


def _num_parameters(config: Any) -> int:
    import transformers

    with torch.device("meta"):
        return sum(p.numel() for p in transformers.BloomForCausalLM(config).parameters())


def _accelerated(
    asked: Asked, folder: Path, offloaded: Path, dtype: torch.dtype, place: str
) -> Any:
    """What fits the limit is on the device, the rest is offloaded."""
    import accelerate
    import transformers

    device = device_for(asked.device)
    limit = free_budget(device) if asked.limit is None else asked.limit
    with torch.device("meta"):
        empty = transformers.BloomForCausalLM(config_of(asked)).to(dtype)
    here: Any = 0 if device.type == "cuda" else "cpu"
    room = {here: limit, **({"cpu": 2**60} if place == "cpu" else {"disk": 2**60})}
    device_map = accelerate.infer_auto_device_map(
        empty, max_memory=room, no_split_module_classes=["BloomBlock"], dtype=dtype
    )
    load = transformers.BloomForCausalLM.from_pretrained
    if here in device_map.values():
        return load(folder, dtype=dtype, device_map=device_map, offload_folder=offloaded).eval()
    model = load(folder, dtype=dtype).eval()
    if place == "cpu":
        return accelerate.cpu_offload(model, device)
    return accelerate.disk_offload(model, str(offloaded), execution_device=device)


def _zero(folder: Path, dtype: torch.dtype) -> Any:
    """DeepSpeed's ZeRO stage 3 with all weights in host memory."""
    import deepspeed
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    hidden_size = transformers.AutoConfig.from_pretrained(folder).hidden_size
    settings = {
        "fp16": {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": hidden_size * hidden_size,
            "stage3_param_persistence_threshold": 0,
        },
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
    }
    kept = HfDeepSpeedConfig(settings)  # which from_pretrained() looks for while this lives
    model = transformers.BloomForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    engine = deepspeed.initialize(model=model, config_params=settings)[0]
    del kept
    engine.module.eval()
    return engine.module
