"""From a source, formats and a limit to a network that is packed, laid out and planned: the only
place where these meet. fill.py reads its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bminf.arch import registry
from bminf.arch.sizes import Pass
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import Rows
from bminf.checks import check_positive
from bminf.engine.rows import FIXED_TOKENS
from bminf.errors import ArgumentError, BudgetError, CheckpointError, UnsupportedModelError
from bminf.keywords import known_keywords
from bminf.layers.parallel import ALONE, Group
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.layers.rendezvous import Place
from bminf.layout import ModuleBlock
from bminf.models.decode_step import check_graphs, check_heads, num_sizes, power_of_two
from bminf.models.shard import shard
from bminf.models.source import HEAD, Source, Weights, find_sizes
from bminf.offload.blob import Blobs, lay_out
from bminf.offload.blocks import find_blocks
from bminf.offload.plan import Plan, least_budget
from bminf.offload.start import plan_on
from bminf.quantization.packed import Format, Packing, is_asked_for, parse_format
from bminf.units import format_bytes, parse_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of all that is not packed."""

_NODE_BYTES = 2**16
_LAYER_NODES = 16
"""Of a CUDA graph: what a launch takes on the device, by what is told of older drivers (newer ones
take less), and launches of a layer, by count."""
LOGITS_CHUNK = 8  # positions of one text whose logits are computed together

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_DEFAULT_MAX_LENGTH = 512  # of models whose positions have no end

_SAMPLING_BYTES = 64  # of an entry of the logits: in the model's type, and what sampling sorts
# What stays with the allocators and libraries of a CPU after tensors are gone. Measured, not
# derived: some quarters of what a layer holds, two more where weights are not packed, and half of
# the logits; and no more than this.
_MAX_CACHED_BYTES = 2**28
_MORE_QUARTERS = 2
_LIBRARY_BYTES = 2**25  # on a GPU, where torch uses again what is gone: of cuBLAS
_FRAGMENTATION = 0.1  # of the peak, between what is still there


@dataclass(frozen=True)
class Formats:
    """What linears are asked to be packed as.

    layers, head: None is not packed; a head of a model whose head is not split has no format of its
    own.   is_auto: whether what is packed on disk may stand for that of the layers.
    """

    layers: Format | None = None
    head: Format | None = None
    is_auto: bool = False


@dataclass(frozen=True)
class Assembly:
    """A network on the meta device, packed and laid out.

    source: with the output head split as it is in the network.   group: the ranks of which one has
    this.
    """

    source: Source
    network: torch.nn.Module
    packing: Packing
    dtype: torch.dtype
    blocks: list[ModuleBlock]
    blobs: Blobs
    group: Group


def assemble(
    source: Source,
    formats: Formats,
    dtype: torch.dtype,
    activations: str = "auto",
    group: Group = ALONE,
) -> Assembly:
    """Pack and lay out the network of `source`, which is changed: one rank's part of it.

    dtype: of what is not packed.   activations: see bminf.QuantizedLinear.
    Raises ArgumentError for formats that do not match the source, what is packed in it, or the
    activations; and for a number of ranks that cannot share it.
    """
    source, packing = shard(source, _packing(source, formats), group)
    source, packing = _with_head(source, packing, formats, dtype)
    network = source.network.to(dtype).eval().requires_grad_(False)
    blocks = find_blocks(network, source.architecture.blocks(network))
    if packing == Packing() and activations not in ("auto", "float"):
        raise ArgumentError(
            f"activations={activations!r}, but quantization=None leaves the weights in floating "
            'point; accepted with it: "auto", "float"'
        )
    _pack_linears(network, blocks, packing, activations)
    # Each tensor aligned to 256: on disk, in host memory and in a slot.
    blobs = lay_out(network, blocks, {}, keep_addresses=False)
    return Assembly(source, network, packing, dtype, blocks, blobs, group)


def plan_within(
    assembly: Assembly,
    budget: int,
    max_length: int,
    max_batch_size: int,
    device_type: str,
    host_bytes: int | None = None,
    deterministic: bool = False,
    cuda_graph: bool = False,
) -> Plan:
    """What stays and what streams.   budget: bytes of a device of this type ("cpu" or "cuda").

    host_bytes: of host memory for streamed blocks; None is as much as it takes.
    deterministic, cuda_graph: see LanguageModel.
    Raises BudgetError, with numbers; ArgumentError for graphs of heads that no kernel takes.
    """
    weight_format, uses = assembly.packing.of_layers, assembly.source.architecture.uses
    reserved = reserved_bytes(assembly, max_length, max_batch_size, device_type, deterministic)
    if cuda_graph:
        check_heads(assembly.source.config.head_dim)
        reserved += graph_bytes(assembly, max_length, max_batch_size)

    planned = partial(
        plan_on, device_type, assembly.blocks, assembly.blobs, uses=uses, reserved_bytes=reserved
    )
    try:
        found = planned(budget, host_bytes=host_bytes)
        if cuda_graph:
            _check_all_stays(found, budget, sum(block.nbytes for block in found.blocks))
        return found
    except BudgetError:
        least = least_budget(planned(2**60))
        if least <= budget:  # host memory is what is missing
            raise
        is_wide = weight_format is None or weight_format.bits > 4
        fewer = ", or pack the weights to fewer bits" if is_wide else ""
        rows = f" and max_batch_size={max_batch_size}" if max_batch_size > 1 else ""
        raise BudgetError(
            f"the limit of {format_bytes(budget)} ({budget} bytes) is below the least that would "
            f"do, {format_bytes(least)} ({least} bytes), of which {format_bytes(reserved)} are for "
            f"max_length={max_length}{rows}; raise memory_limit, lower "
            f"{'those two' if rows else 'max_length'}{fewer}"
        ) from None


# ---- plans without a load ------------------------------------------------------------------------


@known_keywords
def plan_model(
    model: Any,
    memory_limit: int | float | str | None = None,
    quantization: str | Format | None = "auto",
    dtype: torch.dtype | str | None = None,
    max_length: int | None = None,
    max_batch_size: int = 1,
    head_quantization: str | Format | None = None,
    device: str = "cuda",
    host_memory: int | float | str | None = None,
    cuda_graph: bool = False,
    num_ranks: int = 1,
) -> Plan:
    """The plan that loading a model of the zoo would make, for a card that need not be here.

    model: a folder, of which headers are read; the name or hub id of a published model, such as
    "CPM-2 (Chinese), CPM-2.1"; or a configuration, such as a T5Config.
    memory_limit: bytes, or "6GB"; None is no limit.
    quantization: as for the model; "auto" is what is packed in the folder, or the model's default.
    dtype, max_length, max_batch_size, head_quantization: as for the model.
    device: "cuda" or "cpu", which need room for other things beside the weights.
    host_memory: what may be page-locked for streamed blocks; the rest of them stays on the disk.
    None is as much as it takes.   cuda_graph: as for the model.
    num_ranks: of which the plan is that of the first, and memory_limit that of each.
    Raises ArgumentError, BudgetError, or CheckpointError for a folder that cannot be loaded; and
    UnsupportedModelError for what streams where cuda_graph is on.
    """
    budget = 2**60 if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
    host_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    check_positive("max_batch_size", max_batch_size)
    check_positive("num_ranks", num_ranks)
    if device not in ("cuda", "cpu"):
        raise ArgumentError(f'device={device!r}; accepted: "cuda", "cpu"')
    check_graphs(cuda_graph, torch.device(device), num_ranks=num_ranks)
    dtype = dtype_for(dtype, device)
    source, is_auto = find_sizes(model), quantization == "auto"
    formats = source.architecture.formats
    layers = parse_format(None if is_auto else quantization, formats=formats)
    head = parse_format(head_quantization, "head_quantization", formats)
    max_length = max_length_for(max_length, source)
    group = Group(Place(0, num_ranks))
    assembly = assemble(source, Formats(layers, head, is_auto), dtype, group=group)
    return plan_within(
        assembly, budget, max_length, max_batch_size, device, host_bytes, cuda_graph=cuda_graph
    )


def dtype_for(dtype: torch.dtype | str | None, device_type: str) -> torch.dtype:
    """`dtype`; None is float32 on the CPU, float16 elsewhere.   Raises ArgumentError."""
    if dtype is None:
        return torch.float32 if device_type == "cpu" else torch.float16
    dtype = _NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, DTYPES))}, or None")
    return dtype


def max_length_for(max_length: int | None, source: Source) -> int:
    """`max_length`; None is what the positions allow.   Raises ArgumentError for more."""
    positions: int | None = source.config.max_position_embeddings
    if max_length is None:
        return _DEFAULT_MAX_LENGTH if positions is None else positions
    check_positive("max_length", max_length)
    if positions is not None and max_length > positions:
        raise ArgumentError(f"max_length={max_length}, but the model has {positions} positions")
    return max_length


def reserved_bytes(
    assembly: Assembly,
    max_length: int,
    max_batch_size: int,
    device_type: str,
    deterministic: bool = False,
) -> int:
    """Bytes that a model needs beside its weights: the KV cache, and what a pass holds at its peak.

    The peak is the largest of a few moments: a product with what its operands become, the attention
    with its bias, and the logits. Each architecture counts its own (see arch/sizes.py); what is
    common is here.   device_type: "cpu" or "cuda"; their products hold different things on the way.
    """
    is_cpu, weight_format = device_type == "cpu", assembly.packing.of_layers
    vocab_size: int = assembly.source.config.vocab_size
    largest = Pass(
        max_batch_size, max_length, assembly.dtype, weight_format, is_cpu, assembly.group.size
    )
    sizes = assembly.source.architecture.sizes(assembly.source.config, largest)
    # The last ones of each row while they are sampled from; logits() has fewer at a time.
    head = vocab_size * max(LOGITS_CHUNK, max_batch_size) * _SAMPLING_BYTES
    if deterministic:  # always as many rows of logits, of which most are of no text
        head += vocab_size * FIXED_TOKENS * assembly.dtype.itemsize
    aligned = 0 if is_cpu else sizes.bias  # the copy that attention may make of it
    peak = max(sizes.making_bias, sizes.bias + aligned + sizes.layer, head)
    quarters = sizes.kept_quarters + (_MORE_QUARTERS if weight_format is None else 0)
    left = quarters * sizes.layer // 4
    cached = min(left + head // 2, _MAX_CACHED_BYTES) if is_cpu else min(peak, _LIBRARY_BYTES)
    return sizes.cache + peak + int(_FRAGMENTATION * peak) + cached


def graph_bytes(assembly: Assembly, max_length: int, max_batch_size: int) -> int:
    """Bytes that CUDA graphs of passes of one token a row take: their memory is their own.

    All graphs share the memory of a pass, of one token of each row; each has its logits and its
    nodes. What a node takes is not measured; see _NODE_BYTES.
    """
    config = assembly.source.config
    one = Pass(max_batch_size, 1, assembly.dtype, assembly.packing.of_layers, is_cpu=False)
    logits = 4 * config.vocab_size * power_of_two(max_batch_size)
    nodes = _NODE_BYTES * _LAYER_NODES * config.num_hidden_layers
    architecture = assembly.source.architecture
    num_graphs = num_sizes(max_batch_size, max_length + architecture.num_extra_tokens)
    sizes = architecture.sizes(config, one)
    return int(sizes.layer + num_graphs * (logits + nodes))


def _check_all_stays(plan: Plan, budget: int, block_bytes: int) -> None:
    """Raise UnsupportedModelError for a plan that streams."""
    if plan.streamed:
        needed = plan.outside_bytes + plan.reserved_bytes + block_bytes
        raise UnsupportedModelError(
            f"cuda_graph=True is for models of which nothing streams, and {len(plan.streamed)} of "
            f"{len(plan.blocks)} blocks would, within {format_bytes(budget)}; raise memory_limit "
            f"to {format_bytes(needed)} ({needed} bytes), or leave cuda_graph out"
        )


# ---- how linears are packed ----------------------------------------------------------------------


def _packing(source: Source, formats: Formats) -> Packing:
    """That of the layers: as on disk where they are packed there and nobody asks for another."""
    if source.weights.packing is not None:
        return _stored_packing(source, source.weights.packing, formats)
    wanted = source.architecture.default_format if formats.is_auto else formats.layers
    if wanted is not None and source.architecture.split_head is not None:
        return _packing_of_codes(source, wanted, formats.is_auto) or Packing(wanted)
    return Packing(wanted)


def _stored_packing(source: Source, stored: Packing, formats: Formats) -> Packing:
    """That of a folder which convert() has packed; but for an output head that is not packed."""
    path, asked = source.weights.path, formats.layers
    layers = {n: one for n, one in stored.exceptions.items() if not n.startswith(HEAD)}
    found = set(layers.values()) or {stored.default}
    if found == {None} and asked is not None:
        raise ArgumentError(
            f"{path} has a packed head and layers that are not; give quantization=None to load it "
            "so, or convert the original to what you want"
        )
    # A scale a row of each rank, which are groups of columns together, if there are several.
    of_ranks = {Format(one.bits) for one in layers.values() if one is not None}
    is_as_asked = {asked} == of_ranks or all(is_asked_for(one, asked) for one in found)
    if not formats.is_auto and not is_as_asked:
        raise ArgumentError(
            f"quantization is {asked}, but {path} is packed as "
            f"{' and '.join(sorted(map(str, found)))}; leave quantization out, or convert the "
            "original to what you want"
        )
    head = stored.of(f"{HEAD}0")
    if formats.head is not None and not is_asked_for(head, formats.head):
        raise ArgumentError(
            f"head_quantization is {formats.head}, but the head in {path} is packed as {head}; "
            "leave head_quantization out, or convert the original to what you want"
        )
    return stored if head is not None else Packing(stored.default, layers)


def _packing_of_codes(source: Source, wanted: Format, is_auto: bool) -> Packing | None:
    """That of a checkpoint whose authors packed it, a format a matrix; None where they did not."""
    found = {
        name.removesuffix(".weight"): _format_of(stored)
        for name, stored in source.weights.tensors.items()
        if isinstance(stored, Quantized)
    }
    if not found:
        return None
    bits = {packed.bits for packed in found.values()}
    if not is_auto and wanted not in [Format(n) for n in bits]:
        raise ArgumentError(
            f"quantization is {wanted}, but {source.weights.path} holds codes of "
            f"{' and '.join(map(str, sorted(bits)))} bits already; leave quantization out to take "
            "them as they are, give None to unpack them, or take the checkpoint in half precision"
        )
    return Packing(None, found)


def _format_of(stored: Quantized) -> Format:
    try:
        return stored.form
    except ArgumentError as error:
        raise CheckpointError(
            f"{stored.where} has scales for {stored.num_groups} groups of its {stored.shape[1]} "
            f"columns, which cannot be packed so ({error}); unpack it with quantization=None"
        ) from error


def _pack_linears(
    network: torch.nn.Module, blocks: Iterable[ModuleBlock], packing: Packing, activations: str
) -> None:
    """Put a QuantizedLinear in place of each linear in the blocks that is to be packed."""
    inside = {module for b in blocks for module in network.get_submodule(b.name).modules()}
    linears = {
        name: module
        for name, module in network.named_modules()
        if type(module) is torch.nn.Linear and module in inside
    }
    for name, weight_format in packing.of_each(linears).items():
        if weight_format is not None:
            parent, _, child = name.rpartition(".")
            packed = QuantizedLinear(linears[name], activations, weight_format)
            setattr(network.get_submodule(parent), child, packed)


# ---- an output head that is split ----------------------------------------------------------------


def _with_head(
    source: Source, packing: Packing, formats: Formats, dtype: torch.dtype
) -> tuple[Source, Packing]:
    """`source` with its output head split into as many parts as _num_head_parts() says, and packed.

    Raises ArgumentError for 4 bits of an odd number of columns.
    """
    split_head = source.architecture.split_head
    if split_head is None:
        if formats.head is not None:
            titles = [one.title for one in registry.ARCHITECTURES if one.split_head is not None]
            raise ArgumentError(f"head_quantization is for {', '.join(titles)}; leave it out")
        return source, packing
    on_disk = source.weights.packing
    if on_disk is not None and on_disk.of(f"{HEAD}0") is not None:
        return source, packing  # a packed head stays as it is split there
    uncut = _head_packing(packing, formats.head, source.config.num_head_parts)
    _check_columns(source, uncut)
    num_parts = _num_head_parts(source, uncut, dtype)
    split_head(source.network, num_parts)
    config = replace(source.config, num_head_parts=num_parts)
    source = replace(source, config=config, weights=_split_weights(source))
    return source, _head_packing(packing, formats.head, num_parts)


def _num_head_parts(source: Source, packing: Packing, dtype: torch.dtype) -> int:
    """So many that no part of the head is larger than the largest matrix of a layer: then it needs
    no larger slots to be streamed."""
    linears = {
        name: module
        for name, module in source.network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    sizes = {
        name: _linear_bytes(linears[name], weight_format, dtype)
        for name, weight_format in packing.of_each(linears).items()
    }
    head_bytes = sum(size for name, size in sizes.items() if name.startswith(HEAD))
    largest = max(size for name, size in sizes.items() if not name.startswith(HEAD))
    return min(-(-head_bytes // largest), int(source.config.vocab_size))


def _linear_bytes(linear: torch.nn.Linear, weight_format: Format | None, dtype: torch.dtype) -> int:
    """Of its weight and its bias, as they will be."""
    num_rows, num_columns = linear.out_features, linear.in_features
    bias_bytes = 0 if linear.bias is None else num_rows * dtype.itemsize
    bits: float = 8 * dtype.itemsize
    if weight_format is not None:
        bits = weight_format.bits_per_weight(num_columns)
    return round(num_rows * num_columns * bits / 8) + bias_bytes


def _head_packing(packing: Packing, head: Format | None, num_parts: int) -> Packing:
    """`packing` of the layers, and this one of the head."""
    if head == packing.default:
        return packing
    heads = {f"{HEAD}{index}": head for index in range(num_parts)}
    return Packing(packing.default, {**packing.exceptions, **heads})


def _split_weights(source: Source) -> Weights:
    """Those of the head as it is split in the network."""
    if source.weights.table is None:
        return source.weights
    tensors = {n: t for n, t in source.weights.tensors.items() if not n.startswith(HEAD)}
    head = [t for n, t in source.weights.tensors.items() if n.startswith(HEAD)]
    whole = head[0] if len(head) == 1 else Rows(tuple(head))
    start = 0
    for index, part in enumerate(source.network.get_submodule(HEAD.rstrip(".")).children()):
        end = start + int(part.out_features)  # type: ignore[arg-type]
        tensors[f"{HEAD}{index}.weight"] = whole.rows(start, end)
        start = end
    return replace(source.weights, tensors=tensors)


def _check_columns(source: Source, packing: Packing) -> None:
    for name, stored in source.weights.tensors.items():
        is_matrix = name.endswith(".weight") and len(stored.shape) == 2
        if not is_matrix or not name.startswith(("layers.", HEAD)) or stored.shape[1] % 2 == 0:
            continue
        weight_format = packing.of(name.removesuffix(".weight"))
        if weight_format is not None and weight_format.bits == 4:
            raise ArgumentError(
                f"{stored.where} has {stored.shape[1]} columns, and in 4 bits two columns share a "
                'byte; use "int8" for it, or None'
            )
