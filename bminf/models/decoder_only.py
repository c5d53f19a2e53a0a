"""Models that continue a text: what each of them shares with the others, for users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bminf.engine.beam import Decoder
from bminf.engine.request import Request
from bminf.errors import ArgumentError
from bminf.layers.kv_cache import KVCache
from bminf.models.arguments import Text
from bminf.models.base import LanguageModel
from bminf.models.calls import needs_open_model
from bminf.models.evaluate import perplexity, windows
from bminf.models.prompt import Prompt, padded


class PaddedDecoder:
    """A batch of a decoder-only network. Shorter prompts are left-padded, so that all rows have the
    same length in the cache; padding is masked and has no positions.

    network: called with ids (B, T), a KVCache and the padding of each row.   lengths: of the
    prompts, without padding.
    """

    def __init__(self, network: Any, cache: KVCache, lengths: Sequence[int]) -> None:
        cache.reset()
        self._network, self._cache = network, cache
        longest = max(lengths)
        self._num_padding: torch.Tensor | None = None
        if min(lengths) < longest:
            padding = [longest - length for length in lengths]
            self._num_padding = torch.tensor(padding, device=cache.keys.device)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self._network(input_ids, self._cache, self._num_padding)
        logits: torch.Tensor = self._network.head(x[:, -1])
        return logits

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)
        if self._num_padding is not None:
            self._num_padding = self._num_padding[rows]


class DecoderOnly(LanguageModel):
    """A model that continues a text; made by its subclasses.

    Arguments, errors and use: see LanguageModel.
    """

    @needs_open_model
    def logits(self, text: Text) -> torch.Tensor:
        """The logits after each token of `text`: (T, V) float32 on the CPU.

        text: a str or token ids, at most max_length.   Raises ArgumentError.
        """
        ids = self._ids(text, "text")
        self._check_length(ids, "text")
        with self._whole_cache():
            self._cache.reset()
            return self._logits(self._network(self._tensor([ids]), self._cache)[0])

    @needs_open_model
    def score(self, text: Text, choices: Sequence[Text]) -> list[float]:
        """The log-probability of each choice as what follows `text`: the largest is the answer.

        text: a str or token ids.   choices: texts or token ids. The log-probabilities of a choice's
        tokens are summed, without dividing by their number. Choices share passes, as texts do.
        Raises ArgumentError.
        """
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise ArgumentError(f"choices={choices!r}; give a list with at least one choice")
        context = self._ids(text, "text")
        rows = []
        for number, choice in enumerate(choices):
            rows.append([*context, *self._ids(choice, f"choices[{number}]")])
            self._check_length(rows[-1], f"text with choices[{number}]")
        return [sum(logs[len(context) - 1 :]) for logs in self._scored(rows)]

    @needs_open_model
    def perplexity(self, text: Text, stride: int | None = None) -> float:
        """exp of the mean loss per token of `text`, at most exp(20).

        The text is read in windows of max_length tokens, each of which begins `stride` tokens after
        the one before; None is as far as a window is long. Tokens that a window shares with the one
        before are read, and not scored again; a token with nothing before it in its window is not
        scored. Windows share passes, as texts do.
        Raises ArgumentError, also for a text of one token.
        """
        ids = self._ids(text, "text")
        if len(ids) < 2:
            raise ArgumentError("text has one token, and nothing to predict it from; give more")
        length = self.max_length
        if length < 2:
            raise ArgumentError(
                "max_length=1 leaves no window; perplexity() needs a model that was loaded with at "
                "least 2"
            )
        found = [*windows(ids, length, length if stride is None else stride)]
        scored = self._scored([window for window, _ in found])
        known = (max(0, num_known - 1) for _, num_known in found)
        logs = [log for own, first in zip(scored, known, strict=True) for log in own[first:]]
        return perplexity(-sum(logs), len(logs))

    def _scored(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Of each row the log-probabilities of all tokens but the first."""
        requests = [Request(row, 0, num_prompt_logprobs=0) for row in rows]
        engine = self.engine
        engine.run([engine.add(request) for request in requests])
        return [[one.logprob for one in request.prompt_logprobs] for request in requests]

    def _prompt(self, text: Any) -> Prompt:
        ids = self._encoded(text)
        return Prompt(ids, ids)

    def _new_cache(self) -> KVCache:
        cache: KVCache = self.model.new_cache(self.max_batch_size, self.max_length)
        return cache

    def _decoder(self, prompts: Sequence[Any]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.start_ids for prompt in prompts]
        decoder = PaddedDecoder(self._network, self._cache, [len(row) for row in rows])
        return decoder, self._tensor(padded(rows, self._pad_id, padding_side="left"))
