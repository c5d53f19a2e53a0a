"""GLM: GLM-130B, and GLM with 2 to 10 billion parameters. They fill blanks in a text, and continue
it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bminf.arch import glm
from bminf.arch.glm import GLM as Network
from bminf.arch.glm import GLMConfig
from bminf.checks import check_bool, plain
from bminf.engine.beam import Decoder
from bminf.engine.glm_beam import glm_beam_search
from bminf.engine.sampling import Sampling, top_k_then_top_p
from bminf.errors import ArgumentError
from bminf.keywords import known_keywords
from bminf.layers.kv_cache import KVCache
from bminf.models.arguments import Text
from bminf.models.assemble import plan_model
from bminf.models.base import BeamSearch, LanguageModel
from bminf.models.calls import loads_a_model, needs_open_model
from bminf.models.evaluate import log_probabilities, perplexity, token_scores, windows
from bminf.models.glm_text import (
    GENERATION_MASK,
    TEXT_MASK,
    Blank,
    GLMDecoder,
    GLMRows,
    Masked,
    blank,
    has_mask,
    masked_text,
    pack_choices,
    position_tensor,
    prefix_lm_mask,
)
from bminf.models.options import GLMOptions, Options
from bminf.models.prompt import padded
from bminf.offload.plan import Plan
from bminf.quantization.packed import Format
from bminf.tokenizers.base import GLMTokenizer
from bminf.units import parse_bytes


@dataclass(frozen=True)
class Answer:
    """One of the answers that a beam search found.   stopped: see generate()."""

    text: str
    stopped: bool
    score: float


@known_keywords
def plan_glm(
    model: str | GLMConfig,
    memory_limit: int | float | str,
    quantization: str | Format | None = "int4",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    max_batch_size: int = 1,
    head_quantization: str | Format | None = None,
    device: str = "cuda",
    host_memory: int | float | str | None = None,
) -> Plan:
    """The plan that GLM(...) would make with these arguments: plan_model() of a GLM.

    model: "GLM-130B", "GLM-10B", "GLM-10B-chinese", "GLM-2B", or a configuration.
    All else is as for plan_model().   Raises ArgumentError or BudgetError.
    """
    if not isinstance(model, GLMConfig):
        if not isinstance(model, str) or model not in glm.PUBLISHED_GLM:
            names = ", ".join(glm.PUBLISHED_GLM)
            raise ArgumentError(f"model={model!r}; accepted: {names}, a GLMConfig")
        model = glm.PUBLISHED_GLM[model]
    limit = parse_bytes(memory_limit, "memory_limit")
    return plan_model(
        model, limit, quantization, dtype, max_length, max_batch_size, head_quantization, device,
        host_memory,
    )  # fmt: skip


class GLM(LanguageModel):
    """GLM-130B and GLM-10B (2B, ...); which of them is seen from the checkpoint.

    quantization: "int4" (the library's default), "int4-row" (a scale a row, as GLM-130B's authors
        pack), "int8", a bminf.Format, or None. A checkpoint that is packed already keeps its codes,
        in groups of columns where it was split across GPUs; of the authors' own folders None
        unpacks them.
    head_quantization: the same for the output head, which stays as it is by default, as its authors
        leave it. "int8" takes half of its 3.7 GB, for a little rounding of the logits.
    rotary_precision: of GLM-130B's positions, "float16" as in the code that it was published with,
        or "float32", which is exact. None is what the configuration says, or "float16".
    The embedding stays on the host. A block is one matrix.

    All other arguments, errors and use: see LanguageModel.
    """

    _architectures = (glm.GLM130B, glm.GLM10B)
    _defaults: Options = GLMOptions()
    config: GLMConfig
    tokenizer: GLMTokenizer
    model: Network

    @loads_a_model
    @known_keywords
    def __init__(
        self,
        checkpoint: str | Path | None = None,
        memory_limit: int | float | str | None = None,
        quantization: str | Format | None = "int4",
        activations: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        max_length: int | None = None,
        max_batch_size: int = 1,
        config: Any = None,
        tokenizer: Any = None,
        offload_dir: str | Path | None = None,
        head_quantization: str | Format | None = None,
        rotary_precision: str | None = None,
        deterministic: bool = False,
        fused_kernels: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        self._head_quantization = head_quantization
        self._rotary_precision = rotary_precision
        super().__init__(
            checkpoint, memory_limit, quantization, activations, dtype, device, max_length,
            max_batch_size, config, tokenizer, offload_dir, deterministic, fused_kernels,
            cuda_graph,
        )  # fmt: skip

    # ---- what users call ------------------------------------------------------------------------

    @needs_open_model
    def generate(
        self,
        text: str,
        max_tokens: int = 128,
        top_n: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        stop_tokens: Sequence[str] | str | None = None,
        **more: Any,
    ) -> Any:
        """(answer, stopped): the continuation of `text`, or the content of its one blank; and
        whether an end token ended it, which is not part of it; otherwise max_tokens did.

        A text without a mask is continued, as if it ended in [gMASK].
        With num_return_sequences, a list of Answer, best first, instead.
        Arguments and other keywords (num_beams, seed, ...): see bminf.models.GLMOptions.
        Raises ArgumentError.
        """
        options = GLMOptions(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        settings = self._settings(options, more)
        if settings.num_return_sequences is None:
            return self._generate([text], settings)[0]
        prompts, within = self._checked_prompts([text], settings)
        stop_ids = self._stop_ids(within)
        (found,) = self._search(prompts, within, stop_ids)
        return [
            Answer(*self._answer(list(one.ids), stop_ids), one.score)
            for one in found[: settings.num_return_sequences]
        ]

    @needs_open_model
    def fill_blank(self, text: str, max_tokens: int = 128, **more: Any) -> list[dict[str, Any]]:
        """The text of each blank of `text`, in order: {"position", "text"} for each mask.

        text: with masks of one kind, [MASK] (a word or a few), [sMASK] (a sentence) or [gMASK]
        (the rest); without any, [gMASK] is added at its end.   max_tokens: of each blank.
        The blanks are filled from left to right, and each answer is read for the next; blank i
        is sampled with seed + i.
        Arguments and other keywords: see bminf.models.GLMOptions; with num_beams above 1, the best
        beam is taken.
        Raises ArgumentError.
        """
        settings = self._settings(GLMOptions(max_tokens), more).with_stop_tokens()
        _check_one_answer(settings)
        masked = self._masked(text)
        stop_ids = self._stop_ids(settings)
        answers = self._fill(masked, settings, stop_ids)
        return [
            {"position": position, "text": self._answer(answer, stop_ids)[0]}
            for position, answer in zip(masked.positions, answers, strict=True)
        ]

    @needs_open_model
    def score(self, text: Text, choices: Sequence[Text], mask: str = TEXT_MASK) -> list[float]:
        """The log-probability of each choice for the blank of `text`: the largest is the answer.

        text: a str or token ids, with one mask, or without, which adds `mask` at its end.
        choices: texts or token ids. The log-probabilities of a choice's tokens are summed, without
        dividing by their number; all choices share one pass, and have to fit max_length together.
        Source: GLM-130B/evaluation, multiple-choice tasks.   Raises ArgumentError.
        """
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise ArgumentError(f"choices={choices!r}; give a list with at least one choice")
        ids = [self._ids(choice, f"choices[{n}]") for n, choice in enumerate(choices)]
        return [logprob for logprob, _ in self._choice_scores(text, ids, mask)]

    @needs_open_model
    def perplexity(
        self, text: str, generation_length: int = 256, unidirectional: bool = False
    ) -> float:
        """exp of the mean loss per word; words are separated by spaces.

        The text is read in windows of max_length tokens with a stride of generation_length. The new
        tokens of a window are predicted from those before, which are attended to in both
        directions, or with `unidirectional` are predicted again themselves.
        At most exp(20), as in the authors' code.   Source: GLM-130B/evaluation, language modelling.
        Raises ArgumentError.
        """
        check_bool("unidirectional", unidirectional)
        ids = self._encoded(text)
        total = sum(self._window_losses(ids, generation_length, unidirectional))
        return perplexity(total, len(text.strip().split(" ")))

    @needs_open_model
    def logits(self, text: str) -> torch.Tensor:
        """The logits after each token of the input of generate(): (T, V) float32, CPU.

        text: with at most one mask. The last row predicts the first token of the answer.
        Raises ArgumentError.
        """
        one = self._prompt(text)
        self._check_length(one.start_ids, "text")
        attention_mask = prefix_lm_mask(len(one.start_ids), len(one.input_ids))
        with self._whole_cache():
            return self._logits(self._hidden_states(one.start_ids, one.positions, attention_mask))

    # ---- differences from other models ----------------------------------------------------------

    def _configured(self, config: GLMConfig) -> GLMConfig:
        if self._rotary_precision is None:
            return config
        if not config.is_rotary:
            raise ArgumentError(
                "rotary_precision is for GLM-130B; a GLM-10B learned its positions, so leave it out"
            )
        return replace(config, rotary_precision=self._rotary_precision)

    def _settings(self, options: Options, keywords: dict[str, Any]) -> Any:
        settings = super()._settings(options, keywords)
        assert isinstance(settings, GLMOptions)
        special = (settings.min_length, settings.no_repeat_ngram_size, not settings.deterministic)
        if not self.config.is_rotary and any(special):
            raise ArgumentError(
                "min_length, no_repeat_ngram_size and deterministic are for the beam search of "
                "GLM-130B; leave them out for a GLM-10B"
            )
        return settings

    def _generate(self, texts: Sequence[Any], settings: Any) -> list[tuple[str, bool]]:
        _check_one_answer(settings)
        return super()._generate(texts, settings)

    def _within(self, settings: Any, prompts: Sequence[Any]) -> GLMOptions:
        """`settings`, with max_tokens as out_seq_length, if given, allows for the answer."""
        assert isinstance(settings, GLMOptions)
        if settings.out_seq_length is None:
            return settings
        if len(prompts) > 1:
            raise ArgumentError("out_seq_length is for one text; give max_tokens for several")
        (one,) = prompts
        room = settings.out_seq_length - len(one.start_ids)
        if room < 1:
            raise ArgumentError(
                f"out_seq_length={settings.out_seq_length} counts the text, which has "
                f"{len(one.start_ids)} tokens with its mask and the start of the answer; give "
                "more, or max_tokens, which counts the answer alone"
            )
        return replace(settings, max_tokens=room)

    def _beam_search(self, prompts: Sequence[Any], settings: Any) -> BeamSearch:
        if not self.config.is_rotary:
            return super()._beam_search(prompts, settings)
        return partial(
            glm_beam_search, contexts=[prompt.start_ids for prompt in prompts],
            length_penalty=settings.length_penalty, min_length=settings.min_length,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            is_deterministic=settings.deterministic, seed=settings.seed,
        )  # fmt: skip

    def _sampling(self, settings: Options) -> Sampling:
        return replace(super()._sampling(settings), filter=top_k_then_top_p)

    def _stop_ids(self, settings: Any) -> frozenset[int]:
        ends = self._end_ids() if settings.end_tokens is None else settings.end_tokens
        return frozenset([*ends, *settings.stop_ids(self.tokenizer)])

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.eop_id, self.tokenizer.eos_id]

    def _banned_ids(self, settings: Options) -> list[int]:
        """Tokens that no text contains, and rows of the embedding without a token."""
        unused = range(self.tokenizer.vocab_size, self.config.vocab_size)
        return sorted({*self.tokenizer.unspoken_ids, *unused} - self._stop_ids(settings))

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_id

    def _new_cache(self) -> KVCache:
        return self.model.new_cache(self.max_batch_size, self.max_length)

    def _new_rows(self) -> GLMRows:
        return GLMRows(
            self.model, self._cache, self.max_length, self._begin, self._uses_fused_kernels
        )

    def _decoder(self, prompts: Sequence[Any]) -> tuple[Decoder, torch.Tensor]:
        rows = [prompt.start_ids for prompt in prompts]
        decoder = GLMDecoder(self._network, self._cache, prompts)
        return decoder, self._tensor(padded(rows, self._pad_id, padding_side="left"))

    # ---- texts with blanks ----------------------------------------------------------------------

    def _prompt(self, text: Any) -> Blank:
        masked = self._masked(text)
        if len(masked.positions) > 1:
            raise ArgumentError(
                f"the text has {len(masked.positions)} blanks; generate() takes one, fill_blank() "
                "any number"
            )
        return self._blank(masked.ids, masked.mask_indices[0], masked.mask)

    def _blank(
        self,
        ids: Sequence[int],
        mask_index: int,
        mask: str,
        earlier: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> Blank:
        is_continued = self.config.is_rotary and mask == GENERATION_MASK
        return blank(ids, mask_index, self.tokenizer.sop_id, is_continued, earlier)

    def _masked(self, text: Any) -> Masked:
        return masked_text(text, self.tokenizer, self.config.is_rotary)

    # ---- filling several blanks -----------------------------------------------------------------

    def _fill(self, masked: Masked, settings: Any, stop_ids: frozenset[int]) -> list[list[int]]:
        """The answer for each blank, with its end token."""
        self._check_all_room(masked, settings)
        answers: list[list[int]] = []
        for i in range(len(masked.positions)):
            one = self._next_blank(masked, answers, stop_ids)
            if i > 0 and (settings.out_seq_length or math.inf) <= len(one.start_ids):
                answers.append([])  # earlier answers have used up out_seq_length
                continue
            seed = None if settings.seed is None else settings.seed + i
            of_blank = self._within(replace(settings, seed=seed), [one])
            answers += self._answers([one], of_blank, stop_ids)
        return answers

    def _next_blank(
        self, masked: Masked, answers: Sequence[list[int]], stop_ids: frozenset[int]
    ) -> Blank:
        """The first blank without an answer. GLM-130B reads earlier answers in the places of their
        masks; GLM-10B behind the text."""
        earlier, index = list(zip(masked.mask_indices, answers, strict=False)), len(answers)
        if not self.config.is_rotary:
            return self._blank(masked.ids, masked.mask_indices[index], masked.mask, earlier)
        ids, shift = list(masked.ids), 0
        for mask_index, answer in earlier:
            kept = answer[:-1] if answer and answer[-1] in stop_ids else answer
            ids[mask_index + shift : mask_index + shift + 1] = kept
            shift += len(kept) - 1
        return self._blank(ids, masked.mask_indices[index] + shift, masked.mask)

    def _check_all_room(self, masked: Masked, settings: Any) -> None:
        one = self._blank(masked.ids, masked.mask_indices[0], masked.mask)
        within = self._within(settings, [one])
        self._check_room(one, within)
        # Of each answer but the last, GLM-130B reads all tokens in place of the mask; GLM-10B reads
        # all but one, behind a sop, and keeps the mask.
        each = within.max_tokens - (1 if self.config.is_rotary else 0)
        needed = len(one.start_ids) + within.max_tokens - 1 + (len(masked.positions) - 1) * each
        if settings.out_seq_length is None and needed > self.max_length:
            raise ArgumentError(
                f"{len(one.start_ids)} tokens to start with and {len(masked.positions)} blanks of "
                f"max_tokens={within.max_tokens} are more than max_length={self.max_length}; lower "
                f"max_tokens, shorten the text, or {self._remedy()}"
            )

    # ---- scores ---------------------------------------------------------------------------------

    def _scored_blank(self, text: Text, mask: str) -> Blank:
        known = self.tokenizer.masks
        if not isinstance(mask, str) or mask not in known:
            raise ArgumentError(f"mask={mask!r}; this model has {', '.join(known)}")
        if isinstance(text, str):
            masked = self._masked(text if has_mask(text) else text + mask)
            ids, mask_indices, mask = masked.ids, masked.mask_indices, masked.mask
            if self.config.is_rotary and ids[-1] == self.tokenizer.eos_id:
                ids = ids[:-1]  # the authors' evaluation adds no end
        else:
            ids, kinds = self._ids(text, "text"), {own: name for name, own in known.items()}
            mask_indices = [index for index, own in enumerate(ids) if own in kinds]
            if not mask_indices:
                mask_indices, ids = [len(ids)], [*ids, known[mask]]
            mask = kinds[ids[mask_indices[0]]]
        if len(mask_indices) > 1:
            raise ArgumentError(f"the text has {len(mask_indices)} blanks; a choice is for one")
        return self._blank(ids, mask_indices[0], mask)

    def _choice_scores(
        self, text: Text, ids: Sequence[Sequence[int]], mask: str
    ) -> list[tuple[float, bool]]:
        """Of each choice the log-probability, and whether all its tokens are the most probable."""
        tokens, positions, attention_mask, rows = pack_choices(self._scored_blank(text, mask), ids)
        self._check_length(tokens, "text with all choices")
        with self._whole_cache():
            x = self._hidden_states(tokens, positions, attention_mask)
            flat_rows = [row for own in rows for row in own]
            flat_ids = [token for choice in ids for token in choice]
            found = token_scores(self._network.head, x[flat_rows], flat_ids)
        lengths = [len(choice) for choice in ids]
        pairs = zip(*(one.split(lengths) for one in found), strict=True)
        return [(float(logs.sum()), bool(best.all())) for logs, best in pairs]

    def _window_losses(
        self, ids: list[int], generation_length: int, unidirectional: bool
    ) -> Iterator[float]:
        """The summed loss of each window, see perplexity()."""
        num_read = self.max_length - 1
        if num_read < 2:
            raise ArgumentError(
                f"max_length={self.max_length} leaves no window; perplexity() needs a model that "
                "was loaded with at least 3"
            )
        generation_length = plain(generation_length)
        if type(generation_length) is not int or not 0 < generation_length < num_read:
            raise ArgumentError(
                f"generation_length={generation_length!r}; accepted: 1 to {num_read - 1}, less "
                f"than the tokens of a window, which are max_length={self.max_length} with a mask"
            )
        for window, num_known in windows(ids, num_read, generation_length):
            yield self._window_loss(window, 0 if unidirectional else num_known)

    def _window_loss(self, window: list[int], num_context: int) -> float:
        """The summed loss of all tokens but the first `num_context`."""
        targets = window[num_context:]
        with self._whole_cache():
            x = self._answer_states(window[:num_context], targets[:-1])
            return -float(log_probabilities(self._network.head, x, targets).sum())

    def _answer_logits(self, ids: list[int]) -> torch.Tensor:
        """After each of `ids`, the answer to a mask with nothing before it: (T, V) float32, CPU."""
        with self._whole_cache():
            return self._logits(self._answer_states([], ids)[1:])

    def _answer_states(self, context: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """(T + 1, C) after sop and each token of an answer to the mask that ends the context."""
        mask = GENERATION_MASK if GENERATION_MASK in self.tokenizer.masks else TEXT_MASK
        masked = [*context, self.tokenizer.masks[mask]]
        one = self._blank(masked, len(context), mask)
        positions = [*one.positions, *(one.position(n + 1) for n in range(len(answer)))]
        tokens = [*one.start_ids, *answer]
        attention_mask = prefix_lm_mask(len(tokens), len(masked))
        return self._hidden_states(tokens, positions, attention_mask)[len(masked) :]

    def _hidden_states(
        self,
        tokens: Sequence[int],
        positions: Sequence[tuple[int, int]],
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """(T, C), of one whole text.   attention_mask: (T, T) bool, true where not attended to."""
        self._cache.reset()
        x: torch.Tensor = self._network(
            self._tensor([list(tokens)]),
            position_tensor([positions], not self.config.is_rotary).to(self.device),
            self._cache,
            attention_mask.unsqueeze(0).to(self.device),
        )
        return x[0]


def _check_one_answer(settings: GLMOptions) -> None:
    if settings.num_return_sequences is not None:
        raise ArgumentError("num_return_sequences is for generate(); leave it out")
