"""How a GLM fills a blank: the options of all models, and its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bminf.checks import check_bool, check_count, check_ids, check_positive
from bminf.errors import ArgumentError
from bminf.models.options import Options


@dataclass(frozen=True)
class GLMOptions(Options):
    """The keywords of a GLM's generate(), generate_iter(), generate_batch() and fill_blank().

    Beside those of Options:
    out_seq_length: tokens of text and answer together, in place of max_tokens.
    end_tokens: ids that end an answer, in place of eop and eos.
    min_length: least tokens of an answer.   no_repeat_ngram_size: so many tokens in a row come only
    once in an answer; 0 for no such rule.   deterministic: False draws the sequences that a beam
    search goes on with, by their probability; `seed` then repeats them.
    num_return_sequences: of the num_beams that a search finds.
    All of the last four are for num_beams above 1, the first three of them for GLM-130B alone.
    length_penalty: of GLM-130B, scores are divided by ((5 + tokens, text included) / 6) to its
    power.   top_k and top_p: first the one, ties with the last token kept, then the other.
    """

    temperature: float = 1.0
    length_penalty: float = 0.0
    out_seq_length: int | None = None
    end_tokens: Sequence[int] | None = None
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    deterministic: bool = True
    num_return_sequences: int | None = None

    def __post_init__(self) -> None:
        for name in ("out_seq_length", "num_return_sequences"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("min_length", "no_repeat_ngram_size"):
            check_count(name, getattr(self, name))
        check_bool("deterministic", self.deterministic)
        super().__post_init__()

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        if self.end_tokens is not None:
            is_list = isinstance(self.end_tokens, Sequence) and not isinstance(self.end_tokens, str)
            if not is_list or not self.end_tokens:
                raise ArgumentError(
                    f"end_tokens={self.end_tokens!r}; give a list of token ids, at least one"
                )
            check_ids("end_tokens", self.end_tokens, vocab_size)

    def _only_for_beams(self) -> dict[str, Any]:
        return {
            **super()._only_for_beams(),
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "deterministic": True,
            "num_return_sequences": None,
        }

    def _only_without_beams(self) -> dict[str, Any]:
        names = super()._only_without_beams()
        return names if self.deterministic else {n: v for n, v in names.items() if n != "seed"}

    def _check_beams(self) -> None:
        super()._check_beams()
        wanted = self.num_return_sequences
        if wanted is not None and wanted > self.num_beams:
            raise ArgumentError(
                f"num_return_sequences={wanted} is more than num_beams={self.num_beams}; a search "
                "finds at most that many"
            )
