"""Text in pieces, and what is counted of an answer; answers themselves are tested with the verbs.

bminf/cli/session.py, bminf/cli/session_pretrained.py, bminf/cli/session_zoo.py,
bminf/tokenizers/pretrained_stream.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from bminf.cli import session
from bminf.cli.session import Meter
from bminf.cli.session_pretrained import Stream
from bminf.offload.hooks import Stats

TEXT = "  if x:\n    print('今天天气很好 🙂')\n\n\tCafé — naïve\n"


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, and one that is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentencepiece_like() -> transformers.PreTrainedTokenizerFast:
    """Pieces with a mark for blanks, of which the first of a text is dropped."""
    pieces = ["?", "▁if", "▁x", ":", "<0x0A>", "▁▁▁", "▁print", "▁", "今", "天"]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def pieces_of(tokenizer: transformers.PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    import torch

    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append, Stats)
    for end in range(len(ids)):
        stream(torch.tensor([[1, 2, 3, *ids[: end + 1]]]))
    stream.end()
    assert "".join(pieces) == stream.text and stream.ids == list(ids)
    return pieces


def test_the_text_ends_before_a_stop_string() -> None:
    import torch

    tokenizer, pieces = byte_level(), list[str]()
    stream = Stream(tokenizer, pieces.append, lambda: 0, ["tea!", "今天"])
    tokens = tokenizer("a teapot, 今天")["input_ids"]
    was_stopped = [stream(torch.tensor([[1, 2, token]])).tolist() for token in tokens]
    stream.end()
    assert stream.text == "".join(pieces) == "a teapot, " and "teap" in pieces
    assert was_stopped == [[False]] * (len(tokens) - 1) + [[True]]


def test_the_pieces_are_the_text_and_no_character_is_cut() -> None:
    tokenizer = byte_level()
    pieces = pieces_of(tokenizer, tokenizer(TEXT)["input_ids"])
    assert pieces == list(TEXT)


def test_what_the_model_cut_is_given_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer("今")["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer, [*ids])) == tokenizer.decode(ids) != ""


def test_blanks_behind_a_newline_are_kept() -> None:
    """Where a piece is decoded alone, its first blank is lost: Python code would lose a column."""
    tokenizer = sentencepiece_like()
    ids = [1, 2, 3, 4, 5, 6, 8, 9, 4, 7, 1]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "if x:\n    print今天\n  if"


def test_special_tokens_are_not_text() -> None:
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    ids = tokenizer("ab")["input_ids"]
    assert pieces_of(tokenizer, [ids[0], end, ids[1], end]) == ["a", "b"]


@hypothesis.given(st.text(max_size=30))
@hypothesis.settings(max_examples=200)
def test_any_text_streams_as_it_is(text: str) -> None:
    tokenizer = byte_level()
    assert "".join(pieces_of(tokenizer, tokenizer(text)["input_ids"])) == text


def counted(num_tokens: int, bytes_copied: int, waited_s: float = 0.0) -> tuple[int, Stats]:
    return num_tokens, Stats(bytes_copied=bytes_copied, waited_s=waited_s)


def test_a_meter_tells_what_came_after_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 15.0])
    counts = iter([counted(5, 100, 1.0), counted(7, 160, 1.2), counted(13, 400, 3.2)])
    monkeypatch.setattr(session.time, "perf_counter", lambda: next(times))
    meter = Meter(lambda: next(counts))
    meter.text_came()
    meter.text_came()  # no more is read for it
    stats = meter.stats(prompt_tokens=4)
    assert (stats.prompt_tokens, stats.new_tokens, stats.bytes_copied) == (4, 8, 300)
    assert (stats.first_text_s, stats.total_s, stats.decode.seconds) == (2.0, 5.0, 3.0)
    assert (stats.decode_tokens_per_s, stats.decode_bytes_per_token) == (2.0, 40.0)
    assert "4 tokens read and 8 generated in 5.00 s" in str(stats)
    head, prefill, decode = str(stats).splitlines()
    assert head.endswith("2.0 tokens/s, 40 B copied a token")
    assert prefill == "prefill  2.00 s, 60 B copied, 0.20 s waiting for it; bound by computing"
    assert decode == "decode   3.00 s, 240 B copied, 2.00 s waiting for it; bound by copying"
    told = stats.as_json()
    assert (told["prefill"]["bound"], told["decode"]["bound"]) == ("computing", "copying")
    assert told["decode"]["waited_s"] == pytest.approx(2.0)
    assert (told["bytes_copied"], told["decode_bytes"]) == (300, 240)


def test_an_answer_that_came_at_once_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([counted(0, 0), counted(3, 50)])
    stats = Meter(lambda: next(counts)).stats(prompt_tokens=1)
    assert stats.decode_tokens == 0 and stats.first_text_s == stats.total_s
    assert stats.decode_tokens_per_s is stats.decode_bytes_per_token is None
    assert "tokens/s" not in str(stats) and stats.as_json()["decode_tokens_per_s"] is None
    assert stats.decode.bound is None and "decode" not in str(stats)


def test_the_real_tokenizer(smollm2_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    assert "".join(pieces_of(tokenizer, tokenizer(TEXT)["input_ids"])) == TEXT
