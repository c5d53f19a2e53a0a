"""Models of transformers on several ranks: their plan for tensor parallel, read as data.

A model says by name how its linears are shared ("colwise", "rowwise"); its attention works with as
many heads as come out of them. Of stacks of experts each rank has some inner columns of every one.
Here each rank keeps its own part of these weights, packed in whole rows before they are cut, and
the rest of the model is as it was. DTensors are not used.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bminf.errors import ArgumentError, RankError, UnsupportedModelError
from bminf.layers.experts import (
    PackedExperts,
    PackedStack,
    is_dispatched,
    matrices_of,
    stacks_of,
    why_not_packable,
)
from bminf.layers.parallel import Group, RowParallel
from bminf.layers.quantize import meta_linear
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight

_BY_ROWS = ("colwise",)  # in transformers' words, which are of the product's columns
_TAKES_ALL = "rowwise_split_input"
_BY_COLUMNS = ("rowwise", _TAKES_ALL)
_GATHERED = ("colwise_gather_output", "colwise_rep")
_WHOLE = ("embedding_rowwise", "replicated", "replicated_with_grad_allreduce")
"""Of these each rank keeps all: tables, of which rows are read, and norms."""

_EXPERTS = "moe_tp_experts"
_STACKS = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
"""What is said of the stacks in such a module, each as far as there is one."""

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
    is_gathered: bool = False
    takes_all: bool = False

    @property
    def size(self) -> int:
        return self.linear.in_features if self.is_by_columns else self.linear.out_features

    def unit(self, form: Format | None) -> int:
        """Columns that go together.   form: of what is not packed yet."""
        own = self.linear.form if isinstance(self.linear, QuantizedLinear) else form
        return _unit(own) if self.is_by_columns else 1


@dataclass(frozen=True)
class SharedExperts:
    """Stacks of experts, of each of which ranks have some of the columns between its matrices; what
    they make of a token is summed."""

    name: str
    module: torch.nn.Module
    is_by_columns = True

    @property
    def size(self) -> int:
        return int(_shapes(self.module)["down_proj"][-1])

    def unit(self, form: Format | None) -> int:
        """As of Shared; torch.nn.functional.grouped_mm takes rows of whole 16 bytes."""
        own = self.module.form if isinstance(self.module, PackedExperts) else form
        if own is None or why_not_packable(self.module) is not None:
            return max(1, 16 // matrices_of(self.module)["down_proj"].itemsize)
        return _unit(own)


def _unit(form: Format | None) -> int:
    return 1 if form is None else form.group_size or 8 // form.bits


Parts = Sequence[Shared | SharedExperts]
_StyleOf = Callable[[str], str | None]


def shared_parts(model: torch.nn.Module) -> Parts:
    """What the model's plan shares, in order.

    Raises UnsupportedModelError for a model without a plan, or with one that says what is not known
    here; and for one that is cut already.
    """
    kind = type(model).__name__
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if any(isinstance(module, RowParallel | Gathered) for module in model.modules()):
        raise UnsupportedModelError(f"this {kind} is cut for ranks already; load it again")
    found = [*_found(model, plan)]
    if all(isinstance(one, Shared) and one.is_gathered for one in found):
        raise UnsupportedModelError(
            f"{kind} has no plan for tensor parallel in transformers (or one for its head alone); "
            "leave tp out, and run it on one card"
        )
    return found


def _found(model: torch.nn.Module, plan: Mapping[str, str]) -> Iterator[Shared | SharedExperts]:
    patterns = {
        re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in plan.items()
    }

    def style_of(name: str) -> str | None:
        return next((s for pattern, s in patterns.items() if pattern.fullmatch(name)), None)

    others = {id(m._parameters.get("weight")) for m in model.modules() if not _is_linear(m)}
    for name, module in model.named_modules():
        style = style_of(name)
        if style is None or style in _WHOLE:
            continue
        if style == _EXPERTS and _are_known(name, module, style_of):
            yield SharedExperts(name, module)
            continue
        if style not in (*_BY_ROWS, *_BY_COLUMNS, *_GATHERED) or not _is_linear(module):
            raise UnsupportedModelError(
                f"the plan of {type(model).__name__} for tensor parallel says {style!r} of {name}, "
                f"a {type(module).__name__}, which is not known here; leave tp out"
            )
        assert isinstance(module, torch.nn.Linear)
        if style in _GATHERED and id(module._parameters.get("weight")) in others:
            continue  # tied to the embedding, which every rank has whole
        yield Shared(name, module, style in _BY_COLUMNS, style in _GATHERED, style == _TAKES_ALL)


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or isinstance(module, QuantizedLinear)


def _are_known(name: str, module: torch.nn.Module, style_of: _StyleOf) -> bool:
    """Whether `module` holds stacks whose products add up over the ranks, shared as is said."""
    shapes = _shapes(module)
    is_whole = "down_proj" in shapes and len(shapes) == len(_stacks(module)) == 2
    is_linear_after = not getattr(module, "has_post_expert_norm", False)
    is_packed = isinstance(module, PackedExperts)
    is_upright = not getattr(module, "is_transposed", False)
    return (
        (is_packed or is_dispatched(module)) and is_whole and is_linear_after and is_upright
        and all(style_of(f"{name}.{stack}") == _STACKS.get(stack) for stack in shapes)
    )  # fmt: skip


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """(E, N, K) of each stack of matrices, by name."""
    if isinstance(module, PackedExperts):
        return {name: stack.shape for name, stack in module.stacks()}
    return {name: tuple(stack.shape) for name, stack in matrices_of(module).items()}


def _stacks(module: torch.nn.Module) -> set[str]:
    """The names of all that has a part for each expert, biases too."""
    return {name.partition(".")[0] for name in stacks_of(module)}


def check_ranks(model: torch.nn.Module, shared: Parts, form: Format | None, num_ranks: int) -> None:
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
    model: torch.nn.Module, shared: Parts, form: Format | None, num_ranks: int
) -> str | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    fields = ("num_attention_heads", "num_key_value_heads") if _are_heads_shared(shared) else ()
    for field in fields:
        count = getattr(config, field, None) or num_ranks
        if count % num_ranks:
            return f"{field} is {count}"
    for one in shared:
        unit = one.unit(form)
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


def _are_heads_shared(shared: Parts) -> bool:
    """Whether each rank has some of the heads: where results are gathered, it has all of them."""
    return any(
        isinstance(one, Shared) and not (one.is_by_columns or one.is_gathered) and "att" in one.name
        for one in shared
    )


def cut(model: torch.nn.Module, shared: Parts, form: Format | None, group: Group) -> None:
    """Leave this rank's part of all that is shared in `model`, packed as `form`, if any.

    Heads are left to whoever packs the rest: rows are packed alike before and after they are cut.
    A pass that fails on one rank then ends on all, see Group.together().
    """
    for one in shared:
        if isinstance(one, SharedExperts):
            part = _cut_experts(one.module, form, group)
        else:
            part = _cut_linear(one, form, group)
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


def _cut_linear(one: Shared, form: Format | None, group: Group) -> torch.nn.Module:
    whole = one.linear
    if form is not None and not isinstance(whole, QuantizedLinear) and not one.is_gathered:
        whole = QuantizedLinear(whole, quantization=form)
    part = _part(whole, one, group)
    if one.is_by_columns:
        return RowParallel(part, group, one.takes_all)
    return Gathered(part, group) if one.is_gathered else part


def _cut_experts(module: torch.nn.Module, form: Format | None, group: Group) -> torch.nn.Module:
    is_packed = isinstance(module, PackedExperts)
    if form is not None and not is_packed and why_not_packable(module) is None:
        module = PackedExperts(module, form)
    if isinstance(module, PackedExperts):
        for name, packed in module.stacks():
            module._modules[name] = _part_of_packed(name, packed, group)
    else:
        for name, stack in matrices_of(module).items():
            part = _part_of_stack(name, stack.detach(), group)
            module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    module.register_forward_hook(partial(_summed, group))
    return module


def _part_of_packed(name: str, stack: PackedStack, group: Group) -> PackedStack:
    if name != "down_proj":
        return stack.rows(_rows(name, stack.out_features, group))
    size = stack.in_features // group.size
    return stack.columns(group.rank * size, (group.rank + 1) * size)


def _part_of_stack(name: str, stack: torch.Tensor, group: Group) -> torch.Tensor:
    if name == "down_proj":
        return group.share(stack, 2).clone()
    return stack[:, _rows(name, stack.shape[1], group)]


def _rows(name: str, num_rows: int, group: Group) -> torch.Tensor:
    """This rank's rows of a first matrix: of both halves, where gate and up are one."""
    num_fused = 2 if _STACKS[name] == "packed_colwise" else 1
    rows = torch.arange(num_rows).view(num_fused, -1)
    return group.share(rows, 1).reshape(-1)


def _summed(group: Group, module: torch.nn.Module, given: Any, y: torch.Tensor) -> torch.Tensor:
    return group.sum(y)


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
