"""The names of GLM-130B's tensors, and its matrices in 8 and 4 bits.

Sources: GLM-130B, tools/convert_tp.py and quantization/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import Rule, rename, theirs_of
from bminf.checkpoint.quantized import Quantized
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

_KINDS = ("weight", "bias")
_SCALE = "_scale"  # behind the name of a quantised weight
_QKV = re.compile(r"(transformer\.layers\.\d+)\.attention\.query_key_value\.weight")
LINEARS = {
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}
"""Of a layer, theirs -> ours: those that may be quantised."""


def glm130b_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint under the names of arch/glm.py, a quantised weight as one.

    Raises CheckpointError for names of another model or layout, and for weights that are neither
    floating point nor codes of 8 or 4 bits.
    """
    if checkpoint.kind != "original":
        raise CheckpointError(
            f"{checkpoint.path} is a {checkpoint.kind} folder, a layout that GLM-130B is not found "
            "in; give a folder of the original code (latest, mp_rank_NN_model_states.pt)"
        )
    tensors = _with_scales(checkpoint.tensors)
    return rename(tensors, _rules(), checkpoint.path, f"a GLM-130B ({checkpoint.kind})")


def glm130b_name(kind: str, ours: str) -> str:
    """What the layout `kind` calls a tensor that arch/glm.py calls `ours`."""
    return theirs_of(ours, _rules())


def is_quantized(tensors: Mapping[str, Stored]) -> bool:
    """Whether there are codes and scales among the tensors, which have the original names."""
    return any(n.endswith(_SCALE) or not t.dtype.is_floating_point for n, t in tensors.items())


def _rules() -> Iterator[Rule]:
    yield Rule("transformer.word_embeddings.weight", "embed_tokens.weight")
    layer = "transformer.layers.{n}"
    for kind in _KINDS:
        yield Rule(f"{layer}.input_layernorm.{kind}", f"layers.{{n}}.attention.norm.{kind}")
        yield Rule(f"{layer}.post_attention_layernorm.{kind}", f"layers.{{n}}.norm.{kind}")
        yield Rule(f"transformer.final_layernorm.{kind}", f"norm.{kind}")
        for theirs, ours in LINEARS.items():
            yield Rule(f"{layer}.{theirs}.{kind}", f"layers.{{n}}.{ours}.{kind}")


def _with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Each matrix of codes together with its scales, as one."""
    bits = _bits(tensors)
    joined: dict[str, Stored] = {}
    for name, stored in tensors.items():
        scale = tensors.get(name + _SCALE)
        if scale is not None:
            joined[name] = Quantized(stored, scale, bits, torch.float16)
        elif name.removesuffix(_SCALE) not in tensors or not name.endswith(_SCALE):
            joined[name] = stored
    return joined


def _bits(tensors: Mapping[str, Stored]) -> int:
    """Of the codes, which nothing but their shapes tells: 8 where there are none."""
    found: dict[int, Stored] = {}
    for name, stored in tensors.items():
        match = _QKV.fullmatch(name)
        if match and name + _SCALE in tensors:
            found[_bits_of(stored, tensors.get(f"{match[1]}.input_layernorm.weight"))] = stored
    if len(found) > 1:
        one, other = found.values()
        raise CheckpointError(
            f"{one.where} and {other.where} are of {' and '.join(map(str, found))} bits; "
            "the files are not of one checkpoint"
        )
    return next(iter(found), 8)


def _bits_of(codes: Stored, norm: Stored | None) -> int:
    width = norm.shape[0] if norm is not None and len(norm.shape) == 1 else None
    columns = codes.shape[1] if len(codes.shape) == 2 else None
    if width is not None and columns is not None:
        if columns == width:
            return 8
        if 2 * columns == width:
            return 4
    raise CheckpointError(
        f"{codes.where} has shape {codes.shape} beside a LayerNorm of "
        f"{'no known width' if width is None else width}; codes of 8 bits are as many columns, "
        "of 4 bits half as many: this is damaged, or of another model"
    )
