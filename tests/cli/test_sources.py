"""What `bminf plan` takes for a model, and what it says of all else before it reads much.

bminf/cli/sources.py, bminf/cli/gpus.py, bminf/cli/models.py.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from plan_reports import CONFIG, write_llama
from terminal import Command
from tiny_glm import tiny_glm10b
from tiny_models import make
from tiny_zoo import tiny

import bminf
from bminf.arch.registry import ARCHITECTURES
from bminf.cli import sources
from bminf.cli.gpus import _CARDS, card_of, speeds_of
from bminf.errors import ArgumentError
from bminf.models.convert import convert

Report = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read_over(tmp_path: Path, encoding: str, report: Report) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding=encoding)
    assert len(report(tmp_path)["blocks"]) == 6


@pytest.mark.parametrize("head", [b"GGUF", b"GGUF\x63\0\0\0", b"PK\3\4", b"\0" * 8, b"\x80\2"])
@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "config.json"])
def test_a_large_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, name: str, refused: Refused
) -> None:
    with open(tmp_path / name, "wb") as out:
        out.write(head)
        out.truncate(3 << 30)  # a file that takes no room
    num_read = 0
    opened = builtins.open

    def counting(*args: Any, **kwargs: Any) -> Any:
        file = opened(*args, **kwargs)
        if str(args[0]).startswith(str(tmp_path)):
            read = file.read

            class Counted:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def read(self, count: int) -> bytes:
                    nonlocal num_read
                    num_read += count
                    data: bytes = read(count)
                    return data

            return Counted()
        return file

    monkeypatch.setattr(builtins, "open", counting)
    said = refused(tmp_path / name)
    assert name in said and "give a folder with config.json" in said and "fetch" not in said
    assert num_read < 2**25


def test_a_file_of_safetensors_stands_for_its_folder(
    tmp_path: Path, report: Report, refused: Refused
) -> None:
    file = tmp_path / "model-00001-of-00002.safetensors"
    file.write_bytes(b"not even opened")
    assert "no config.json beside it" in refused(file)
    write_llama(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    for name in (file, index):
        assert len(report(name)["blocks"]) == 6


@pytest.mark.parametrize("kind", ["int4", "int8", None])
def test_a_folder_of_save_is_planned_as_it_is_packed(
    kind: str | None, tmp_path: Path, report: Report, refused: Refused
) -> None:
    some = None if kind is None else (lambda name, _: "mlp" in name)
    model = bminf.wrapper(make("llama"), kind, device="cpu", quantize=some)
    bminf.save(model, tmp_path / "saved")
    found = report(tmp_path / "saved")
    expected = bminf.plan_of(bminf.load(tmp_path / "saved", device="cpu"))
    assert expected is not None
    assert [block["bytes"] for block in found["blocks"]] == [b.nbytes for b in expected.blocks]
    assert found["quantization"] == ("none" if kind is None else "as stored")
    if kind is not None:
        wrong = refused(tmp_path / "saved", "--quantization", "int8")
        assert "packed already; leave out --quantization" in wrong


def write_gguf(path: Path, architecture: str) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(6)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(100)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_name("tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_of_a_gguf_file_is_enough(
    tmp_path: Path, report: Report, refused: Refused
) -> None:
    shown = report(write_gguf(tmp_path / "a.gguf", "llama"), "--quantization", "none")
    config = {name: value for name, value in CONFIG.items() if name != "architectures"}
    (tmp_path / "b").mkdir()
    written = write_llama(tmp_path / "b", num_key_value_heads=2, dtype="float16", **config)
    same = report(written, "--quantization", "none")
    assert shown["dtype"] == "float16"
    assert [block["bytes"] for block in shown["blocks"]] == [b["bytes"] for b in same["blocks"]]
    said = refused(write_gguf(tmp_path / "c.gguf", "quokka"))
    assert "quokka" in said and "give the folder with the config.json" in said
    folder = tmp_path / "d"
    folder.mkdir()
    write_gguf(folder / "model.gguf", "llama")
    assert "name one of model.gguf" in refused(folder)


def test_only_the_configuration_of_a_hub_id_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report, refused: Refused
) -> None:
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        if repo_id == "some/closed":
            raise OSError("401 Unauthorized\nand pages of advice")
        return str(write_llama(tmp_path) / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("some/model", "model"):
        assert len(report(name)["blocks"]) == 6
    assert asked == [("some/model", "config.json"), ("model", "config.json")]
    said = refused("some/closed")
    assert "'some/closed'" in said and "401 Unauthorized - give a folder" in said
    assert "pages of advice" not in said


@pytest.mark.parametrize("name", ["/no/such", "./none", "../none", "~/none", "a b", "x/y/z", ""])
def test_what_cannot_be_a_hub_id_is_not_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Refused
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.chdir(tmp_path)
    assert "give a folder with config.json" in refused(name)


@pytest.mark.parametrize(
    ("name", "num_blocks", "bits"),
    [
        ("cpm2", 72, 8), ("CPM-2.1", 72, 8), ("cpm1", 32, 8), ("eva", 72, 8), ("EVA1.0", 72, 8),
        ("TsinghuaAI/CPM-Generate", 32, 8), ("thu-coai/EVA2.0-base", 36, 8),
        ("GLM-10B", 203, 4), ("thudm/glm-10b", 203, 4), ("glm-130b", 289, 4),
    ],
)  # fmt: skip
def test_published_names_need_no_network(
    name: str, num_blocks: int, bits: int, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    shown = report(name)
    assert len(shown["blocks"]) == num_blocks and shown["quantization"] == f"int{bits}"
    assert shown["reserved_bytes"] > 0 and shown["least_limit"] > shown["reserved_bytes"]


def loaded(kind: Any, folder: Path, **settings: Any) -> Any:
    with kind(folder, device="cpu", dtype=torch.float16, **settings) as model:
        return model.plan


@pytest.mark.filterwarnings("ignore:found no sentencepiece model")
def test_folders_of_the_zoo_are_planned_as_they_load(tmp_path: Path, report: Report) -> None:
    for name in ("cpm1", "cpm2", "eva"):
        tiny(name).write_original(tmp_path / name)
    tiny_glm10b(max_sequence_length=512).write_original(tmp_path / "glm")
    convert(tmp_path / "cpm2", tmp_path / "packed", "int4", model="cpm2")
    for name, kind in (
        ("cpm1", bminf.models.CPM1), ("cpm2", bminf.models.CPM2), ("eva", bminf.models.EVA),
        ("glm", bminf.models.GLM), ("packed", bminf.models.CPM2),
    ):  # fmt: skip
        plan = loaded(kind, tmp_path / name)
        shown = report(tmp_path / name)
        assert [b["bytes"] for b in shown["blocks"]] == [b.nbytes for b in plan.blocks], name
        assert shown["outside_bytes"] == plan.outside_bytes
    limit = str(shown["least_limit"])
    assert report(tmp_path / "packed", "--memory-limit", limit)["resident"] == []


def test_options_of_the_others_are_refused_for_the_zoo(report: Report, refused: Refused) -> None:
    assert "leave it out" in refused("cpm1", "--blocks", "a")
    assert "leave it out" in refused("cpm1", "--reserve", "1GB")
    assert "1024 positions" in refused("cpm1", "--max-length", "2048")
    assert "accepted" in refused("cpm1", "--quantization", "int4-row")
    longer = report("cpm2", "--max-length", "64")["reserved_bytes"]
    assert longer < report("cpm2", "--max-length", "128")["reserved_bytes"]


def test_a_configuration_alone_may_be_of_the_zoo(tmp_path: Path, report: Report) -> None:
    config = dict(model_type="eva", d_model=48, d_ff=80, d_kv=8, num_heads=4, num_layers=2,
        num_decoder_layers=2, vocab_size=100)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = report(tmp_path)
    assert shown["model"] == "EVA" and len(shown["blocks"]) == 6


@pytest.mark.parametrize(
    ("named", "title", "num_blocks"),
    [
        (None, "BLOOM", 3 * 4),
        ("BloomForCausalLM", "BLOOM", 3 * 4),
        ("BloomForTokenClassification", "BloomForTokenClassification", 3),
    ],
)
def test_the_class_of_a_bloom_says_whose_it_is(
    named: str | None, title: str, num_blocks: int, tmp_path: Path, report: Report
) -> None:
    config = dict(model_type="bloom", hidden_size=64, n_layer=3, n_head=4, vocab_size=50)
    config |= {} if named is None else {"architectures": [named]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = report(tmp_path)
    layers = [block for block in shown["blocks"] if "lm_head" not in block["name"]]
    assert shown["model"] == title and len(layers) == num_blocks


def test_experts_are_packed_and_routers_are_not(
    tmp_path: Path, command: Command, report: Report
) -> None:
    config = transformers.MixtralConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    ).to_dict() | {"architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    out, err = command("plan", tmp_path, "--quantization", "int4")
    assert "not quantized in the blocks: " in out and not err
    routers = 4 * 4 * 64 * 2  # no norms: only matrices
    left = report(tmp_path, "--quantization", "int4")["not_quantized_bytes"]
    assert left == routers
    assert report(tmp_path, "--quantization", "none")["not_quantized_bytes"] == 0


def test_max_length_is_planned(
    tmp_path: Path, command: Command, report: Report, refused: Refused
) -> None:
    folder = str(write_llama(tmp_path))
    bare, usual = report(folder), report(folder, "--max-length", "2048")
    assert bare["context"] is None and bare["usual_context"] == usual["context"]
    context = usual["context"]
    assert context["cache_bytes"] == 2048 * 6 * 2 * 64 * 4
    taken = context["cache_bytes"] + context["workspace_bytes"]
    assert usual["reserved_bytes"] == taken == usual["least_limit"] - bare["least_limit"]
    assert "a context of 2,048 tokens would take about" in command("plan", folder).out
    assert command("plan", folder, "--memory-limit", "1MB").out.count("2,048") == 1
    assert "whole number above 0" in refused(folder, "--max-length", "0")


def test_the_speeds_of_a_card(tmp_path: Path, report: Report, refused: Refused) -> None:
    folder = str(write_llama(tmp_path))
    limit = str(report(folder)["least_limit"])

    def speeds(*options: str) -> tuple[float, float]:
        shown = report(folder, "--memory-limit", limit, *options)
        return shown["memory_bytes_per_s"] / 1e9, shown["link_bytes_per_s"] / 1e9

    assert speeds() == (150, 12)
    for name in ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"):
        memory, link = speeds("--gpu", name)
        assert memory == 1008 and 24 < link < 26
    assert speeds("--gpu", "RTX 4090", "--link", "10GB")[1] == 10
    assert speeds("--gpu", "RTX 4060")[1] == pytest.approx(link / 2)
    assert all(speed > 0.01 for speed in speeds("--gpu", "this"))
    said = refused(folder, "--gpu", "Voodoo 2")
    assert "'Voodoo 2'" in said and "RTX 4090" in said and "--memory-bandwidth" in said


def test_cards_go_by_the_names_that_the_driver_prints() -> None:
    for printed, name in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "Tesla V100-SXM2-32GB": "V100",
        "NVIDIA GeForce RTX 3060 12GB": "rtx3060",
    }.items():
        assert speeds_of(printed) == speeds_of(name)
    assert speeds_of("NVIDIA A100-SXM4-80GB").memory == 2039 * 10**9
    with pytest.raises(ArgumentError, match="is not known"):
        speeds_of("RTX 3080 12GB")  # which reads its memory faster than the one of 10 GB


def test_what_a_card_has_is_known_of_each() -> None:
    for name in _CARDS:
        card = card_of(name)
        assert card.speeds == speeds_of(name) and 6 * 2**30 <= card.memory_bytes <= 140 * 2**30
        assert card.flops is None or 4e12 <= card.flops < 1e15
    assert card_of("NVIDIA A100-SXM4-40GB") == card_of("A100 40GB")
    assert card_of("A100 40GB").flops == 312e12
    here = card_of("this")
    assert here.memory_bytes > 0 and here.speeds.memory > 0 and here.flops is None


def test_files_that_hold_something_else_are_told(tmp_path: Path, refused: Refused) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("model.gguf", "model.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).write_text(pointer)
        assert "git lfs pull" in refused(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert "has no model_type" in refused(tmp_path / "config.json")


def test_slow_tokens_are_told_in_seconds(tmp_path: Path, command: Command, report: Report) -> None:
    folder = str(write_llama(tmp_path))
    limit = str(report(folder)["least_limit"])
    line = command("plan", folder, "--memory-limit", limit, "--link", "1KB").out.splitlines()[-1]
    assert "tokens/s" not in line and "a token: 2" in line and " s (" in line
    assert (
        "tokens/s"
        in command("plan", folder, "--memory-limit", limit, "--link", "100KB").out.splitlines()[-1]
    )


def test_a_limit_is_printed_as_given(tmp_path: Path, command: Command, refused: Refused) -> None:
    folder = str(write_llama(tmp_path))
    for given, shown in (("6GB", "6 GB"), ("6G", "6 GB"), ("1.25GiB", "1.25 GiB")):
        assert f" {shown}   planned" in command("plan", folder, "--memory-limit", given).out
    assert "the limit of 1 KB (1000 bytes)" in refused(folder, "--memory-limit", "1KB")


def test_a_model_that_writes_no_text(tmp_path: Path, report: Report, refused: Refused) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        image_size=32,
    ).to_dict()  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert report(tmp_path)["usual_context"] is None
    assert "--reserve 1GB" in refused(tmp_path, "--max-length", "64")


def test_the_built_in_models_are_those_of_the_registry() -> None:
    assert sources.BUILT_IN == tuple(architecture.name for architecture in ARCHITECTURES)
