"""Names of tensors without what training code wraps around a model, and leaves in its files.

Sources: torch.nn.parallel (DataParallel, DistributedDataParallel), torch._dynamo (torch.compile),
torch.distributed (FSDP, activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Tensor = TypeVar("Tensor")

_PARALLEL = "module."
# These stand around any module, the model or a layer of it, and no module is called so itself.
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, in their order, under the names that the model itself has.

    "module." is taken off, as often as it is there, where all names begin with it. Where two names
    would become one, all stay as they are.
    """
    names = {name: _without_wrappers(name) for name in tensors}
    while names and all(bare.startswith(_PARALLEL) for bare in names.values()):
        names = {name: bare.removeprefix(_PARALLEL) for name, bare in names.items()}
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ANYWHERE)
