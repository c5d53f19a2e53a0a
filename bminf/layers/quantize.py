"""Which linears of a model are quantised and what stays as it is, how large they will be, and the
exchange itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from warnings import warn

import torch

from bminf.errors import ArgumentError
from bminf.layers.quantized_linear import QuantizedLinear, is_conv1d, is_hooked
from bminf.layout import ModuleBlock, tensors_of
from bminf.ops.rows import ELEMENTS
from bminf.quantization.packed import Format
from bminf.units import format_bytes

_PROBE = (64, 48)  # columns and rows

# torch.nn.MultiheadAttention computes with the weight of its output projection, and never calls it.
_READ_BY_PARENT = (torch.nn.modules.linear.NonDynamicallyQuantizableLinear,)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether `module` is a linear that is not packed yet, of whatever class."""
    return (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and not isinstance(
        module, QuantizedLinear
    )


def is_quantizable(module: torch.nn.Module) -> bool:
    """Whether a QuantizedLinear can stand in for `module`: nn.Linear, Conv1D, or a subclass of
    nn.Linear that computes the same.

    A linear whose weight is computed anew by a hook (weight_norm, pruning) or a parametrization,
    is not initialised yet, or is read by the module around it, stays as it is.
    """
    if not is_linear(module) or type(module) in _READ_BY_PARENT:
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in ELEMENTS or weight.dim() != 2:
        return False
    return is_conv1d(module) or computes_as_linear(module)


def why_not_quantizable(module: torch.nn.Module) -> str:
    """What to say of a linear that is_quantizable() is not true of."""
    weight = module._parameters.get("weight")
    if type(module) in _READ_BY_PARENT:
        return f"of the class {type(module).__name__}, which the module around it reads"
    if _has_forward_of_its_own(module):
        return "whose forward was replaced on the instance"
    if weight is not None and weight.dtype not in ELEMENTS:
        return f"of the dtype {weight.dtype}"
    return f"of the class {type(module).__name__}, not computing as torch.nn.Linear does"


def computes_as_linear(module: torch.nn.Module) -> bool:
    """Whether `module`, of nn.Linear or a subclass, gives x W^T + b and has no other state.

    A subclass with a forward of its own is tried on small random numbers, weights and inputs, in
    float32. The module itself is not called.
    """
    names = {name for name, tensor in module._parameters.items() if tensor is not None}
    if not names <= {"weight", "bias"} or module._buffers or module._modules:
        return False
    if _has_forward_of_its_own(module):
        return False
    if type(module).__call__ is not torch.nn.Module.__call__:  # and around its forward, whatever
        return False
    if type(module).forward is torch.nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _agrees_on_a_probe(module)


def _has_forward_of_its_own(module: torch.nn.Module) -> bool:
    """Whether somebody has put another forward on this instance."""
    forward = module.__dict__.get("_old_forward" if is_hooked(module) else "forward")
    is_of_class = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (is_of_class and forward.__self__ is module)


def _agrees_on_a_probe(module: torch.nn.Module) -> bool:
    twin = torch.nn.Linear(_PROBE[0], _PROBE[1], bias=module._parameters.get("bias") is not None)
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": twin.weight, "bias": twin.bias}
    probe.__dict__["in_features"], probe.__dict__["out_features"] = _PROBE
    rows = torch.randn(6, _PROBE[0])
    # Large and small ones: a clamp, or a rounding of activations, shows.
    for x in (rows, rows.view(2, 3, -1), 1e3 * rows, 1e-3 * rows):
        try:
            y = type(probe).forward(probe, x)
        except Exception:  # whatever it wants instead, it is no linear
            return False
        expected = twin(x)
        if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
            return False
        if (y - expected).abs().max() > 1e-5 * expected.abs().max():
            return False
    return True


def skeleton(linear: torch.nn.Module, form: Format) -> QuantizedLinear:
    """The QuantizedLinear that `linear` will become, on the meta device: shapes without bytes."""
    with torch.device("meta"):
        twin = torch.nn.Linear(1, 1, bias=linear.bias is not None)
    twin.weight = torch.nn.Parameter(_meta(linear.weight), requires_grad=False)
    if linear.bias is not None:
        twin.bias = torch.nn.Parameter(_meta(linear.bias), requires_grad=False)
    if is_conv1d(linear):
        twin.weight = torch.nn.Parameter(twin.weight.t(), requires_grad=False)
    return QuantizedLinear(twin, quantization=form)


def quantize_children(
    root: torch.nn.Module,
    stand_ins: Mapping[torch.nn.Module, QuantizedLinear],
    prefix: str = "",
) -> Iterator[str]:
    """Put a QuantizedLinear in place of each module below `root` that has a stand-in; yield names.

    stand_ins: module -> its skeleton.   prefix: of the names, that of `root` with a dot.
    A module that is registered twice is exchanged in both places for the same new one. Raises
    ArgumentError, with the name, for a weight that cannot be packed.
    """
    exchanged: dict[torch.nn.Module, QuantizedLinear] = {}
    for name, parent in list(root.named_modules(remove_duplicate=False)):
        for child_name, child in list(parent._modules.items()):
            if child is None or child not in stand_ins:
                continue
            full_name = prefix + (f"{name}.{child_name}" if name else child_name)
            if child not in exchanged:
                exchanged[child] = _packed(child, stand_ins[child], full_name)
            parent._modules[child_name] = exchanged[child]
            yield full_name


def _packed(linear: torch.nn.Module, stand_in: QuantizedLinear, name: str) -> QuantizedLinear:
    try:
        return QuantizedLinear(linear, stand_in.activations, stand_in.form)
    except ArgumentError as error:
        raise ArgumentError(f"{name!r} cannot be quantised: {error}") from error


def _meta(tensor: torch.nn.Parameter | torch.Tensor | torch.nn.Module) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


StandIns = Mapping[torch.nn.Module, QuantizedLinear]
"""Linears to quantise, each with the skeleton of what will stand in its place."""

Predicate = Callable[[str, torch.nn.Module], bool]

Linear = tuple[str, torch.nn.Module]


@dataclass(frozen=True)
class Choice:
    """stand_ins: what is packed.   kept: why a linear stays that was wanted -> all of those."""

    stand_ins: StandIns
    kept: Mapping[str, Sequence[Linear]]


def choose(
    model: torch.nn.Module,
    blocks: Iterable[ModuleBlock],
    form: Format | None,
    wanted: Predicate | None = None,
) -> Choice:
    """The linears to quantise, as `form`; None is none.

    wanted: says so by name and module; None takes the linears in the blocks, or all where there are
    no blocks, but output heads, adapters, and those that a group of columns is too wide for. What
    cannot be packed is kept. A weight that several modules share stays: packing one of them would
    add bytes, not save any.
    """
    if wanted is not None and not callable(wanted):
        raise ArgumentError(
            f"quantize={wanted!r}; give a function of the name and the module of a linear "
            "that says whether it is packed"
        )
    if form is None:
        if wanted is not None:
            raise ArgumentError('quantize= chooses what quantization="int8" or "int4" packs')
        return Choice({}, {})
    is_wanted = wanted or _inside(model, blocks)
    linears = [linear for linear in _unshared_linears(model) if is_wanted(*linear)]
    reasons = _Reasons.of(model, linears, form, is_default=wanted is None)
    stand_ins: dict[torch.nn.Module, QuantizedLinear] = {}
    kept: dict[str, list[Linear]] = {}
    for name, module in linears:
        reason = reasons.to_keep(module)
        if reason is None:
            stand_ins[module] = _skeleton(module, form, name)
        else:
            kept.setdefault(reason, []).append((name, module))
    return Choice(stand_ins, kept)


@dataclass(frozen=True)
class _Reasons:
    """Why a linear that was wanted stays as it is.

    is_default: nobody chose it by name.   adapters: linears beside a frozen one, of peft.
    is_mixed: some of the linears are frozen, so that those which are not are there to be trained.
    has_wide: some have as many columns as share a scale; where none has, the format was meant so.
    """

    form: Format
    is_default: bool
    adapters: set[torch.nn.Module]
    is_mixed: bool
    has_wide: bool

    @classmethod
    def of(
        cls, model: torch.nn.Module, linears: Sequence[Linear], form: Format, is_default: bool
    ) -> _Reasons:
        trained = {_is_trained(module) for _, module in linears}
        widest = max((_num_columns(module) for _, module in linears), default=0)
        has_wide = widest >= (form.group_size or 0)
        return cls(form, is_default, set(_adapters(model)), len(trained) == 2, has_wide)

    def to_keep(self, module: torch.nn.Module) -> str | None:
        if not is_quantizable(module):
            return why_not_quantizable(module)
        if self.is_default and (module in self.adapters or (self.is_mixed and _is_trained(module))):
            return "trained beside frozen ones, or part of an adapter"
        if self.form.bits == 4 and self._is_narrow(module):
            return "with an odd number of columns, or fewer than share a scale"
        return None

    def _is_narrow(self, module: torch.nn.Module) -> bool:
        """Whether 4 bits cannot take it (two columns share a byte), or save little."""
        columns = _num_columns(module)
        is_judged = self.is_default and self.has_wide
        return bool(columns % 2) or (is_judged and columns < (self.form.group_size or 0))


def warn_of_what_stays(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], choice: Choice, stacklevel: int
) -> None:
    """One warning, with bytes and reasons, where quantization leaves weights as they are.

    None where the model is packed already: then it is wrapped again, under another limit.
    """
    kind = type(model).__name__
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return
    parts = [*_kept_parts(choice), *_stacked_parts(model, blocks)]
    if not choice.stand_ins and not choice.kept:
        warn(
            f"nothing in the blocks of {kind} could be quantised: they hold no "
            "torch.nn.Linear or Conv1D that was chosen; the weights stay as they are",
            stacklevel=stacklevel + 1,
        )
    elif parts:
        total = format_bytes(sum(nbytes for nbytes, _ in parts))
        listed = "; ".join(text for _, text in parts)
        warn(
            f"{total} in the blocks of {kind} are not quantised: {listed}",
            stacklevel=stacklevel + 1,
        )


def _kept_parts(choice: Choice) -> Iterator[tuple[int, str]]:
    """(bytes, what they are) for each reason to keep linears."""
    for reason, linears in choice.kept.items():
        nbytes = sum(p.nbytes for _, module in linears for p in module.parameters())
        names = ", ".join(name for name, _ in linears[:2])
        more = ", ..." if len(linears) > 2 else ""
        count = f"{len(linears)} linear{'s' if len(linears) > 1 else ''}"
        yield nbytes, f"{format_bytes(nbytes)} in {count} {reason} ({names}{more})"


def _stacked_parts(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock]
) -> Iterator[tuple[int, str]]:
    stacked = {id(t): t for part in _parts(model, blocks) for t in _stacked(part)}
    nbytes = sum(tensor.nbytes for tensor in stacked.values())
    if nbytes:
        yield (
            nbytes,
            (
                f"{format_bytes(nbytes)} in {len(stacked)} three-dimensional parameters "
                "(stacked experts), not linears"
            ),
        )


def _skeleton(module: torch.nn.Module, form: Format, name: str) -> QuantizedLinear:
    try:
        return skeleton(module, form)
    except ArgumentError as error:
        raise ArgumentError(f"{name!r} cannot be quantised: {error}") from error


def _inside(model: torch.nn.Module, blocks: Iterable[ModuleBlock]) -> Predicate:
    inside = {m for part in _parts(model, blocks) for m in part.modules()}
    heads = {part for head in _heads(model, inside) for part in head.modules()}
    return lambda _, module: module in inside and module not in heads


def _heads(model: torch.nn.Module, inside: set[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """The output heads of the model, and of the models in it: one, or a list of them.

    inside: the modules in blocks.
    """
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        parts = head if isinstance(head, list | tuple) else [head]
        yield from (part for part in parts if isinstance(part, torch.nn.Module))
        for name, child in module.named_children():
            if child not in inside and _is_list_of_heads(name, child):
                yield child


def _is_list_of_heads(name: str, child: torch.nn.Module) -> bool:
    """Whether a model written by hand calls a list of bare linears its heads."""
    is_list = isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict)
    return is_list and name.endswith("heads") and all(is_linear(item) for item in child.children())


def _adapters(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What stands beside a layer that it adapts: peft calls that one `base_layer`."""
    for module in model.modules():
        if "base_layer" in module._modules:
            for name, child in module.named_children():
                if name != "base_layer":
                    yield from child.modules()


def _num_columns(linear: torch.nn.Module) -> int:
    weight = linear._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return 0
    return weight.shape[0 if is_conv1d(linear) else 1]


def _is_trained(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad


def _unshared_linears(model: torch.nn.Module) -> Iterator[Linear]:
    places = {place: id(tensor) for _, place, tensor in tensors_of(model)}
    num_holders = Counter(places.values())  # a module that stands in two places holds once
    for name, module in model.named_modules():
        if module is model:
            continue  # the object that wrapper() was given cannot be exchanged for another
        # A weight that a hook computes (weight_norm, pruning) is no parameter, and stays.
        if is_linear(module) and num_holders[id(module._parameters.get("weight"))] == 1:
            yield name, module


def _parts(model: torch.nn.Module, blocks: Iterable[ModuleBlock]) -> Iterable[torch.nn.Module]:
    """The blocks; the whole model where it has none."""
    return [model.get_submodule(block.name) for block in blocks] or [model]


def _stacked(block: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters that are several matrices: (experts, rows, columns). Convolutions have three
    dimensions as well, and stay without a word."""
    for module in block.modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
                yield parameter
