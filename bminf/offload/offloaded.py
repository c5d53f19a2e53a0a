"""Models that another library has offloaded: their weights come out of its store before wrapping.

accelerate puts a hook on each module and leaves its tensors on the meta device; the hook knows the
store. With the weights fetched and its hooks gone, the model is an ordinary one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bminf.errors import UnsupportedModelError
from bminf.layout import TensorPlace, tensors_of

logger = logging.getLogger("bminf")

_REMEDY = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def fetch_offloaded(model: torch.nn.Module) -> None:
    """Make a model that accelerate has offloaded one whose weights lie in host memory.

    What it keeps on disk is mapped, not read. Other models are left alone. Raises
    UnsupportedModelError for weights that are not in the store, and for a model with diffusers'
    group offloading, which moves weights itself.
    """
    _check_no_group_offloading(model)
    stores = [
        (name, module, hook)
        for name, module in model.named_modules()
        for around in [module.__dict__.get("_hf_hook")]
        for hook in getattr(around, "hooks", [around])  # a SequentialHook has several
        if getattr(hook, "offload", False) and hasattr(hook, "weights_map")
    ]
    if not stores:
        return
    fetched = [item for store in stores for item in _fetch(*store)]
    from accelerate.hooks import remove_hook_from_module

    for _, _, hook in stores:
        hook.offload = False  # or it would fetch them once more
    remove_hook_from_module(model, recurse=True)
    _set_tensors(fetched)
    _drop_device_map(model)
    logger.info("%d tensors were fetched from accelerate's store, its hooks removed", len(fetched))


def _fetch(
    name: str, module: torch.nn.Module, hook: Any
) -> Iterator[tuple[TensorPlace, torch.Tensor]]:
    for key, place, tensor in tensors_of(module):
        if not tensor.is_meta or ("." in key and not hook.place_submodules):
            continue
        try:
            value = _mapped(hook.weights_map, key)
            value = hook.weights_map[key] if value is None else value
        except (KeyError, OSError) as error:
            full_name = f"{name}.{key}" if name else key
            raise UnsupportedModelError(
                f"{full_name!r} was offloaded by accelerate and is not in its store ({error!r}); "
                f"load the model without offloading, or call {_REMEDY} first"
            ) from error
        yield place, value.to(tensor.dtype)


def _mapped(weights_map: Mapping[str, torch.Tensor], key: str) -> torch.Tensor | None:
    """A tensor that lies in a file of its own, mapped: reading it would take memory for it."""
    store: Any = weights_map
    while hasattr(store, "prefix") and hasattr(store, "dataset"):
        store, key = store.dataset, f"{store.prefix}{key}"
    entry = getattr(store, "index", {}).get(key)
    in_memory = getattr(store, "state_dict", {})
    if entry is None or key in in_memory or entry.get("safetensors_file") is not None:
        return None
    dtype = getattr(torch, entry["dtype"])
    shape = torch.Size(entry["shape"])
    path = Path(store.save_folder) / f"{key}.dat"
    nbytes = shape.numel() * dtype.itemsize
    if nbytes == 0 or path.stat().st_size != nbytes:
        return None
    data = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def _set_tensors(fetched: list[tuple[TensorPlace, torch.Tensor]]) -> None:
    """Tensors that are one in the store are one in the model, too."""
    made: dict[Any, torch.Tensor] = {}
    for place, value in fetched:
        before = place.get()
        if place.is_parameter:
            assert before is not None
            same = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            fresh = torch.nn.Parameter(value.detach(), requires_grad=before.requires_grad)
            value = made.setdefault(same, fresh)
        place.set(value)


def _drop_device_map(model: torch.nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("hf_device_map", None)
    if len({tensor.device for _, _, tensor in tensors_of(model)}) > 1:
        model.to("cpu")
    tie_weights = getattr(model, "tie_weights", None)
    if callable(tie_weights):  # on disk, tied weights are files of their own
        tie_weights()


def _check_no_group_offloading(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
        if "group_offloading" in hooks:
            raise UnsupportedModelError(
                f"{name or 'the model'!r} has diffusers' group offloading, which moves weights "
                "itself; wrap a model on which enable_group_offload() was not called"
            )
