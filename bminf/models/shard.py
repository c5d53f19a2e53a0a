"""One rank's part of a model: its network, on the meta device, and its tensors, not read yet.

How ranks share a tensor is what the tables of each architecture say of its authors' checkpoints, in
the other direction. Any checkpoint is whole before it is cut, so that one of any degree is for any
number of ranks. Matrices that are cut by columns are packed in whole rows and cut afterwards: ranks
together have the codes and scales that one has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from bminf.arch.architecture import Architecture
from bminf.checkpoint.model_parallel import Split
from bminf.checkpoint.quantized import ColumnsOf, Packed, Quantized, quantized_rows
from bminf.checkpoint.stored import Rows, Stored
from bminf.errors import ArgumentError
from bminf.layers.embedding import HostEmbedding
from bminf.layers.parallel import Group, RowParallel
from bminf.layers.position_bias import RelativePositionBias
from bminf.layers.rendezvous import Place
from bminf.models.source import HEAD, Source, meta_network
from bminf.offload.blocks import find_blocks
from bminf.quantization.packed import PACKED_FIELDS, Format, Packing

_MOST_RANKS = 64  # that a message names

Linears = Mapping[str, torch.nn.Linear]


def shard(source: Source, packing: Packing, group: Group) -> tuple[Source, Packing]:
    """The part of `source`, which is changed, that a rank of `group` has; and how it is packed.

    packing: of the whole.   Raises ArgumentError for a number of ranks that cannot share it.
    """
    if group.size == 1:
        return source, packing
    linears = _linears(source.network)
    check_degree(source, packing, group.size)
    tensors = dict(_tensors(source, linears, packing, group))
    changed = _packing(source.architecture, packing, linears, tensors)
    network: Any = source.network
    network.group = group
    _cut(network, source.architecture, linears, group)
    config = source.config
    if source.architecture.split_head is not None:
        config = replace(config, num_head_parts=-(-config.num_head_parts // group.size))
        source.architecture.split_head(network, config.num_head_parts)
        tensors |= _head(source, group)
    source = replace(source, config=config, weights=replace(source.weights, tensors=tensors))
    return _with_host_table(source, group), changed


def sums_of(source: Source, num_ranks: int) -> dict[str, int]:
    """How many sums over so many ranks a pass has behind each block, by its name; under "" what is
    behind all of them, the logits and the message that says what the next pass is of."""
    if num_ranks == 1:
        return {}
    source = replace(source, network=meta_network(source.architecture, source.config))
    shard(source, Packing(), Group(Place(0, num_ranks)))
    blocks = [
        b.name for b in find_blocks(source.network, source.architecture.blocks(source.network))
    ]
    found = {"": 2}
    for name, module in source.network.named_modules():
        if isinstance(module, RowParallel):
            (block,) = [b for b in blocks if f"{name}.linear.".startswith(f"{b}.")]
            found[block] = found.get(block, 0) + 1
    return found


def check_degree(source: Source, packing: Packing, num_ranks: int) -> None:
    """Raise ArgumentError, with the numbers that do, where so many ranks cannot share a model."""
    if not hasattr(source.network, "group"):
        raise ArgumentError(f"{source.title} cannot be shared by ranks; start one process")
    reason = why_not(source, packing, num_ranks)
    if reason is None:
        return
    others = [n for n in range(2, _MOST_RANKS + 1) if why_not(source, packing, n) is None]
    raise ArgumentError(
        f"{num_ranks} ranks cannot share this {source.title}: {reason}; numbers of ranks that can: "
        f"{', '.join(map(str, [1, *others]))}"
    )


def why_not(source: Source, packing: Packing, num_ranks: int) -> str | None:
    """What so many ranks cannot divide; None where there is nothing."""
    config, linears = source.config, _linears(source.network)
    counts = {
        "attention heads": config.num_attention_heads,
        "columns of the feed-forward": config.intermediate_size,
        "rows of the vocabulary": config.vocab_size,
    }
    for name, linear in linears.items():
        if source.architecture.split_of(name).axis == 1:
            stored = source.weights.tensors.get(f"{name}.weight")
            form, is_given = packing.of(name), isinstance(stored, Quantized)
            counts |= _column_units(name, linear.in_features, form, num_ranks if is_given else 1)
    for what, count in counts.items():
        if count % num_ranks:
            return f"it has {count} {what}"
    return None


def _column_units(
    name: str, num_columns: int, form: Format | None, num_ranks: int
) -> dict[str, int]:
    """What of a matrix that is cut by columns goes together: a group with a scale, or a byte.

    num_ranks: that may share a group, as each of them has columns of one only; 1 is none.
    """
    if form is None:
        return {}
    size = form.group_size or 8 // form.bits
    if num_ranks > 1 and num_columns % size == 0 and num_ranks % (num_columns // size) == 0:
        size = 8 // form.bits
    return {f"groups of {size} columns in {name}": num_columns // size}


# ---- the network ---------------------------------------------------------------------------------


def _linears(network: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """All but the parts of an output head."""
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) is torch.nn.Linear and not name.startswith(HEAD)
    }


def _cut(
    network: torch.nn.Module, architecture: Architecture, linears: Linears, group: Group
) -> None:
    """Put this rank's linears and position biases in place of the whole ones."""
    with torch.device("meta"):
        for name, linear in linears.items():
            parent, _, key = name.rpartition(".")
            cut = _cut_linear(linear, architecture.split_of(name), group)
            setattr(network.get_submodule(parent), key, cut)
        for module in network.modules():
            if isinstance(module, RelativePositionBias):
                module.weight = torch.nn.Parameter(group.share(module.weight, 1).clone())


def _cut_linear(linear: torch.nn.Linear, split: Split, group: Group) -> torch.nn.Module:
    size, has_bias = group.size, linear.bias is not None
    if split.axis == 0:
        return torch.nn.Linear(linear.in_features, linear.out_features // size, has_bias)
    if split.axis is None:
        return linear
    has_bias = has_bias and group.rank == 0  # which is to be in the sum once
    part = torch.nn.Linear(linear.in_features // size, linear.out_features, has_bias)
    return RowParallel(part, group)


# ---- tensors -------------------------------------------------------------------------------------


def _tensors(
    source: Source, linears: Linears, packing: Packing, group: Group
) -> Iterator[tuple[str, Stored]]:
    """All but those of an output head in parts, under the names of the rank's network."""
    biases = {n for n, m in source.network.named_modules() if isinstance(m, RelativePositionBias)}
    for name, stored in source.weights.tensors.items():
        module, _, key = name.rpartition(".")
        if name.startswith(HEAD):
            continue
        if module not in linears and module not in biases:
            yield name, stored
            continue
        split = source.architecture.split_of(module)
        if module in linears and split.axis == 1:
            if key == "bias" and group.rank == 0:
                yield f"{module}.linear.bias", stored
            elif key in ("weight", "qweight"):
                whole = stored if key == "weight" else _packed(source, linears, module, packing)
                yield f"{module}.linear.weight", _columns(whole, packing.of(module), group)
        else:
            yield name, _part(split, stored, group)


def _part(split: Split, stored: Stored, group: Group) -> Stored:
    """This rank's rows, or columns of a table: of several matrices those of each."""
    part = split.part(stored, group.rank, group.size)
    if isinstance(part, Rows):
        pieces = [piece for piece in part.parts if isinstance(piece, Quantized)]
        return quantized_rows(pieces) if len(pieces) == len(part.parts) else part
    return part


def _columns(whole: Stored, form: Format | None, group: Group) -> Stored:
    size = whole.shape[1] // group.size
    start, end = group.rank * size, (group.rank + 1) * size
    if isinstance(whole, Quantized) and whole.form == form:
        return whole.columns(start, end)  # codes and scales as they are there
    return ColumnsOf(whole, start, end)


def _packed(source: Source, linears: Linears, module: str, packing: Packing) -> Packed:
    """A matrix of a folder that is packed already."""
    tensors, form = source.weights.tensors, packing.of(module)
    assert form is not None, "check_shapes() has compared them"
    names = {key: f"{module}.{key}" for key in PACKED_FIELDS}
    fields = {key: tensors[name] for key, name in names.items() if name in tensors}
    return Packed(fields, linears[module].in_features, form)


def _with_host_table(source: Source, group: Group) -> Source:
    """With rows of the embedding gathered on the host: one mapping of its file is for all ranks.
    What it was tied to is an output head of its own, this rank's rows."""
    network: Any = source.network
    if isinstance(network.embed_tokens, HostEmbedding):
        return source
    num_rows, size = network.embed_tokens.weight.shape
    network.embed_tokens = HostEmbedding(num_rows, size)
    tensors = dict(source.weights.tensors)
    table = tensors.pop("embed_tokens.weight", None)
    if network.lm_head is None:
        with torch.device("meta"):
            network.lm_head = torch.nn.Linear(size, num_rows // group.size, bias=False)
        if table is not None:  # else of a model of which sizes are all that is known
            split = source.architecture.split_of("embed_tokens")
            tensors["lm_head.weight"] = _part(split, table, group)
    return replace(source, weights=replace(source.weights, tensors=tensors, table=table))


def _head(source: Source, group: Group) -> dict[str, Stored]:
    """This rank's rows of an output head, in the parts that its network has now."""
    wholes: dict[str, list[Stored]] = {}
    for name, stored in source.weights.tensors.items():
        if name.startswith(HEAD):
            wholes.setdefault(name.rpartition(".")[2], []).append(stored)
    head: Any = source.network.get_submodule(HEAD.rstrip("."))
    found: dict[str, Stored] = {}
    for key, parts in wholes.items():
        whole = parts[0] if len(parts) == 1 else Rows(tuple(parts))
        start = group.rank * (whole.shape[0] // group.size)
        for index, part in enumerate(head.children()):
            found[f"{HEAD}{index}.{key}"] = whole.rows(start, start + part.out_features)
            start += part.out_features
    return found


def _packing(
    architecture: Architecture, packing: Packing, linears: Linears, tensors: Mapping[str, Stored]
) -> Packing:
    """`packing` by the names of the rank's network."""
    changed: dict[str, Format | None] = {}
    for name, form in packing.exceptions.items():
        if name in linears and architecture.split_of(name).axis == 1:
            part = tensors.get(f"{name}.linear.weight")
            is_kept = isinstance(part, Quantized) and form is not None
            changed[f"{name}.linear"] = part.form if is_kept else form  # type: ignore[union-attr]
        else:
            changed[name] = form
    return Packing(packing.default, changed)
