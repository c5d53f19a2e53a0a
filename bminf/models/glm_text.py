"""Texts of a GLM: their masks, their blanks as ids, positions and attention masks, and a batch of
blanks as the decode loop sees it.

A text is attended to in both directions (a prefix LM). Behind it come `sop` and the answer, which
attend to the text and to the tokens before them. Positions say where an answer belongs: in GLM-130B
every token of an answer has the position of its mask, or, for a [gMASK], the positions behind the
text; GLM-10B has a second position that counts within the blank.
Sources: GLM-130B/generate.py, evaluation/dataset.py; GLM/generate_samples.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bminf.arch.glm import GLM
from bminf.engine.request import Request
from bminf.engine.rows import Feed
from bminf.errors import ArgumentError
from bminf.layers.kv_cache import KVCache
from bminf.layers.packed_cache import PackedCache, Span
from bminf.layers.step_cache import StepCache
from bminf.models.decode_step import Step
from bminf.models.prompt import Prompt
from bminf.models.rows import DecoderRows, ToldRequest, ToldRow
from bminf.tokenizers.base import GLMTokenizer

# ---- masks ---------------------------------------------------------------------------------------

TEXT_MASK, GENERATION_MASK = "[MASK]", "[gMASK]"
"""For a word or a few; and for all that follows."""

_MASK = re.compile(r"\[s?MASK\]|\[gMASK\]")


@dataclass(frozen=True)
class Masked:
    """A text with blanks.   ids: of the whole text.   mask_indices: where the masks are in `ids`.
    positions: where they are in the text, in characters.   mask: their kind."""

    ids: list[int]
    mask_indices: list[int]
    positions: list[int]
    mask: str


def has_mask(text: str) -> bool:
    """Whether there is a mask of any kind in the text."""
    return _MASK.search(text) is not None


def masked_text(text: Any, tokenizer: GLMTokenizer, masks_end_texts: bool) -> Masked:
    """The ids of a text and its masks; one is added at the end where there is none.

    masks_end_texts: whether a text that ends in a mask of any kind gets no end token, as in
    GLM-130B; in GLM-10B this holds only for [gMASK].
    Raises ArgumentError for anything but a text with something in it, for several kinds of masks,
    and for a kind that the vocabulary does not have.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"text is a {type(text).__name__}; give a str")
    found = list(_MASK.finditer(text))
    if not found and not text.strip():
        raise ArgumentError("text is empty; give a text, with or without a mask")
    mask = _kind([match[0] for match in found], tokenizer)
    pieces = _pieces(text, found, tokenizer)
    positions = [match.start() for match in found] or [len(text)]
    is_open = not found or found[-1].end() == len(text)  # by the text: a blank may have no ids
    is_open = is_open and (masks_end_texts or mask == GENERATION_MASK)
    ids, mask_indices = list(tokenizer.prefix_ids), []
    for piece in pieces[: len(positions)]:
        ids += piece
        mask_indices.append(len(ids))
        ids.append(tokenizer.masks[mask])
    rest = [token for piece in pieces[len(positions) :] for token in piece]
    end = [] if is_open else [tokenizer.eos_id]
    return Masked([*ids, *rest, *end], mask_indices, positions, mask)


def _kind(masks: list[str], tokenizer: GLMTokenizer) -> str:
    """The one kind of mask; without any, the kind that continues a text."""
    known = tokenizer.masks
    kinds = list(dict.fromkeys(masks)) or [
        GENERATION_MASK if GENERATION_MASK in known else TEXT_MASK
    ]
    if len(kinds) > 1:
        raise ArgumentError(
            f"the text mixes {' and '.join(kinds)}; give masks of one kind, since only one kind is "
            "filled"
        )
    if kinds[0] not in known:
        raise ArgumentError(f"this model has no {kinds[0]}; it has {', '.join(known)}")
    return kinds[0]


def _pieces(text: str, found: Sequence[re.Match[str]], tokenizer: GLMTokenizer) -> list[list[int]]:
    """The ids before each mask, and behind the last; an added mask comes after the whole text."""
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    if tokenizer.strips_before_masks:
        num_before = max(1, len(found))
        pieces[:num_before] = [piece.rstrip() for piece in pieces[:num_before]]
    return [tokenizer.encode(piece) if piece else [] for piece in pieces]


# ---- blanks --------------------------------------------------------------------------------------

Position = tuple[int, int]
"""In the text, and in the blank (0 outside)."""


@dataclass(frozen=True)
class Blank(Prompt):
    """A blank to fill.

    input_ids: the text with its masks.   start_ids: input_ids, the answers to earlier blanks that
    stand behind the text, each with its sop, and a last sop.
    positions: of start_ids.   mask_index: where the mask is in input_ids.
    is_continued: whether the answer has the positions behind the text, as [gMASK] in GLM-130B.
    """

    positions: tuple[Position, ...]
    mask_index: int
    is_continued: bool

    def position(self, index: int) -> Position:
        """That of a token of the answer; its sop has the index 0."""
        if self.is_continued:
            return len(self.input_ids) + index, 0
        return self.mask_index, index + 1


def blank(
    context: Sequence[int],
    mask_index: int,
    sop_id: int,
    is_continued: bool,
    earlier: Sequence[tuple[int, Sequence[int]]] = (),
) -> Blank:
    """The blank at `mask_index` in `context`.

    earlier: (mask_index, answer) of the blanks before it whose answers follow the text, as in
    GLM-10B. The model never reads the last token of an answer before the next blank, so that token
    is left out.
    """
    ids = list(context)
    positions: list[Position] = [(index, 0) for index in range(len(ids))]
    for other, answer in [*earlier, (mask_index, [sop_id])]:
        tokens = [sop_id, *answer[:-1]]
        ids += tokens
        answered = Blank([*context], [], (), other, is_continued)
        positions += [answered.position(index) for index in range(len(tokens))]
    return Blank([*context], ids, tuple(positions), mask_index, is_continued)


def pack_choices(
    one: Blank, choices: Sequence[Sequence[int]]
) -> tuple[list[int], list[Position], torch.Tensor, list[list[int]]]:
    """All choices for a blank in one sequence, behind the text; none of them sees another.

    one: whose start_ids end in sop.   choices: ids, at least one each.
    Returns ids, positions, the attention mask (T, T) bool, true where not attended to, and for
    each choice the rows whose logits are those of its tokens. Choices of one token share a row.
    """
    ids, positions = list(one.start_ids[:-1]), list(one.positions[:-1])
    sop_id, num_context = one.start_ids[-1], len(one.start_ids) - 1
    are_single = all(len(choice) == 1 for choice in choices)
    segments = [[sop_id, *choice[:-1]] for choice in (choices[:1] if are_single else choices)]
    rows = []
    owner = [-1] * num_context
    for index, segment in enumerate(segments):
        rows.append(list(range(len(ids), len(ids) + len(segment))))
        ids += segment
        positions += [one.position(i) for i in range(len(segment))]
        owner += [index] * len(segment)
    owners = torch.tensor(owner, device="cpu")
    is_other = (owners.unsqueeze(0) != owners.unsqueeze(1)) & (owners.unsqueeze(0) >= 0)
    attention_mask = is_other | prefix_lm_mask(len(ids), num_context)
    return ids, positions, attention_mask, rows * len(choices) if are_single else rows


def prefix_lm_mask(num_tokens: int, num_context: int) -> torch.Tensor:
    """(T, T) bool, true where a token does not attend to one: a later one behind the context."""
    tokens = torch.arange(num_tokens, device="cpu")
    return (tokens > tokens.unsqueeze(1)) & (tokens >= num_context)


def position_tensor(positions: Sequence[Sequence[Position]], has_blocks: bool) -> torch.Tensor:
    """Positions of rows of equal length as arch/glm.py takes them: (B, T), or (B, 2, T)."""
    by_axis = [[*zip(*row, strict=True)] for row in positions]  # in the text, in the blank
    given = by_axis if has_blocks else [in_text for in_text, _ in by_axis]
    return torch.tensor(given, dtype=torch.int64, device="cpu")


# ---- batches -------------------------------------------------------------------------------------


class GLMDecoder:
    """A batch of blanks. Shorter texts are left-padded, as in a PaddedDecoder; the attention mask
    is that of a prefix LM.
    """

    def __init__(self, model: GLM, cache: KVCache, blanks: Sequence[Blank]) -> None:
        cache.reset()
        self._model, self._cache, self._blanks = model, cache, list(blanks)
        self._longest = max(len(blank.start_ids) for blank in blanks)
        self._num_padding = torch.tensor(
            [self._longest - len(blank.start_ids) for blank in blanks], device=cache.keys.device
        )

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        start, num_tokens = self._cache.length, input_ids.shape[1]
        x = self._model(
            input_ids,
            self._positions(start).to(input_ids.device),
            self._cache,
            self._attention_mask(start + num_tokens) if start == 0 or self._is_padded else None,
        )
        return self._model.head(x[:, -1])

    def select(self, rows: torch.Tensor) -> None:
        self._cache.select(rows)
        self._blanks = [self._blanks[row] for row in rows.tolist()]
        self._num_padding = self._num_padding[rows]

    @property
    def _is_padded(self) -> bool:
        return any(len(blank.start_ids) < self._longest for blank in self._blanks)

    def _positions(self, start: int) -> torch.Tensor:
        """Of all start_ids (start 0), or of the one token at `start`."""
        has_blocks = not self._model.config.is_rotary
        if start:
            index = start - self._longest + 1  # counted from sop
            return position_tensor([[blank.position(index)] for blank in self._blanks], has_blocks)
        rows = [
            [(0, 0)] * (self._longest - len(blank.positions)) + list(blank.positions)
            for blank in self._blanks
        ]
        return position_tensor(rows, has_blocks)

    def _attention_mask(self, num_keys: int) -> torch.Tensor:
        """(B, T, S), true for padding, and in the first pass for later tokens of the answer."""
        device = self._num_padding.device
        is_padding = torch.arange(num_keys, device=device) < self._num_padding.unsqueeze(1)
        if num_keys > self._longest:
            return is_padding.unsqueeze(1)
        later = [
            prefix_lm_mask(num_keys, num_keys - len(b.start_ids) + len(b.input_ids))
            for b in self._blanks
        ]
        return is_padding.unsqueeze(1) | torch.stack(later).to(device)


class GLMRows(DecoderRows):
    """Rows of a GLM; each request has its Blank as `prompt`, which is read in one pass."""

    can_chunk = can_resume = can_score = False  # a text is attended to in both directions

    def check(self, request: Request) -> None:
        if not isinstance(request.prompt, Blank):
            raise ArgumentError(
                "a request to a GLM needs to know its blank; use generate() or fill_blank()"
            )
        super().check(request)

    def told_of(self, feed: Feed) -> Any:
        one: Blank = feed.row.request.prompt
        return list(_positions_of(feed)), len(one.input_ids)

    def row_told(self, span: Span, told: Any) -> ToldRow:
        return ToldRow(span.length, ToldRequest(prompt=_ToldBlank(*told)))

    def hidden_states(
        self, feeds: Sequence[Feed], ids: torch.Tensor, packed: PackedCache
    ) -> torch.Tensor:
        positions = [position for feed in feeds for position in _positions_of(feed)]
        positions += [(0, 0)] * (ids.shape[1] - len(positions))
        position_ids = self._position_tensor(positions)
        masks = [_mask_of(feed) for feed in feeds]
        on_device = [None if mask is None else mask.to(ids.device) for mask in masks]
        x: torch.Tensor = self.network(ids, position_ids, packed, on_device)
        return x

    def new_step(self, num_rows: int, num_keys: int) -> Step:
        step = super().new_step(num_rows, num_keys)
        positions = self._position_tensor([(0, 0)] * num_rows)
        return replace(step, positions=positions)

    def fill_step(self, step: Step, feeds: Sequence[Feed], spans: Sequence[Span]) -> None:
        super().fill_step(step, feeds, spans)
        assert step.positions is not None
        positions = [position for feed in feeds for position in _positions_of(feed)]
        step.positions.copy_(self._position_tensor(positions))

    def step_states(self, step: Step) -> torch.Tensor:
        cache = StepCache(self._cache.tokens, step.own)
        x: torch.Tensor = self.network(step.x, step.positions, cache)
        return x

    def _position_tensor(self, positions: Sequence[Position]) -> torch.Tensor:
        """(1, T) or (1, 2, T) on the device."""
        has_blocks = not self.network.config.is_rotary
        return position_tensor([positions], has_blocks).to(self.sampler_device())


@dataclass(frozen=True)
class _ToldBlank:
    """What a pass asks of a Blank.   positions: of the tokens that it is fed."""

    positions: Sequence[Position]
    num_context: int

    start_ids = ()

    @property
    def input_ids(self) -> Sequence[int]:
        """As many, whichever they are."""
        return range(self.num_context)

    def position(self, index: int) -> Position:
        return self.positions[0]


def _positions_of(feed: Feed) -> Sequence[Position]:
    one: Blank = feed.row.request.prompt
    if feed.row.length == 0:
        return one.positions
    index = feed.row.length - len(one.start_ids) + 1  # counted from sop
    return [one.position(index)]


def _mask_of(feed: Feed) -> torch.Tensor | None:
    """(1, T, T) of a whole text; one token attends to all before it."""
    one: Blank = feed.row.request.prompt
    if feed.row.length > 0:
        return None
    return prefix_lm_mask(len(feed.ids), len(one.input_ids)).unsqueeze(0)
