"""The tokenizers of GLM-130B, GLM-10B and GLM-10B-chinese, with tiny vocabularies."""

# ruff: noqa: RUF001 - odd characters are what many tests are about

from __future__ import annotations

import functools
import io
import json
import random
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import PIECES, write_piece_model

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import GLMTokenizer, SentinelTokenizer, TextStream
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.cpm1 import CPM1Tokenizer
from bminf.tokenizers.find import find_tokenizer, tokenizer_from
from bminf.tokenizers.gpt2 import GPT2Tokenizer
from bminf.tokenizers.icetk import IcetkPackageTokenizer, IceTokenizer
from bminf.tokenizers.pieces import sentencepiece

LINES = [
    "The weights of a layer wait on the host, and come over the bus when it is their turn.",
    "one two three four five six seven eight nine ten eleven twelve, eop and sop",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
]
OFFSET = 7
ODD_TEXTS = [
    *["", " ", "\n", "\r\n\t ", "a\nb", "a\0b", "\0", "ﬁ ½ ＡＢ", "é e\u0301", "\ufffe\u2028"],
    "😀 ❤\ufe0f 👩\u200d👩\u200d👧",
]


@functools.cache
def ice_model(**options: Any) -> bytes:
    """A sentencepiece model with the first ids of the real one."""
    model = io.BytesIO()
    settings = {"vocab_size": 150, "user_defined_symbols": ["<n>"], "unk_id": 0, "bos_id": 1}
    settings |= {"eos_id": 2, "pad_id": 3, "minloglevel": 2, **options}
    sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, hard_vocab_limit=False, **settings
    )
    return model.getvalue()


def processor(content: bytes) -> Any:
    loaded = sentencepiece().SentencePieceProcessor()
    loaded.LoadFromSerializedProto(content)
    return loaded


def write_ice(path: Path, **options: Any) -> Path:
    path.write_bytes(ice_model(**options))
    return path


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTERS = [*map(chr, BYTES), *map(chr, range(256, 256 + 256 - len(BYTES)))]
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "ð Ł", "ä ¸", "ä¸ Ń", "Ċ Ċ", "1 2", "' s"]
ENTRIES = [*CHARACTERS, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]


def write_gpt2(
    folder: Path, prefix: str = "", entries: Sequence[str] = ENTRIES, merges: str | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ids = {entry: number for number, entry in enumerate(entries)}
    (folder / f"{prefix}vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *MERGES, ""]) if merges is None else merges
    (folder / f"{prefix}merges.txt").write_text(lines, encoding="utf-8")
    return folder


KINDS = ["ice", "ice_lines", "cog", "cog_fixed", "gpt2"]


@functools.cache
def make(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "gpt2":
            return GPT2Tokenizer(write_gpt2(folder))
        path = write_ice(folder / "any.model")
        if kind.startswith("cog"):
            return CogPretrainTokenizer(path, fixed_commands=kind == "cog_fixed")
        return IceTokenizer(path, OFFSET, ignore_linebreak=kind == "ice")


def text_ids(ours: Any) -> list[int]:
    """The ids that `decode` takes: no image tokens, no unused rows."""

    def has_text(number: int) -> bool:
        try:
            ours.tokens([number])
        except ArgumentError:
            return False
        return True

    return [number for number in range(ours.vocab_size) if has_text(number)]


def stream(ours: Any, ids: Sequence[int]) -> list[str]:
    feeder = TextStream(ours)
    return [*map(feeder.feed, ids), feeder.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_glm_tokenizer_tells(kind: str) -> None:
    ours: GLMTokenizer = make(kind)
    family = "glm130b" if kind.startswith("ice") else "glm10b"
    assert tokenizer_from(family, ours) is ours
    assert list(ours.masks) == ["[MASK]", "[sMASK]", "[gMASK]"]
    for name, number in ours.masks.items():
        assert ours.token_id(name) == number and ours.tokens([number]) == [name]
    assert list(ours.unspoken_ids) == sorted(set(ours.unspoken_ids))
    assert not {ours.eop_id, ours.eos_id} & set(ours.unspoken_ids)
    assert {ours.sop_id, *ours.masks.values()} - {ours.eop_id} <= set(ours.unspoken_ids)
    assert max(ours.unspoken_ids) < ours.vocab_size
    assert ours.encode("") == [] and ours.decode([]) == "" and ours.tokens([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_text_and_ids_out_of_range_are_refused(kind: str) -> None:
    ours = make(kind)
    for wrong in (None, b"abc", 1, ["a"]):
        with pytest.raises(ArgumentError, match=r"text=.* is a .*; give a str"):
            ours.encode(wrong)
    with pytest.raises(ArgumentError, match=r"half a surrogate pair, '\\ud83d', at 2"):
        ours.encode("ab\ud83d")
    with pytest.raises(ArgumentError, match=r"token='\[MASKS\]' is not .*near ones: '\[MASK\]'"):
        ours.token_id("[MASKS]")
    for call in (ours.decode, ours.tokens, TextStream(ours).feed):
        for number in (-1, ours.vocab_size):
            with pytest.raises(ArgumentError, match=rf"id {number} is not .*{ours.vocab_size - 1}"):
                call(number if call not in (ours.decode, ours.tokens) else [number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_have_ids_in_range_and_text_again(kind: str, text: str) -> None:
    ours = make(kind)
    ids = ours.encode(text)
    assert not set(ids) - set(text_ids(ours))
    assert "".join(stream(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_in_a_text_are_ordinary_characters(kind: str) -> None:
    ours = make(kind)
    ids = ours.encode("a [MASK] [gMASK][sMASK] sop <|endofpiece|> </s> [CLS]")
    commands = {ours.sop_id, ours.eop_id, ours.eos_id, *ours.masks.values(), *ours.prefix_ids}
    assert not commands & set(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_all_pieces_together_are_the_decoded_text(kind: str, data: st.DataObject) -> None:
    ours = make(kind)
    usable = text_ids(ours)
    often = [ours.eos_id, ours.eop_id, *ours.masks.values(), *usable[:6], *usable[-14:]]
    ids = data.draw(st.lists(st.sampled_from(often) | st.sampled_from(usable), max_size=12))
    assert "".join(stream(ours, ids)) == ours.decode(ids)


def authors_text(model: Any, ids: Sequence[int], offset: int, specials: dict[int, str]) -> str:
    """The authors' way: what stands between special tokens is decoded as a whole."""
    text, held = "", []
    for number in [*ids, None]:
        if number is not None and number not in specials:
            held.append(number - offset)
            continue
        text += model.decode(held) + ("" if number is None else specials[number])
        held = []
    return text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "vocab_size": 400},
        {"unk_surface": ""},
    ],
    ids=str,
)
def test_text_is_that_of_the_model_between_special_tokens(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = write_ice(tmp_path / "ice_text.model", **options)
    ours, model = IceTokenizer(path, OFFSET), processor(ice_model(**options))
    first = OFFSET + model.get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "eod", "sop", "eop", "ENC", "dBLOCK"]
    specials = {first + at: f"[{name}]" for at, name in enumerate(names)}
    specials[OFFSET + 2] = "[</s>]"
    blanks = [n for n in range(model.get_piece_size()) if "▁" in model.id_to_piece(n)]
    bytes_ = [n for n in range(model.get_piece_size()) if model.is_byte(n)]
    often = [first, OFFSET + 2, *(OFFSET + n for n in [0, 1, 3, 4, *blanks[:3], *bytes_[-4:]])]
    assert bool(bytes_) == ("byte_fallback" in options)
    draw = random.Random(6)
    for _ in range(150):
        ids = [
            draw.choice(often) if draw.random() < 0.6 else draw.randrange(OFFSET, first + 8)
            for _ in range(draw.randrange(10))
        ]
        expected = authors_text(model, ids, OFFSET, specials).replace("<n>", "\n")
        assert ours.decode(ids) == expected, ids
        assert "".join(stream(ours, ids)) == expected, ids


def test_ids_of_icetk_are_those_of_the_model_behind_the_image_tokens() -> None:
    ours, model = make("ice"), processor(ice_model())
    for text in [*LINES, *ODD_TEXTS]:
        assert ours.encode(text) == [OFFSET + number for number in model.encode(text)]
    first = OFFSET + model.get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "eod", "sop", "eop", "ENC", "dBLOCK"]
    assert ours.tokens(range(first, first + 8)) == names
    assert [ours.token_id(name) for name in names] == [*range(first, ours.vocab_size)]
    assert (ours.sop_id, ours.eop_id, ours.eos_id) == (first + 4, first + 5, OFFSET + 2)
    assert ours.token_id("eos") == ours.token_id("</s>") == ours.eos_id
    assert ours.pad_id == ours.token_id("<pad>") == OFFSET + 3
    assert ours.prefix_ids == () and ours.strips_before_masks is False
    silent = [*range(OFFSET), OFFSET, OFFSET + 1, OFFSET + 3, *range(first, first + 8)]
    assert ours.unspoken_ids == tuple(number for number in silent if number != first + 5)
    assert ours.token_id("<n>") not in ours.unspoken_ids


def test_the_offset_is_that_of_the_published_model_unless_told(tmp_path: Path) -> None:
    path = write_ice(tmp_path / "ice_text.model")
    count = processor(ice_model()).get_piece_size()
    assert IceTokenizer(path).masks["[MASK]"] == 20000 + count
    assert IceTokenizer(str(path), 0).masks["[MASK]"] == count and IceTokenizer(path, 0).decode([0])
    for wrong in (-1, True, 2.0, "20000", None):
        with pytest.raises(
            ArgumentError, match=r"image_offset=.*; give the number of image tokens"
        ):
            IceTokenizer(path, wrong)


def test_a_line_break_is_a_blank_or_a_piece() -> None:
    blank, piece = make("ice"), make("ice_lines")
    assert blank.encode("one\ntwo") == blank.encode("one two") != piece.encode("one\ntwo")
    assert piece.token_id("<n>") in piece.encode("one\ntwo")
    assert piece.decode(piece.encode("one\n\ntwo\n")) == "one\n\ntwo\n"
    assert blank.decode(blank.encode("a<n>b")) == "a\nb"


def test_what_may_become_a_line_break_is_held_back(tmp_path: Path) -> None:
    pieces = [*PIECES, "n"]
    ours = IceTokenizer(write_piece_model(tmp_path / "ice_text.model", pieces), 0)
    less, n, more, eos = map(ours.token_id, ("<", "n", ">", "</s>"))
    assert stream(ours, [less, n, more, n]) == ["", "", "\n", "n", ""]
    assert stream(ours, [less, less, n, less]) == ["", "<", "", "<n", "<"]
    assert stream(ours, [less, eos, n, more]) == ["", "<[</s>]", "n", ">", ""]


def test_an_image_token_has_no_text() -> None:
    ours = make("ice")
    for call in (ours.decode, ours.tokens):
        with pytest.raises(ArgumentError, match=r"id 6 of .* is an image token and has no text"):
            call([OFFSET, OFFSET - 1])
    with pytest.raises(ArgumentError, match="image token"):
        TextStream(ours).feed(0)


def test_a_special_token_is_found_before_a_piece_that_is_spelled_alike(tmp_path: Path) -> None:
    path = write_piece_model(tmp_path / "ice_text.model", [*PIECES, "eop", "eos", "[MASK]", "sop"])
    ours = IceTokenizer(path, 5)
    first = 5 + len(PIECES) + 4
    assert [ours.token_id(name) for name in ("eop", "sop", "eos")] == [first + 5, first + 4, 7]
    assert (ours.eop_id, ours.sop_id, ours.masks["[MASK]"]) == (first + 5, first + 4, first)
    assert ours.decode([5 + len(PIECES), ours.eop_id]) == "eop[eop]"


@pytest.mark.parametrize("missing", ["</s>", "<pad>", "<n>"])
def test_an_ice_model_without_a_special_piece_is_refused(missing: str, tmp_path: Path) -> None:
    pieces = ["other" if piece == missing else piece for piece in PIECES]
    path = write_piece_model(tmp_path / "ice_text.model", pieces)
    with pytest.raises(CheckpointError, match=rf"ice_text\.model.* where '{missing}' is expected"):
        IceTokenizer(path, ignore_linebreak=False)


@pytest.mark.parametrize("cls", [IceTokenizer, CogPretrainTokenizer])
@pytest.mark.parametrize("content", [b"", b"\0", b"\x0a\xff\xff", None])
def test_a_file_that_is_no_sentencepiece_model_is_refused(
    cls: Any, content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "ice_text.model"
    path.write_bytes(ice_model()[:-40] if content is None else content)
    with pytest.raises(CheckpointError, match=r"ice_text\.model"):
        cls(path)
    with pytest.raises(CheckpointError, match=r"none\.model cannot be read"):
        cls(tmp_path / "none.model")


class FakeIcetk:
    """What the package has of text."""

    num_image_tokens = 20000

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self._model = processor((folder / "ice_text.model").read_bytes())
        self.calls: list[str] = []

    @property
    def num_text_tokens(self) -> int:
        return self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        self.calls.append("encode")
        return [20000 + number for number in self._model.encode(text)]

    def decode(self, text_ids: list[int]) -> str:
        self.calls.append("decode")
        return self._model.decode([number - 20000 for number in text_ids])

    def __getitem__(self, number: int) -> str:
        return self._model.id_to_piece(number - 20000)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIcetk:
    write_ice(tmp_path / "ice_text.model")
    fake = types.ModuleType("icetk")
    fake.icetk = FakeIcetk(tmp_path)
    monkeypatch.setitem(sys.modules, "icetk", fake)
    return fake.icetk


def test_the_package_gives_what_its_file_gives(package: FakeIcetk, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    ours = tokenizer_from("glm130b", "icetk")
    own = IceTokenizer(tmp_path / "ice_text.model")
    assert type(ours) is IcetkPackageTokenizer and ours.files == own.files
    for name in ("vocab_size", "masks", "sop_id", "eop_id", "eos_id", "pad_id", "unspoken_ids"):
        assert getattr(ours, name) == getattr(own, name)
    for text in [*LINES, *ODD_TEXTS]:
        ids = [*own.encode(text), own.masks["[gMASK]"], own.eos_id, *own.encode(text)]
        assert ours.encode(text) == own.encode(text) and ours.decode(ids) == own.decode(ids)
        assert stream(ours, ids) == stream(own, ids) and ours.tokens(ids) == own.tokens(ids)
    assert {"encode", "decode"} <= set(package.calls)
    lines = IcetkPackageTokenizer(ignore_linebreak=False)
    assert lines.decode(lines.encode("one\ntwo")) == "one\ntwo"


def test_a_path_named_icetk_is_not_the_package(package: FakeIcetk, tmp_path: Path) -> None:
    path = write_ice(tmp_path / "icetk")
    assert type(tokenizer_from("glm130b", path)) is IceTokenizer
    assert type(tokenizer_from("glm130b", str(path))) is IceTokenizer
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        tokenizer_from("glm10b", "icetk")


def test_the_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "icetk", None)
    with pytest.raises(ArgumentError, match=r'pip install "bminf\[icetk\]", or give the path'):
        tokenizer_from("glm130b", "icetk")


def test_a_package_whose_import_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its generated messages raise a TypeError under a newer protobuf."""
    (tmp_path / "icetk.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.delitem(sys.modules, "icetk", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match="failed: Descriptors cannot be created directly;"):
        tokenizer_from("glm130b", "icetk")


COG = {
    "<|endoftext|>": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "[UNK]": 4,
    "<|startofpiece|>": 6, "<|endofpiece|>": 7, "[sMASK]": 8,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "gmask"), [("cog", 7), ("cog_fixed", 9)])
def test_special_ids_of_cog_pretrain(kind: str, gmask: int) -> None:
    ours, count = make(kind), processor(ice_model()).get_piece_size()
    commands = {**COG, "[gMASK]": gmask}
    assert {name: ours.token_id(name) - count for name in commands} == commands
    assert ours.vocab_size == count + max(commands.values()) + 1
    assert (ours.eos_id, ours.pad_id, ours.sop_id) == (count, count, count + 6)
    assert ours.eop_id == count + 7 and ours.prefix_ids == (count + 2,)
    assert ours.masks == {"[MASK]": count + 3, "[sMASK]": count + 8, "[gMASK]": count + gmask}
    assert ours.strips_before_masks is True
    silent = {0, 1, 2, 3, *(count + at for at in (1, 2, 3, 4, 5, 6, 8, gmask))} - {count + 7}
    assert ours.unspoken_ids == tuple(sorted(silent))
    for call in (ours.decode, ours.tokens):
        with pytest.raises(ArgumentError, match=rf"id {count + 5} of .* is an unused row"):
            call([count + 5])


@pytest.mark.parametrize("kind", ["cog", "cog_fixed"])
def test_ids_and_text_of_cog_pretrain_are_those_of_its_model(kind: str) -> None:
    ours, model = make(kind), processor(ice_model())
    for text in [*LINES, *ODD_TEXTS]:
        ids = model.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == model.decode(ids)
        assert "".join(stream(ours, ids)) == model.decode(ids)
    one = model.encode("one two")
    given = [ours.prefix_ids[0], *one, ours.masks["[MASK]"], ours.eos_id, ours.sop_id, *one]
    expected = "[CLS]one two[MASK]<|endoftext|><|startofpiece|>one two"
    assert ours.decode(given) == expected == "".join(stream(ours, given))
    shared = {"cog": "[gMASK]", "cog_fixed": "<|endofpiece|>"}[kind]
    assert ours.decode([ours.eop_id]) == shared


def transformers_twin(folder: Path) -> Any:
    from transformers import GPT2Tokenizer as Theirs

    return Theirs.from_pretrained(folder, local_files_only=True)


def test_gpt2_ids_and_text_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = transformers_twin(write_gpt2(tmp_path)), make("gpt2")
    texts = ["the  thin 's the12\n\nA in", " the", "中中", "it's \u00a0x", "١٢ 中a"]
    for text in [*texts, *ODD_TEXTS, *LINES]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == text == "".join(stream(ours, ids))
        assert ours.tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert len(ours.encode(" the")) == 1 and len(ours.encode("中")) == 1


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_gives_any_text_back(text: str) -> None:
    assert make("gpt2").decode(make("gpt2").encode(text)) == text


def test_special_ids_of_gpt2() -> None:
    ours, count = make("gpt2"), len(ENTRIES)
    names = ["<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]"]
    names += ["[UNK]", "[gMASK]", "[sMASK]"]
    assert [ours.token_id(name) - count for name in names] == [*range(-1, 8)]
    assert ours.vocab_size == count + 8 and ours.prefix_ids == (count + 2,)
    assert (ours.eos_id, ours.pad_id, ours.sop_id, ours.eop_id) == (
        count - 1, count - 1, count, count + 1,
    )  # fmt: skip
    assert ours.masks == {"[MASK]": count + 3, "[sMASK]": count + 7, "[gMASK]": count + 6}
    assert ours.unspoken_ids == (count, *range(count + 2, count + 8))
    assert ours.strips_before_masks is True
    assert ours.decode([ours.encode("a")[0], *range(count - 1, count + 8)]) == "a" + "".join(names)


def test_gpt2_holds_a_character_back_until_it_is_whole() -> None:
    ours = make("gpt2")
    first, second, third, fourth = (ours.token_id(c) for c in ("ð", "Ł", "ĺ", "Ģ"))
    assert stream(ours, [first, second, third, fourth]) == ["", "", "", "😀", ""]
    assert stream(ours, [first, second, ours.token_id("a")]) == ["", "", "\ufffda", ""]
    assert stream(ours, [first, second]) == ["", "", "\ufffd"]
    assert stream(ours, [first, ours.eop_id, fourth]) == ["", "\ufffd<|endofpiece|>", "\ufffd", ""]


@pytest.mark.parametrize("prefix", ["", "gpt2-", "own-"])
def test_gpt2_has_two_files_that_name_each_other(prefix: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path, prefix)
    files = (tmp_path / f"{prefix}vocab.json", tmp_path / f"{prefix}merges.txt")
    given: list[Any] = [files[0], str(files[1]), *([] if prefix == "own-" else [tmp_path])]
    for path in given:
        assert GPT2Tokenizer(path).files == tokenizer_from("glm10b", path).files == files


def test_gpt2_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it needs vocab\.json and merges\.txt or gpt2-voca"):
        GPT2Tokenizer(tmp_path)
    path = write_gpt2(tmp_path / "a") / "merges.txt"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read"):
        GPT2Tokenizer(path.with_name("vocab.json"))
    with pytest.raises(CheckpointError, match=r"other\.txt is no file of a GPT-2 vocabulary"):
        GPT2Tokenizer(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"\xff": 0}', "is not JSON"),
        (b"[]", "is no vocabulary"),
        (b"{}", "is no vocabulary"),
        (b'{"a": 0, "b": 2}', "without gaps"),
        (b'{"a": 0, "b": 0}', "without gaps"),
        (b'{"a": "0"}', "is no vocabulary"),
        (b'{"a": true}', "is no vocabulary"),
        (b'{"a": 0}', r"the last entry is 'a', and GPT-2's is '<\|endoftext\|>'"),
        (b'{"a": 0, "<|endoftext|>": 1}', "no entry for 255 of the 256 bytes"),
    ],
)
def test_a_file_that_is_no_gpt2_vocabulary_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = write_gpt2(tmp_path) / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"vocab\.json.*{message}"):
        GPT2Tokenizer(tmp_path)


def test_an_entry_that_is_no_bytes_is_refused(tmp_path: Path) -> None:
    write_gpt2(tmp_path, entries=[*ENTRIES[:-1], "中", ENTRIES[-1]])
    with pytest.raises(CheckpointError, match=r"entry '中' has '中', which stands for no byte"):
        GPT2Tokenizer(tmp_path)


@pytest.mark.parametrize("line", ["t", "t h e", "x y", "th the", "中 中", "t  h"])
def test_a_line_that_is_no_merge_is_refused(line: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path, merges=f"#version: 0.2\nt h\n{line}\n")
    with pytest.raises(CheckpointError, match=rf"merges\.txt, line 3: '{line}' is not two entries"):
        GPT2Tokenizer(tmp_path)


def test_merges_may_lack_their_first_line_and_end_in_any_way(tmp_path: Path) -> None:
    write_gpt2(tmp_path, merges="\r\n".join(MERGES))
    assert GPT2Tokenizer(tmp_path).encode("the in") == make("gpt2").encode("the in")
    (tmp_path / "merges.txt").write_bytes(b"\xff \xff\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not UTF-8"):
        GPT2Tokenizer(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    return inner


@pytest.mark.parametrize("model", ["glm130b", "glm10b"])
def test_glm_models_are_found_in_the_folder_and_then_in_its_parent(
    model: str, folder: Path
) -> None:
    known, kind = {
        "glm130b": ("ice_text.model", IceTokenizer),
        "glm10b": ("cog-pretrain.model", CogPretrainTokenizer),
    }[model]
    above = write_ice(folder.parent / "any.model")
    found = find_tokenizer(model, folder)
    assert type(found) is kind and found.files == (above,)
    for name in ("a.model", "b.model"):
        write_ice(folder / name)
    with pytest.raises(CheckpointError, match=rf"2 files \*\.model .*none named {known}"):
        find_tokenizer(model, folder)
    own = write_ice(folder / known)
    assert find_tokenizer(model, folder).files == tokenizer_from(model, str(folder)).files == (own,)
    assert tokenizer_from(model, above).files == (above,)


@pytest.mark.parametrize("prefix", ["", "gpt2-"])
def test_the_english_tokenizer_goes_before_models_of_other_names(prefix: str, folder: Path) -> None:
    write_gpt2(folder.parent, prefix)
    found = find_tokenizer("glm10b", folder)
    assert type(found) is GPT2Tokenizer and found.files[0].parent == folder.parent
    write_ice(folder.parent / "any.model")
    assert type(find_tokenizer("glm10b", folder)) is GPT2Tokenizer
    write_ice(folder.parent / "cog-pretrain.model")
    with pytest.raises(CheckpointError, match=rf"\({prefix}vocab\.json\) and the Chinese one"):
        find_tokenizer("glm10b", folder)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("glm130b", r"ice_text\.model, \*\.model"),
        ("glm10b", r"vocab\.json and merges\.txt, gpt2-.*, cog-pretrain\.model, \*\.model"),
    ],
)
def test_nothing_found_lists_names_and_folders(model: str, names: str, folder: Path) -> None:
    (folder / "vocab.json").write_text("{}")  # no merges beside it
    with pytest.raises(CheckpointError, match=rf"looked for {names} in {folder} and .*/outer;"):
        find_tokenizer(model, folder)


@pytest.mark.parametrize("model", ["glm130b", "glm10b"])
def test_an_object_must_have_all_of_a_glm_tokenizer(model: str, folder: Path) -> None:
    plain = CPM1Tokenizer(write_piece_model(folder / "spiece.model"))
    missing = "eop_id, eos_id, masks, pad_id, prefix_ids, sop_id, strips_before_masks, unspoken_ids"
    for wrong, lacks in ((plain, missing), (None, "decode"), (7, "decode")):
        with pytest.raises(ArgumentError, match=rf"without {lacks}.*GLMTokenizer: "):
            tokenizer_from(model, wrong)
    spans = SentinelTokenizer.__name__
    with pytest.raises(ArgumentError, match=f"without num_sentinels.*{spans}"):
        tokenizer_from("eva", make("gpt2"))


def test_nothing_of_glm_is_imported_before_it_is_used() -> None:
    program = "import sys, bminf.tokenizers; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"tokenizers", "icetk", "sentencepiece"} & set(done.stdout.split())


def test_a_model_is_loaded_without_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IceTokenizer(write_ice(tmp_path / "any.model")).encode("one")
