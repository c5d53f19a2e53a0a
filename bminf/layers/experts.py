"""Experts that a model holds as stacks: one tensor (E, N, K) for the matrices of all E experts.

Modules of transformers hold them so, and multiply in several ways that a configuration chooses.
Here one expert is multiplied after another, on the rows that the router sent to it, or, of few
tokens, all that are at hand in one call. Where their tensors lie is the caller's business: they may
be slices of the stacks, or copies of one expert in a slot. Every routed output is written by itself
and a token's outputs are added in the order of the router, so neither the order in which experts
are at hand nor where they lie changes a bit. On the CPU that gives the bits of transformers'
default (grouped_mm) in float32 and bfloat16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from bminf.cpu.library import MAX_ROWS
from bminf.cuda.launcher import launcher_for
from bminf.errors import ArgumentError
from bminf.layers.quantized_linear import (
    copy_attributes,
    has_forward_of_its_own,
    is_of_class,
)
from bminf.layers.saving import check_not_saved
from bminf.ops.dequantize import dequantize_weight
from bminf.ops.grouped_linear import MAX_PRODUCTS, grouped_linear_of_checked
from bminf.ops.linear import linear_of_checked
from bminf.ops.linear_weight_only import MIN_TENSOR_CORE_ROWS
from bminf.ops.rows import ELEMENTS
from bminf.quantization.packed import PACKED_FIELDS, Format, PackedWeight, empty
from bminf.quantization.packing import pack
from bminf.tracing import is_watched

Tensors = Mapping[str, torch.Tensor]
"""Those of one expert, by the names of the stacks in the module."""


class Visit(Protocol):
    """Where the tensors of experts are had from."""

    def __call__(self, experts: Sequence[int]) -> Iterable[Mapping[int, Tensors]]:
        """Experts, ascending -> those that are at hand together with their tensors, one such group
        after another until each has come once; good until the next one."""

    def on_host(self, ids: torch.Tensor) -> list[int]:
        """What a router chose, (T, k) integers, as (T * k,)."""


_MATRICES = ("gate_up_proj", "up_proj", "down_proj", "weight")
_MAX_LAUNCHED_ROWS = MIN_TENSOR_CORE_ROWS - 1  # of an expert, in a launch for all of them
_VECTORS = 64  # rows in which there are whole vectors, however wide they are
_DISPATCHER = "transformers.integrations.moe"
_SCALES = ("scale", "minimum", "row_scale")
# Of transformers, all of which mean the same.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")


def forward_of(module: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """What computes as the experts in `module` do, given them and a Visit before the arguments of
    their forward; None for a module that is no stack of experts, or of a class that is not known.
    """
    if isinstance(module, PackedExperts):
        return module.computes
    if is_dispatched(module) or is_of_class(module, "step3p7", "Step3p7Experts"):
        return _routed
    if is_of_class(module, "llama4", "Llama4TextExperts"):
        return _of_all_tokens
    if is_of_class(module, "jetmoe", "JetMoeParallelExperts"):
        return _of_sorted_tokens
    return None


def listed_experts(name: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """By their names in there, the experts in a list or dict of modules that is called `name`.

    None in one whose name has no "expert" in it, or where not all that hold parameters are of one
    class: nothing else tells that a token goes through some of them.
    """
    if not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        return {}
    children = module.named_children()
    experts = {key: child for key, child in children if any(True for _ in child.parameters())}
    are_experts = "expert" in name and "shared" not in name and len(experts) > 1
    are_alike = len({type(child) for child in experts.values()}) == 1
    return experts if are_experts and are_alike else {}


def has_experts(model: torch.nn.Module) -> bool:
    """Whether some module of a model holds experts that can be told apart."""
    return any(
        forward_of(module) is not None or listed_experts(path.rpartition(".")[2], module)
        for path, module in model.named_modules()
    )


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether transformers lets a configuration choose how the experts in `module` multiply."""
    forward = getattr(type(module), "forward", None)
    return getattr(forward, "__globals__", {}).get("__name__") == _DISPATCHER


def reads_by_index(module: torch.nn.Module) -> bool:
    """Whether the forward of the class is what computes, and takes the matrices of one expert after
    another by its index: transformers' "eager", which adds up in the order of the experts."""
    if forward_of(module) is not _routed or isinstance(module, PackedExperts):
        return False
    return _implementation(module) == "eager" if is_dispatched(module) else True


def reads_whole_stacks(module: torch.nn.Module) -> bool:
    """Whether somebody has registered an implementation of their own, which may do anything."""
    if isinstance(module, PackedExperts) or not is_dispatched(module):
        return False
    return _implementation(module) not in _IMPLEMENTATIONS


def _implementation(module: torch.nn.Module) -> str | None:
    return getattr(module.__dict__.get("config"), "_experts_implementation", None)


def matrices_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The stacks of matrices that are not packed, by name: (E, N, K), or transposed (E, K, N)."""
    found = {name: module._parameters.get(name) for name in _MATRICES}
    return {name: t for name, t in found.items() if t is not None and t.dim() == 3}


def stacks_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a module of experts that have a part for each expert, first index first."""
    found: dict[str, torch.Tensor | None] = {}
    for name in _MATRICES:
        found |= {key: module._parameters.get(key) for key in (name, f"{name}_bias")}
        stack = module._modules.get(name)
        if isinstance(stack, PackedStack):
            found |= {f"{name}.{key}": buffer for key, buffer in stack._buffers.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether the matrices are (K, N), for x W."""
    default = is_of_class(module, "llama4", "Llama4TextExperts")
    return bool(module.__dict__.get("is_transposed", default))


def why_not_packable(module: torch.nn.Module) -> str | None:
    """What to say of stacks of a known class that cannot be packed; None of those that can."""
    if has_forward_of_its_own(module):
        return "whose forward was replaced on the instance"
    if any(tensor.dtype not in ELEMENTS for tensor in matrices_of(module).values()):
        return "of a dtype that is not packed"
    return None


class PackedStack(torch.nn.Module):
    """The matrices (E, N, K) of E experts, packed row by row to 8 or 4 bits.

    weight: (E, N, K), or (E, K, N) if is_transposed.   Buffers: the fields of PackedWeight that the
    format has, each with a first index for the expert. Raises ArgumentError for an odd number of
    columns in 4 bits, or a weight that is not finite.
    """

    qweight: torch.Tensor

    def __init__(self, weight: torch.Tensor, is_transposed: bool, quantization: Format) -> None:
        super().__init__()
        self.form, self.is_transposed, self.dtype = quantization, is_transposed, weight.dtype
        self.num_experts, *shape = weight.shape
        self.out_features, self.in_features = reversed(shape) if is_transposed else shape
        like = empty(self.out_features, self.in_features, quantization, "meta")
        for name in PACKED_FIELDS:
            self._buffers[name] = self._stacked(getattr(like, name), weight.device)
        if not weight.is_meta:
            for expert in range(self.num_experts):
                self._put(expert, pack(self.matrix(weight[expert]), quantization))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """That of one expert as (N, K)."""
        return weight.detach().t() if self.is_transposed else weight.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was packed."""
        shape = (self.out_features, self.in_features)
        return (self.num_experts, *(reversed(shape) if self.is_transposed else shape))

    def of(self, tensors: Mapping[str, torch.Tensor | None], prefix: str = "") -> PackedWeight:
        """The matrix of one expert, whose fields are in `tensors` under names with this prefix."""
        qweight, scale, minimum, code_sum, row_scale = (
            tensors.get(prefix + name) for name in PACKED_FIELDS
        )
        assert qweight is not None and scale is not None
        return PackedWeight(
            qweight, scale, minimum, self.in_features, self.form.group_size, code_sum, row_scale
        )

    def __getitem__(self, expert: int) -> torch.Tensor:
        """(N, K), or (K, N) if transposed, in the compute dtype: dequantized each time."""
        fields = {name: t if t is None else t[expert] for name, t in self._buffers.items()}
        return self.matrix(dequantize_weight(self.of(fields), self.dtype))

    def rows(self, rows: torch.Tensor) -> PackedStack:
        """These rows of each expert's matrix, (n,) int64, which is not transposed."""
        return self._of_each([packed.rows(rows) for packed in self._each()])

    def columns(self, start: int, end: int) -> PackedStack:
        """Some columns of each, with the same codes and scales; see PackedWeight.columns()."""
        return self._of_each([packed.columns(start, end) for packed in self._each()])

    def _each(self) -> Iterator[PackedWeight]:
        for expert in range(self.num_experts):
            yield self.of({n: t if t is None else t[expert] for n, t in self._buffers.items()})

    def _of_each(self, parts: Sequence[PackedWeight]) -> PackedStack:
        shape = (len(parts), parts[0].out_features, parts[0].in_features)
        like = torch.empty(shape, dtype=self.dtype, device="meta")
        found = PackedStack(like, is_transposed=False, quantization=self.form)
        for name in PACKED_FIELDS:
            fields = [getattr(part, name) for part in parts]
            found._buffers[name] = None if fields[0] is None else torch.stack(fields)
        return found.train(self.training)

    def _stacked(self, like: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        if like is None:
            return None
        return torch.zeros((self.num_experts, *like.shape), dtype=like.dtype, device=device)

    def _put(self, expert: int, packed: PackedWeight) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer[expert] = getattr(packed, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedStack:
        """As QuantizedLinear: a new dtype is for the activations, not for the scales."""
        before = {name: self._buffers[name] for name in _SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        for name, tensor in before.items():
            held = self._buffers[name]
            if tensor is not None and held is not None and held.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self.qweight.device)
        return self

    def _save_to_state_dict(self, *arguments: Any, **more: Any) -> None:
        check_not_saved()
        super()._save_to_state_dict(*arguments, **more)

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        """Kernels read these buffers unchecked at each call, so they are checked here."""
        super()._load_from_state_dict(*arguments, **more)
        self.of({name: t if t is None else t[0] for name, t in self._buffers.items()}).check()

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, {self.form}"
        )


class PackedExperts(torch.nn.Module):
    """The experts in `module`, their matrices packed to 8 or 4 bits.

    module: of a class of transformers that holds stacks of experts, see forward_of(); it is left
        as it is. What code hung on it (hooks, attributes), its other modules and its methods are
        there as before, and it is called as before.
    quantization: a Format.

    A PackedStack stands in place of each stack of matrices, under its name; biases stay in their
    dtype. Frozen: gradients flow to the input only. Whatever implementation a configuration of
    transformers names, the experts are multiplied by bminf.ops.linear, one after another. Raises
    ArgumentError as PackedStack, and for a module that is none.
    """

    num_experts: int

    def __init__(self, module: torch.nn.Module, quantization: Format) -> None:
        super().__init__()
        computes = forward_of(module)
        if computes is None or not matrices_of(module):
            raise ArgumentError(
                f"a {type(module).__name__} holds no stacks of experts of a class that is known"
            )
        self.form, self.computes = quantization, computes
        matrices = matrices_of(module)
        for name, parameter in module._parameters.items():
            self._parameters[name] = None if name in matrices else _frozen(parameter)
        self._modules.update(module._modules)
        for name, weight in matrices.items():
            del self._parameters[name]
            with torch.no_grad():
                stack = PackedStack(weight.detach(), is_transposed(module), quantization)
            self._modules[name] = stack.train(module.training)
        copy_attributes(module, self)
        self._packed_class = type(module)

    def stacks(self) -> list[tuple[str, PackedStack]]:
        """By the names of the parameters that they stand for."""
        return [(n, m) for n, m in self._modules.items() if isinstance(m, PackedStack)]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.computes(self, VisitResident(self), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        kind = self.__dict__.get("_packed_class", torch.nn.Module)
        if name.startswith("__") or not hasattr(kind, name):
            return super().__getattr__(name)
        member = inspect.getattr_static(kind, name)  # a method or property of the class it was
        return member.__get__(self, kind) if hasattr(member, "__get__") else member


def _frozen(parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
    if parameter is None:
        return None
    return torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)


class VisitResident:
    """A Visit of experts that lie in the stacks of `module`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._stacks = stacks_of(module)

    def __call__(self, experts: Sequence[int]) -> Iterator[Mapping[int, Tensors]]:
        if experts:
            yield {
                expert: {name: stack[expert] for name, stack in self._stacks.items()}
                for expert in experts
            }

    def on_host(self, ids: torch.Tensor) -> list[int]:
        return ids.reshape(-1).tolist()


# ---- what the experts of each known class compute -----------------------------------------------


def _routed(
    experts: Any,
    visit: Visit,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of what the experts that a router chose make of each token.

    hidden_states: (T, C).   top_k_index: (T, k) integers; those of num_experts and more are of no
    expert here, and add nothing.   top_k_weights: (T, k).   Returns (T, C).
    """
    ids, order = torch.sort(top_k_index.reshape(-1))
    tokens = hidden_states[order // top_k_index.shape[1]]
    spans = _spans(visit.on_host(top_k_index), experts.num_experts)
    if not spans:
        return torch.zeros_like(hidden_states)
    inner, outputs = _Rows(len(order)), _Rows(len(order))
    is_grouped = _is_grouped(experts, tokens, spans)
    for at_hand in visit(list(spans)):
        if is_grouped:
            _multiply_together(experts, tokens, ids, at_hand, inner, outputs)
            continue
        for expert, tensors in at_hand.items():
            rows = spans[expert]
            wide = inner.put(rows, _product(experts, _first_matrix(experts), tokens[rows], tensors))
            narrow = _activated(experts, wide, rows)
            outputs.put(rows, _product(experts, "down_proj", narrow, tensors))
    return _added(experts, outputs.all, order, hidden_states, top_k_weights)


def _is_grouped(experts: Any, tokens: torch.Tensor, spans: Mapping[int, slice]) -> bool:
    """Whether one call multiplies all tokens with a matrix of their own: where each expert has so
    few that the kernels for few rows would multiply them, which gives the same bits."""
    device, stacks = tokens.device, _packed_stacks(experts)
    if stacks is None or tokens.dtype not in ELEMENTS or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type) or is_watched():
        return False
    is_cpu = launcher_for(device) is None
    # More tokens on a CPU are activated expert by expert, while they are in the cache.
    most, most_of_expert = (_VECTORS, MAX_ROWS) if is_cpu else (MAX_PRODUCTS, _MAX_LAUNCHED_ROWS)
    is_few = all(rows.stop - rows.start <= most_of_expert for rows in spans.values())
    biases = [experts._parameters.get(f"{name}_bias") for name in stacks]
    is_alike = all(bias is None or bias.dtype == tokens.dtype for bias in biases)
    return is_few and is_alike and len(tokens) <= most


def _packed_stacks(experts: Any) -> dict[str, PackedStack] | None:
    """Both, in the order of their products; None where one is not packed."""
    found = {name: experts._modules.get(name) for name in (_first_matrix(experts), "down_proj")}
    packed = {name: stack for name, stack in found.items() if isinstance(stack, PackedStack)}
    return packed if len(packed) == len(found) else None


def _multiply_together(
    experts: Any,
    tokens: torch.Tensor,
    ids: torch.Tensor,
    at_hand: Mapping[int, Tensors],
    inner: _Rows,
    outputs: _Rows,
) -> None:
    """Put the outputs of the experts at hand in their rows, for each matrix in one call.

    ids: the expert of each token, of the others too: their rows stay as they are.
    """
    wide = _products(experts, _first_matrix(experts), tokens, ids, at_hand, inner)
    activate = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    _products(experts, "down_proj", activate(wide), ids, at_hand, outputs)


def _products(
    experts: Any,
    name: str,
    x: torch.Tensor,
    ids: torch.Tensor,
    at_hand: Mapping[int, Tensors],
    rows: _Rows,
) -> torch.Tensor:
    stack: PackedStack = experts._modules[name]
    weights = {expert: stack.of(tensors, f"{name}.") for expert, tensors in at_hand.items()}
    has_bias = all(f"{name}_bias" in tensors for tensors in at_hand.values())
    biases = {e: tensors[f"{name}_bias"] for e, tensors in at_hand.items()} if has_bias else None
    out = rows.of_width(stack.out_features, x)
    return grouped_linear_of_checked(x, weights, ids, biases, None, out)


def _added(
    experts: Any,
    outputs: torch.Tensor,
    order: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Each token's outputs, weighted.   outputs: (T * k, C), in this order of the routing."""
    if getattr(experts, "has_post_expert_norm", False):
        outputs = experts.post_expert_norm(outputs)
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    weighted = weighted[_inverse(order)].view(*top_k_weights.shape, -1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _spans(ids: list[int], num_experts: int) -> dict[int, slice]:
    """Of each expert in `ids`, ascending, the rows that are its own when the ids are sorted."""
    counts: dict[int, int] = {}
    for expert in ids:
        counts[expert] = counts.get(expert, 0) + 1
    spans, start = {}, 0
    for expert in sorted(counts):
        if expert < 0:
            raise ArgumentError(f"a router chose the expert {expert}; give numbers from 0 on")
        if expert < num_experts:
            spans[expert] = slice(start, start := start + counts[expert])
    return spans


def _inverse(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class _Rows:
    """(S, N), some rows after others; zeros before."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.all: torch.Tensor

    def put(self, rows: slice, values: torch.Tensor) -> torch.Tensor:
        """Returns all."""
        self.of_width(values.shape[1], values)[rows] = values
        return self.all

    def of_width(self, width: int, like: torch.Tensor) -> torch.Tensor:
        """Returns all."""
        if not hasattr(self, "all"):
            self.all = like.new_zeros(self._number, width)
        return self.all


def _first_matrix(experts: Any) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def _activated(experts: Any, wide: torch.Tensor, rows: slice) -> torch.Tensor:
    """What the second matrix of an expert multiplies.   wide: (S, N), where `rows` are its own.

    The vectors of a CPU and what is left behind the last one have other last bits, so that the
    neighbours of a row decide: these are the ones that it has where all rows are taken at once.
    """
    activate = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    start = rows.start // _VECTORS * _VECTORS
    stop = min(len(wide), -(-rows.stop // _VECTORS) * _VECTORS)
    taken = wide[start:stop]
    if torch.is_grad_enabled():  # which would keep all rows, and refuse that more are put there
        taken = taken.clone()
    return activate(taken)[rows.start - start : rows.stop - start]


def _of_all_tokens(experts: Any, visit: Visit, hidden_states: torch.Tensor) -> torch.Tensor:
    """Llama 4: every expert has all tokens, scaled by its score, which is 0 for most of them.

    hidden_states: (E * T, C).   Returns the same shape: zeros for an expert that all scores of
    are 0, as multiplying would give.
    """
    x = hidden_states.view(experts.num_experts, -1, experts.hidden_size)
    is_asked = (x != 0).flatten(1).any(dim=1).tolist()
    outputs = torch.zeros_like(x)
    asked_for = [index for index, asked in enumerate(is_asked) if asked]
    for expert, tensors in _one_by_one(visit(asked_for)):
        gate, up = _product(experts, "gate_up_proj", x[expert], tensors).chunk(2, dim=-1)
        outputs[expert] = _product(experts, "down_proj", up * experts.act_fn(gate), tensors)
    return outputs.view(-1, experts.hidden_size)


def _of_sorted_tokens(
    experts: Any, visit: Visit, inputs: torch.Tensor, expert_size: Sequence[int]
) -> torch.Tensor:
    """JetMoe: one matrix an expert.   inputs: (S, K), sorted by expert.   expert_size: rows of
    each.   Returns (S, N)."""
    parts = inputs.split(expert_size, dim=0)
    outputs = inputs.new_zeros(len(inputs), experts.output_size)
    starts = [0, *accumulate(map(len, parts))]
    asked_for = [expert for expert, part in enumerate(parts) if len(part)]
    for expert, tensors in _one_by_one(visit(asked_for)):
        rows = slice(starts[expert], starts[expert + 1])  # views of split() take no gradients
        outputs[rows] = _product(experts, "weight", parts[expert], tensors)
    return outputs


def _one_by_one(groups: Iterable[Mapping[int, Tensors]]) -> Iterator[tuple[int, Tensors]]:
    for at_hand in groups:
        yield from at_hand.items()


def _product(experts: Any, name: str, x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """x W^T, with the bias where there is one: (n, K) -> (n, N)."""
    bias, stack = tensors.get(f"{name}_bias"), experts._modules.get(name)
    if isinstance(stack, PackedStack):
        return linear_of_checked(x, stack.of(tensors, f"{name}."), bias, "auto")
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm knows none either
        with torch.autocast(x.device.type, enabled=False):
            return _product(experts, name, x, tensors)
    weight = tensors[name]
    y = torch.mm(x.to(weight.dtype), weight if is_transposed(experts) else weight.t())
    return y if bias is None else y + bias
