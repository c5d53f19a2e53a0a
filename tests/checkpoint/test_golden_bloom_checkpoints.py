"""BLOOM's training checkpoints and DeepSpeed's forms of it: the model of the Hugging Face folder.

How ranks split its tensors stands here once more, as the public conversion script and DeepSpeed
have it; what a set holds makes the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from golden import GoldenSet, for_each, golden, is_int8

from bminf.checkpoint.folder import Checkpoint, open_checkpoint
from bminf.checkpoint.model_parallel import AVERAGED, COLUMNS, REPLICATED, ROWS, SplitTable
from bminf.checkpoint.quantized import Quantized

TABLE = SplitTable(
    "BLOOM's kind",
    {
        r"\d+\.word_embeddings\.weight": ROWS,
        r".*(query_key_value|dense_h_to_4h)\.(weight|bias)": ROWS,
        r".*\.(dense|dense_4h_to_h)\.weight": COLUMNS,
        r"\d+\.(.*norm\.|.*\.dense\.|.*\.dense_4h_to_h\.)?(weight|bias)": AVERAGED,
        r".*\.(attn_qkv|inter_)[wb]": ROWS,
        r".*\.(attn_o|output_)w": COLUMNS,
        r".*\.(attn_o|output_)b": REPLICATED,
        r".*\.(norm_|attn_n)[wb]": REPLICATED,
    },
    lambda names: True,
)
PRESHARDED = {
    "norm_": "input_layernorm.", "attention.attn_qkv": "self_attention.query_key_value.",
    "attention.attn_o": "self_attention.dense.", "mlp.attn_n": "post_attention_layernorm.",
    "mlp.inter_": "mlp.dense_h_to_4h.", "mlp.output_": "mlp.dense_4h_to_h.",
}  # fmt: skip
KINDS = {"megatron": "layers", "ds": "presharded"}


def folders(kind: str, of: GoldenSet) -> list[str]:
    return [name for name in of.layouts() if KINDS.get(name.partition("_")[0]) == kind]


def layered(of: GoldenSet) -> list[str]:
    return folders("layers", of)


def presharded(of: GoldenSet) -> list[str]:
    return folders("presharded", of)


def opened(given: GoldenSet, layout: str) -> Checkpoint:
    return open_checkpoint(given.path / layout, [TABLE])


def whole(given: GoldenSet) -> dict[str, torch.Tensor]:
    """Of a folder of Hugging Face, without the prefix and the tied head that some of them have."""
    layout = next(name for name in given.layouts() if name.startswith("hf_"))
    tensors = open_checkpoint(given.path / layout, []).tensors
    found = {name.removeprefix("transformer."): x.read() for name, x in tensors.items()}
    found.pop("lm_head.weight", None)
    return found


def name_of_layers(name: str, last: int) -> str:
    """What Hugging Face calls "3.input_layernorm.weight"; the last place is the final norm's."""
    place, _, key = name.partition(".")
    if int(place) == last:
        return f"ln_f.{key}"
    if key.startswith("word_embeddings"):
        return key.replace("embeddings.norm", "embeddings_layernorm")
    return f"h.{int(place) - 3}.{key}"


def name_of_presharded(name: str) -> str:
    found = re.fullmatch(r"transformer\.(h\.\d+)\.(.+)([wb])", name)
    kind = PRESHARDED.get(found[2]) if found else None
    if found is None or kind is None:
        return name.removeprefix("transformer.")
    return f"{found[1]}.{kind}{'weight' if found[3] == 'w' else 'bias'}"


@for_each(["bloom"], layered)
def test_golden_layers_are_the_model_whatever_their_degree(name: str, case: str) -> None:
    given, found = golden(name), opened(golden(name), case)
    assert found.kind == "layers"
    last, expected = max(int(key.partition(".")[0]) for key in found.tensors), whole(given)
    assert {name_of_layers(key, last) for key in found.tensors} == expected.keys()
    for key, stored in found.tensors.items():
        tensor = expected[name_of_layers(key, last)]
        assert stored.shape == tuple(tensor.shape), key
        assert torch.equal(stored.read().float(), tensor.float()), key


@for_each(["bloom"], presharded)
def test_golden_presharded_folders_hold_the_model(name: str, case: str) -> None:
    """Codes are as near to the weights as half a step, or a step where the largest saturates."""
    given, found = golden(name), opened(golden(name), case)
    assert found.kind == "presharded"
    expected, num_quantized = whole(given), 0
    if "lm_head.weight" in found.tensors:
        expected["lm_head.weight"] = expected["word_embeddings.weight"]
    assert {name_of_presharded(key) for key in found.tensors} == expected.keys()
    for key, stored in found.tensors.items():
        tensor = expected[name_of_presharded(key)].float()
        assert stored.shape == tuple(tensor.shape), key
        if isinstance(stored, Quantized):
            num_quantized += 1
            step = stored.scale.read().repeat_interleave(tensor.shape[1] // stored.num_groups, 1)
            far = (stored.read() - tensor).abs() / step
            assert far.max() <= 1 + 1e-4 and far.median() < 0.5, key
        else:
            assert torch.equal(stored.read().float(), tensor), key
    layers = {key.split(".")[2] for key in found.tensors if ".h." in key}
    assert num_quantized == (4 * len(layers) if is_int8(given, case) else 0)


def shapes(of: GoldenSet) -> Iterator[list[str]]:
    keys: dict[str, Any] = json.loads((of.path / "keys.json").read_text())
    for layout in [*layered(of), *presharded(of)]:
        if layout in keys:
            yield [layout, str(len(keys[layout]))]


@for_each(["bloom"], shapes)
def test_golden_files_are_all_that_the_folders_are_read_from(name: str, case: list[str]) -> None:
    """Each key of each listed file is one of the tensors, or a rank's part of one."""
    given, (layout, num_files) = golden(name), case
    listed = json.loads((given.path / "keys.json").read_text())[layout]
    assert len(listed) == int(num_files)
    found = set()
    for file, keys in listed.items():
        place = re.search(r"layer_(\d+)-", file)
        found |= {f"{int(place[1])}.{key}" if place else key for key in keys}
    assert opened(given, layout).tensors.keys() == found
