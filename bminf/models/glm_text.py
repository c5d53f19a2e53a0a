"""Blanks of a GLM as ids, positions and masks: what it reads, and what may see what.

A text is read whole; behind it come `sop` and the answer, which see the text and what stands before
them. Where an answer stands is told by positions: GLM-130B's are the mask's own for every token of
its answer, or go on behind the text where the mask is a [gMASK]; GLM-10B has a second position that
counts within the blank.
Sources: GLM-130B/generate.py, evaluation/dataset.py; GLM/generate_samples.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bminf.models.prompt import Prompt

Position = tuple[int, int]
"""In the text, and in the blank (0 outside)."""


@dataclass(frozen=True)
class Blank(Prompt):
    """One blank about to be filled.

    input_ids: the text with its masks.   start_ids: these, sop, and, behind a text whose earlier
    blanks are filled already, answer after answer, each with its sop; the last sop ends it.
    positions: of start_ids.   place: of the mask, in the text.   is_continued: whether the answer
    goes on behind the text, as that of a [gMASK] in GLM-130B.
    """

    positions: tuple[Position, ...]
    place: int
    is_continued: bool

    def position(self, number: int) -> Position:
        """That of token `number` of the answer, counted from its sop, which is 0."""
        if self.is_continued:
            return len(self.input_ids) + number, 0
        return self.place, number + 1


def blank(
    context: Sequence[int],
    place: int,
    sop_id: int,
    is_continued: bool,
    earlier: Sequence[tuple[int, Sequence[int]]] = (),
) -> Blank:
    """The blank at `place` in `context`.

    earlier: (place, answer) of those before it that stand behind the text and not in it: of a
    GLM-10B. The last token of an answer was never read by the model when it went on to the next
    blank, so it is not here either.
    """
    ids = list(context)
    positions: list[Position] = [(number, 0) for number in range(len(ids))]
    for other, answer in [*earlier, (place, [sop_id])]:
        tokens = [sop_id, *answer[:-1]]
        ids += tokens
        begin = Blank([*context], [], (), other, is_continued)
        positions += [begin.position(number) for number in range(len(tokens))]
    return Blank([*context], ids, tuple(positions), place, is_continued)


def choices_behind(
    one: Blank, choices: Sequence[Sequence[int]]
) -> tuple[list[int], list[Position], torch.Tensor, list[list[int]]]:
    """All choices for a blank behind one text, none of which sees another.

    one: whose start_ids end in sop.   choices: ids, at least one each.
    Returns ids, positions, (T, T) bool of what is hidden, and for each choice the rows whose logits
    are those of its tokens. Choices of one token share a row.
    """
    ids, positions = list(one.start_ids[:-1]), list(one.positions[:-1])
    sop_id, num_context = one.start_ids[-1], len(one.start_ids) - 1
    are_single = all(len(choice) == 1 for choice in choices)
    segments = [[sop_id, *choice[:-1]] for choice in (choices[:1] if are_single else choices)]
    rows = []
    owner = [-1] * num_context
    for number, segment in enumerate(segments):
        rows.append(list(range(len(ids), len(ids) + len(segment))))
        ids += segment
        positions += [one.position(at) for at in range(len(segment))]
        owner += [number] * len(segment)
    owners = torch.tensor(owner, device="cpu")
    is_other = (owners.unsqueeze(0) != owners.unsqueeze(1)) & (owners.unsqueeze(0) >= 0)
    is_hidden = is_other | is_ahead(len(ids), len(ids), num_context)
    return ids, positions, is_hidden, rows * len(choices) if are_single else rows


def is_ahead(num_queries: int, num_keys: int, num_context: int) -> torch.Tensor:
    """(T, S) bool: tokens behind the text that come after the query; the last one sees all."""
    queries = torch.arange(num_keys - num_queries, num_keys, device="cpu").unsqueeze(1)
    keys = torch.arange(num_keys, device="cpu")
    return (keys > queries) & (keys >= num_context)


def position_tensor(positions: Sequence[Sequence[Position]], has_blocks: bool) -> torch.Tensor:
    """Positions of rows of equal length as arch/glm.py takes them: (B, T), or (B, 2, T)."""
    both = torch.tensor(positions, dtype=torch.int64, device="cpu").view(len(positions), -1, 2)
    return both.transpose(1, 2).contiguous() if has_blocks else both[:, :, 0].contiguous()
