"""How the authors of each model cut its tensors for the ranks of model parallelism: tables by name.

Sources: change_mp.py of CPM-1-Generate, EVA and GLM; tools/convert_tp.py of GLM-130B.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from bminf.checkpoint.stored import (
    Columns,
    InFile,
    Replicated,
    Rows,
    Stored,
    slice_of,
    striped,
)
from bminf.errors import ArgumentError, CheckpointError


@dataclass(frozen=True)
class Split:
    """How a tensor was cut for the ranks: along which axis, and how many matrices it holds.

    axis: None where each rank has the whole.   num_stripes: matrices one below another, such as
    Q, K and V, of each of which a rank has its slice.
    is_own: each rank has a vector of its own, of scales of its columns: the whole is a matrix with
    a column a rank.
    """

    axis: int | None
    num_stripes: int = 1
    is_own: bool = False

    def merge(self, parts: tuple[InFile, ...]) -> Stored:
        """The whole tensor, from the ranks' parts in order.   Raises CheckpointError."""
        if len(parts) == 1:
            return parts[0]
        if self.axis is None:
            return Replicated(parts)
        if self.is_own:
            return Columns(tuple(_as_column(part) for part in parts))
        if self.axis == 1:
            return Columns(parts)
        return Rows(parts) if self.num_stripes == 1 else striped(parts, self.num_stripes)

    def part(self, whole: Stored, rank: int, num_ranks: int) -> Stored:
        """What one of the ranks has of the whole tensor; merge() is the inverse.

        Raises ArgumentError where the tensor cannot be cut into as many equal parts,
        CheckpointError where it has no such axis.
        """
        if self.axis is None:
            return whole
        if self.is_own:
            raise ArgumentError(f"{whole.where} belongs to the ranks it was made for; it stays so")
        if len(whole.shape) <= self.axis:
            raise CheckpointError(
                f"{whole.where} has shape {whole.shape}; it should have {self.axis + 1} dimensions"
            )
        size, left = divmod(whole.shape[self.axis], self.num_stripes * num_ranks)
        if left:
            raise ArgumentError(
                f"{whole.where} has shape {whole.shape}, whose axis {self.axis} {num_ranks} ranks "
                "cannot share equally; choose another degree"
            )
        begins = [(stripe * num_ranks + rank) * size for stripe in range(self.num_stripes)]
        pieces = tuple(slice_of(whole, self.axis, begin, begin + size) for begin in begins)
        return pieces[0] if len(pieces) == 1 else Rows(pieces)


def _as_column(vector: InFile) -> InFile:
    """(N,) as (N, 1)."""
    if len(vector.shape) != 1:
        raise CheckpointError(f"{vector.where} has shape {vector.shape}; it should be a vector")
    return replace(vector, shape=(*vector.shape, 1), stride=(*vector.stride, 1))


REPLICATED, ROWS, COLUMNS, OWN = Split(None), Split(0), Split(1), Split(1, is_own=True)


def STRIPED(num_stripes: int) -> Split:
    """Rows of several matrices, one below another."""
    return Split(0, num_stripes)


_LAYER_OF_CPM1 = {
    r".*layernorm\.(weight|bias)": REPLICATED,
    r".*\.attention\.query_key_value\.(weight|bias)": STRIPED(3),
    r".*\.attention\.dense\.weight": COLUMNS,
    r".*\.attention\.dense\.bias": REPLICATED,
    r".*\.mlp\.dense_h_to_4h\.(weight|bias)": ROWS,
    r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
    r".*\.mlp\.dense_4h_to_h\.bias": REPLICATED,
}
_CPM = {
    # CPM-1
    r"word_embeddings\.weight": ROWS,
    r"position_embeddings\.weight": REPLICATED,
    **_LAYER_OF_CPM1,
    # CPM-2 and EVA
    r"(.*\.)?word_embeds\.weight": ROWS,
    r"lm_head\.weight": ROWS,
    r"(.*\.)?(role|prompt)_embeds\.weight": REPLICATED,
    r".*\.layer_norm\.weight": REPLICATED,
    r".*\.self_attn\.project\.weight": STRIPED(3),
    r".*\.(self|cross)_attn\.dense\.weight": COLUMNS,
    r".*\.self_attn\.relative_attention_bias\.weight": COLUMNS,
    r".*\.cross_attn\.project_q\.weight": ROWS,
    r".*\.cross_attn\.project_kv\.weight": STRIPED(2),
    r".*\.dense_relu_dense\.wi_[01]\.weight": ROWS,
    r".*\.dense_relu_dense\.wo\.weight": COLUMNS,
}
_GLM10B_BLOCK_POSITIONS = (
    "transformer.block_position_embeddings.weight",
    "mixins.block_position_embedding.block_position_embeddings.weight",  # in SwissArmyTransformer
)
_GLM10B = {
    r"(transformer\.)?word_embeddings\.weight": ROWS,
    r"transformer\.position_embeddings\.weight": REPLICATED,
    **{re.escape(name): REPLICATED for name in _GLM10B_BLOCK_POSITIONS},
    **_LAYER_OF_CPM1,
}
_GLM130B_EMBEDDING = "transformer.word_embeddings.weight"
_GLM130B = {
    re.escape(_GLM130B_EMBEDDING): ROWS,
    r".*layernorm\.(weight|bias)": REPLICATED,
    # A head's rows of Q, K and V stand together, so a rank has the rows of whole heads.
    r".*\.attention\.query_key_value\.(weight|weight_scale|bias)": ROWS,
    r".*\.attention\.dense\.weight": COLUMNS,
    r".*\.attention\.dense\.weight_scale": OWN,
    r".*\.attention\.dense\.bias": REPLICATED,
    # What is gated, and below it the gate.
    r".*\.mlp\.dense_h_to_4h\.(weight|weight_scale|bias)": STRIPED(2),
    r".*\.mlp\.dense_4h_to_h\.weight": COLUMNS,
    r".*\.mlp\.dense_4h_to_h\.weight_scale": OWN,
    r".*\.mlp\.dense_4h_to_h\.bias": REPLICATED,
    r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq": REPLICATED,
    r"mixins\.rotary-embedding\.rotary_emb\.inv_freq": REPLICATED,
}


def is_glm10b(names: Collection[str]) -> bool:
    """Whether these are names of GLM-10B: it has a second table of positions."""
    return any(name in names for name in _GLM10B_BLOCK_POSITIONS)


def is_glm130b(names: Collection[str]) -> bool:
    """Whether these are names of GLM-130B."""
    return _GLM130B_EMBEDDING in names and not is_glm10b(names)


def splits_of(names: Collection[str]) -> dict[str, Split]:
    """How the original code of the model that has tensors of these names cuts each of them.

    CPM-1, CPM-2, EVA, GLM-130B and GLM-10B are told by their names.
    Raises CheckpointError for a name that the model does not have.
    """
    title, table = "the CPM family", _CPM
    if is_glm10b(names):
        title, table = "GLM-10B's kind", _GLM10B
    elif is_glm130b(names):
        title, table = "GLM-130B's kind", _GLM130B
    return {name: _split(name, table, title) for name in names}


def _split(name: str, table: Mapping[str, Split], title: str) -> Split:
    for pattern, split in table.items():
        if re.fullmatch(pattern, name):
            return split
    raise CheckpointError(
        f"no model of {title} has a tensor {name!r}, so how it was cut for the ranks is not "
        "known; see whether this is a checkpoint of another model"
    )
