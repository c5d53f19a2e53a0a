"""How a GLM's matrices are packed, and how its output head is cut into blocks."""

from __future__ import annotations

from dataclasses import replace

import torch

from bminf.arch.glm import GLM130B, GLMConfig, head_rows
from bminf.checkpoint.quantized import Quantized
from bminf.errors import ArgumentError, CheckpointError
from bminf.models.load import Packing, lay_out, skeleton
from bminf.models.source import HEAD, Source
from bminf.quantization.packed import Format


def own_packing(source: Source, form: Format, default: Format | None) -> Packing | None:
    """That of a checkpoint whose authors packed it, a format a matrix; None where they did not.

    form: what was asked for.   default: what stands for the checkpoint's own, if anything does.
    Raises ArgumentError for another number of bits.
    """
    own = {
        name.removesuffix(".weight"): _form_of(stored)
        for name, stored in source.weights.tensors.items()
        if isinstance(stored, Quantized)
    }
    if not own:
        return None
    bits = {packed.bits for packed in own.values()}
    if form != default and form not in [Format(number) for number in bits]:
        raise ArgumentError(
            f"quantization is {form}, but {source.weights.path} holds codes of "
            f"{' and '.join(map(str, sorted(bits)))} bits already; leave quantization out to take "
            "them as they are, give None to unpack them, or take the checkpoint in half precision"
        )
    return Packing(None, own)


def as_in_folder(
    source: Source,
    form: Format | None,
    head_form: Format | None,
    dtype: torch.dtype,
) -> tuple[Source, Packing]:
    """A GLM from a folder which convert() has packed, and its packing.

    form, head_form: what was asked for; the default format stands for the folder's own.
    A head that is not packed is cut anew, for what fits `dtype`.
    Raises ArgumentError where the layers or the head are packed otherwise.
    """
    packing = source.weights.packing
    assert packing is not None
    layers = {n: own for n, own in packing.exceptions.items() if not n.startswith(HEAD)}
    own = set(layers.values()) or {packing.form}
    if own == {None} and form is not None:
        raise ArgumentError(
            f"{source.weights.path} has a packed head and layers that are not; give "
            "quantization=None to load it so, or convert the original to what you want"
        )
    # A scale a row of each rank, which are groups of columns together, if there are several.
    of_ranks = {Format(one.bits) for one in layers.values() if one is not None}
    if form != source.architecture.default_format and {form} not in (own, of_ranks):
        raise ArgumentError(
            f"quantization is {form}, but {source.weights.path} is packed as "
            f"{' and '.join(sorted(map(str, own)))}; leave quantization out, or convert the "
            "original to what you want"
        )
    _check_head(packing, head_form, source)
    if packing.of(f"{HEAD}0") is not None:
        return source, packing
    return with_head(source, Packing(packing.form, layers), None, dtype)


def with_head(
    source: Source, packing: Packing, head_form: Format | None, dtype: torch.dtype
) -> tuple[Source, Packing]:
    """A GLM whose head is packed in `head_form`, and cut as num_head_parts() says.

    Raises ArgumentError for 4 bits of an odd number of columns.
    """
    _check_columns(source, head_packing(packing, head_form, 1))
    num_parts = num_head_parts(source.config, packing, head_form, dtype)
    return with_head_parts(source, num_parts), head_packing(packing, head_form, num_parts)


def with_head_parts(source: Source, num_head_parts: int) -> Source:
    """`source` with its output head cut into so many parts."""
    assert source.weights.table is not None
    config = replace(source.config, num_head_parts=num_head_parts)
    tensors = {n: t for n, t in source.weights.tensors.items() if not n.startswith(HEAD)}
    for number, (begin, end) in enumerate(head_rows(config)):
        tensors[f"{HEAD}{number}.weight"] = source.weights.table.rows(begin, end)
    return replace(source, config=config, weights=replace(source.weights, tensors=tensors))


def num_head_parts(
    config: GLMConfig, packing: Packing, head_form: Format | None, dtype: torch.dtype
) -> int:
    """So many that no part of the head is larger than the largest matrix of a layer: then it needs
    no larger slots to be streamed."""
    whole = replace(config, num_head_parts=1)  # which also tells the two architectures apart
    model, blocks = skeleton(GLM130B, whole, dtype, head_packing(packing, head_form, 1), "auto")
    sizes = {name: layout.nbytes for name, layout in lay_out(model, blocks).blocks.items()}
    head_bytes = sizes.pop(f"{HEAD}0")
    return min(-(-head_bytes // max(sizes.values())), config.vocab_size)


def head_packing(packing: Packing, head_form: Format | None, num_parts: int) -> Packing:
    """`packing` of the layers, and this one of the head."""
    if head_form == packing.form:
        return packing
    heads = {f"{HEAD}{number}": head_form for number in range(num_parts)}
    return Packing(packing.form, {**packing.exceptions, **heads})


def _form_of(stored: Quantized) -> Format:
    try:
        return stored.form
    except ArgumentError as error:
        raise CheckpointError(
            f"{stored.where} has scales for {stored.num_groups} groups of its {stored.shape[1]} "
            f"columns, which cannot be packed so ({error}); unpack it with quantization=None"
        ) from error


def _check_columns(source: Source, packing: Packing) -> None:
    for name, stored in source.weights.tensors.items():
        form = packing.of(name.removesuffix(".weight")) if name.endswith(".weight") else None
        is_matrix = len(stored.shape) == 2 and name.startswith(("layers.", HEAD))
        if is_matrix and form is not None and form.bits == 4 and stored.shape[1] % 2:
            raise ArgumentError(
                f"{stored.where} has {stored.shape[1]} columns, and in 4 bits two columns share a "
                'byte; use "int8" for it, or None'
            )


def _check_head(packing: Packing, head_form: Format | None, source: Source) -> None:
    """Raise ArgumentError where a folder's head is not packed as it is asked for."""
    own = packing.of(f"{HEAD}0")
    if head_form is not None and head_form != own:
        raise ArgumentError(
            f"head_quantization is {head_form}, but the head in {source.weights.path} is packed as "
            f"{own}; leave head_quantization out, or convert the original to what you want"
        )
