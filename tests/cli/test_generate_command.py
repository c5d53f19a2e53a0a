"""`bminf generate`: the text of the Python functions, as it comes; errors in one line.

bminf/cli/generate.py, bminf/cli/flags.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from terminal import Command, Interrupted
from tiny_glm import tiny_model
from tiny_llama import WORDS, save_llama, save_tokenizer
from tiny_models import make

import bminf
from bminf.errors import BudgetError
from bminf.models import CPM1, CPM2, EVA, GLM

ZOO = {"cpm1": CPM1, "cpm2": CPM2, "eva": EVA, "glm10b": GLM}
Printed = Callable[..., str]
TEXTS = {"cpm1": "今天天气", "cpm2": "今天天气", "eva": "你是谁", "glm10b": "now is the time"}


@pytest.fixture
def generate(command: Command) -> Command:
    """generate(folder, "once", "--json", code=0)"""
    return lambda *argv, **more: command("generate", *argv, "--device", "cpu", **more)


@pytest.fixture
def printed(generate: Command) -> Printed:
    return lambda *argv: generate(*argv).out


@pytest.fixture
def failed(generate: Command) -> Printed:
    """The one line that it fails with."""
    return lambda code, *argv: generate(*argv, code=code).error


class Typed(io.StringIO):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


# ---- the text ------------------------------------------------------------------------------------


def test_the_text_is_that_of_transformers(folder: Path, printed: Printed) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("once upon", return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)[0, 2:]
    options = ("--max-new-tokens", "12", "--temperature", "0", "--quantization", "none")
    expected = tokenizer.decode(ids) + "\n"
    assert printed(folder, "once upon", *options) == expected
    assert printed(folder, "once upon", *options, "--memory-limit", "13MB") == expected


@pytest.mark.parametrize("name", ZOO)
def test_the_text_is_that_of_a_built_in_model(name: str, tmp_path: Path, printed: Printed) -> None:
    folder = tiny_model(name).write_original(tmp_path / name)
    options = ("--max-new-tokens", "8", "--top-k", "50", "--temperature", "1.5", "--seed", "3")
    kind = () if name.startswith("glm") else ("--model", name)
    with warnings.catch_warnings():
        # This CPM-1 folder has no sentencepiece model, and the library says so.
        warnings.filterwarnings("ignore", message="found no sentencepiece model")
        with ZOO[name](folder, device="cpu") as model:
            text, _ = model.generate(TEXTS[name], 8, top_k=50, temperature=1.5, seed=3)
        assert printed(folder, TEXTS[name], *options, *kind) == f"{text}\n"


def test_a_saved_folder_is_taken_as_it_is(folder: Path, tmp_path: Path, printed: Printed) -> None:
    model = bminf.load(folder, quantization="int4", device="cpu")
    bminf.save(model, tmp_path / "saved")
    options = ("once", "--temperature", "1", "--seed", "1", "--max-new-tokens", "40")
    text = printed(tmp_path / "saved", *options)
    assert text == printed(folder, *options, "--quantization", "int4")
    assert text != printed(folder, *options, "--quantization", "none")


def test_a_file_of_a_folder_stands_for_it(folder: Path, printed: Printed) -> None:
    options = ("once", "--temperature", "0", "--max-new-tokens", "3")
    expected = printed(folder, *options)
    for name in ("config.json", "model.safetensors"):
        assert printed(folder / name, *options) == expected


def test_an_encoder_decoder_of_transformers(tmp_path: Path, printed: Printed) -> None:
    model = make("t5", vocab_size=len(WORDS))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("once upon a time", return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    options = ("--temperature", "0", "--max-new-tokens", "6", "--quantization", "none")
    assert printed(tmp_path, "once upon a time", *options) == expected


def test_seeds(folder: Path, printed: Printed) -> None:
    options = (folder, "once", "--temperature", "1", "--max-new-tokens", "16")
    first = printed(*options, "--seed", "5")
    assert printed(*options, "--seed", "5") == first
    assert printed(*options, "--seed", "6") != first
    torch.manual_seed(0)
    unseeded = printed(*options)
    torch.manual_seed(0)  # as every process begins
    assert printed(*options) != unseeded


def test_an_end_token_ends_the_text(folder: Path, tmp_path: Path, printed: Printed) -> None:
    """Also one that only the tokenizer knows, as in many models made for dialogues."""
    options = ("once", "--temperature", "0", "--max-new-tokens", "12", "--json")
    whole = json.loads(printed(folder, *options))
    words = whole["text"].split()
    assert whole["finish_reason"] == "length" and len(words) == 12
    save_llama(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = words[3]
    tokenizer.save_pretrained(tmp_path)
    cut = json.loads(printed(tmp_path, *options))
    assert cut["finish_reason"] == "stop"
    assert cut["text"].split() == words[: words.index(words[3])]
    assert cut["stats"]["new_tokens"] == words.index(words[3]) + 1


def words_until(text: str, stop: str) -> int:
    """After how many words, of which each is a token, the stop string has come."""
    words = text.split()
    return next(n for n in range(len(words) + 1) if stop in " ".join(words[:n]))


def test_a_stop_string_ends_the_text(folder: Path, tmp_path: Path, printed: Printed) -> None:
    """Which lies over the border of two tokens, and in the last that is allowed."""
    built_in = str(tiny_model("glm10b").write_original(tmp_path))
    for model, penalty in ((folder, "--repetition-penalty"), (built_in, "--presence-penalty")):
        options = (model, "once", "--temperature", "0", penalty, "50", "--json")
        whole = json.loads(printed(*options, "--max-new-tokens", "12"))
        assert whole["finish_reason"] == "length"
        at = len(whole["text"]) // 2
        stop = whole["text"][at : at + 4]
        stopping = ("--stop", "never", "--stop", stop)
        cut = json.loads(printed(*options, "--max-new-tokens", "12", *stopping))
        assert cut["finish_reason"] == "stop"
        assert cut["text"] == whole["text"][: whole["text"].index(stop)]
        most = cut["stats"]["new_tokens"]
        assert most < 12 and (model == built_in or most == words_until(whole["text"], stop))
        last = json.loads(printed(*options, "--max-new-tokens", str(most), *stopping))
        assert {**last, "stats": None} == {**cut, "stats": None}


def test_the_name_of_a_special_token_is_a_stop_string(
    folder: Path, tmp_path: Path, printed: Printed
) -> None:
    options = ("once", "--temperature", "0", "--max-new-tokens", "6", "--json")
    words = json.loads(printed(folder, *options))["text"].split()
    save_llama(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": [words[2]]})
    tokenizer.save_pretrained(tmp_path)
    cut = json.loads(printed(tmp_path, *options, "--stop", words[2]))
    assert cut["finish_reason"] == "stop" and cut["text"].split() == words[: words.index(words[2])]


def test_too_many_stop_strings(failed: Printed) -> None:
    stops = [part for number in range(65) for part in ("--stop", str(number))]
    assert "at most 64" in failed(2, "/no/such/model", "once", *stops)
    assert "--stop" in failed(2, "/no/such/model", "once", "--stop", "")


def test_the_prompt_comes_from_stdin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "5")
    expected = printed(folder, "once upon", *options)
    for given in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("once upon\n"))
        assert printed(folder, *given, *options) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(" once\n\n"))
    report = json.loads(printed(folder, "-", *options, "--json"))
    assert report["prompt"] == " once\n", "one newline ends the last line, no more is dropped"


def test_json_and_verbose(folder: Path, generate: Command, printed: Printed) -> None:
    limit = str(bminf_limit(folder))
    options = ("--temperature", "0", "--max-new-tokens", "5", "--memory-limit", limit)
    out, err = generate(folder, "once upon", *options, "--json", "--verbose")
    report = json.loads(out)
    assert report["prompt"] == "once upon" and report["model"] == str(folder)
    assert report["text"] + "\n" == printed(folder, "once upon", *options)
    stats = report["stats"]
    assert (stats["prompt_tokens"], stats["new_tokens"], stats["decode_tokens"]) == (2, 5, 4)
    assert stats["bytes_copied"] > stats["decode_bytes"] > 0
    assert stats["decode"]["bytes_copied"] == stats["decode_bytes"]
    for phase in ("prefill", "decode"):
        assert re.search(rf"^{phase} .*copied.*; bound by {stats[phase]['bound']}$", err, re.M)
    assert "stream (.)" in err and "2 tokens read and 5 generated" in err
    assert "estimated for one text of 7 tokens" in err
    assert "\nroom for 7 tokens of prompt and answer together; --max-length sets it\n" in err


def bminf_limit(folder: Path) -> int:
    """One under which some blocks of the model are streamed, with a text of 7 tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return bminf.plan_for(model, memory_limit="1GB", max_length=7, device="cpu").least_limit


LOADING = ("--memory-limit", "6GB", "--offload-dir", "/some/disk", "--max-length", "99")


def test_how_to_load_is_handed_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: Command
) -> None:
    given: dict[str, Any] = {}

    def load(path: Path, memory_limit: Any, *arguments: Any, **more: Any) -> None:
        given.update(more, path=path, memory_limit=memory_limit, arguments=arguments)
        raise BudgetError("enough was seen")

    common = {"memory_limit": 6 * 10**9, "offload_dir": "/some/disk", "device": "cpu"}
    monkeypatch.setattr(bminf, "load", load)
    generate(folder, "once", *LOADING, "--trust-remote-code", code=1)
    assert given.items() >= {**common, "max_length": 99, "trust_remote_code": True}.items()
    assert given["path"] == folder and given["arguments"] == ("auto",)
    for name, quantization in {"none": None, "int4": "int4"}.items():
        generate(folder, "once", "--quantization", name, code=1)
        assert given["arguments"] == (quantization,) and given["max_length"] is None
    monkeypatch.setattr(GLM, "__init__", lambda self, *arguments, **more: load(*arguments, **more))
    built_in = str(tiny_model("glm10b").write_original(tmp_path))
    given.clear()
    generate(built_in, "now", *LOADING, code=1)
    assert given.items() >= {**common, "max_length": 99}.items() and "quantization" not in given
    assert "deterministic" not in given
    assert "fused_kernels" not in given
    generate(built_in, "now", "--deterministic", "--no-fused-kernels", code=1)
    assert given["deterministic"] is True and given["fused_kernels"] is False
    for name, quantization in {"none": None, "int4-row": "int4-row"}.items():
        generate(built_in, "now", "--quantization", name, code=1)
        assert given["quantization"] == quantization


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "1.5"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "0"),
        ("--top-p", "0"),
        ("--top-p", "1.01"),
        ("--seed", "-1"),
        ("--seed", "x"),
        ("--max-length", "0"),
        ("--memory-limit", "6 bananas"),
        ("--repetition-penalty", "0"),
        ("--quantization", "int5"),
        ("--no-such-option", "1"),
    ],
)
def test_wrong_values_are_told_before_anything_is_read(
    option: str, value: str, failed: Printed
) -> None:
    line = failed(2, "/no/such/model", "once", option, value)
    assert option in line and value in line


@pytest.mark.parametrize(
    ("given", "text", "said"),
    [
        (None, Typed(""), "no PROMPT is given"),
        ("-", io.StringIO("\n"), "PROMPT is empty"),
        ("", io.StringIO("unused"), "PROMPT is empty"),
        ("caf\udce9", io.StringIO(""), "not UTF-8"),
        ("-", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"), "not UTF-8"),
    ],
)
def test_a_prompt_that_is_none(
    given: str | None, text: Any, said: str, monkeypatch: pytest.MonkeyPatch, failed: Printed
) -> None:
    monkeypatch.setattr(sys, "stdin", text)
    prompt = [] if given is None else [given]
    assert said in failed(2, "/no/such/model", *prompt)


def test_a_prompt_without_tokens(folder: Path, failed: Printed) -> None:
    assert "no tokens" in failed(2, folder, " ")


def test_what_is_no_model(folder: Path, tmp_path: Path, failed: Printed) -> None:
    (tmp_path / "notes.txt").write_text("a shopping list", encoding="utf-8")
    assert "notes.txt" in failed(1, tmp_path / "notes.txt", "once")
    assert str(tmp_path) in failed(1, tmp_path, "once")
    assert "/no/such" in failed(1, "/no/such", "once")
    assert "none.gguf" in failed(1, tmp_path / "none.gguf", "once")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\0\0\0\1")
    assert "name one of a.gguf" in failed(1, tmp_path, "once")
    assert "cannot be loaded" in failed(1, tmp_path / "a.gguf", "once")
    make("llama").save_pretrained(tmp_path / "silent")
    assert "no tokenizer" in failed(1, tmp_path / "silent", "once")


def test_a_model_that_generates_no_text(tmp_path: Path, failed: Printed) -> None:
    make("bert").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert "BertModel generates no text" in failed(1, tmp_path, "once")


def test_options_of_the_other_kind_are_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: Printed
) -> None:
    built_in = tiny_model("glm10b").write_original(tmp_path / "glm")
    pretrained = save_llama(tmp_path / "llama")
    monkeypatch.setattr(GLM, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    (pretrained / "model.safetensors").write_bytes(b"")  # whose error would be another
    line = failed(2, built_in, "now", "--repetition-penalty", "1.1")
    assert "--repetition-penalty is not for" in line and "--frequency-penalty" in line
    for option in ("--frequency-penalty", "--presence-penalty"):
        line = failed(2, pretrained, "once", option, "1")
        assert option in line and "--repetition-penalty" in line
    line = failed(2, pretrained, "once", "--deterministic")
    assert "--deterministic is not for" in line and "--seed" in line
    line = failed(2, pretrained, "once", "--no-fused-kernels")
    assert "--no-fused-kernels is not for" in line and "torch's operators in any case" in line


def test_penalties(folder: Path, tmp_path: Path, printed: Printed) -> None:
    """Of text that repeats itself without them."""
    greedy = ("--temperature", "0", "--max-new-tokens", "12")
    words = printed(folder, "once", *greedy, "--repetition-penalty", "50").split()
    assert len(set(words)) == len(words) == 12
    built_in = str(tiny_model("glm10b").write_original(tmp_path))
    plain = printed(built_in, "now is", *greedy)
    for option in ("--frequency-penalty", "--presence-penalty"):
        assert printed(built_in, "now is", *greedy, option, "100") != plain


def test_lengths_that_do_not_fit(
    folder: Path, tmp_path: Path, printed: Printed, failed: Printed
) -> None:
    prompt = "once upon a time"
    assert "4 tokens" in failed(2, folder, prompt, "--max-length", "4")
    line = failed(2, folder, prompt, "--max-length", "9", "--max-new-tokens", "6")
    assert "no room for 6 new ones in 9" in line
    few = str(save_llama(tmp_path, max_position_embeddings=10))
    assert "in 10" in failed(2, few, prompt, "--max-new-tokens", "7")
    fitting = ("--max-length", "9", "--json")
    report = json.loads(printed(folder, prompt, *fitting))
    assert report["stats"]["new_tokens"] == 5


def test_a_limit_that_is_too_small(folder: Path, failed: Printed) -> None:
    assert "below the least" in failed(1, folder, "once", "--memory-limit", "1KB")


def test_what_generating_raises_is_one_line(tmp_path: Path, failed: Printed) -> None:
    save_llama(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # so that all logits are infinite
    model.save_pretrained(tmp_path)
    options = ("--quantization", "none", "--temperature", "1")
    line = failed(1, tmp_path, "once", *options)
    assert "cannot generate" in line and "nan" in line


# ---- interruptions -------------------------------------------------------------------------------


LONG = ("once", "--max-new-tokens", "1000")


def test_ctrl_c_ends_cleanly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, generate: Command
) -> None:
    """`bminf chat` is tested with a signal of its own."""
    monkeypatch.setattr(sys, "stdout", out := Interrupted())
    assert generate(folder, *LONG, code=130).err == "bminf: interrupted\n"
    (word,) = out.getvalue().split()
    assert word in WORDS and out.getvalue().endswith("\n")


def test_a_closed_pipe_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, generate: Command
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert generate(folder, *LONG).err == ""
        monkeypatch.undo()


def write_gguf(path: Path) -> Path:
    """A llama of one layer and a tokenizer of letters."""
    import gguf

    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "on"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_merges(["o n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    sizes = {
        "token_embd": (len(letters), 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        **{f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_norm": (64,), "blk.0.ffn_up": (128, 64), "blk.0.ffn_gate": (128, 64),
        "blk.0.ffn_down": (64, 128),
    }  # fmt: skip
    for name, shape in sizes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed) -> None:
    """Its header is read for the tokenizer, and once more with the weights."""
    import gguf

    path = write_gguf(tmp_path / "tiny.gguf")
    of_file = {"pretrained_model_name_or_path": tmp_path, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**of_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**of_file)
    inputs = tokenizer("once", return_tensors="pt")["input_ids"]
    ids = model.generate(inputs, max_new_tokens=4, do_sample=False)[0, inputs.shape[1] :]
    begin, read = gguf.GGUFReader.__init__, []
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, path: read.append(path) or begin(self, path)
    )
    options = ("--temperature", "0", "--max-new-tokens", "4", "--quantization", "none")
    expected = tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert expected.strip() and len(ids) == 4
    assert printed(path, "once", *options) == expected
    assert len(read) == 2
