"""Tables that are read by row: input embeddings, which stay on the host while their model streams.

A token needs one row of each, so these are gathered on the host and sent to the device; the table
itself takes none of its memory. What stands in the module is a lazy tensor that answers
torch.nn.functional.embedding() with the rows alone, so that subclasses of torch.nn.Embedding which
scale or shift what they look up go on working, and anything else with all of it, slowly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bminf.errors import UnsupportedModelError
from bminf.layout import overlapping, specs_of, tensors_of
from bminf.lazy import LazyTensor
from bminf.offload.backends.base import Backend

logger = logging.getLogger("bminf")


@dataclass(frozen=True)
class Table:
    """One table by all its names in the model; its bytes."""

    names: tuple[str, ...]
    nbytes: int


def find_tables(
    model: torch.nn.Module, replacements: Container[torch.nn.Module] = ()
) -> list[Table]:
    """The tables of `model` that nothing reads but by row, in module order.

    replacements: modules that will be exchanged, so that a table which is tied to one of them (an
    output head that is packed) is no longer.

    A table is the weight of a torch.nn.Embedding that the model names as its input embedding, or
    that has at least half as many rows; of a model that names none, one with as many rows as a
    linear of its own has (the head): without, it may multiply by the table itself. Smaller ones,
    of positions or queries, are often read whole. Left out are those with max_norm, which write as
    they read, and those that are trained beside what is frozen.
    """
    embeddings, is_frozen = set(_embeddings(model)), _is_frozen(model)
    by_row: set[str] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, place, tensor in tensors_of(model):
        if place.module not in replacements:
            tensors[name] = tensor
            if place.module in embeddings and place.key == "weight":
                by_row.add(name)
    return [
        Table(tuple(names), tensors[names[0]].nbytes)
        for names in _groups(tensors)
        if by_row.issuperset(names)
        and len({id(tensors[name]) for name in names}) == 1
        and not (is_frozen and tensors[names[0]].requires_grad)
    ]


def _groups(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are one, or overlap, in the order of their first names."""
    specs = specs_of(tensors)
    located = {name: spec for name, spec in specs.items() if spec.start is not None}
    runs = {name: names for _, names in overlapping(located) for name in names}
    seen: set[str] = set()
    for name in tensors:
        if name not in seen:
            names = runs.get(name, [name])
            seen.update(names)
            yield names


def _embeddings(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    inputs = list(_input_embeddings(model))
    least = min((_num_rows(module) // 2 for module in inputs), default=None)
    heads = {
        module.out_features for module in model.modules() if isinstance(module, torch.nn.Linear)
    }
    for module in model.modules():
        if _is_plain(module):
            num_rows = _num_rows(module)
            is_wanted = num_rows in heads if least is None else num_rows >= least
            if is_wanted or module in inputs:
                yield module


def _input_embeddings(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Of the model, and of the models in it."""
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        try:
            found = get() if callable(get) else None
        except (NotImplementedError, AttributeError, TypeError):  # it has none, or wants ids
            continue
        if isinstance(found, torch.nn.Embedding):
            yield found


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether it is an embedding whose weight only it can tell from any other matrix."""
    if not isinstance(module, torch.nn.Embedding) or module.max_norm is not None:
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.numel():
        return False
    return weight.is_floating_point() and weight.is_contiguous()


def _num_rows(embedding: torch.nn.Module) -> int:
    return int(embedding.weight.shape[0])  # type: ignore[index]


def _is_frozen(model: torch.nn.Module) -> bool:
    """Whether most of it is, so that what is not is there to be trained."""
    tensors = {id(tensor): tensor for _, _, tensor in tensors_of(model)}.values()
    trained_bytes = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)
    return 2 * trained_bytes <= sum(tensor.nbytes for tensor in tensors)


# ---- a table while its model runs ----------------------------------------------------------------


class RowTensor(LazyTensor):
    """A matrix on the host whose rows are given on the device."""

    _gather: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default and isinstance(args[0], RowTensor):
            return args[0]._gather(args[1])
        return super().__torch_dispatch__(func, types, args, kwargs)


class HostTable:
    """A table on the host, in place of a parameter that is let go.

    table: by its names.   model: which holds it.   rows: its values, (N, C) on the CPU.
    reads_host: whether whoever reads all of it now wants it where it lies.
    """

    def __init__(
        self,
        table: Table,
        model: torch.nn.Module,
        rows: torch.Tensor,
        backend: Backend,
        reads_host: Callable[[], bool],
        write: Callable[[HostTable, torch.Tensor], None],
    ) -> None:
        self.name, self.rows = table.names[0], rows
        self._backend, self._reads_host, self._is_warned = backend, reads_host, False
        self._places = [place for name, place, _ in tensors_of(model) if name in table.names]
        parameter = self._places[0].get()
        assert parameter is not None
        self._attributes = dict(parameter.__dict__)  # what python code hung on it
        lazy = RowTensor(
            self._read, parameter, backend.device, True, lambda value: write(self, value)
        )
        lazy._gather = self.gather
        self._lazy = _guarded(lazy)

    def release(self) -> None:
        """Put the lazy tensor in place."""
        for place in self._places:
            place.set(self._lazy)

    def holders(self) -> set[torch.nn.Module]:
        """The modules that hold it."""
        return {place.module for place in self._places}

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (...) int32 or int64, on the device -> those rows (..., C), there.

        Raises IndexError for an id that is not in the table.
        """
        return self._backend.gather(self.rows, ids)

    def restore(self, rows: torch.Tensor) -> None:
        """Give the modules an ordinary parameter again, of these values."""
        parameter = torch.nn.Parameter(rows, requires_grad=self._lazy.requires_grad)
        parameter.__dict__.update(self._attributes)
        # Whoever still has the lazy tensor goes on reading the right values.
        self._lazy._read, self._lazy._write = parameter.detach, parameter.detach().copy_
        self._lazy._gather = lambda ids: torch.embedding(parameter.detach(), ids)
        for place in self._places:
            if place.get() is self._lazy:
                place.set(parameter)

    def _read(self) -> torch.Tensor:
        if self._reads_host():
            return self.rows
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "%s, of which rows are kept on the host, is read as a whole: it is fetched anew "
                "each time, which is slow",
                self.name,
            )
        return self.rows.to(self._backend.device)


def _guarded(lazy: RowTensor) -> RowTensor:
    """`lazy`, such that a gradient for it raises, also if it is asked for later."""
    is_trainable = lazy.requires_grad
    lazy.requires_grad_(True).register_hook(_refuse_gradient)
    lazy.requires_grad_(is_trainable)
    return lazy


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise UnsupportedModelError(
        "a gradient reached an embedding whose rows are kept on the host, which cannot be trained; "
        "freeze what is not to be trained before wrapping (an embedding that is trained beside "
        "frozen weights stays on the device), or call bminf.unwrap(model)"
    )
