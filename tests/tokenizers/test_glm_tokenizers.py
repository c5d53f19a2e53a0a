"""What the tokenizers of GLM-130B, GLM-10B and GLM-10B-chinese have in common.

bminf/tokenizers/pieces.py, bminf/tokenizers/cog_pretrain.py.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import said_by
from tiny_tokenizers import GLM_KINDS, OFFSET, make, stream
from tiny_vocabularies import LINES, ODD_TEXTS, ice_model, processor, write_ice

from bminf.errors import ArgumentError
from bminf.tokenizers.base import GLMTokenizer
from bminf.tokenizers.find import tokenizer_from
from bminf.tokenizers.icetk import IceTokenizer


@pytest.mark.parametrize("kind", GLM_KINDS)
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
    with pytest.raises(ArgumentError, match=r"token='\[MASKS\]' is not .*near ones: '\[MASK\]'"):
        ours.token_id("[MASKS]")
    assert ours.encode("") == [] and ours.decode([]) == "" and ours.tokens([]) == []


@pytest.mark.parametrize("kind", GLM_KINDS)
def test_masks_in_a_text_are_ordinary_characters(kind: str) -> None:
    ours = make(kind)
    ids = ours.encode("a [MASK] [gMASK][sMASK] sop <|endofpiece|> </s> [CLS]")
    commands = {ours.sop_id, ours.eop_id, ours.eos_id, *ours.masks.values(), *ours.prefix_ids}
    assert not commands & set(ids)


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


def test_nothing_of_glm_is_imported_before_it_is_used() -> None:
    modules = said_by("import sys, bminf.tokenizers; print(*sys.modules)").split()
    assert not {"tokenizers", "icetk", "sentencepiece"} & set(modules)


def test_a_model_is_loaded_without_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IceTokenizer(write_ice(tmp_path / "any.model")).encode("one")
