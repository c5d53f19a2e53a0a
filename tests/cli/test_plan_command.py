"""bminf/cli/plan.py: from config.json alone to bytes, resident blocks and predicted time."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from plan_reports import LLAMA, write_llama
from terminal import Command

import bminf
from bminf.cli.demo import half_limit
from bminf.cli.sources import build_on_meta
from bminf.offload.plan import Block, least_budget, plan
from bminf.offload.predict import predict

Report = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def stored_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_model(tmp_path: Path, dtype: str, report: Report) -> None:
    write_llama(tmp_path, dtype=dtype)
    shown = report(tmp_path, "--quantization", "none")
    assert shown["dtype"] == dtype
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.to(getattr(torch, dtype))
    sizes = {block["bytes"] for block in shown["blocks"]}
    assert len(shown["blocks"]) == 6
    # A blob is a little more than its tensors: each begins at a multiple of 256 bytes.
    assert is_little_more(min(sizes), stored_bytes(model.model.layers[0]))
    assert is_little_more(shown["total_bytes"], stored_bytes(model))
    assert "resident" not in shown


def is_little_more(planned: int, stored: int) -> bool:
    return stored <= planned <= 1.01 * stored


def test_no_dtype_is_float32(tmp_path: Path, report: Report) -> None:
    assert report(write_llama(tmp_path))["dtype"] == "float32"


def test_int8_is_smaller(tmp_path: Path, report: Report) -> None:
    write_llama(tmp_path)
    packed, plain = (
        report(tmp_path, "--quantization", choice)["blocks"][0]["bytes"]
        for choice in ("int8", "none")
    )
    assert plain / 4 < packed < plain / 3


def test_limit_is_planned_and_timed(tmp_path: Path, report: Report) -> None:
    config = str(write_llama(tmp_path) / "config.json")
    whole = report(config)
    size = whole["blocks"][0]["bytes"]
    limit = whole["outside_bytes"] - whole["table_bytes"] + 4 * size
    speeds = ("--link", "1MB/s", "--memory-bandwidth", "1GB/s")
    shown = report(config, "--memory-limit", str(limit), *speeds)
    assert len(shown["resident"]) == 2
    assert len(shown["streamed"]) == 4
    assert shown["slot_bytes"] == 2 * size
    assert shown["planned_bytes"] == limit
    assert shown["copy_s"] == pytest.approx(4 * size / 1e6)
    assert shown["token_s"] == pytest.approx(shown["copy_s"], rel=0.05)
    assert shown["link_busy"] > 0.95


DOCS = Path(__file__).parents[2] / "docs"

QWEN3_14B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17408,
    "max_position_embeddings": 40960, "max_window_layers": 40, "model_type": "qwen3",
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_half_of_a_small_card_is_not_spent_on_tables(
    tmp_path: Path, command: Command, report: Report
) -> None:
    """Qwen3-14B on 7 GB at 12 GB/s: the embedding's rows on the host, the head in 8 bits."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_14B))
    arguments = (tmp_path, "--quantization", "int4", "--memory-limit", "7GB", "--link", "12GB")
    shown = report(*arguments)
    assert is_little_more(shown["table_bytes"], 151936 * 5120 * 2)
    assert shown["tables_on_host"] == ["model.embed_tokens.weight"]
    assert 1 / shown["token_s"] >= 7
    out = command("plan", *map(str, arguments)).out
    assert (
        "of these read by row: 1.4 GiB" in out and "on the host: model.embed_tokens.weight" in out
    )
    model = build_on_meta(QWEN3_14B)
    smallest = bminf.Format(4, group_size=32, scale_bits=8)
    fewer = bminf.plan_for(model, smallest, "7GB", device="cuda")
    assert 1 / predict(fewer, 12e9, 150e9).pass_s >= 9.5
    head_bytes = 151936 * (5120 + 8)  # codes, a scale and a sum of codes a row
    assert head_bytes <= fewer.outside_bytes <= 1.01 * head_bytes


def test_three_tiers_are_planned_and_timed(
    tmp_path: Path, command: Command, report: Report
) -> None:
    folder = str(write_llama(tmp_path))
    whole = report(folder)
    size, least = whole["blocks"][0]["bytes"], str(whole["least_limit"])
    host_bytes = 4 * size + whole["table_bytes"]
    limits = ("--memory-limit", least, "--host-memory", str(host_bytes))
    speeds = ("--link", "1GB/s", "--disk", "1MB/s")
    shown = report(folder, *limits, *speeds)
    assert len(shown["streamed"]) == 6
    assert shown["on_disk"] == [f"model.layers.{at}" for at in (0, 1, 3, 4)]
    assert shown["disk_bytes"] == 4 * size and shown["host_bytes"] == host_bytes
    assert shown["disk_s"] == pytest.approx(4 * size / 1e6)
    assert shown["token_s"] == pytest.approx(shown["disk_s"], rel=0.05)
    assert shown["bound"] == "disk" and shown["disk_busy"] > 0.95
    out = command("plan", folder, *limits, *speeds).out
    assert "on disk" in out and "reading the disk" in out and "bound by the disk" in out
    in_host = report(folder, "--memory-limit", least, *speeds)
    assert in_host["on_disk"] == [] and in_host["disk_bytes"] == in_host["disk_s"] == 0
    assert in_host["bound"] == "link" and in_host["token_s"] < shown["token_s"]
    out = command("plan", folder, "--memory-limit", least, *speeds).out
    assert "disk" not in out and "bound by the link" in out


def test_too_little_host_memory_is_refused(
    tmp_path: Path, command: Command, report: Report
) -> None:
    folder = str(write_llama(tmp_path))
    least = str(report(folder)["least_limit"])
    assert (
        "two staging buffers"
        in command("plan", folder, "--memory-limit", least, "--host-memory", "1KB", code=1).err
    )


def test_least_limit_can_be_kept(tmp_path: Path, command: Command, report: Report) -> None:
    folder = str(write_llama(tmp_path))
    least = report(folder)["least_limit"]
    assert report(folder, "--memory-limit", str(least))["resident"] == []
    assert (
        "raise --memory-limit"
        in command("plan", folder, "--memory-limit", str(least - 1), code=1).err
    )


@given(sizes=st.lists(st.integers(1, 50), min_size=3, max_size=8), outside=st.integers(0, 50))
def test_half_limit_streams_some(sizes: list[int], outside: int) -> None:
    blocks = [Block(str(i), size, "list") for i, size in enumerate(sizes)]
    whole = plan(blocks, sum(sizes) + outside, outside_bytes=outside)
    limited = plan(blocks, max(half_limit(whole), least_budget(whole)), outside_bytes=outside)
    assert limited.streamed or least_budget(whole) == whole.total_bytes


def test_half_limit_holds_half() -> None:
    blocks = [Block(str(i), 10, "list") for i in range(8)]
    whole = plan(blocks, 100, outside_bytes=5)
    assert half_limit(whole) == 5 + 4 * 10 + 2 * 10
    assert len(plan(blocks, half_limit(whole), outside_bytes=5).resident) == 4


def test_report_for_people(tmp_path: Path, command: Command) -> None:
    folder = str(write_llama(tmp_path))
    out = command("plan", folder).out
    assert "model.layers.0 ... model.layers.5: 6 blocks of" in out
    assert "least memory limit" in out
    assert "predicted" not in out
    assert "predicted for a token" in command("plan", folder, "--memory-limit", "150KB").out


def test_parts_of_layers_are_listed_once_for_all_layers(command: Command) -> None:
    """A model of 289 blocks, of which each layer is four."""
    lines = command("plan", "glm-130b").out.splitlines()
    named = [line for line in lines if line.startswith(("layers.", "lm_head."))]
    assert len(named) == 5
    assert named[0].startswith("layers.0.attention.qkv ... layers.69.attention.qkv: 70 blocks of")
    assert named[-1].startswith("lm_head.parts.0 ... lm_head.parts.8: 9 blocks of")


def test_blocks_by_hand(tmp_path: Path, report: Report) -> None:
    names = ["model.layers.1.mlp", "model.layers.3"]
    shown = report(write_llama(tmp_path), "--blocks", *names)
    assert [block["name"] for block in shown["blocks"]] == names


def test_architecture_without_a_head(tmp_path: Path, report: Report) -> None:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert len(report(tmp_path)["blocks"]) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "model_type None is not known"),
        ('{"model_type": "quokka"}', "model_type 'quokka' is not known"),
        ('{"model_type": ["llama"]}', "is not known"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be built"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be built"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, message: str, command: Command) -> None:
    (tmp_path / "config.json").write_text(text)
    error = command("plan", tmp_path, code=1).err.splitlines()[-1]
    assert error.startswith("bminf: error:")
    assert message in error


def test_quantized_checkpoint_is_told(tmp_path: Path, command: Command) -> None:
    write_llama(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantization_config" in command("plan", tmp_path).err


def test_two_lists(tmp_path: Path, report: Report) -> None:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 3}
    config = transformers.T5Config(**sizes, vocab_size=64).to_dict()
    config["architectures"] = ["T5ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    blocks = report(tmp_path)["blocks"]
    assert {(block["list"], block["uses"]) for block in blocks} == {
        ("encoder.block", 1),
        ("decoder.block", 128),
    }


def test_missing_file(tmp_path: Path, command: Command) -> None:
    assert "cannot be read" in command("plan", tmp_path, code=1).err


SPEEDS, SIZES = ("--link", "--memory-bandwidth", "--disk"), ("--memory-limit", "--reserve")


@pytest.mark.parametrize(
    ("options", "value", "said"),
    [
        (SPEEDS, "0GB/s", "more than 0"),
        (SPEEDS, "12", "='12' has no unit.*\"12GB\""),
        ((*SPEEDS, *SIZES, "--host-memory"), "6 bananas", "bananas"),
    ],
)
def test_values_that_are_none(
    tmp_path: Path, options: tuple[str, ...], value: str, said: str, command: Command
) -> None:
    folder = str(write_llama(tmp_path))
    for option in options:
        assert re.search(
            said, command("plan", folder, "--memory-limit", "1GB", option, value, code=2).err
        ), option


@pytest.mark.parametrize("config", [{"format": "bminf"}, {"d_kv": 64}, {"dim_model": 64}])
def test_a_model_of_the_zoo_is_told_apart(
    config: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "load it with bminf.models" in command("plan", tmp_path, code=1).err


def test_a_plan_is_drawn(tmp_path: Path, report: Report, command: Command) -> None:
    folder, file = write_llama(tmp_path), tmp_path / "plan.svg"
    limit = ("--memory-limit", "200KB")
    said = command("plan", folder, *limit)
    assert command("plan", folder, *limit, "--plot", file) == said
    drawn = file.read_bytes()
    assert drawn.startswith(b"<?xml")
    assert report(folder, *limit, "--plot", file) == report(folder, *limit)
    assert file.read_bytes() == drawn


def titles_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of the figures that are saved from now on."""
    found: list[str] = []
    monkeypatch.setattr(
        "bminf.plot.save", lambda figure, _: found.append(" ".join(figure.get_suptitle().split()))
    )
    return found


def test_a_drawn_plan_says_what_stays_and_how_fast_that_is(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, folder = titles_of(monkeypatch), write_llama(tmp_path)
    drawn = ("--memory-limit", "500KB", "--gpu", "GTX 1060", "--plot", tmp_path / "plan.png")
    shown = report(folder, "--quantization", "none", *drawn)
    (title,) = titles
    stay = f"{len(shown['resident'])} of {len(shown['blocks'])} blocks stay"
    assert title.startswith(f"LlamaForCausalLM, float32, within 500 KB: {stay}; predicted for GTX")
    assert title.endswith(f" = {1 / shown['token_s']:.1f} tokens/s")


def test_a_drawn_plan_of_experts_says_both_ends(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = titles_of(monkeypatch)
    moe = {
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | moe), encoding="utf-8")
    whole = report(tmp_path)
    limit = (whole["least_limit"] + whole["total_bytes"]) // 2
    shown = report(tmp_path, "--memory-limit", str(limit), "--plot", tmp_path / "plan.png")
    slots, best = shown["experts"]["num_slots"], shown["experts"]["best"]["token_s"]
    (title,) = titles
    assert f": 2 of 2 blocks and {slots} of 32 experts stay; predicted: " in title
    assert title.endswith(f": {1 / shown['token_s']:.1f} to {1 / best:.1f} tokens/s")


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--memory-limit", "200KB", "--plot", "plan.jpg"], r"--plot='plan.jpg' does not end in"),
        (["--memory-limit", "200KB", "--plot", "none/plan.png"], "there is no folder none"),
        (["--plot", "plan.png"], "--plot draws what a limit keeps; give --memory-limit"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused_before_the_model_is_looked_at(
    argv: list[str], error: str, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(error, refused("no-such-model", *argv))


def test_to_draw_needs_matplotlib(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused("no-such-model", "--memory-limit", "1GB", "--plot", "plan.png")
    assert 'pip install "bminf[plot]"' in error


def test_the_picture_of_the_page_is_that_of_its_command(tmp_path: Path, command: Command) -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.endswith("--plot plan-cpm2.svg"))
    *argv, _ = shlex.split(line)[1:]
    command(*argv, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_bytes() == (DOCS / "plan-cpm2.svg").read_bytes()


def test_several_cards_are_compared(report: Report) -> None:
    """GLM-130B on cards of 24 GB: two stream a quarter of what one does, and four nothing."""
    arguments = [
        "GLM-130B", "--memory-limit", "24GB", "--quantization", "int4-row", "--link", "25GB",
        "--memory-bandwidth", "850GB", "--max-length", "2048",
    ]  # fmt: skip
    shown = report(*arguments, "--tp", "2")
    one, two, four, eight = shown["ranks"]
    assert [found["ranks"] for found in shown["ranks"]] == [1, 2, 4, 8]
    assert 1 / two["token_s"] > 1.5 > 0.6 > 1 / one["token_s"]
    assert 1 / four["token_s"] > 25 and four["streamed_bytes"] == 0
    bounds = [found["bound"] for found in shown["ranks"]]
    assert bounds == ["link", "link", "device memory", "all-reduces"]
    # Two sums in each of 70 layers; the logits, and the message between passes.
    assert [found["sums_s"] for found in shown["ranks"]] == pytest.approx([0, *[142e-4] * 3])
    assert shown["token_s"] == two["token_s"] and shown["sums_s"] == two["sums_s"]
    quick = report(*arguments, "--tp", "8", "--all-reduce", "10")["ranks"][3]
    assert quick["bound"] == "device memory" and quick["token_s"] < eight["token_s"] - 0.01


def test_numbers_of_ranks_that_cannot_share_a_model_are_told(
    report: Report, command: Command, refused: Refused, tmp_path: Path
) -> None:
    shown = report("EVA2.0-base", "--memory-limit", "4GB", "--tp", "2")["ranks"]
    assert "8 ranks cannot share this" in shown[3]["error"] and "error" not in shown[2]
    text = command("plan", "EVA2.0-base", "--memory-limit", "4GB", "--tp", "2").out
    assert "8 ranks: cannot, 8 ranks cannot share" in text and "1 rank: " in text
    assert "5 ranks cannot share this" in refused("EVA2.0-base", "--tp", "5")
    write_llama(tmp_path)
    assert "--tp is for built-in models" in refused(tmp_path, "--tp", "2")
