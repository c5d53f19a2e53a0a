"""bminf/cli/convert.py, `bminf convert` on small checkpoints that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from terminal import Command
from tiny_glm import tiny_glm10b, tiny_glm130b
from tiny_llama import save_llama
from tiny_models import inputs_of, make, output_of
from tiny_zoo import T5_CONFIG, modules, tiny

import bminf

pytestmark = pytest.mark.filterwarnings("ignore:.*no sentencepiece model")


@pytest.fixture(scope="module")
def cpm1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("cpm1").write_original(tmp_path_factory.mktemp("cpm1") / "from")


def said_of(target: Path) -> str:
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return f"{target}: {bminf.units.format_bytes(size)} of weights\n"


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        ([], {"bits": 8, "group_size": None, "has_minimum": False}),
        (["--quantization", "int4"], {"bits": 4, "group_size": 16, "has_minimum": False,
                                     "scale_bits": 8}),
        (["--quantization", "none"], None),
    ],
)  # fmt: skip
def test_it_writes_a_folder_that_loads(
    options: list[str], packing: object, cpm1: Path, tmp_path: Path, command: Command
) -> None:
    target = tmp_path / "to"
    assert command("convert", cpm1, target, *options).out == said_of(target)
    assert json.loads((target / "config.json").read_text())["quantization"] == packing
    with bminf.models.CPM1(target, device="cpu") as model:
        assert model.logits([11, 12]).shape == (2, model.config.vocab_size)


@pytest.mark.parametrize("kind", ["cpm1", "llama"])
def test_several_files(kind: str, cpm1: Path, tmp_path: Path, command: Command) -> None:
    source = cpm1 if kind == "cpm1" else save_llama(tmp_path / "from")
    more = ("--quantization", "none", "--max-shard-size", "100KB")
    assert command("convert", source, tmp_path / "to", *more).out == said_of(tmp_path / "to")
    assert len(list((tmp_path / "to").glob("*.safetensors"))) > 2


def test_what_does_not_lie_beside_the_weights_can_be_named(
    tmp_path: Path, command: Command
) -> None:
    made = tiny("cpm2")
    source = made.write_original(tmp_path / "in" / "from")
    (source / "vocab.txt").rename(tmp_path / "words.txt")
    (source / "model_config.json").rename(tmp_path / "sizes.json")
    arguments = ["convert", source, tmp_path / "to"]
    assert "say --model cpm2 or --model eva" in command(*arguments, code=2).error
    arguments += ["--model", "cpm2"]
    assert "has a config.json or model_config.json" in command(*arguments, code=1).error
    arguments += ["--config", tmp_path / "sizes.json"]
    assert "no tokenizer for cpm2" in command(*arguments, code=1).error
    assert not (tmp_path / "to").exists()
    command(*arguments, "--tokenizer", tmp_path / "words.txt")
    with bminf.models.CPM2(tmp_path / "to", device="cpu") as model:
        assert model.config.num_decoder_layers == T5_CONFIG["num_decoder_layers"]
        assert model.tokenizer.vocab_size == len(made.tokens)
        assert torch.isfinite(model.logits([11], [12])).all()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "{to}"], 2, "there is no 'nowhere'"),
        (["{cpm1}", "{cpm1}"], 2, "exists already; name a folder"),
        (["{cpm1}", "{to}", "--model", "eva"], 1, "holds CPM-1, not EVA"),
        (["{cpm1}", "{to}", "--config", "nowhere.json"], 1, "nowhere.json cannot be read"),
        (["{cpm1}", "{to}", "--tokenizer", "nowhere"], 1, "there is no such file"),
        (["{cpm1}", "{to}", "--head-quantization", "int8"], 2, "is for GLM-130B"),
        (["{cpm1}", "{to}", "--tp", "2"], 1, "only those have model-parallel files"),
        (["{cpm1}", "{to}", "--tp", "0"], 2, "--tp 0; accepted: an int of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], code: int, words: str, cpm1: Path, tmp_path: Path, command: Command
) -> None:
    given = [argument.format(cpm1=cpm1, to=tmp_path / "to") for argument in arguments]
    assert words in command("convert", *given, code=code).error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["a"], ["a", "b", "--quantization", "int3"], ["a", "b", "--tp", "two"]),
        ["a", "b", "--head-quantization", "int4-row"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], command: Command) -> None:
    assert "see bminf convert --help" in command("convert", *arguments, code=2).error


# ---- GLM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glm10b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_glm10b().write_original(tmp_path_factory.mktemp("glm10b") / "from", 2)


@pytest.mark.parametrize(
    ("options", "packing", "head"),
    [
        ([], "int4", None),
        (["--quantization", "int4-row", "--head-quantization", "int8"], "int4-row", "int8"),
        (["--quantization", "none", "--head-quantization", "int4"], None, "int4"),
    ],
)
def test_a_glm_and_its_head(
    options: list[str],
    packing: str | None,
    head: str | None,
    glm10b: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    target = tmp_path / "to"
    assert command("convert", glm10b, target, *options).out == said_of(target)
    packings = {"quantization": packing, "head_quantization": head}
    with bminf.models.GLM(glm10b, device="cpu", **packings) as model:
        expected = model.logits("the layer")
    with bminf.models.GLM(target, device="cpu", **packings) as model:
        assert torch.equal(model.logits("the layer"), expected)


def test_the_files_of_the_authors(glm10b: Path, tmp_path: Path, command: Command) -> None:
    """What they hold is in test_glm_ranks.py."""
    for tp, said in (("1", "1 rank"), ("4", "4 ranks")):
        target = tmp_path / tp
        assert command("convert", glm10b, target, "--tp", tp).out == f"{target}: {said}\n"
        assert len(modules(target)) == int(tp)


def test_the_files_of_the_authors_quantized(tmp_path: Path, command: Command) -> None:
    """The number of heads is not in the files, and comes from a configuration elsewhere."""
    made = tiny_glm130b()
    source = made.write_original(tmp_path / "inner" / "from")
    (source / "config.json").rename(tmp_path / "sizes.json")
    arguments = [source, tmp_path / "to", "--tp", "2", "--quantization", "int4-row"]
    command("convert", *arguments, code=2)
    command("convert", *arguments, "--config", tmp_path / "sizes.json", "--model", "glm130b")
    for found, wanted in zip(modules(tmp_path / "to"), made.ranks(2, 4), strict=True):
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("option", "bits"), [("auto", {8}), ("int4", {4, 8}), ("none", set())])
def test_a_folder_of_transformers(
    option: str, bits: set[int], tmp_path: Path, command: Command
) -> None:
    """In 4 bits its head takes 8."""
    model, target = make("llama"), tmp_path / "to"
    model.save_pretrained(tmp_path / "from")
    output = command("convert", tmp_path / "from", target, "--quantization", option)
    assert output.out == said_of(target)
    loaded = bminf.load(target, device="cpu")
    assert {m.form.bits for m in packed(loaded)} == bits
    asked = {"auto": "int8", "none": False}.get(option, option)
    expected = bminf.wrapper(model, asked, device="cpu")
    given = inputs_of("llama")
    torch.testing.assert_close(output_of(loaded, given), output_of(expected, given))


def packed(model: torch.nn.Module) -> list[bminf.QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, bminf.QuantizedLinear)]


def test_a_target_that_exists_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    source = save_llama(tmp_path / "from")
    monkeypatch.setattr(bminf, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert "exists already; name a folder" in command("convert", source, tmp_path, code=2).error


def test_what_only_built_in_models_take_is_refused(tmp_path: Path, command: Command) -> None:
    make("llama").save_pretrained(tmp_path / "from")
    arguments = (tmp_path / "from", tmp_path / "to", "--head-quantization", "int8")
    said = command("convert", *arguments, code=2).error
    assert "--head-quantization is for the built-in models" in said
    assert not (tmp_path / "to").exists()
