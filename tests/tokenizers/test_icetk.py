"""bminf/tokenizers/icetk.py: GLM-130B's tokenizer, of a file and of the package."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from tiny_tokenizers import OFFSET, make, stream
from tiny_vocabularies import (
    LINES,
    ODD_TEXTS,
    PIECES,
    ice_model,
    processor,
    write_ice,
    write_piece_model,
)

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers.base import TextStream
from bminf.tokenizers.find import tokenizer_from
from bminf.tokenizers.icetk import IcetkPackageTokenizer, IceTokenizer


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
