"""The names of CPM-1's tensors in each layout that it is found in."""

from __future__ import annotations

from collections.abc import Iterator

from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import Rule, parts, rename, theirs_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

_KINDS = ("weight", "bias")


def cpm1_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint under the names of arch/gpt.py.

    Raises CheckpointError for names of another model, and for parts that are missing.
    """
    if checkpoint.kind not in _RULES:
        raise CheckpointError(
            f"{checkpoint.path} is a {checkpoint.kind} folder, a layout that CPM-1 is not found in"
            + (
                ": ModelCenter's CPM1 is another architecture (relative positions, RMSNorm)"
                if checkpoint.kind == "modelcenter"
                else ""
            )
        )
    rules = _RULES[checkpoint.kind]()
    return rename(checkpoint.tensors, rules, checkpoint.path, f"a CPM-1 ({checkpoint.kind})")


def cpm1_name(kind: str, ours: str) -> str:
    """What the layout `kind` calls a tensor that arch/gpt.py calls `ours`."""
    return theirs_of(ours, _RULES[kind]())


def _original() -> Iterator[Rule]:
    yield Rule("word_embeddings.weight", "embed_tokens.weight")
    yield Rule("position_embeddings.weight", "embed_positions.weight")
    layer = "transformer.layers.{n}"
    for kind in _KINDS:
        yield Rule(f"{layer}.input_layernorm.{kind}", f"layers.{{n}}.attention.norm.{kind}")
        yield Rule(
            f"{layer}.attention.query_key_value.{kind}", f"layers.{{n}}.attention.qkv.{kind}"
        )
        yield Rule(f"{layer}.attention.dense.{kind}", f"layers.{{n}}.attention.out.{kind}")
        yield Rule(f"{layer}.post_attention_layernorm.{kind}", f"layers.{{n}}.norm.{kind}")
        yield Rule(f"{layer}.mlp.dense_h_to_4h.{kind}", f"layers.{{n}}.feed_forward.up.{kind}")
        yield Rule(f"{layer}.mlp.dense_4h_to_h.{kind}", f"layers.{{n}}.feed_forward.down.{kind}")
        yield Rule(f"transformer.final_layernorm.{kind}", f"norm.{kind}")


def _huggingface() -> Iterator[Rule]:
    """GPT2LMHeadModel, and GPT2Model, which has no prefix; their linears are stored transposed."""
    yield Rule("lm_head.weight", None)  # tied
    for prefix in ("transformer.", ""):
        yield Rule(f"{prefix}wte.weight", "embed_tokens.weight")
        yield Rule(f"{prefix}wpe.weight", "embed_positions.weight")
        layer = f"{prefix}h.{{n}}"
        yield Rule(f"{layer}.attn.bias", None)  # the causal mask, in old files
        yield Rule(f"{layer}.attn.masked_bias", None)
        for kind in _KINDS:
            yield Rule(f"{layer}.ln_1.{kind}", f"layers.{{n}}.attention.norm.{kind}")
            yield Rule(f"{layer}.ln_2.{kind}", f"layers.{{n}}.norm.{kind}")
            yield Rule(f"{prefix}ln_f.{kind}", f"norm.{kind}")
            for theirs, ours in (
                ("attn.c_attn", "attention.qkv"),
                ("attn.c_proj", "attention.out"),
                ("mlp.c_fc", "feed_forward.up"),
                ("mlp.c_proj", "feed_forward.down"),
            ):
                yield Rule(
                    f"{layer}.{theirs}.{kind}",
                    f"layers.{{n}}.{ours}.{kind}",
                    is_transposed=kind == "weight",
                )


def _bminf1() -> Iterator[Rule]:
    yield Rule("token_embedding.weight", "embed_tokens.weight")
    yield Rule("position_embedding.weight", "embed_positions.weight")
    for kind in _KINDS:
        yield Rule(f"layernorm.{kind}", f"norm.{kind}")
        yield Rule(f"layers.{{n}}.ln_attn.{kind}", f"layers.{{n}}.attention.norm.{kind}")
        yield Rule(f"layers.{{n}}.ln_ff.{kind}", f"layers.{{n}}.norm.{kind}")
        yield from parts(
            [f"layers.{{n}}.self_attn.project_{x}.{kind}" for x in "qkv"],
            f"layers.{{n}}.attention.qkv.{kind}",
        )
        for theirs, ours in (
            ("self_attn.linear_out", "attention.out"),
            ("ff.linear_in", "feed_forward.up"),
            ("ff.linear_out", "feed_forward.down"),
        ):
            yield Rule(f"layers.{{n}}.{theirs}.{kind}", f"layers.{{n}}.{ours}.{kind}")


_RULES = {"original": _original, "huggingface": _huggingface, "bminf1": _bminf1}
