"""The names of the tensors of CPM-2 and EVA in each layout that they are found in."""

from __future__ import annotations

from collections.abc import Iterator

from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import Rule, num_known, parts, rename, theirs_of
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError

_STACKS = ("encoder", "decoder")


def t5_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint under the names of arch/t5.py.

    Raises CheckpointError for names of another model, for parts that are missing, and for the
    prompts of a prompt-tuned model, which generate() has no use for.
    """
    prompts = [name for name in checkpoint.tensors if name.endswith("prompt_embeds.weight")]
    if prompts:
        raise CheckpointError(
            f"{checkpoint.path} holds {prompts[0]!r}: it is prompt-tuned for one task, and without "
            "those prompts it would answer wrongly; take the checkpoint it was tuned from"
        )
    rules = _RULES[checkpoint.kind]()
    return rename(checkpoint.tensors, rules, checkpoint.path, f"a T5 ({checkpoint.kind})")


def is_t5(checkpoint: Checkpoint) -> bool:
    """Whether most of a checkpoint's tensors have names of CPM-2 and EVA in its layout."""
    rules = _RULES.get(checkpoint.kind)
    if rules is None:
        return False
    return 2 * num_known(checkpoint.tensors, rules()) > len(checkpoint.tensors)


def t5_name(kind: str, ours: str) -> str:
    """What the layout `kind` calls a tensor that arch/t5.py calls `ours`."""
    return theirs_of(ours, _RULES[kind]())


def _original() -> Iterator[Rule]:
    yield Rule("word_embeds.weight", "embed_tokens.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    yield Rule("role_embeds.weight", None)  # EVA's, not used after its training
    for stack in _STACKS:
        yield Rule(f"{stack}.word_embeds.weight", None)  # the shared embedding again
        yield Rule(f"{stack}.role_embeds.weight", None)
        yield Rule(f"{stack}.final_layernorm.weight", f"{stack}.norm.weight")
        theirs, ours = f"{stack}.blocks.{{n}}", f"{stack}.layers.{{n}}"
        yield Rule(f"{theirs}.self_attn.layer_norm.weight", f"{ours}.attention.norm.weight")
        attention = f"{theirs}.self_attn.self_attn"
        yield Rule(f"{attention}.project.weight", f"{ours}.attention.qkv.weight")
        yield Rule(f"{attention}.dense.weight", f"{ours}.attention.out.weight")
        yield Rule(
            f"{stack}.blocks.0.self_attn.self_attn.relative_attention_bias.weight",
            f"{stack}.position_bias.weight",
        )
        yield Rule(f"{theirs}.ff.layer_norm.weight", f"{ours}.norm.weight")
        dense = f"{theirs}.ff.dense_relu_dense"
        yield Rule(f"{dense}.wi_0.weight", f"{ours}.feed_forward.gate.weight")
        yield Rule(f"{dense}.wi_1.weight", f"{ours}.feed_forward.up.weight")
        yield Rule(f"{dense}.wo.weight", f"{ours}.feed_forward.down.weight")
    theirs, ours = "decoder.blocks.{n}.cross_attn", "decoder.layers.{n}.cross_attention"
    yield Rule(f"{theirs}.layer_norm.weight", f"{ours}.norm.weight")
    yield Rule(f"{theirs}.cross_attn.project_q.weight", f"{ours}.query.weight")
    yield Rule(f"{theirs}.cross_attn.dense.weight", f"{ours}.out.weight")
    yield Rule(f"{theirs}.cross_attn.project_kv.weight", "cross_projections.layers.{n}.weight")


def _huggingface() -> Iterator[Rule]:
    yield Rule("shared.weight", "embed_tokens.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    yield Rule("role_embeds.weight", None)
    for stack, feed_forward in zip(_STACKS, ("layer.1", "layer.2"), strict=True):
        yield Rule(f"{stack}.embed_tokens.weight", None)
        yield Rule(f"{stack}.role_embeds.weight", None)
        yield Rule(f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight")
        theirs, ours = f"{stack}.block.{{n}}", f"{stack}.layers.{{n}}"
        yield Rule(f"{theirs}.layer.0.layer_norm.weight", f"{ours}.attention.norm.weight")
        attention = f"{theirs}.layer.0.SelfAttention"
        yield from parts([f"{attention}.{x}.weight" for x in "qkv"], f"{ours}.attention.qkv.weight")
        yield Rule(f"{attention}.o.weight", f"{ours}.attention.out.weight")
        yield Rule(
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{stack}.position_bias.weight",
        )
        yield Rule(f"{theirs}.{feed_forward}.layer_norm.weight", f"{ours}.norm.weight")
        dense = f"{theirs}.{feed_forward}.DenseReluDense"
        yield Rule(f"{dense}.wi_0.weight", f"{ours}.feed_forward.gate.weight")
        yield Rule(f"{dense}.wi_1.weight", f"{ours}.feed_forward.up.weight")
        yield Rule(f"{dense}.wo.weight", f"{ours}.feed_forward.down.weight")
    theirs, ours = "decoder.block.{n}.layer.1", "decoder.layers.{n}.cross_attention"
    yield Rule(f"{theirs}.layer_norm.weight", f"{ours}.norm.weight")
    yield Rule(f"{theirs}.EncDecAttention.q.weight", f"{ours}.query.weight")
    yield Rule(f"{theirs}.EncDecAttention.o.weight", f"{ours}.out.weight")
    yield from parts(
        [f"{theirs}.EncDecAttention.{x}.weight" for x in "kv"],
        "cross_projections.layers.{n}.weight",
    )


def _modelcenter() -> Iterator[Rule]:
    yield Rule("input_embedding.weight", "embed_tokens.weight")
    yield Rule("output_projection.weight", "lm_head.weight")
    for stack in _STACKS:
        yield Rule(
            f"position_bias_{stack[:3]}.relative_attention_bias", f"{stack}.position_bias.weight"
        )
        yield Rule(f"{stack}.output_layernorm.weight", f"{stack}.norm.weight")
        theirs, ours = f"{stack}.layers.{{n}}", f"{stack}.layers.{{n}}"
        yield Rule(
            f"{theirs}.self_att.layernorm_before_attention.weight", f"{ours}.attention.norm.weight"
        )
        attention = f"{theirs}.self_att.self_attention"
        yield from parts(
            [f"{attention}.project_{x}.weight" for x in "qkv"], f"{ours}.attention.qkv.weight"
        )
        yield Rule(f"{attention}.attention_out.weight", f"{ours}.attention.out.weight")
        yield Rule(f"{theirs}.ffn.layernorm_before_ffn.weight", f"{ours}.norm.weight")
        dense = f"{theirs}.ffn.ffn"
        yield Rule(f"{dense}.w_in.w_0.weight", f"{ours}.feed_forward.gate.weight")
        yield Rule(f"{dense}.w_in.w_1.weight", f"{ours}.feed_forward.up.weight")
        yield Rule(f"{dense}.w_out.weight", f"{ours}.feed_forward.down.weight")
    theirs, ours = "decoder.layers.{n}.cross_att", "decoder.layers.{n}.cross_attention"
    yield Rule(f"{theirs}.layernorm_before_attention.weight", f"{ours}.norm.weight")
    attention = f"{theirs}.self_attention"  # so they call it
    yield Rule(f"{attention}.project_q.weight", f"{ours}.query.weight")
    yield Rule(f"{attention}.attention_out.weight", f"{ours}.out.weight")
    yield from parts(
        [f"{attention}.project_{x}.weight" for x in "kv"], "cross_projections.layers.{n}.weight"
    )


def _bminf1() -> Iterator[Rule]:
    yield Rule("input_embedding.weight", "embed_tokens.weight")
    yield Rule("output_embedding.weight", "lm_head.weight")
    for stack in _STACKS:
        short = stack[:3]
        yield Rule(f"ln_{short}.weight", f"{stack}.norm.weight")
        yield Rule(
            f"position_bias_{short}.weight", f"{stack}.position_bias.weight", is_transposed=True
        )
        theirs, ours = f"{short}_layers.{{n}}", f"{stack}.layers.{{n}}"
        yield Rule(f"{theirs}.ln_attn.weight", f"{ours}.attention.norm.weight")
        yield from parts(
            [f"{theirs}.self_attn.project_{x}.weight" for x in "qkv"],
            f"{ours}.attention.qkv.weight",
        )
        yield Rule(f"{theirs}.self_attn.linear_out.weight", f"{ours}.attention.out.weight")
        yield Rule(f"{theirs}.ln_ff.weight", f"{ours}.norm.weight")
        yield Rule(f"{theirs}.ff.linear_in.weight", f"{ours}.feed_forward.gate.weight")
        yield Rule(f"{theirs}.ff.linear_gated.weight", f"{ours}.feed_forward.up.weight")
        yield Rule(f"{theirs}.ff.linear_out.weight", f"{ours}.feed_forward.down.weight")
    theirs, ours = "dec_layers.{n}", "decoder.layers.{n}.cross_attention"
    yield Rule(f"{theirs}.ln_cross_attn.weight", f"{ours}.norm.weight")
    yield Rule(f"{theirs}.cross_attn.project_q.weight", f"{ours}.query.weight")
    yield Rule(f"{theirs}.cross_attn.linear_out.weight", f"{ours}.out.weight")
    yield from parts(
        [f"{theirs}.cross_attn.project_{x}.weight" for x in "kv"],
        "cross_projections.layers.{n}.weight",
    )


_RULES = {
    "original": _original,
    "huggingface": _huggingface,
    "modelcenter": _modelcenter,
    "bminf1": _bminf1,
}
