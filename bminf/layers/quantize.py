"""Which linears of a model are quantized and what stays as it is, how large they will be, and the
replacement itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from warnings import warn

import torch

from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.experts import (
    PackedExperts,
    PackedStack,
    forward_of,
    is_transposed,
    matrices_of,
    why_not_packable,
)
from bminf.layers.quantized_linear import QuantizedLinear, has_forward_of_its_own, is_conv1d
from bminf.layout import ModuleBlock, TensorPlace, tensors_of
from bminf.ops.rows import ELEMENTS
from bminf.quantization.packed import INT8, Format, parse_format
from bminf.units import format_bytes

HEAD_FORMAT = INT8
"""Of output heads where linears are packed to 4 bits: it costs the predictions a few thousandths of
what 4 bits cost them in the blocks, and is half or a quarter of the bytes that a token reads."""

_PROBE = (64, 48)  # columns and rows
_PLURALS = {"linear": "linears", "module of experts": "modules of experts"}

# torch.nn.MultiheadAttention computes with the weight of its output projection, and never calls it.
_READ_BY_PARENT = (torch.nn.modules.linear.NonDynamicallyQuantizableLinear,)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether `module` is a linear that is not packed yet, of whatever class."""
    return (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and not isinstance(
        module, QuantizedLinear
    )


def why_not_quantizable(linear: torch.nn.Module) -> str | None:
    """What to say of a linear that cannot be packed; None of one that a QuantizedLinear can
    replace: nn.Linear, Conv1D, or a subclass of nn.Linear that computes the same.

    A linear whose weight is computed anew by a hook (weight_norm, pruning) or a parametrization,
    is not initialised yet, or is read by the module around it, stays as it is.
    """
    weight = linear._parameters.get("weight")
    if type(linear) in _READ_BY_PARENT:
        return f"of the class {type(linear).__name__}, which the module around it reads"
    if has_forward_of_its_own(linear):
        return "whose forward was replaced on the instance"
    if weight is not None and weight.dtype not in ELEMENTS:
        return f"of the dtype {weight.dtype}"
    is_matrix = weight is not None and weight.dim() == 2
    if is_matrix and (is_conv1d(linear) or computes_as_linear(linear)):
        return None
    return f"of the class {type(linear).__name__}, not computing as torch.nn.Linear does"


def computes_as_linear(module: torch.nn.Module) -> bool:
    """Whether `module`, of nn.Linear or a subclass, gives x W^T + b and has no other state.

    A subclass with a forward of its own is tried on small random numbers, weights and inputs, in
    float32. The module itself is not called. A forward on the instance is not looked at.
    """
    names = {name for name, tensor in module._parameters.items() if tensor is not None}
    if not names <= {"weight", "bias"} or module._buffers or module._modules:
        return False
    if type(module).__call__ is not torch.nn.Module.__call__:  # and around its forward, whatever
        return False
    if type(module).forward is torch.nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _agrees_on_a_probe(module)


def _agrees_on_a_probe(module: torch.nn.Module) -> bool:
    reference = torch.nn.Linear(
        _PROBE[0], _PROBE[1], bias=module._parameters.get("bias") is not None
    )
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {"weight": reference.weight, "bias": reference.bias}
    probe.__dict__["in_features"], probe.__dict__["out_features"] = _PROBE
    rows = torch.randn(6, _PROBE[0])
    # Large and small ones: a clamp, or a rounding of activations, shows.
    for x in (rows, rows.view(2, 3, -1), 1e3 * rows, 1e-3 * rows):
        try:
            y = type(probe).forward(probe, x)
        except Exception:  # whatever it wants instead, it is no linear
            return False
        expected = reference(x)
        if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
            return False
        if (y - expected).abs().max() > 1e-5 * expected.abs().max():
            return False
    return True


def meta_linear(linear: torch.nn.Module, format_: Format) -> QuantizedLinear:
    """The QuantizedLinear that `linear` will become, on the meta device: shapes without bytes."""
    meta = copy.copy(linear)
    meta.__dict__["_parameters"] = {
        name: tensor
        if tensor is None
        else torch.nn.Parameter(torch.empty_like(tensor, device="meta"), False)
        for name, tensor in linear._parameters.items()
    }
    return QuantizedLinear(meta, quantization=format_)


def meta_experts(module: torch.nn.Module, format_: Format) -> PackedExperts:
    """The PackedExperts that `module` will become, on the meta device."""
    meta = copy.copy(module)
    meta.__dict__["_parameters"] = {
        name: tensor
        if tensor is None
        else torch.nn.Parameter(torch.empty_like(tensor, device="meta"), False)
        for name, tensor in module._parameters.items()
    }
    return PackedExperts(meta, format_)


Places = Mapping[torch.nn.Module, Sequence[tuple[torch.nn.Module, str, str]]]
"""Of each module where it stands: the module around it, its name in there, its whole name."""


def places_of(root: torch.nn.Module, modules: Container[torch.nn.Module]) -> Places:
    """Where those of `modules` stand that are below `root`."""
    places: dict[torch.nn.Module, list[tuple[torch.nn.Module, str, str]]] = {}
    for path, parent in root.named_modules(remove_duplicate=False):
        for key, child in parent._modules.items():
            if child is not None and child in modules:
                place = parent, key, f"{path}.{key}" if path else key
                places.setdefault(child, []).append(place)
    return places


def replace_module(module: torch.nn.Module, format_: Format, places: Places) -> None:
    """Put a linear or experts, packed in `format_`, in all places where `module` stands.

    Raises ArgumentError, with the name, for a weight that cannot be packed.
    """
    with _named(places[module][0][2]):
        if forward_of(module) is not None:
            packed: torch.nn.Module = PackedExperts(module, format_)
        else:
            packed = QuantizedLinear(module, quantization=format_)
    for parent, key, _ in places[module]:
        parent._modules[key] = packed


def install(root: torch.nn.Module, replacements: Replacements) -> Mapping[str, torch.nn.Module]:
    """Put replacements, on the meta device as `root` is, in all places of what they replace.

    Returns what they replaced, by each of its names.
    """
    replaced: dict[str, torch.nn.Module] = {}
    for linear, places in places_of(root, replacements).items():
        for parent, key, name in places:
            parent._modules[key] = replacements[linear]
            replaced[name] = linear
    return replaced


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{name!r} cannot be quantized: {error}") from error


Replacements = Mapping[torch.nn.Module, QuantizedLinear | PackedExperts]
"""Linears and experts to quantize, each with its replacement on the meta device."""

Predicate = Callable[[str, torch.nn.Module], bool | str | Format | None]
"""Whether a linear is packed, by its name and module; or how, where that is not as the others."""

Named = tuple[str, torch.nn.Module]
"""A linear or experts, after the name."""


@dataclass(frozen=True)
class Choice:
    """replacements: what is packed.   kept: why a linear, or experts, stay that were wanted -> all
    of those."""

    replacements: Replacements
    kept: Mapping[str, Sequence[Named]]


def choose_linears(
    model: torch.nn.Module,
    blocks: Iterable[ModuleBlock],
    format_: Format | None,
    wanted: Predicate | None = None,
) -> Choice:
    """The linears and experts to quantize, as `format_`; None is none.

    wanted: says so by name and module; None takes the linears in the blocks, or all where there are
    no blocks, but adapters, and those that a group of columns is too wide for; output heads in 8
    bits where the others are in 4, else not. What cannot be packed is kept. A weight that several
    modules share stays: packing one of them would add bytes, not save any. One that a head shares
    with embeddings alone does not: of these only rows are read (see offload/tables.py).
    """
    if wanted is not None and not callable(wanted):
        raise ArgumentError(
            f"quantize={wanted!r}; give a function of the name and the module of a linear, or of "
            "experts, that says whether it is packed"
        )
    if format_ is None:
        if wanted is not None:
            raise ArgumentError('quantize= chooses what quantization="int8" or "int4" packs')
        return Choice({}, {})
    forms, kept = _wanted_forms(model, blocks, format_, wanted)
    found = list(forms)
    adapters, min_columns = set[torch.nn.Module](), 0
    if wanted is None:  # nobody chose them by name
        adapters = _adapters(model, found)
        # Narrower ones save little; unless all are, so that the format was meant for them.
        in_format = [module for (_, module), form in forms.items() if form == format_]
        widest = max((n for module in in_format for n in _columns(module)), default=0)
        group_size = format_.group_size or 0
        min_columns = group_size if widest >= group_size else 0
    replacements: dict[torch.nn.Module, QuantizedLinear | PackedExperts] = {}
    for (name, module), form in forms.items():
        reason = why_not_quantizable(module) if is_linear(module) else why_not_packable(module)
        if reason is None and module in adapters:
            reason = "trained beside frozen ones, or part of an adapter"
        elif reason is None and form.bits == 4 and _are_unfit(_columns(module), min_columns):
            reason = "with an odd number of columns, or fewer than share a scale"
        if reason is not None:
            kept.setdefault(reason, []).append((name, module))
            continue
        with _named(name):
            replacements[module] = _meta(module, form)
    return Choice(replacements, kept)


def _are_unfit(columns: Iterable[int], min_columns: int) -> bool:
    """Whether rows of some of these sizes cannot be packed in 4 bits, or are not worth it."""
    return any(count % 2 or count < min_columns for count in columns)


def _meta(module: torch.nn.Module, format_: Format) -> QuantizedLinear | PackedExperts:
    """What `module` will become, on the meta device: shapes without bytes."""
    return meta_linear(module, format_) if is_linear(module) else meta_experts(module, format_)


def _wanted_forms(
    model: torch.nn.Module,
    blocks: Iterable[ModuleBlock],
    format_: Format,
    wanted: Predicate | None,
) -> tuple[dict[Named, Format], dict[str, list[Named]]]:
    """How the linears that are wanted would be packed; and those that cannot be, as others read
    their weights, where somebody has chosen them."""
    by_default = _by_default(model, blocks, format_)
    ask = by_default if wanted is None else partial(_asked, wanted, format_)
    forms: dict[Named, Format] = {}
    kept: dict[str, list[Named]] = {}
    for name, module, others in _candidates(model):
        form = ask(name, module)
        if form is None:
            continue
        is_tied = all(isinstance(other, torch.nn.Embedding) for other in others)
        if not others or (is_tied and (wanted is not None or form != format_)):
            forms[name, module] = form
        elif wanted is not None:
            kept.setdefault("whose weight other modules share", []).append((name, module))
    return forms, kept


def _asked(wanted: Predicate, format_: Format, name: str, module: torch.nn.Module) -> Format | None:
    """How `wanted` has a linear packed.   Raises ArgumentError for what it cannot mean."""
    answer = wanted(name, module)
    if isinstance(answer, str | Format):
        return parse_format(answer, "quantize")
    return format_ if answer else None


def choice_of(model: torch.nn.Module, packed: Mapping[str, Format]) -> Choice:
    """The linears, and stacks of experts, of these names, each in its format.

    Raises CheckpointError for what is none.
    """
    modules = dict(model.named_modules())
    found: dict[torch.nn.Module, QuantizedLinear | PackedExperts] = {}
    for name, form in packed.items():
        parent, _, key = name.rpartition(".")
        module = modules.get(name) or modules.get(parent)
        is_stack = module is modules.get(parent) and key in _matrices(module)
        if module is None or not (is_stack or is_linear(module)):
            raise CheckpointError(
                f"{name!r} is packed on disk and is no linear of a {type(model).__name__}: "
                "the weights are of another model"
            )
        if module not in found:
            found[module] = _meta(module, form)
    return Choice(found, {})


def _matrices(module: torch.nn.Module | None) -> Mapping[str, torch.Tensor]:
    """The stacks of a module of experts; none of any other."""
    return matrices_of(module) if module is not None and forward_of(module) is not None else {}


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """What is packed of a linear, or of experts."""
    stacks = _matrices(module).values()
    return [*stacks] or [w for w in [module._parameters.get("weight")] if w is not None]


def _adapters(model: torch.nn.Module, found: Sequence[Named]) -> set[torch.nn.Module]:
    """Adapters, and where some linears are frozen those that are not: they are there to be trained.

    Adapters stand beside a layer that peft calls `base_layer`.
    """
    trained = {module for _, module in found if any(w.requires_grad for w in _weights(module))}
    adapters = trained if len(trained) < len(found) else set[torch.nn.Module]()
    for module in model.modules():
        if "base_layer" in module._modules:
            beside = [child for name, child in module.named_children() if name != "base_layer"]
            adapters = adapters.union(*(child.modules() for child in beside))
    return adapters


def warn_of_unquantized(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], choice: Choice, stacklevel: int
) -> None:
    """One warning, with bytes and reasons, where quantization leaves weights as they are.

    None where the model is packed already: then it is wrapped again, under another limit.
    """
    kind = type(model).__name__
    if any(isinstance(module, QuantizedLinear | PackedStack) for module in model.modules()):
        return
    parts = [*_kept_parts(choice), *_stacked_parts(model, blocks, choice)]
    if not choice.replacements and not choice.kept:
        message = (
            f"nothing in the blocks of {kind} could be quantized: they hold no "
            "torch.nn.Linear or Conv1D that was chosen; the weights stay as they are"
        )
    elif parts:
        total = format_bytes(sum(nbytes for nbytes, _ in parts))
        listed = "; ".join(text for _, text in parts)
        message = f"{total} in the blocks of {kind} are not quantized: {listed}"
    else:
        return
    warn(message, stacklevel=stacklevel + 1)


def _kept_parts(choice: Choice) -> Iterator[tuple[int, str]]:
    """(bytes, what they are) for each reason to keep linears."""
    for reason, kept in choice.kept.items():
        nbytes = sum(p.nbytes for _, module in kept for p in module.parameters())
        names = ", ".join(name for name, _ in kept[:2])
        more = ", ..." if len(kept) > 2 else ""
        noun = "linear" if any(is_linear(module) for _, module in kept) else "module of experts"
        count = f"{len(kept)} {noun if len(kept) == 1 else _PLURALS[noun]}"
        yield nbytes, f"{format_bytes(nbytes)} in {count} {reason} ({names}{more})"


def _stacked_parts(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], choice: Choice
) -> Iterator[tuple[int, str]]:
    """Of parameters that are several matrices, (experts, rows, columns), in classes that are not
    known. Convolutions have three dimensions as well, and stay without a word."""
    seen = choice.replacements.keys() | {m for kept in choice.kept.values() for _, m in kept}
    stacked = {
        parameter: type(module).__name__
        for part in _parts(model, blocks)
        for module in part.modules()
        if not isinstance(module, torch.nn.modules.conv._ConvNd) and module not in seen
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
    }
    nbytes = sum(tensor.nbytes for tensor in stacked)
    if nbytes:
        kind = "three-dimensional parameters (stacked experts), not linears, of the class"
        classes = ", ".join(sorted(set(stacked.values())))
        yield nbytes, f"{format_bytes(nbytes)} in {len(stacked)} {kind} {classes}"


def _by_default(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], format_: Format
) -> Callable[[str, torch.nn.Module], Format | None]:
    inside = {m for part in _parts(model, blocks) for m in part.modules()}
    heads = {part for head in _heads(model, inside) for part in head.modules()}
    of_heads = HEAD_FORMAT if format_.bits < HEAD_FORMAT.bits else None

    def form(_: str, module: torch.nn.Module) -> Format | None:
        if module in heads:
            return of_heads
        return format_ if module in inside else None

    return form


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
            # Of a model written by hand: a list of bare linears that it calls its heads.
            is_list = isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict)
            is_named = name.endswith("heads") and child not in inside
            if is_list and is_named and all(map(is_linear, child.children())):
                yield child


def _columns(module: torch.nn.Module) -> list[int]:
    """Of the matrices in a linear, or in experts: of how many columns they are."""
    columns_first = is_conv1d(module) or is_transposed(module)
    weights = [w for w in _weights(module) if w.dim() > 1]
    return [w.shape[-2 if columns_first else -1] for w in weights] or [0]


def _candidates(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, list[torch.nn.Module]]]:
    """(name, module, other modules that hold its weight, too) of each linear, and of experts
    of classes that are known."""
    holders: dict[int, dict[TensorPlace, None]] = {}  # by place: a module may stand in two
    for _, place, tensor in tensors_of(model):
        holders.setdefault(id(tensor), {})[place] = None
    for name, module in model.named_modules():
        if module is model:
            continue  # the object that wrapper() was given cannot be replaced by another
        # A weight that a hook computes (weight_norm, pruning) is no parameter, and stays.
        weights = _weights(module) if is_linear(module) or _matrices(module) else []
        if weights:
            places = [place for weight in weights for place in holders[id(weight)]]
            yield name, module, [place.module for place in places if place.module is not module]


def _parts(model: torch.nn.Module, blocks: Iterable[ModuleBlock]) -> Iterable[torch.nn.Module]:
    """The blocks; the whole model where it has none."""
    return [model.get_submodule(block.name) for block in blocks] or [model]
