"""How probable a model finds texts: one class for each way in which models read them.

A TokenScorer has a context and a continuation as the ids of one text, which is read from its first
token to its last. A TextScorer has them apart: the context of a GLM is attended to in both
directions, and that of an encoder-decoder model goes into its encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bminf.engine.request import Request
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.models.evaluate import token_scores
from bminf.tokenizers.pretrained_stream import PretrainedStream
from bminf.tokenizers.stop_strings import StopStrings

if TYPE_CHECKING:
    from bminf.models import LanguageModel

Options = Mapping[str, Any]
"""max_tokens, temperature (0 is greedy), top_p, stop: texts before which an answer ends."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, at least one, and of what follows it."""

_AT_ONCE = 512  # tokens of rows that share a pass
_STRIDE = 256  # new tokens of a window of a GLM, as its authors have them


@dataclass(frozen=True)
class Score:
    """logprob: of all tokens together, in nats.   is_greedy: whether each is the most probable."""

    logprob: float
    is_greedy: bool


class TokenScorer(Protocol):
    """max_length: tokens that a continuation may have, behind a context of one or more; what is too
    long together loses its beginning.   end_id: of the token that ends texts.   start_id: of the
    one that a text begins after."""

    max_length: int
    end_id: int
    start_id: int

    def encode(self, text: str, has_special: bool = True) -> list[int]: ...

    def score(self, pairs: Sequence[Pair]) -> list[Score]: ...

    def generate(self, context: str, options: Options) -> str: ...


class TextScorer(Protocol):
    """The same with texts."""

    def score_texts(self, context: str, continuations: Sequence[str]) -> list[Score]: ...

    def whole(self, text: str) -> float:
        """The log-probability of a text that follows nothing."""
        ...

    def generate(self, context: str, options: Options) -> str: ...


def scorer_of(
    model: Any, tokenizer: Any = None, max_length: int | None = None
) -> TokenScorer | TextScorer:
    """The scorer of a model.

    model: of bminf.models, or one of transformers that continues texts, wrapped or not.
    tokenizer: that of a model of transformers.   max_length: of its texts; None is all its
    positions.   Raises ArgumentError, or UnsupportedModelError.
    """
    from bminf.models import GLM, LanguageModel
    from bminf.models.decoder_only import DecoderOnly

    if isinstance(model, GLM):
        return GLMScorer(model)
    if isinstance(model, DecoderOnly):
        return ZooScorer(model)
    if isinstance(model, LanguageModel):
        return EncoderScorer(model)
    if tokenizer is None:
        raise ArgumentError("tokenizer is None; give that of the model")
    return PretrainedScorer(model, tokenizer, max_length)


# ---- from the first token to the last ------------------------------------------------------------


class PretrainedScorer:
    """A decoder-only model of transformers, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"a {type(model).__name__} has an encoder; of models of transformers those that "
                "continue a text can be evaluated"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(n for n in (max_length, positions, 2**20) if n is not None)
        self._model, self._tokenizer = model, tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, 0)
        self.end_id: int = next(i for i in ends if i is not None)
        first = tokenizer.bos_token_id
        self.start_id: int = self.end_id if first is None else first
        can_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._can_cut = can_cut

    def encode(self, text: str, has_special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=has_special)["input_ids"])

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        found: dict[int, Score] = {}
        for rows in _batches(pairs, self.max_length):
            num_scored = max(len(pairs[at][1]) for own in rows.values() for at in own)
            logits = self._logits(list(rows), num_scored)
            for states, own in zip(logits, rows.values(), strict=True):
                for at in own:
                    ids = pairs[at][1]
                    found[at] = _score(states[len(states) - len(ids) :], ids)
        return [found[at] for at in range(len(pairs))]

    def generate(self, context: str, options: Options) -> str:
        answer = _Answer(self._tokenizer, options.get("stop", ()))
        num_tokens = int(options["max_tokens"])
        ids = self.encode(context)[-max(1, self.max_length - num_tokens) :]
        given = torch.tensor([ids], device=self._model.device)
        self._model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=num_tokens,
            pad_token_id=self.end_id, stopping_criteria=[answer], **_sampling(options),
        )  # fmt: skip
        return answer.end()

    def _logits(self, rows: Sequence[Sequence[int]], num_kept: int) -> torch.Tensor:
        """(B, num_kept or more, V) of the last positions of rows of equal length."""
        cut = {"logits_to_keep": num_kept} if self._can_cut else {}
        ids = torch.tensor(rows, device=self._model.device)
        logits: torch.Tensor = self._model(ids, use_cache=False, **cut).logits
        return logits


def _batches(pairs: Sequence[Pair], max_length: int) -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Rows to be read together, of one length, each with the pairs that it scores.

    A row is a context with all but the last token of what follows: choices of one token share it.
    What is too long loses its beginning.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for at, pair in enumerate(pairs):
        rows.setdefault(tuple(_shortened(pair, max_length)[:-1]), []).append(at)
    batch: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(rows, key=len):
        length = len(next(iter(batch), row))
        if len(row) != length or (len(batch) + 1) * length > max(_AT_ONCE, length):
            yield batch
            batch = {}
        batch[row] = rows[row]
    if batch:
        yield batch


def _shortened(pair: Pair, max_length: int) -> list[int]:
    """Context and continuation, `max_length` tokens and one before them at most."""
    context, ids = pair
    if len(ids) > max_length:
        raise ArgumentError(f"{len(ids)} tokens to score; the most is {max_length}")
    return [*context, *ids][-max_length - 1 :]


def _score(logits: torch.Tensor, ids: Sequence[int]) -> Score:
    """logits: (T, V), each before one of `ids`."""
    logs, best = token_scores(lambda x: x, logits, ids)
    return Score(float(logs.sum()), bool(best.all()))


def _sampling(options: Options) -> dict[str, Any]:
    temperature = options.get("temperature", 0)
    if not temperature:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_p": options.get("top_p", 1.0)}


class _Answer:
    """A stopping criterion of one generate(): the text so far, up to what it stops at. That of
    transformers itself does not know all tokenizers."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._pieces, self._stops = PretrainedStream(tokenizer), StopStrings(tuple(stop))
        self._text = ""

    def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(1,) bool.   ids: (1, T), of which the last is new."""
        self._text += self._stops.feed(self._pieces.feed(int(ids[0, -1])))
        return ids.new_full((1,), self._stops.is_found).bool()

    def end(self) -> str:
        self._text += self._stops.feed(self._pieces.finish())
        return self._text + self._stops.finish()


class ZooScorer:
    """CPM-1 or a BLOOM: a model of bminf.models that continues a text."""

    def __init__(self, model: Any) -> None:
        # A request holds the token before those that are scored, too.
        self._model, self.max_length = model, int(model.max_length) - 1
        self.end_id = self.start_id = int(model._end_ids()[0])

    def encode(self, text: str, has_special: bool = True) -> list[int]:
        return list(self._model.tokenizer.encode(text))

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Rows share passes of the engine."""
        whole = [(_shortened(pair, self.max_length), len(pair[1])) for pair in pairs]
        requests = [Request(ids, 0, num_prompt_logprobs=1) for ids, _ in whole]
        engine = self._model.engine
        engine.run([engine.add(request) for request in requests])
        return [
            _of_tokens(request.prompt_logprobs[len(ids) - 1 - number :])
            for request, (ids, number) in zip(requests, whole, strict=True)
        ]

    def generate(self, context: str, options: Options) -> str:
        return _generated(self._model, context, options)


def _of_tokens(tokens: Sequence[Any]) -> Score:
    """tokens: TokenLogprob, with the most probable one each."""
    is_greedy = all(one.logprob >= one.top[0][1] for one in tokens)
    return Score(sum(one.logprob for one in tokens), is_greedy)


def _generated(model: LanguageModel, context: Any, options: Options) -> str:
    """Of a model of the zoo, which knows a temperature of 0 and texts to stop at."""
    given = {"temperature": 0, **options}
    return "".join(model.generate_iter(context, **given))


# ---- a context that is read at once --------------------------------------------------------------


class GLMScorer:
    """A GLM: the context is attended to in both directions, and all choices share a pass.

    mask: of a context without one, to which it is added.
    """

    def __init__(self, model: Any, mask: str = "[MASK]") -> None:
        self.model, self.mask = model, mask

    def score_texts(self, context: str, continuations: Sequence[str]) -> list[Score]:
        ids = [list(self.model.tokenizer.encode(text)) for text in continuations]
        return self.score_ids(context, ids)

    def score_ids(self, context: Any, ids: Sequence[Sequence[int]]) -> list[Score]:
        """context: a text or ids.   What is too long loses its beginning; where the choices do not
        fit together, each has a pass."""
        try:
            found = self.model._choice_scores(self.shortened(context, ids), ids, self.mask)
        except ArgumentError:
            if len(ids) == 1:
                raise
            return [self.score_ids(context, [one])[0] for one in ids]
        return [Score(logprob, is_best) for logprob, is_best in found]

    def shortened(self, context: Any, ids: Sequence[Sequence[int]]) -> Any:
        """`context`, or the ids of its end, where not even one choice has room behind it."""
        if not isinstance(context, str):
            tokens = list(context)
        else:
            tokens = list(self.model.tokenizer.encode(context)) if context else []
        prefix = list(self.model.tokenizer.prefix_ids)
        room = self.model.max_length - max(len(one) for one in ids) - len(prefix) - 2
        if len(tokens) <= room:
            return context or prefix
        return [*prefix, *tokens[-max(0, room) :]] if room > 0 else prefix

    def whole(self, text: str) -> float:
        ids = self.model._encoded(text)
        stride = min(_STRIDE, self.model.max_length - 2)
        return -float(sum(self.model._window_losses(ids, stride, False)))

    def generate(self, context: str, options: Options) -> str:
        return _generated(self.model, context, options)


class EncoderScorer:
    """CPM-2 or EVA: the encoder reads the context, and the decoder what follows."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def score_texts(self, context: str, continuations: Sequence[str]) -> list[Score]:
        return [self._one(context, text) for text in continuations]

    def _one(self, context: str, text: str) -> Score:
        ids = list(self._model.tokenizer.encode(text))
        logits = self._model.logits(context, text)  # of the start ids, too
        return _score(logits[-len(ids) - 1 : -1], ids)

    def whole(self, text: str) -> float:
        raise UnsupportedModelError(
            f"a {type(self._model).__name__} has an encoder, which needs a context: a text as a "
            "whole has no probability; give tasks with a context"
        )

    def generate(self, context: str, options: Options) -> str:
        return _generated(self._model, context, options)
