"""Small checkpoints of the zoo's models, written by the tests: random weights, real layouts, a
vocabulary of a few hundred tokens."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CPM1_CONFIG = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    "layernorm_epsilon": 1e-05,
}
T5_CONFIG = {
    "d_model": 48,
    "d_ff": 80,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-06,
}
WORDS = "今天 天气 很 好 我们 去 公园 散步 吧 ， 。 ？ 你 是 谁 人".split()
_SPECIAL = ("<unk> <s> </s> \u2583 <sep> <pad> <mask> <eod> \u2581 , \u2582").split()


def vocabulary(num_sentinels: int = 190) -> list[str]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    tokens = [*_SPECIAL, *WORDS, *letters]
    tokens += list("ABC")[: -(len(tokens) + num_sentinels) % 4]  # for 4 ranks
    return [*tokens, *(f"<s_{k}>" for k in range(num_sentinels))]


def write_vocabulary(folder: Path, tokens: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


def megatron_layers(
    num_layers: int, size: int, up: int, down: int, gain: float = 1.0, bias: float = 1 / 8
) -> dict[str, torch.Tensor]:
    """Random weights of all layers and the last norm, under Megatron's names, float32.

    up: rows of the first matrix of a feed-forward.   down: columns of the second.
    gain, bias: the deviation of a linear's output for one of 1, and that of its bias.
    """
    found: dict[str, torch.Tensor] = {}

    def norm(name: str) -> None:
        found[f"{name}.weight"] = 1 + torch.randn(size) / 8
        found[f"{name}.bias"] = torch.randn(size) / 8

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = torch.randn(rows, columns) * gain / columns**0.5
        found[f"{name}.bias"] = torch.randn(rows) * bias

    for layer in (f"transformer.layers.{n}" for n in range(num_layers)):
        norm(f"{layer}.input_layernorm")
        linear(f"{layer}.attention.query_key_value", 3 * size, size)
        linear(f"{layer}.attention.dense", size, size)
        norm(f"{layer}.post_attention_layernorm")
        linear(f"{layer}.mlp.dense_h_to_4h", up, size)
        linear(f"{layer}.mlp.dense_4h_to_h", size, down)
    norm("transformer.final_layernorm")
    return found


def cpm1_tensors(
    config: Mapping[str, Any], vocab_size: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """As in the authors' files, not split, float16."""
    torch.manual_seed(seed)
    size = config["hidden_size"]
    tensors = {
        "word_embeddings.weight": torch.randn(vocab_size, size),
        "position_embeddings.weight": torch.randn(config["max_position_embeddings"], size) / 4,
    }
    tensors |= megatron_layers(config["num_layers"], size, 4 * size, 4 * size)
    return {name: tensor.half() for name, tensor in tensors.items()}


def t5_tensors(
    config: Mapping[str, Any], vocab_size: int, seed: int = 0, with_roles: bool = False
) -> dict[str, torch.Tensor]:
    """As in the authors' files of CPM-2 and EVA, not split, float16."""
    torch.manual_seed(seed)
    size, inner, ff = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    tensors = {
        "word_embeds.weight": torch.randn(vocab_size, size),
        "lm_head.weight": torch.randn(vocab_size, size) / size**0.5,
    }

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(size) / 8

    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.word_embeds.weight"] = tensors["word_embeds.weight"]
        norm(f"{stack}.final_layernorm")
        count = config["num_layers" if stack == "encoder" else "num_decoder_layers"]
        for n in range(count):
            block = f"{stack}.blocks.{n}"
            norm(f"{block}.self_attn.layer_norm")
            matrix(f"{block}.self_attn.self_attn.project", 3 * inner, size)
            matrix(f"{block}.self_attn.self_attn.dense", size, inner)
            if stack == "decoder":
                norm(f"{block}.cross_attn.layer_norm")
                matrix(f"{block}.cross_attn.cross_attn.project_q", inner, size)
                matrix(f"{block}.cross_attn.cross_attn.project_kv", 2 * inner, size)
                matrix(f"{block}.cross_attn.cross_attn.dense", size, inner)
            norm(f"{block}.ff.layer_norm")
            matrix(f"{block}.ff.dense_relu_dense.wi_0", ff, size)
            matrix(f"{block}.ff.dense_relu_dense.wi_1", ff, size)
            matrix(f"{block}.ff.dense_relu_dense.wo", size, ff)
        bias = f"{stack}.blocks.0.self_attn.self_attn.relative_attention_bias.weight"
        tensors[bias] = torch.randn(32, config["num_heads"])
    if with_roles:
        for prefix in ("", "encoder.", "decoder."):
            tensors[f"{prefix}role_embeds.weight"] = torch.randn(2, size)
    return {name: tensor.half() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class TinyModel:
    """One model of the tests, which every layout can be written of.

    config, tensors: as the authors have them.   tokens: of vocab.txt.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    tokens: list[str]

    def write_beside(self, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
        """The vocabulary, and a configuration: the authors' own unless another is given."""
        write_vocabulary(folder, self.tokens)
        name = "config.json" if config is not None or self.name == "cpm1" else "model_config.json"
        (folder / name).write_text(json.dumps(self.config if config is None else config))
        return folder

    def write_original(self, folder: Path, degree: int = 1, **how: Any) -> Path:
        self.write_beside(folder)
        return write_ranks(folder, self.ranks(degree), **how)

    def ranks(self, degree: int) -> list[dict[str, torch.Tensor]]:
        """What each rank of so many has."""
        return split(self.tensors, degree)

    def write_huggingface(
        self, folder: Path, form: str = "zip", prefix: str = "transformer."
    ) -> Path:
        """form: "zip", "old", "safetensors", or "sharded"."""
        self.write_beside(folder, self.huggingface_config())
        return write_huggingface(folder, self.huggingface_tensors(prefix), form)

    def huggingface_tensors(self, prefix: str = "transformer.") -> dict[str, torch.Tensor]:
        """prefix: of a GPT-2's names."""
        if self.name != "cpm1":
            return renamed(self.tensors, _HUGGINGFACE_T5)
        found = renamed(self.tensors, _HUGGINGFACE_GPT2)
        is_linear = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
        return {
            f"{prefix}{name}": t.t().contiguous() if is_linear.fullmatch(name) else t
            for name, t in found.items()
        }

    def huggingface_config(self) -> dict[str, Any]:
        config = self.config
        if self.name != "cpm1":
            return {**config, "model_type": "eva"}
        return {
            "model_type": "gpt2",
            "n_layer": config["num_layers"],
            "n_embd": config["hidden_size"],
            "n_head": config["num_attention_heads"],
            "n_positions": config["max_position_embeddings"],
            "n_ctx": config["max_position_embeddings"],
            "n_inner": None,
            "activation_function": "gelu_new",
            "vocab_size": len(self.tokens),
            "eos_token_id": 50256,  # outside the vocabulary, as in the published file
        }

    def write_modelcenter(self, folder: Path, form: str = "zip", **changed: Any) -> Path:
        """changed: fields of the configuration. With length_scale, the weights are written so
        that they mean the same; tied leaves the head out."""
        config = {**self.modelcenter_config(), **changed}
        self.write_beside(folder, config)
        tensors = renamed(self.tensors, _MODELCENTER)
        if config["tied"]:
            del tensors["output_projection.weight"]
        if config["length_scale"]:
            for name, tensor in tensors.items():
                if tensor.dim() == 2 and "position_bias" not in name:
                    tensors[name] = (tensor.float() * tensor.shape[1] ** 0.5).half()
        save(tensors, folder / "pytorch_model.pt", form)
        return folder

    def modelcenter_config(self) -> dict[str, Any]:
        config = self.config
        return {
            "vocab_size": len(self.tokens),
            "dim_model": config["d_model"],
            "num_heads": config["num_heads"],
            "dim_head": config["d_kv"],
            "dim_ff": config["d_ff"],
            "num_encoder_layers": config["num_layers"],
            "num_decoder_layers": config["num_decoder_layers"],
            "dropout_p": 0,
            "pos_bias_type": "relative",
            "position_bias_num_buckets": 32,
            "position_bias_max_distance": 128,
            "norm_bias": False,
            "norm_eps": 1e-6,
            "att_bias": False,
            "att_mask_value": "-inf",
            "ffn_bias": False,
            "ffn_activate_fn": "gated_gelu_new",
            "proj_bias": False,
            "length_scale": False,
            "attn_scale": config.get("attn_scale", False),
            "half": True,
            "int8": False,
            "tied": False,
            "cls_head": None,
            "post_layer_norm": False,
        }

    def write_bminf1(self, folder: Path) -> Path:
        """checkpoint.pt of BMInf 1.x, with the vocabulary and no configuration."""
        write_vocabulary(folder, self.tokens)
        (folder / "checkpoint.pt").write_bytes(bminf1_bytes(self.bminf1_tree()))
        return folder

    def bminf1_tree(self) -> dict[str, Any]:
        """What the migration tools of BMInf 1.x make: int8 rows with float16 scales."""
        table = _BMINF1_GPT if self.name == "cpm1" else _BMINF1_T5
        tree: dict[str, Any] = {}
        for name, tensor in renamed(self.tensors, table).items():
            *outer, linear, kind = name.split(".")
            inside = _inside(tree, [*outer, linear])
            if kind == "weight" and linear.startswith(("project", "linear")):
                inside["weight"], inside["scale"] = int8_rows(tensor)
            else:
                inside[kind] = tensor.t() if "position_bias" in linear else tensor
        return tree

    def dequantized(self) -> TinyModel:
        """The model whose linears are what int8 rows make of them, in float32."""
        changed = dict(self.tensors)
        for name, tensor in self.tensors.items():
            is_in_layer = ".blocks." in name or ".layers." in name
            if tensor.dim() == 2 and is_in_layer and "relative_attention_bias" not in name:
                codes, scale = int8_rows(tensor)
                changed[name] = codes.float() * scale.float().unsqueeze(1)
        return replace(self, tensors=changed)


def with_tensor(made: Any, name: str, tensor: torch.Tensor | None) -> Any:
    """A model of the tests with another tensor; None: without it."""
    kept = {n: t for n, t in made.tensors.items() if n != name}
    return replace(made, tensors=kept if tensor is None else {**made.tensors, name: tensor})


def tiny(name: str, **changed: Any) -> TinyModel:
    """A CPM-1, CPM-2 or EVA; `changed` are fields of its configuration."""
    if name == "cpm1":
        config, tokens = {**CPM1_CONFIG, **changed}, vocabulary(0)
        return TinyModel(name, config, cpm1_tensors(config, len(tokens)), tokens)
    config, tokens = {**T5_CONFIG, **changed}, vocabulary()
    if name == "eva":
        config.setdefault("attn_scale", True)
        tokens[8] = ""  # as in the published file
    return TinyModel(name, config, t5_tensors(config, len(tokens), 0, name == "eva"), tokens)


# ---- torch files ---------------------------------------------------------------------------------


def save(saved: object, path: Path, form: str = "zip") -> Path:
    """form: "zip", or "old", as torch wrote before 1.6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
    return path


def write_ranks(
    folder: Path,
    ranks: Sequence[Mapping[str, torch.Tensor]],
    iteration: int | str = 7,
    /,
    form: str = "zip",
    has_rank_folders: bool = False,
    tracker: str | None = "latest_checkpointed_iteration.txt",
    **beside: Any,
) -> Path:
    """The authors' layout; `beside` stands next to the weights in each file.

    has_rank_folders: iter_0000007/mp_rank_00/model_optim_rng.pt, as without DeepSpeed.
    tracker: the file that names the iteration; None for no such file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tracker is not None:
        (folder / tracker).write_text(f"{iteration}\n")
    for rank, tensors in enumerate(ranks):
        if has_rank_folders:
            path = folder / f"iter_{iteration:07d}/mp_rank_{rank:02d}/model_optim_rng.pt"
            save({"model": dict(tensors), **beside}, path, form)
        else:
            path = folder / f"{iteration}/mp_rank_{rank:02d}_model_states.pt"
            save({"module": dict(tensors), **beside}, path, form)
    return folder


def rank_file(folder: Path, rank: int) -> Path:
    (path,) = folder.rglob(f"mp_rank_{rank:02d}_*.pt")
    return path


def saved_ranks(folder: Path) -> list[dict[str, Any]]:
    """What torch finds in the file of each rank."""
    paths = sorted(folder.glob("*/mp_rank_*_model_states.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def modules(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of each rank."""
    return [saved["module"] for saved in saved_ranks(folder)]


FUSED = {"query_key_value": 3, "self_attn.project.": 3, "project_kv": 2}
"""In the name of a tensor -> how many matrices lie in it one below another, each cut by itself."""

_COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight", "attn.dense.weight", ".wo.weight")
_WHOLE = (
    *("layernorm", "layer_norm", "position_embeddings", "role_embeds", "prompt_embeds"),
    *("inv_freq", "attention.dense.bias", "dense_4h_to_h.bias"),
)


def split(
    tensors: Mapping[str, torch.Tensor], degree: int, fused: Mapping[str, int] = FUSED
) -> list[dict[str, torch.Tensor]]:
    """The tensors as each of `degree` ranks has them; apart from the library's own tables."""
    if degree == 1:
        return [dict(tensors)]  # aliases stay aliases
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(degree)]
    for name, tensor in tensors.items():
        for rank, part in zip(ranks, _parts(name, tensor, degree, fused), strict=True):
            rank[name] = part.clone()
    return ranks


def join(
    ranks: Sequence[Mapping[str, torch.Tensor]], fused: Mapping[str, int] = FUSED
) -> dict[str, torch.Tensor]:
    """What split() has cut."""
    return {name: _whole(name, [rank[name] for rank in ranks], fused) for name in ranks[0]}


def _axis(name: str) -> int | None:
    """Which axis of a tensor is cut; None for one that all ranks have."""
    if any(word in name for word in _WHOLE):
        return None
    return int(name.endswith(_COLUMNS) or "relative_attention_bias" in name)


def _num_fused(name: str, fused: Mapping[str, int]) -> int:
    return next((count for word, count in fused.items() if word in name), 1)


def _parts(
    name: str, tensor: torch.Tensor, degree: int, fused: Mapping[str, int]
) -> Sequence[torch.Tensor]:
    axis = _axis(name)
    if axis is None:
        return [tensor] * degree
    if axis == 1:
        return tensor.chunk(degree, 1)
    matrices = [matrix.chunk(degree) for matrix in tensor.chunk(_num_fused(name, fused))]
    return [torch.cat([matrix[rank] for matrix in matrices]) for rank in range(degree)]


def _whole(name: str, parts: Sequence[torch.Tensor], fused: Mapping[str, int]) -> torch.Tensor:
    axis = _axis(name)
    if axis is None:
        return parts[0]
    if axis == 1:
        return torch.cat(list(parts), 1)
    pieces = [part.chunk(_num_fused(name, fused)) for part in parts]
    return torch.cat([piece for matrix in zip(*pieces, strict=True) for piece in matrix])


# ---- Hugging Face, ModelCenter, BMInf 1.x --------------------------------------------------------


def write_huggingface(folder: Path, tensors: Mapping[str, torch.Tensor], form: str) -> Path:
    """form: "zip", "old", "safetensors", or "sharded", two files of safetensors and an index."""
    whole = {name: tensor.clone() for name, tensor in tensors.items()}  # one storage each
    if form in ("zip", "old"):
        save(whole, folder / "pytorch_model.bin", form)
    elif form == "safetensors":
        save_file(whole, folder / "model.safetensors")
    else:
        files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        places = {name: files[n % 2] for n, name in enumerate(whole)}
        for file in files:
            save_file({n: t for n, t in whole.items() if places[n] == file}, folder / file)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def renamed(
    tensors: Mapping[str, torch.Tensor], table: Mapping[str, Sequence[str]]
) -> dict[str, torch.Tensor]:
    """The tensors under other names.

    table: an original name, with S for the stack, # for the number of the layer and * for weight or
    bias -> the names of the parts that it is cut into. In those, {x} is "enc" or "dec".
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        stack, _, rest = stem.partition(".")
        key = f"S.{rest}" if stack in ("encoder", "decoder") else stem
        number = next(iter(re.findall(r"\.(\d+)\.", stem)), "")
        key = re.sub(r"\.\d+\.", ".#.", key)
        names = table[key]
        for new_name, part in zip(names, tensor.chunk(max(1, len(names))), strict=False):
            place = {"s": stack, "x": stack[:3], "n": number, "f": 1 + (stack == "decoder")}
            found[new_name.format(**place) + f".{kind}"] = part
    return {name.removesuffix("!.weight"): tensor for name, tensor in found.items()}


_HUGGINGFACE_GPT2 = {
    "word_embeddings": ["wte"],
    "position_embeddings": ["wpe"],
    "transformer.layers.#.input_layernorm": ["h.{n}.ln_1"],
    "transformer.layers.#.attention.query_key_value": ["h.{n}.attn.c_attn"],
    "transformer.layers.#.attention.dense": ["h.{n}.attn.c_proj"],
    "transformer.layers.#.post_attention_layernorm": ["h.{n}.ln_2"],
    "transformer.layers.#.mlp.dense_h_to_4h": ["h.{n}.mlp.c_fc"],
    "transformer.layers.#.mlp.dense_4h_to_h": ["h.{n}.mlp.c_proj"],
    "transformer.final_layernorm": ["ln_f"],
}
_HUGGINGFACE_T5 = {
    "word_embeds": ["shared"],
    "lm_head": ["lm_head"],
    "role_embeds": [],
    "S.word_embeds": ["{s}.embed_tokens"],
    "S.role_embeds": [],
    "S.final_layernorm": ["{s}.final_layer_norm"],
    "S.blocks.#.self_attn.layer_norm": ["{s}.block.{n}.layer.0.layer_norm"],
    "S.blocks.#.self_attn.self_attn.project": [
        f"{{s}}.block.{{n}}.layer.0.SelfAttention.{x}" for x in "qkv"
    ],
    "S.blocks.#.self_attn.self_attn.dense": ["{s}.block.{n}.layer.0.SelfAttention.o"],
    "S.blocks.#.self_attn.self_attn.relative_attention_bias": [
        "{s}.block.{n}.layer.0.SelfAttention.relative_attention_bias"
    ],
    "S.blocks.#.cross_attn.layer_norm": ["{s}.block.{n}.layer.1.layer_norm"],
    "S.blocks.#.cross_attn.cross_attn.project_q": ["{s}.block.{n}.layer.1.EncDecAttention.q"],
    "S.blocks.#.cross_attn.cross_attn.project_kv": [
        f"{{s}}.block.{{n}}.layer.1.EncDecAttention.{x}" for x in "kv"
    ],
    "S.blocks.#.cross_attn.cross_attn.dense": ["{s}.block.{n}.layer.1.EncDecAttention.o"],
    "S.blocks.#.ff.layer_norm": ["{s}.block.{n}.layer.{f}.layer_norm"],
    **{
        f"S.blocks.#.ff.dense_relu_dense.{w}": [f"{{s}}.block.{{n}}.layer.{{f}}.DenseReluDense.{w}"]
        for w in ("wi_0", "wi_1", "wo")
    },
}
_MODELCENTER = {
    "word_embeds": ["input_embedding"],
    "lm_head": ["output_projection"],
    "S.word_embeds": [],
    "S.final_layernorm": ["{s}.output_layernorm"],
    "S.blocks.#.self_attn.layer_norm": ["{s}.layers.{n}.self_att.layernorm_before_attention"],
    "S.blocks.#.self_attn.self_attn.project": [
        f"{{s}}.layers.{{n}}.self_att.self_attention.project_{x}" for x in "qkv"
    ],
    "S.blocks.#.self_attn.self_attn.dense": [
        "{s}.layers.{n}.self_att.self_attention.attention_out"
    ],
    "S.blocks.#.self_attn.self_attn.relative_attention_bias": [
        "position_bias_{x}.relative_attention_bias!"
    ],
    "S.blocks.#.cross_attn.layer_norm": ["{s}.layers.{n}.cross_att.layernorm_before_attention"],
    "S.blocks.#.cross_attn.cross_attn.project_q": [
        "{s}.layers.{n}.cross_att.self_attention.project_q"
    ],
    "S.blocks.#.cross_attn.cross_attn.project_kv": [
        f"{{s}}.layers.{{n}}.cross_att.self_attention.project_{x}" for x in "kv"
    ],
    "S.blocks.#.cross_attn.cross_attn.dense": [
        "{s}.layers.{n}.cross_att.self_attention.attention_out"
    ],
    "S.blocks.#.ff.layer_norm": ["{s}.layers.{n}.ffn.layernorm_before_ffn"],
    "S.blocks.#.ff.dense_relu_dense.wi_0": ["{s}.layers.{n}.ffn.ffn.w_in.w_0"],
    "S.blocks.#.ff.dense_relu_dense.wi_1": ["{s}.layers.{n}.ffn.ffn.w_in.w_1"],
    "S.blocks.#.ff.dense_relu_dense.wo": ["{s}.layers.{n}.ffn.ffn.w_out"],
}
_BMINF1_GPT = {
    "word_embeddings": ["token_embedding"],
    "position_embeddings": ["position_embedding"],
    "transformer.layers.#.input_layernorm": ["layers.{n}.ln_attn"],
    "transformer.layers.#.attention.query_key_value": [
        f"layers.{{n}}.self_attn.project_{x}" for x in "qkv"
    ],
    "transformer.layers.#.attention.dense": ["layers.{n}.self_attn.linear_out"],
    "transformer.layers.#.post_attention_layernorm": ["layers.{n}.ln_ff"],
    "transformer.layers.#.mlp.dense_h_to_4h": ["layers.{n}.ff.linear_in"],
    "transformer.layers.#.mlp.dense_4h_to_h": ["layers.{n}.ff.linear_out"],
    "transformer.final_layernorm": ["layernorm"],
}
_BMINF1_T5 = {
    "word_embeds": ["input_embedding"],
    "lm_head": ["output_embedding"],
    "role_embeds": [],
    "S.word_embeds": [],
    "S.role_embeds": [],
    "S.final_layernorm": ["ln_{x}"],
    "S.blocks.#.self_attn.layer_norm": ["{x}_layers.{n}.ln_attn"],
    "S.blocks.#.self_attn.self_attn.project": [
        f"{{x}}_layers.{{n}}.self_attn.project_{x}" for x in "qkv"
    ],
    "S.blocks.#.self_attn.self_attn.dense": ["{x}_layers.{n}.self_attn.linear_out"],
    "S.blocks.#.self_attn.self_attn.relative_attention_bias": ["position_bias_{x}"],
    "S.blocks.#.cross_attn.layer_norm": ["{x}_layers.{n}.ln_cross_attn"],
    "S.blocks.#.cross_attn.cross_attn.project_q": ["{x}_layers.{n}.cross_attn.project_q"],
    "S.blocks.#.cross_attn.cross_attn.project_kv": [
        f"{{x}}_layers.{{n}}.cross_attn.project_{x}" for x in "kv"
    ],
    "S.blocks.#.cross_attn.cross_attn.dense": ["{x}_layers.{n}.cross_attn.linear_out"],
    "S.blocks.#.ff.layer_norm": ["{x}_layers.{n}.ln_ff"],
    "S.blocks.#.ff.dense_relu_dense.wi_0": ["{x}_layers.{n}.ff.linear_in"],
    "S.blocks.#.ff.dense_relu_dense.wi_1": ["{x}_layers.{n}.ff.linear_gated"],
    "S.blocks.#.ff.dense_relu_dense.wo": ["{x}_layers.{n}.ff.linear_out"],
}


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float16 scales of the rows, as BMInf 1.x rounds them."""
    scale = (weight.float().abs().amax(1) / 127).half()
    codes = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def _inside(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The layer at `path`, made where it is not there yet."""
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


def bminf1_bytes(tree: Mapping[str, Any]) -> bytes:
    """A checkpoint.pt of BMInf 1.x: nested mappings of int8 and float16 tensors."""
    tensors = {name: t for name, t in tree.items() if isinstance(t, torch.Tensor)}
    layers = {name: layer for name, layer in tree.items() if name not in tensors}
    parts = [struct.pack("<2I", len(tensors), len(layers))]
    for name, tensor in tensors.items():
        data, code = tensor.contiguous().numpy().tobytes(), int(tensor.dtype != torch.int8)
        parts += [_named(name), struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)]
        parts += [struct.pack("<IB", len(data), code), data]
    for name, layer in layers.items():
        parts += [_named(name), bminf1_bytes(layer)]
    return b"".join(parts)


def _named(name: str) -> bytes:
    return struct.pack("<I", len(name.encode())) + name.encode()
