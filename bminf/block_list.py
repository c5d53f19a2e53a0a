"""TransformerBlockList: streaming for hand-written models, as a drop-in for torch.nn.ModuleList."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bminf.errors import ArgumentError
from bminf.keywords import known_keywords
from bminf.wrapping import wrapper


class TransformerBlockList(torch.nn.ModuleList):
    """Blocks of which as many stay on the device as `memory_limit` allows; the rest streams.

    layers: the blocks, in the order in which they run.
    gpus: the index of the GPU to use, in a list; None is the first GPU, or the CPU where there is
        none. One list of blocks runs on one GPU.
    memory_limit, quantization, offload_dir, reserve: as in wrapper(), for this list alone.

    Iterate over it, index it, or call it: a call hands the output of each block to the next, and
    all further arguments to each. Of a tuple, the first item is handed on; the last block's whole
    output is returned. Raises as wrapper() does.

    A slice, a copy (copy.copy) or a sum is a plain torch.nn.ModuleList of the same blocks, which go
    on streaming under the one limit.
    """

    @known_keywords
    def __init__(
        self,
        layers: Iterable[torch.nn.Module],
        gpus: Sequence[int] | None = None,
        memory_limit: int | float | str | None = None,
        quantization: bool | str | None = False,
        offload_dir: str | Path | None = None,
        reserve: int | float | str = 0,
    ) -> None:
        super().__init__(_checked(layers))
        wrapper(
            self,
            quantization=quantization,
            memory_limit=memory_limit,
            device=_device(gpus),
            offload_dir=offload_dir,
            reserve=reserve,
            blocks=[name for name, _ in self.named_children()],
        )

    def __getitem__(self, idx: int | slice) -> Any:
        # A ModuleList makes a slice with its own class: it would be wrapped once more.
        if isinstance(idx, slice):
            return torch.nn.ModuleList(list(self)[idx])
        return super().__getitem__(idx)

    def __copy__(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList(self)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output = hidden_states
        for block in self:
            output = block(hidden_states, *args, **kwargs)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return output


def _checked(layers: Any) -> list[torch.nn.Module]:
    """The layers in a list: the iterable may be one that is read once."""
    modules = list(layers) if isinstance(layers, Iterable) else [layers]
    for module in modules:
        if module is layers or not isinstance(module, torch.nn.Module):
            what = f"a {type(layers).__name__}"
            what += "" if module is layers else f" that holds a {type(module).__name__}"
            raise ArgumentError(f"layers is {what}; give a list of modules")
    return modules


def _device(gpus: Sequence[int] | None) -> int | None:
    if gpus is None:
        return None
    if isinstance(gpus, str) or not isinstance(gpus, Sequence) or len(gpus) != 1:
        raise ArgumentError(f"gpus={gpus!r}; give one index in a list, such as [0], or None")
    return gpus[0]
