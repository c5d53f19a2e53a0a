"""bminf/models/glm_text.py: the masks of a text, and the ids that a GLM reads of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_glm import ice_tokenizer

from bminf.errors import ArgumentError
from bminf.models.glm_text import blank, masked_text, prefix_lm_mask

Loader = Callable[..., Any]
TEXT = "the blocks of a layer"

each_model = pytest.mark.parametrize("name", ["glm130b", "glm10b"])


class OneMask:
    """A tokenizer of a GLM that was trained on one kind of mask alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.masks = tokenizer, {"[MASK]": tokenizer.masks["[MASK]"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def uses_of(model: Any) -> list[Callable[[str], Any]]:
    """What takes a text with one blank."""
    return [
        lambda text: model.generate(text, max_tokens=3),
        lambda text: model.generate_iter(text, max_tokens=3),
        lambda text: model.generate_batch([TEXT, text], max_tokens=3),
        lambda text: model.logits(text),
        lambda text: model.score(text, ["a", "the host"]),
    ]


@each_model
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the [MASK] of [gMASK]", r"mixes \[MASK\] and \[gMASK\]; give masks of one kind"),
        ("[sMASK] of [MASK] and [sMASK]", r"mixes \[sMASK\] and \[MASK\]"),
        ("a [MASK] b [MASK]", "has 2 blanks; (generate.. takes one, fill_bl|a choice is for one)"),
    ],
)
def test_masks_that_cannot_be_filled(name: str, text: str, words: str, silent: Loader) -> None:
    model = silent(name)
    for use in uses_of(model):
        with pytest.raises(ArgumentError, match=words):
            use(text)
    mask = model.tokenizer.masks["[MASK]"]
    with pytest.raises(ArgumentError, match="has 2 blanks; a choice is for one"):
        model.score([60, mask, 61, mask], ["a"])


@each_model
def test_a_mask_that_the_model_does_not_have(name: str, silent: Loader) -> None:
    model = silent(name)
    model.tokenizer = OneMask(model.tokenizer)
    for mask in ("[gMASK]", "[sMASK]"):
        for use in uses_of(model):
            with pytest.raises(ArgumentError, match=rf"no \{mask[:-1]}\]; it has \[MASK\]"):
                use(f"the {mask}")
        with pytest.raises(ArgumentError, match=rf"mask='\{mask[:-1]}\]'; this model has \[MASK\]"):
            model.score(TEXT, ["a"], mask=mask)
    assert model._prompt(TEXT).mask_index == model._prompt(f"{TEXT}[MASK]").mask_index


@each_model
def test_blanks_that_do_not_all_fit(name: str, silent: Loader) -> None:
    model = silent(name)
    with pytest.raises(ArgumentError, match="2 blanks of max_tokens=19 are more than max_len"):
        model.fill_blank("a [MASK] b [MASK]", max_tokens=19)
    with pytest.raises(ArgumentError, match="max_tokens=40 are more than max_length=40"):
        model.fill_blank("a [MASK] b [MASK]", max_tokens=40)


def test_a_text_that_ends_in_a_mask_and_a_space_does_not_end_in_a_mask() -> None:
    """Sentencepiece makes nothing of a space, and the end is that of the text."""
    tokenizer = ice_tokenizer()
    for text, ends in (("the layer [MASK]", False), ("the layer [MASK] ", True)):
        ids = masked_text(text, tokenizer, masks_end_texts=True).ids
        assert (ids[-1] == tokenizer.eos_id) is ends


def test_a_context_is_seen_from_everywhere_and_what_follows_only_from_behind() -> None:
    hidden = prefix_lm_mask(5, 3)
    behind = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert hidden.dtype == torch.bool and hidden.int().tolist() == [[0, 0, 0, 1, 1]] * 3 + behind


def test_answers_behind_a_text_have_the_places_of_their_blanks() -> None:
    """As in GLM-10B; the last token of an answer is never read for the next blank."""
    one = blank([5, 9, 6, 9], 3, 7, is_continued=False, earlier=[(1, [20, 21, 8])])
    assert one.start_ids == [5, 9, 6, 9, 7, 20, 21, 7]
    assert one.positions[:4] == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert one.positions[4:] == ((1, 1), (1, 2), (1, 3), (3, 1))
    assert one.position(1) == (3, 2)
