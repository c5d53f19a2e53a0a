"""bminf/tokenizers/find.py: which tokenizer a folder has, and what may be given in its place."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_vocabularies import (
    BILINGUAL,
    CHINESE,
    DIALOGUE,
    PIECES,
    write_bloom,
    write_gpt2,
    write_ice,
    write_lines,
    write_piece_model,
)

from bminf.errors import ArgumentError, CheckpointError
from bminf.tokenizers import (
    BloomTokenizer,
    CPM1Tokenizer,
    CPM1WordTokenizer,
    CPM2BilingualTokenizer,
    CPM2Tokenizer,
    EVATokenizer,
    SentinelTokenizer,
    Tokenizer,
    find_tokenizer,
    tokenizer_from,
)
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.gpt2 import GPT2Tokenizer
from bminf.tokenizers.icetk import IceTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    return inner


@pytest.mark.parametrize(
    ("model", "tokens", "kind"),
    [
        ("cpm2", CHINESE, CPM2Tokenizer),
        ("cpm2", BILINGUAL, CPM2BilingualTokenizer),
        ("eva", DIALOGUE, EVATokenizer),
    ],
)
def test_a_vocabulary_is_found_in_the_folder_and_then_in_its_parent(
    model: str, tokens: list[str], kind: type, folder: Path
) -> None:
    above = write_lines(folder.parent / "vocab.txt", tokens)
    found = find_tokenizer(model, folder)
    assert type(found) is kind and found.files == (above,)
    own = write_lines(folder / "vocab.txt", tokens)
    for given in (folder, str(folder)):
        assert find_tokenizer(model, given).files == (own,)


def test_the_parent_of_a_relative_folder_is_looked_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(folder.parent / "vocab.txt", DIALOGUE)
    monkeypatch.chdir(folder)
    assert find_tokenizer("eva", ".").files == (path,)


@pytest.mark.parametrize("name", ["spiece.model", "chinese_vocab.model", "any.model"])
def test_a_sentencepiece_model_is_found_under_its_names(name: str, folder: Path) -> None:
    write_lines(folder / "vocab.txt", PIECES)
    above = write_piece_model(folder.parent / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_tokenizer("cpm1", folder)
    assert type(found) is CPM1Tokenizer and found.files == (above,)
    own = write_piece_model(folder / name)
    assert find_tokenizer("cpm1", folder).files == (own,)


def test_known_names_go_before_others_and_several_others_are_refused(folder: Path) -> None:
    for name in ("b.model", "a.model"):
        write_piece_model(folder / name)
    with pytest.raises(CheckpointError, match=r"2 files \*\.model \(a\.model, b\.model\)"):
        find_tokenizer("cpm1", folder)
    for name in ("chinese_vocab.model", "spiece.model"):
        path = write_piece_model(folder / name)
        assert find_tokenizer("cpm1", folder).files == (path,)


def test_a_vocabulary_alone_is_cpm1_of_bminf_1_with_one_warning(folder: Path) -> None:
    path = write_lines(folder.parent / "vocab.txt", PIECES)
    message = r"no sentencepiece model .*other ids .* Put CPM-1's chinese_vocab\.model there"
    with pytest.warns(UserWarning, match=message) as caught:
        found = find_tokenizer("cpm1", folder)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(found) is CPM1WordTokenizer and found.files == (path,)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("cpm1", r"spiece\.model, chinese_vocab\.model, \*\.model, vocab\.txt"),
        ("cpm2", r"vocab\.txt"),
        ("eva", r"vocab\.txt"),
        ("glm130b", r"ice_text\.model, \*\.model"),
        ("glm10b", r"vocab\.json and merges\.txt, gpt2-.*, cog-pretrain\.model, \*\.model"),
        ("bloom", r"tokenizer\.json"),
    ],
)
def test_nothing_found_lists_names_and_folders(model: str, names: str, folder: Path) -> None:
    (folder / "vocab.txt").mkdir()
    (folder / "spiece.model").mkdir()
    (folder / "vocab.json").write_text("{}")  # no merges beside it
    where = f"{folder} and {folder.parent}"
    with pytest.raises(CheckpointError, match=rf"looked for {names} in {where}.*tokenizer=\.\.\."):
        find_tokenizer(model, folder)


def test_an_unknown_model_is_refused(folder: Path) -> None:
    for call in (find_tokenizer, tokenizer_from):
        with pytest.raises(ArgumentError, match="model='glm'; accepted: 'cpm1', 'cpm2', 'eva'"):
            call("glm", folder)


@pytest.mark.parametrize(
    ("model", "name", "tokens", "kind"),
    [
        ("cpm1", "other.model", PIECES, CPM1Tokenizer),
        ("cpm1", "other.txt", PIECES, CPM1WordTokenizer),
        ("cpm2", "other.txt", CHINESE, CPM2Tokenizer),
        ("cpm2", "other", BILINGUAL, CPM2BilingualTokenizer),
        ("eva", "other.txt", DIALOGUE, EVATokenizer),
    ],
)
def test_a_file_may_be_given_under_any_name(
    model: str, name: str, tokens: list[str], kind: type, folder: Path
) -> None:
    write = write_piece_model if kind is CPM1Tokenizer else write_lines
    path = write(folder / name, tokens)
    for given in (path, str(path)):
        found = tokenizer_from(model, given)
        assert type(found) is kind and found.files == (path,)


def test_a_folder_may_be_given(folder: Path) -> None:
    path = write_lines(folder / "vocab.txt", CHINESE)
    assert tokenizer_from("cpm2", str(folder)).files == (path,)


def test_a_path_where_nothing_is_is_refused(folder: Path) -> None:
    for path in (folder / "none", f"{folder}/\0"):
        with pytest.raises(CheckpointError, match="there is no such file or folder"):
            tokenizer_from("eva", path)


def test_an_object_with_all_methods_is_taken_as_it_is(folder: Path) -> None:
    class Own:
        vocab_size = 3
        files = ()
        encode = decode = token_id = tokens = lambda self, _: []

    own: Any = Own()
    assert tokenizer_from("cpm1", own) is own
    with pytest.raises(ArgumentError, match="a Own without num_sentinels, sentinel, sentinel_ids"):
        tokenizer_from("cpm2", own)
    del Own.token_id, Own.files
    with pytest.raises(ArgumentError, match=r"a Own without files, token_id; give a path, or an"):
        tokenizer_from("cpm1", own)
    for wrong in (None, 7, EVATokenizer):
        with pytest.raises(ArgumentError, match="without"):
            tokenizer_from("eva", wrong)


def test_the_classes_have_what_the_protocols_ask_for(folder: Path) -> None:
    path = write_lines(folder / "vocab.txt", CHINESE)
    plain: Tokenizer = CPM1WordTokenizer(path)
    spans: SentinelTokenizer = CPM2Tokenizer(path)
    assert tokenizer_from("cpm1", plain) is plain and tokenizer_from("cpm2", spans) is spans
    with pytest.raises(ArgumentError, match="without num_sentinels"):
        tokenizer_from("eva", plain)


def test_bloom_is_found_in_the_folder_and_then_in_its_parent(folder: Path) -> None:
    above = write_bloom(folder.parent)
    found = find_tokenizer("bloom", folder)
    assert type(found) is BloomTokenizer and found.files == (above,)
    own = write_bloom(folder)
    for given in (folder, own, str(own)):
        assert tokenizer_from("bloom", given).files == (own,)
    assert tokenizer_from("bloom", found) is found


# ---- of a GLM ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("model", ["glm130b", "glm10b"])
def test_an_object_must_have_all_of_a_glm_tokenizer(model: str, folder: Path) -> None:
    plain = CPM1Tokenizer(write_piece_model(folder / "spiece.model"))
    missing = "eop_id, eos_id, masks, pad_id, prefix_ids, sop_id, strips_before_masks, unspoken_ids"
    for wrong, lacks in ((plain, missing), (None, "decode"), (7, "decode")):
        with pytest.raises(ArgumentError, match=rf"without {lacks}.*GLMTokenizer: "):
            tokenizer_from(model, wrong)
    spans = SentinelTokenizer.__name__
    gpt2 = GPT2Tokenizer(write_gpt2(folder))
    with pytest.raises(ArgumentError, match=f"without num_sentinels.*{spans}"):
        tokenizer_from("eva", gpt2)
