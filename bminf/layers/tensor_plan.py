"""Models of transformers on several ranks: their plan for tensor parallel, read as data.

A model says by name how its linears are shared ("colwise", "rowwise"); its attention works with as
many heads as come out of them. Here each rank keeps its own part of these weights, packed in whole
rows before they are cut, and the rest of the model is as it was. DTensors are not used.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bminf.errors import ArgumentError, RankError, UnsupportedModelError
from bminf.layers.parallel import Group, RowParallel
from bminf.layers.quantize import meta_linear
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight

_BY_ROWS = ("colwise",)  # in transformers' words, which are of the product's columns
_BY_COLUMNS = ("rowwise", "rowwise_split_input")
_TAKE_ALL = ("rowwise_split_input",)  # behind linears whose results were gathered
_GATHERED = ("colwise_gather_output", "colwise_rep")
_WHOLE = ("embedding_rowwise", "replicated", "replicated_with_grad_allreduce")
"""Of these each rank keeps all: tables, of which rows are read, and norms."""

_MOST_RANKS = 64  # that a message names
_SAMPLE = 64  # numbers of a tensor that are compared between ranks


class Gathered(torch.nn.Module):
    """A linear of which each rank has some rows, whose results lie side by side: an output head, or
    what goes into a norm or a split over all of them."""

    def __init__(self, linear: torch.nn.Module, group: Group) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    @property
    def weight(self) -> Any:
        """This rank's, which code asks for its dtype."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        return self.group.gather(self.linear(x))


@dataclass(frozen=True)
class Shared:
    """A linear that ranks share.   is_by_columns: of its weight.   is_gathered: see Gathered.
    takes_all: see RowParallel."""

    name: str
    linear: torch.nn.Linear
    is_by_columns: bool
    is_gathered: bool
    takes_all: bool

    @property
    def size(self) -> int:
        return self.linear.in_features if self.is_by_columns else self.linear.out_features


def shared_linears(model: torch.nn.Module) -> list[Shared]:
    """The linears that the model's plan shares, in order.

    Raises UnsupportedModelError for a model without a plan, or with one that says what is not known
    here; and for one that is cut already.
    """
    kind = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if any(isinstance(module, RowParallel | Gathered) for module in model.modules()):
        raise UnsupportedModelError(f"this {kind} is cut for ranks already; load it again")
    found = [*_found(model, plan)]
    if not any(not one.is_gathered for one in found):
        raise UnsupportedModelError(
            f"{kind} has no plan for tensor parallel in transformers (or one for its head alone); "
            "leave tp out, and run it on one card"
        )
    return found


def _found(model: torch.nn.Module, plan: Mapping[str, str]) -> Iterator[Shared]:
    patterns = {
        re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()
    }
    others = {id(m._parameters.get("weight")) for m in model.modules() if not _is_linear(m)}
    for name, module in model.named_modules():
        style = next((s for pattern, s in patterns.items() if pattern.fullmatch(name)), None)
        if style is None or style in _WHOLE:
            continue
        if style not in (*_BY_ROWS, *_BY_COLUMNS, *_GATHERED) or not _is_linear(module):
            raise UnsupportedModelError(
                f"the plan of {type(model).__name__} for tensor parallel says {style!r} of {name}, "
                f"a {type(module).__name__}, which is not known here; leave tp out"
            )
        assert isinstance(module, torch.nn.Linear)
        if style in _GATHERED and id(module._parameters.get("weight")) in others:
            continue  # tied to the embedding, which every rank has whole
        yield Shared(name, module, style in _BY_COLUMNS, style in _GATHERED, style in _TAKE_ALL)


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or isinstance(module, QuantizedLinear)


def check_ranks(
    model: torch.nn.Module, shared: list[Shared], form: Format | None, num_ranks: int
) -> None:
    """Raise ArgumentError, with the numbers that do, where so many ranks cannot share a model.

    form: of what is not packed yet.
    """
    reason = _why_not(model, shared, form, num_ranks)
    if reason is not None:
        others = range(2, _MOST_RANKS + 1)
        fit = [n for n in others if _why_not(model, shared, form, n) is None]
        raise ArgumentError(
            f"{num_ranks} ranks cannot share this {type(model).__name__}: {reason}; numbers of "
            f"ranks that can: {', '.join(map(str, [1, *fit]))}"
        )


def _why_not(
    model: torch.nn.Module, shared: list[Shared], form: Format | None, num_ranks: int
) -> str | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    has_all_heads = all(one.is_gathered or one.takes_all for one in shared)
    for field in () if has_all_heads else ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, field, None) or num_ranks
        if count % num_ranks:
            return f"{field} is {count}"
    for one in shared:
        own = one.linear.form if isinstance(one.linear, QuantizedLinear) else form
        unit = 1 if own is None or not one.is_by_columns else own.group_size or 8 // own.bits
        if one.size % (unit * num_ranks):
            what = "columns" if one.is_by_columns else "rows"
            return f"{one.name} has {one.size} {what}" + (f", {unit} together" if unit > 1 else "")
    return None


def sample_of(model: torch.nn.Module) -> dict[str, str]:
    """What is alike where ranks have loaded one model: the checksum of a few numbers of each tensor
    of it, under a name that says so. Numbers that were drawn by each rank differ at once."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            first = tensor.detach()[(slice(1),) * (tensor.dim() - 1)].flatten()[:_SAMPLE]
            digest.update(first.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"the checksum of the weights": digest.hexdigest()[:16]}


def cut(model: torch.nn.Module, shared: list[Shared], form: Format | None, group: Group) -> None:
    """Leave this rank's part of each of these linears in `model`, packed as `form`, if any.

    Heads are left to whoever packs the rest: rows are packed alike before and after they are cut.
    A pass that fails on one rank then ends on all, see Group.together().
    """
    for one in shared:
        whole = one.linear
        if form is not None and not isinstance(whole, QuantizedLinear) and not one.is_gathered:
            whole = QuantizedLinear(whole, quantization=form)
        part: torch.nn.Module = _part(whole, one, group)
        if one.is_by_columns:
            part = RowParallel(part, group, one.takes_all)
        elif one.is_gathered:
            part = Gathered(part, group)
        parent, _, key = one.name.rpartition(".")
        model.get_submodule(parent)._modules[key] = part

    def tell(module: torch.nn.Module, given: Any, result: Any) -> None:
        error = sys.exc_info()[1]
        if result is None and error is not None and not isinstance(error, RankError):
            group.leave(error)

    model.register_forward_hook(tell, always_call=True)
    if hasattr(model, "generate"):
        model.__dict__["generate"] = _Telling(model, group)


class _Telling:
    """generate() of a model that is cut. It may fail between two passes, in a streamer, say: then
    all ranks end; not where it fails before the first, as it does on all for what it was given."""

    def __init__(self, model: Any, group: Group) -> None:
        self._model, self._group = weakref.ref(model), group  # a cycle would keep its memory
        self.__doc__, self.__signature__ = model.generate.__doc__, inspect.signature(model.generate)

    def __call__(self, *given: Any, **more: Any) -> Any:
        model: Any = self._model()
        num_before = self._group.num_sums
        try:
            return type(model).generate(model, *given, **more)
        except RankError:
            raise
        except BaseException as error:
            if self._group.num_sums > num_before or not isinstance(error, Exception):
                self._group.leave(error)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> _Telling:
        """That of the copy of its model."""
        own = self._model()
        return _Telling(memo.get(id(own), own), self._group)


def _part(linear: torch.nn.Linear, one: Shared, group: Group) -> torch.nn.Linear:
    size = one.size // group.size
    start, end = group.rank * size, (group.rank + 1) * size
    shape = (size, linear.out_features) if one.is_by_columns else (linear.in_features, size)
    has_bias = linear.bias is not None and (not one.is_by_columns or group.rank == 0)
    with torch.device("meta"):
        part = torch.nn.Linear(*shape, bias=has_bias, dtype=_dtype_of(linear))
    if isinstance(linear, QuantizedLinear):
        packed = linear.packed
        own = packed.columns(start, end) if one.is_by_columns else packed.rows(slice(start, end))
        part = meta_linear(part, linear.form)
        part._buffers.update(_copied(own))
    else:
        weight = linear.weight.detach()
        weight = weight[:, start:end] if one.is_by_columns else weight[start:end]
        part.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    if has_bias:
        bias = linear.bias.detach()
        bias = bias if one.is_by_columns else bias[start:end]
        part.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return part.train(linear.training)


def _copied(packed: PackedWeight) -> dict[str, torch.Tensor | None]:
    """Its tensors, without the memory of others that they are views of."""
    held = {name: getattr(packed, name) for name in PACKED_FIELDS}
    return {name: tensor if tensor is None else tensor.clone() for name, tensor in held.items()}


def _dtype_of(linear: torch.nn.Linear) -> torch.dtype:
    return linear.dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype
