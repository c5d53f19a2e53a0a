"""The names of the tensors of GLM-10B and its smaller siblings in each layout of theirs.

Sources: GLM, change_mp.py and model/modeling_glm.py; SwissArmyTransformer, examples/glm.
"""

from __future__ import annotations

from collections.abc import Iterator

from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import Rule, rename, theirs_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

_KINDS = ("weight", "bias")


def glm10b_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint under the names of arch/glm.py.

    Raises CheckpointError for names of another model, and for another layout.
    """
    if checkpoint.kind not in _RULES:
        raise CheckpointError(
            f"{checkpoint.path} is a {checkpoint.kind} folder, a layout that GLM-10B is not found "
            f"in; accepted: {', '.join(_RULES)}"
        )
    rules = _RULES[checkpoint.kind]()
    return rename(checkpoint.tensors, rules, checkpoint.path, f"a GLM-10B ({checkpoint.kind})")


def glm10b_name(kind: str, ours: str) -> str:
    """What the layout `kind` calls a tensor that arch/glm.py calls `ours`."""
    return theirs_of(ours, _RULES[kind]())


def _inner(prefix: str) -> Iterator[Rule]:
    """The names inside the model, which its own code and Hugging Face's share."""
    yield Rule(f"{prefix}word_embeddings.weight", "embed_tokens.weight")
    inner = f"{prefix}transformer"
    yield Rule(f"{inner}.position_embeddings.weight", "embed_positions.weight")
    yield Rule(f"{inner}.block_position_embeddings.weight", "embed_block_positions.weight")
    layer = f"{inner}.layers.{{n}}"
    for kind in _KINDS:
        yield Rule(f"{layer}.input_layernorm.{kind}", f"layers.{{n}}.attention.norm.{kind}")
        yield Rule(f"{layer}.post_attention_layernorm.{kind}", f"layers.{{n}}.norm.{kind}")
        yield Rule(f"{inner}.final_layernorm.{kind}", f"norm.{kind}")
        for theirs, ours in (
            ("attention.query_key_value", "attention.qkv"),
            ("attention.dense", "attention.out"),
            ("mlp.dense_h_to_4h", "feed_forward.up"),
            ("mlp.dense_4h_to_h", "feed_forward.down"),
        ):
            yield Rule(f"{layer}.{theirs}.{kind}", f"layers.{{n}}.{ours}.{kind}")


def _original() -> Iterator[Rule]:
    yield from _inner("")
    # SwissArmyTransformer's, where the second table is an addition to its base model.
    yield Rule("transformer.word_embeddings.weight", "embed_tokens.weight")
    yield Rule(
        "mixins.block_position_embedding.block_position_embeddings.weight",
        "embed_block_positions.weight",
    )


def _huggingface() -> Iterator[Rule]:
    yield from _inner("")
    yield from _inner("glm.")  # of the classes around the model


_RULES = {"original": _original, "huggingface": _huggingface}
