"""GLM-130B and GLM-10B as users have them: small models with random weights, compared with slow
loops over the network itself, and with themselves by another way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glm import IMAGE_OFFSET, TinyGLM, tiny_glm, tiny_glm10b, tiny_glm130b

import bminf
from bminf.arch.glm import GLM10B, GLM130B, PUBLISHED_GLM, GLMConfig, glm10b_config, glm130b_config
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.models import GLM, Answer, plan_glm
from bminf.models.glm_text import pack_choices
from bminf.models.options import GLMOptions
from bminf.quantization.packed import Format

Loader = Callable[..., Any]
NAMES = ("glm130b", "glm10b")
TEXT = "the blocks of a layer wait"
MASKED = "the blocks of a [MASK] wait on the host"
SEVERAL = "the [MASK] of a layer [MASK] on the [MASK]."
GROUPS_OF_8_BITS = Format(8, 32)
QUANTIZATIONS = [None, "int8", "int4", "int4-row", GROUPS_OF_8_BITS]
HEADS = ["int8", None, "int4", "int8", None]

each_model = pytest.mark.parametrize("name", NAMES)


# ---- slow loops ----------------------------------------------------------------------------------


def context_of(model: Any, text: str) -> list[int]:
    """What a text with one mask is to the model, up to sop, put together by hand."""
    tokenizer, (before, mask, after) = model.tokenizer, parts_of(text)
    if model.config.is_rotary:
        ids = [*encoded(tokenizer, before), tokenizer.masks[mask], *encoded(tokenizer, after)]
        return [*ids, tokenizer.eos_id] if after else ids
    ids = [tokenizer.token_id("[CLS]"), *encoded(tokenizer, before.rstrip())]
    ids += [tokenizer.masks[mask], *encoded(tokenizer, after)]
    return ids if mask == "[gMASK]" and not after else [*ids, tokenizer.eos_id]


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text) if text else []


def parts_of(text: str) -> tuple[str, str, str]:
    """A text without a mask ends in [gMASK]."""
    for mask in ("[MASK]", "[sMASK]", "[gMASK]"):
        if mask in text:
            return text.partition(mask)
    return text, "[gMASK]", ""


def states(model: Any, context: Sequence[int], behind: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) after `behind`, which begins with sop, all read anew, with no cache."""
    ids, num_context = [*context, *behind], len(context)
    masks = set(model.tokenizer.masks.values())
    place = next(at for at, number in enumerate(context) if number in masks)
    goes_on = model.config.is_rotary and context[place] == model.tokenizer.masks["[gMASK]"]
    later = range(len(behind))
    first = [num_context + at if goes_on else place for at in later]
    positions = torch.tensor([[*range(num_context), *first]])
    if not model.config.is_rotary:
        second = torch.tensor([[0] * num_context + [1 + at for at in later]])
        positions = torch.stack([positions, second], dim=1)
    is_hidden = torch.zeros(1, len(ids), len(ids), dtype=torch.bool)
    for row in range(len(ids)):
        is_hidden[0, row, max(num_context, row + 1) :] = True
    with torch.inference_mode():
        cache = model.model.new_cache(1, len(ids))
        x = model.model(torch.tensor([ids]), positions, cache, is_hidden)
        return model.model.head(x[0, num_context:])


def allowed(model: Any) -> torch.Tensor:
    """(V,) 0 for what an answer may hold, -infinity for the rest."""
    tokenizer = model.tokenizer
    banned = torch.zeros(model.config.vocab_size)
    banned[list(tokenizer.unspoken_ids)] = -math.inf
    banned[tokenizer.vocab_size :] = -math.inf
    return banned


def greedy(model: Any, context: Sequence[int], max_tokens: int) -> list[int]:
    """Token after token, with its end token."""
    answer: list[int] = []
    while len(answer) < max_tokens:
        logits = states(model, context, [model.tokenizer.sop_id, *answer])[-1]
        answer.append(int((logits + allowed(model)).argmax()))
        if answer[-1] in (model.tokenizer.eop_id, model.tokenizer.eos_id):
            break
    return answer


def told(model: Any, ids: list[int]) -> tuple[str, bool]:
    stopped = ids[-1] in (model.tokenizer.eop_id, model.tokenizer.eos_id)
    return model.tokenizer.decode(ids[:-1] if stopped else ids), stopped


def script(model: Any, *answers: Sequence[int]) -> None:
    """Let the model write these ids, answer after answer; then what it would have written."""
    waiting = [number for answer in answers for number in answer]
    head = type(model.model).head

    def scripted(x: torch.Tensor) -> torch.Tensor:
        logits = head(model.model, x)
        if waiting:
            logits[:, waiting.pop(0)] += 1000
        return logits

    model.model.head = scripted


# ---- generating ----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    "text",
    [TEXT, MASKED, "a layer of [sMASK]", "[gMASK]", "the [gMASK] of a layer", "[MASK] wait"],
)
def test_an_answer_is_what_a_slow_loop_gives(load: Loader, name: str, text: str) -> None:
    model = load(name)
    ids = greedy(model, context_of(model, text), 9)
    assert model.generate(text, max_tokens=9, temperature=0) == told(model, ids)


@each_model
def test_the_slow_loop_has_something_to_say(load: Loader, name: str) -> None:
    """Else two models that always say one thing would pass for equal."""
    model = load(name)
    texts = (TEXT, MASKED, "a layer of [sMASK]", "the [gMASK] of a layer")
    answers = [greedy(model, context_of(model, text), 9) for text in texts]
    assert len({tuple(ids) for ids in answers}) == 4 and max(len(set(a)) for a in answers) > 3


@each_model
@pytest.mark.parametrize("end", ["eop_id", "eos_id"])
def test_an_end_is_no_part_of_the_answer(load: Loader, name: str, end: str) -> None:
    model = load(name)
    ids = model.tokenizer.encode("the layer")
    script(model, [*ids, getattr(model.tokenizer, end)])
    assert model.generate(TEXT, temperature=0) == (model.tokenizer.decode(ids), True)


@each_model
def test_other_ends(load: Loader, name: str) -> None:
    """end_tokens stand in place of eop and eos; stop_tokens beside either."""
    model = load(name)
    tokenizer = model.tokenizer
    first, second, third = ids = tokenizer.encode("abcd" if name == "glm10b" else "b a c")[:3]
    script(model, ids)
    assert model.generate(TEXT, max_tokens=5, temperature=0, end_tokens=[third]) == (
        tokenizer.decode([first, second]), True
    )  # fmt: skip
    script(model, [first, tokenizer.eop_id, second])
    text, stopped = model.generate(TEXT, max_tokens=3, temperature=0, end_tokens=[third])
    assert text == tokenizer.decode([first, tokenizer.eop_id, second]) and not stopped
    (stop,) = tokenizer.tokens([second])
    script(model, ids)
    assert model.generate(TEXT, max_tokens=5, temperature=0, stop_tokens=[stop]) == (
        tokenizer.decode([first]), True
    )  # fmt: skip
    script(model, [first, tokenizer.eop_id])
    assert model.generate(TEXT, temperature=0, stop_tokens=[stop])[1]


@each_model
def test_banned_tokens(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=2)
    first = greedy(model, context_of(model, TEXT), 1)[0]
    (banned,) = model.tokenizer.tokens([first])
    for options in ({"temperature": 0}, {"num_beams": 2}):
        text, _ = model.generate(TEXT, max_tokens=1, banned_tokens=[banned], **options)
        assert text != model.tokenizer.decode([first])


@each_model
@pytest.mark.parametrize("options", [{"seed": 1}, {"temperature": 0}, {"num_beams": 2}])
def test_answers_hold_only_what_can_be_spoken(
    load: Loader, name: str, options: dict[str, Any]
) -> None:
    """Masks, image tokens and rows of the embedding that no token has are never written, though
    the model wants nothing else."""
    model = load(name, max_batch_size=2)
    head = type(model.model).head
    wanted = allowed(model).isinf()
    assert wanted[model.tokenizer.vocab_size :].all() and len(wanted) > model.tokenizer.vocab_size
    model.model.head = lambda x: head(model.model, x) + 100 * wanted
    seen: list[int] = []
    decode = model.tokenizer.decode
    model.tokenizer = Spied(model.tokenizer, seen)
    text, _ = model.generate(TEXT, max_tokens=12, **options)
    assert seen and text == decode(seen) and not any(wanted[number] for number in seen)


class Spied:
    """A tokenizer that notes what it decodes."""

    def __init__(self, tokenizer: Any, seen: list[int]) -> None:
        self._tokenizer, self._seen = tokenizer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int]) -> str:
        self._seen += ids
        return self._tokenizer.decode(ids)


def test_image_tokens_come_first(load: Loader) -> None:
    assert set(range(IMAGE_OFFSET)) <= set(load("glm130b").tokenizer.unspoken_ids)


@each_model
def test_a_seed_repeats(load: Loader, name: str) -> None:
    model = load(name)
    options = {"max_tokens": 12, "temperature": 1.5}
    texts = [model.generate(TEXT, seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@each_model
def test_top_k_of_1_is_greedy(load: Loader, name: str) -> None:
    model = load(name)
    expected = model.generate(TEXT, max_tokens=9, temperature=0)
    assert model.generate(TEXT, max_tokens=9, top_k=1) == expected
    assert model.generate(TEXT, 9, 1) == expected


@each_model
def test_of_top_k_and_top_p_one_follows_the_other(load: Loader, name: str) -> None:
    """0.4 and 0.3 are left of four, and are then 0.57 and 0.43: half of which is the first."""
    model = load(name)
    shares = torch.full((model.config.vocab_size,), -math.inf)
    shares[60:64] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    model.model.head = lambda x: shares.expand(len(x), -1).clone()

    def drawn(**options: Any) -> set[str]:
        return {model.generate(TEXT, max_tokens=1, seed=n, **options)[0] for n in range(30)}

    first, second, _, _ = (model.tokenizer.decode([number]) for number in range(60, 64))
    assert drawn(top_k=2, top_p=0.5) == {first}
    assert drawn(top_k=2) == drawn(top_p=0.5) == {first, second}
    assert len(drawn()) == 4


@each_model
@pytest.mark.parametrize("text", [TEXT, MASKED])
def test_the_pieces_are_the_text(load: Loader, name: str, text: str) -> None:
    model = load(name)
    length = len(context_of(model, text)) + 1 + 7
    for options in ({"max_tokens": 20, "seed": 5}, {"out_seq_length": length, "temperature": 0}):
        expected, _ = model.generate(text, **options)
        pieces = list(model.generate_iter(text, **options))
        assert "".join(pieces) == expected and all(pieces) and len(pieces) > 1


@each_model
def test_out_seq_length_counts_the_text(load: Loader, name: str) -> None:
    """And its mask, and sop; it is another way to say max_tokens."""
    model = load(name, max_batch_size=2)
    for text in (TEXT, MASKED):
        length = len(context_of(model, text)) + 1
        for options in ({"temperature": 0}, {"seed": 4}, {"num_beams": 2}):
            expected = model.generate(text, max_tokens=5, **options)
            assert model.generate(text, out_seq_length=length + 5, **options) == expected
            assert model.generate_batch([text], out_seq_length=length + 5, **options) == [expected]
        candidates = model.generate(
            text, out_seq_length=length + 5, num_beams=2, num_return_sequences=2
        )
        assert candidates == model.generate(text, 5, num_beams=2, num_return_sequences=2)


@each_model
def test_a_batch_gives_what_each_text_gives_alone(load: Loader, name: str) -> None:
    """Lengths and kinds of blanks differ; and one text ends long before the others."""
    model = load(name, max_batch_size=4)
    texts = ["the", "the blocks [sMASK]", MASKED, f"{TEXT} {TEXT}"]
    for options in ({"temperature": 0}, {"num_beams": 1, "top_k": 1}):
        together = model.generate_batch(texts, max_tokens=10, **options)
        assert together == [model.generate(text, max_tokens=10, **options) for text in texts]
    (stop,) = model.tokenizer.tokens([greedy(model, context_of(model, texts[3]), 2)[1]])
    options = {"max_tokens": 10, "temperature": 0, "stop_tokens": [stop]}
    together = model.generate_batch(texts, **options)
    assert together == [model.generate(text, **options) for text in texts]
    assert {stopped for _, stopped in together} == {True, False}


@each_model
def test_beams_of_a_batch_are_those_of_each_text(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=6)
    texts = ["the", MASKED]
    together = model.generate_batch(texts, max_tokens=6, num_beams=3, length_penalty=0.5)
    alone = [model.generate(text, max_tokens=6, num_beams=3, length_penalty=0.5) for text in texts]
    assert together == alone


@each_model
def test_logits_of_a_padded_row_are_those_of_the_row_alone(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=2)
    short, long = (model._prompt(text) for text in ("a [MASK].", f"{MASKED}, {TEXT}"))
    rows = {}
    for blanks in ([short], [short, long]):
        with torch.inference_mode():
            decoder, start = model._decoder(blanks)
            steps = [decoder(start)[0]]
            for token in (60, 61, 62):
                steps.append(decoder(torch.full((len(blanks), 1), token))[0])
        rows[len(blanks)] = torch.stack(steps)
    assert torch.allclose(rows[1], rows[2], atol=2e-5)


# ---- blanks --------------------------------------------------------------------------------------


@each_model
def test_one_blank_is_filled_as_generate_does(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=2)
    for options in (
        {"temperature": 0},
        {"seed": 7},
        {"num_beams": 2},
        {"seed": 7, "stop_tokens": ["a"]},
    ):
        for text, position in ((MASKED, MASKED.index("[")), (TEXT, len(TEXT))):
            answer, _ = model.generate(text, max_tokens=6, **options)
            filled = model.fill_blank(text, max_tokens=6, **options)
            assert filled == [{"position": position, "text": answer}]


@each_model
def test_several_blanks_are_filled_from_left_to_right(load: Loader, name: str) -> None:
    """Each answer is read for the next: in its place by GLM-130B, behind the text by GLM-10B."""
    model = load(name)
    filled = model.fill_blank(SEVERAL, max_tokens=4, temperature=0)
    places = [at for at in range(len(SEVERAL)) if SEVERAL.startswith("[MASK]", at)]
    assert [blank["position"] for blank in filled] == places
    assert [blank["text"] for blank in filled] == by_hand(model, SEVERAL, 4)


def by_hand(model: Any, text: str, max_tokens: int) -> list[str]:
    tokenizer, mask = model.tokenizer, model.tokenizer.masks["[MASK]"]
    pieces = text.split("[MASK]")
    if not model.config.is_rotary:
        pieces = [*(piece.rstrip() for piece in pieces[:-1]), pieces[-1]]
    ids = [*tokenizer.prefix_ids, *encoded(tokenizer, pieces[0])]
    for piece in pieces[1:]:
        ids += [mask, *encoded(tokenizer, piece)]
    ids.append(tokenizer.eos_id)
    return in_place(model, ids, max_tokens) if model.config.is_rotary else behind(
        model, ids, max_tokens
    )  # fmt: skip


def in_place(model: Any, ids: list[int], max_tokens: int) -> list[str]:
    mask, ends, texts = model.tokenizer.masks["[MASK]"], [model.tokenizer.eop_id], []
    ends.append(model.tokenizer.eos_id)
    while mask in ids:
        answer, place = greedy(model, ids, max_tokens), ids.index(mask)
        answer = answer[:-1] if answer[-1] in ends else answer
        ids = [*ids[:place], *answer, *ids[place + 1 :]]
        texts.append(model.tokenizer.decode(answer))
    return texts


def behind(model: Any, context: list[int], max_tokens: int) -> list[str]:
    tokenizer, ids, texts = model.tokenizer, list(context), []
    positions = [(at, 0) for at in range(len(ids))]
    for place in [at for at, number in enumerate(context) if number == tokenizer.masks["[MASK]"]]:
        fed, answer = [tokenizer.sop_id], []
        while len(answer) < max_tokens:
            own = [(place, 1 + at) for at in range(len(fed))]
            is_hidden = torch.ones(len(ids) + len(fed), len(ids) + len(fed)).triu(1).bool()
            is_hidden[:, : len(context)] = False
            with torch.inference_mode():
                x = model.model(
                    torch.tensor([[*ids, *fed]]),
                    torch.tensor([[*positions, *own]]).transpose(1, 2),
                    model.model.new_cache(1, len(ids) + len(fed)),
                    is_hidden.unsqueeze(0),
                )
                answer.append(int((model.model.head(x[0, -1]) + allowed(model)).argmax()))
            if answer[-1] in (tokenizer.eop_id, tokenizer.eos_id):
                break
            fed.append(answer[-1])
        fed = [tokenizer.sop_id, *answer[:-1]]
        ids += fed
        positions += [(place, 1 + at) for at in range(len(fed))]
        texts.append(told(model, answer)[0])
    return texts


@each_model
def test_ends_of_blanks_are_not_read_for_the_next(load: Loader, name: str) -> None:
    model, fed = load(name), []
    words, ends = [60, 61], (model.tokenizer.eop_id, model.tokenizer.eos_id)
    forward = type(model.model).forward

    def noted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        fed.append(ids[0].tolist())
        return forward(model.model, ids, *rest)

    model.model.forward = noted
    script(model, [*words, ends[0]], [ends[1]], words[:1])
    filled = model.fill_blank(SEVERAL, max_tokens=4, temperature=0, end_tokens=[*ends, 62])
    decode = model.tokenizer.decode
    assert [blank["text"] for blank in filled][:2] == [decode(words), ""]
    context, mask = model._masked(SEVERAL).ids, model.tokenizer.masks["[MASK]"]
    sop, (first, second, third) = model.tokenizer.sop_id, model._masked(SEVERAL).mask_indices
    begins = [ids for ids in fed if len(ids) > 1]
    assert len(begins) == 3 and begins[0] == [*context, sop] and context[third] == mask
    if name == "glm130b":
        left, middle, right = context[:first], context[first + 1 : second], context[second + 1 :]
        assert begins[1] == [*left, *words, *middle, mask, *right, sop]
        assert begins[2] == [*left, *words, *middle, *right, sop]
    else:
        assert begins[1] == [*context, sop, *words, sop]
        assert begins[2] == [*context, sop, *words, sop, sop]


@each_model
def test_blanks_share_out_seq_length(load: Loader, name: str) -> None:
    model = load(name)
    whole = model.fill_blank(SEVERAL, max_tokens=4, temperature=0)
    first = len(model._masked(SEVERAL).ids) + 1
    filled = model.fill_blank(SEVERAL, out_seq_length=first + 4, temperature=0)
    assert len(filled) == 3 and filled[0] == whole[0]
    if name == "glm10b":  # the first answer takes all there is
        assert [blank["text"] for blank in filled[1:]] == ["", ""]
    roomy = model.fill_blank(SEVERAL, out_seq_length=60, temperature=0)
    assert roomy[0]["text"].startswith(whole[0]["text"])


def fits(model: Any, max_tokens: int) -> bool:
    try:
        model._check_all_room(model._masked(SEVERAL), GLMOptions(max_tokens))
    except ArgumentError:
        return False
    return True


@each_model
def test_blanks_may_fill_all_positions(load: Loader, name: str) -> None:
    """The largest max_tokens is that with which the last token read has the last position."""
    model = load(name)
    most, lengths = next(n for n in range(60, 0, -1) if fits(model, n)), list[int]()
    (word,) = model.tokenizer.encode("a")[-1:]
    forward = type(model.model).forward

    def measured(*arguments: Any) -> torch.Tensor:
        result = forward(model.model, *arguments)
        lengths.append(arguments[2].length)
        return result

    model.model.forward = measured
    script(model, [word] * 3 * most)
    filled = model.fill_blank(SEVERAL, max_tokens=most, temperature=0)
    assert {blank["text"] for blank in filled} == {model.tokenizer.decode([word] * most)}
    assert model.max_length - 3 < max(lengths) <= model.max_length


# ---- beams ---------------------------------------------------------------------------------------


def log_probability(model: Any, text: str, answer: Sequence[int]) -> float:
    """Of an answer with its end, by one pass; as GLM-130B has it, of what may be written alone."""
    logits = states(model, context_of(model, text), [model.tokenizer.sop_id, *answer[:-1]])
    if model.config.is_rotary:
        logits = logits + allowed(model)
    steps = logits.log_softmax(-1)
    return float(steps.gather(1, torch.tensor(answer).unsqueeze(1)).sum())


@each_model
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_candidates_come_best_first(load: Loader, name: str, length_penalty: float) -> None:
    model = load(name, max_batch_size=4)
    options = {"max_tokens": 6, "num_beams": 4, "length_penalty": length_penalty}
    found = model.generate(MASKED, num_return_sequences=4, **options)
    assert all(isinstance(one, Answer) for one in found) and len(found) == 4
    assert len({one.text for one in found}) > 1
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert model.generate(MASKED, **options) == (found[0].text, found[0].stopped)
    assert model.generate(MASKED, num_return_sequences=2, **options) == found[:2]


@each_model
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_score_is_a_log_probability(load: Loader, name: str, length_penalty: float) -> None:
    model = load(name, max_batch_size=3)
    settings = GLMOptions(max_tokens=5, num_beams=3, length_penalty=length_penalty)
    one = model._prompt(MASKED)
    (found,) = model._search([one], settings, model._stop_ids(settings))
    num_context = len(context_of(model, MASKED)) + 1
    for hypothesis in found:
        length = len(hypothesis.ids)
        if name == "glm130b":
            length = (5 + num_context + length) / 6
        expected = log_probability(model, MASKED, hypothesis.ids) / length**length_penalty
        assert hypothesis.score == pytest.approx(expected, abs=1e-4)


def test_beams_drawn_by_lot(load: Loader) -> None:
    model = load("glm130b", max_batch_size=3)
    options = {"max_tokens": 8, "num_beams": 3, "deterministic": False, "num_return_sequences": 3}
    found = [model.generate(TEXT, seed=seed, **options) for seed in (1, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({tuple(one.text for one in own) for own in found}) > 1
    sure = model.generate(TEXT, **{**options, "deterministic": True})
    assert sure == model.generate(TEXT, **{**options, "deterministic": True})


def test_min_length(load: Loader) -> None:
    model = load("glm130b", max_batch_size=2)
    head = type(model.model).head
    for end in (model.tokenizer.eop_id, model.tokenizer.eos_id):
        bonus = torch.zeros(model.config.vocab_size)
        bonus[end] = 50
        model.model.head = lambda x, bonus=bonus: head(model.model, x) + bonus
        assert model.generate(TEXT, max_tokens=9, num_beams=2) == ("", True)
        seen: list[int] = []
        own, model.tokenizer = model.tokenizer, Spied(model.tokenizer, seen)
        assert model.generate(TEXT, max_tokens=9, num_beams=2, min_length=4)[1]
        assert len(seen) == 4
        model.tokenizer = own


def test_no_repeat_ngram_size(load: Loader) -> None:
    model = load("glm130b", max_batch_size=2)

    def repeats(size: int) -> bool:
        seen: list[int] = []
        own, model.tokenizer = model.tokenizer, Spied(model.tokenizer, seen)
        model.generate(TEXT, max_tokens=20, num_beams=2, no_repeat_ngram_size=size, min_length=20)
        model.tokenizer = own
        runs = [tuple(seen[at : at + 2]) for at in range(len(seen) - 1)]
        return len(set(runs)) < len(runs)

    assert repeats(0) and not repeats(2)


# ---- scores --------------------------------------------------------------------------------------

CHOICES = ["the host", "a layer of blocks", "on", "wait, wait"]


def score_by_hand(model: Any, context: Sequence[int], choice: Sequence[int]) -> float:
    logits = states(model, context, [model.tokenizer.sop_id, *choice[:-1]])
    steps = logits.double().log_softmax(-1)
    return float(steps.gather(1, torch.tensor(choice).unsqueeze(1)).sum())


def scored_context(model: Any, text: str) -> list[int]:
    """As for generate(), but GLM-130B's evaluation adds no end."""
    ids = context_of(model, text)
    end = model.tokenizer.eos_id
    return ids[:-1] if model.config.is_rotary and ids[-1] == end else ids


@each_model
@pytest.mark.parametrize("text", [MASKED, "the blocks [sMASK]", "the blocks [gMASK]"])
def test_a_choice_scores_as_if_it_were_alone(load: Loader, name: str, text: str) -> None:
    model = load(name)
    context = scored_context(model, text)
    ids = [model.tokenizer.encode(choice) for choice in CHOICES]
    expected = [score_by_hand(model, context, choice) for choice in ids]
    scores = model.score(text, CHOICES)
    assert scores == pytest.approx(expected, rel=1e-5)
    assert model.score(text, ids) == scores
    assert model.score(context, [torch.tensor(choice) for choice in ids]) == scores
    assert model.score(text, CHOICES[1:2]) == pytest.approx(expected[1:2], rel=1e-5)


@each_model
def test_choices_of_one_token(load: Loader, name: str) -> None:
    """One pass and one row for all; and beside a longer one, each has its own."""
    model = load(name)
    choices = [[60], [61], [62], [60]]
    context = scored_context(model, MASKED)
    expected = [score_by_hand(model, context, choice) for choice in choices]
    assert model.score(MASKED, choices) == pytest.approx(expected, rel=1e-5)
    rows = pack_choices(model._scored_blank(MASKED, "[MASK]"), choices)[3]
    assert rows == [[len(context)]] * 4
    mixed = model.score(MASKED, [*choices, [60, 61]])
    assert mixed[:4] == pytest.approx(expected, rel=1e-5)
    total = sum(math.exp(s) for s in model.score(MASKED, [[n] for n in range(len(allowed(model)))
        if n < model.tokenizer.vocab_size]))  # fmt: skip
    assert 0.5 < total < 1


@each_model
def test_a_text_without_a_blank_is_scored_at_its_end(load: Loader, name: str) -> None:
    model = load(name)
    for mask in ("[MASK]", "[sMASK]", "[gMASK]"):
        expected = model.score(f"{TEXT}{mask}", CHOICES)
        assert model.score(TEXT, CHOICES, mask=mask) == expected
    prefix = list(model.tokenizer.prefix_ids)
    ids = [*prefix, *model.tokenizer.encode(TEXT)]
    expected = model.score([*ids, model.tokenizer.masks["[sMASK]"]], CHOICES)
    assert model.score(ids, CHOICES, mask="[sMASK]") == expected
    assert model.score(TEXT, CHOICES) == model.score(f"{TEXT}[MASK]", CHOICES)


@each_model
@pytest.mark.parametrize("unidirectional", [False, True])
@pytest.mark.parametrize("num_words", [1, 9, 42])
def test_perplexity(load: Loader, name: str, unidirectional: bool, num_words: int) -> None:
    model = load(name, max_length=40)
    words = "the blocks of a layer wait on the host".split()
    text = " ".join(words[number % len(words)] for number in range(num_words))
    ids = model.tokenizer.encode(text)
    total, begin, seen = 0.0, 0, 0
    while seen < len(ids):
        window = ids[begin : begin + 39]
        known = 39 - 12 if begin and not unidirectional else 0
        total -= window_by_hand(model, window[:known], window[known:])
        seen, begin = begin + 39, begin + 12
    expected = math.exp(min(20.0, total / num_words))
    found = model.perplexity(f" {text} " if name == "glm130b" else text, 12, unidirectional)
    assert found == pytest.approx(expected, rel=1e-5)


def window_by_hand(model: Any, known: list[int], scored: list[int]) -> float:
    """One token after the other."""
    tokenizer, total = model.tokenizer, 0.0
    context = [*known, tokenizer.masks["[gMASK]"]]
    for at, token in enumerate(scored):
        logits = states(model, context, [tokenizer.sop_id, *scored[:at]])[-1]
        total += float(logits.double().log_softmax(-1)[token])
    return total


@each_model
@pytest.mark.parametrize("text", [TEXT, MASKED])
def test_logits(load: Loader, name: str, text: str) -> None:
    model = load(name)
    context = context_of(model, text)
    logits = model.logits(text)
    assert logits.shape == (len(context) + 1, model.config.vocab_size)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    last = states(model, context, [model.tokenizer.sop_id])[-1]
    assert torch.allclose(logits[-1], last, atol=1e-5)
    assert not torch.allclose(logits[-2], last, atol=0.1)


# ---- what surrounds a model ----------------------------------------------------------------------


def least(plan: Any) -> int:
    """A limit with room for two slots of the largest block, and no block beside them."""
    slots = 2 * max(block.nbytes for block in plan.blocks)
    return int(plan.outside_bytes + plan.reserved_bytes + slots)


@each_model
@pytest.mark.parametrize(("quantization", "head"), [*zip(QUANTIZATIONS, HEADS, strict=True)])
def test_streamed_is_resident(load: Loader, name: str, quantization: Any, head: Any) -> None:
    """At the least limit, to the bit; with a batch of texts of different lengths."""
    settings = {"quantization": quantization, "head_quantization": head, "max_batch_size": 2}
    resident = load(name, **settings)
    limit = least(resident.plan)
    streamed = load(name, memory_limit=limit, **settings)
    assert not resident.plan.streamed and streamed.plan.total_bytes <= limit
    assert len(streamed.plan.streamed) > len(streamed.plan.resident)
    for use in USES:
        assert use(streamed) == use(resident)
    assert torch.equal(streamed.logits(MASKED), resident.logits(MASKED))
    assert streamed.stats.bytes_copied > 0 == resident.stats.bytes_copied


USES: list[Callable[[Any], Any]] = [
    lambda model: model.generate_batch([TEXT, "a [MASK] of."], max_tokens=5, seed=2),
    lambda model: model.generate(TEXT, 4, num_beams=2, num_return_sequences=2),
    lambda model: model.fill_blank(SEVERAL, max_tokens=3, temperature=0),
    lambda model: model.score(MASKED, CHOICES),
]


@each_model
def test_the_head_is_packed_if_asked_for(load: Loader, name: str) -> None:
    plain = load(name, quantization="int4")
    for head, share in (("int8", 4), ("int4", 6)):  # of float32
        packed = load(name, quantization="int4", head_quantization=head)
        sizes = [
            sum(block.nbytes for block in model.plan.blocks if block.name.startswith("lm_head"))
            for model in (plain, packed)
        ]
        assert sizes[1] < sizes[0] / (share - 2)
        logits = plain.logits(TEXT), packed.logits(TEXT)
        assert not torch.equal(*logits) and torch.allclose(*logits, atol=2)


@each_model
def test_blocks_are_matrices(load: Loader, name: str) -> None:
    """No part of the head is larger than the largest matrix of a layer."""
    model = load(name, quantization="int4-row")
    blocks = {block.name: block.nbytes for block in model.plan.blocks}
    matrices = [size for block, size in blocks.items() if block.startswith("layers.")]
    assert len(matrices) == 4 * model.config.num_hidden_layers
    parts = [size for block, size in blocks.items() if block.startswith("lm_head.parts.")]
    assert len(parts) == model.config.num_head_parts > 1
    assert max(parts) <= max(matrices) and len(blocks) == len(parts) + len(matrices)


@each_model
def test_a_model_can_be_closed(load: Loader, name: str) -> None:
    limit = least(load(name).plan)
    with load(name, memory_limit=limit) as model:
        assert "on cpu" in repr(model) and "GLM" in repr(model)
        pieces = model.generate_iter(TEXT, seed=1, max_tokens=9)
        next(pieces)
        stats = model.stats
        assert stats.num_tokens > 0 and stats.bytes_copied > 0
        assert bminf.plan_of(model.model) is model.plan
        assert stats.streamed_bytes == model.plan.streamed_bytes > 0
    assert "closed" in repr(model)
    uses: list[Callable[[], Any]] = [
        lambda: model.generate(TEXT),
        lambda: model.generate(TEXT, num_beams=1, out_seq_length=50),
        lambda: model.generate_batch([TEXT]),
        lambda: model.generate_iter(TEXT),
        lambda: model.fill_blank(SEVERAL, max_tokens=3),
        lambda: model.score(TEXT, CHOICES),
        lambda: model.perplexity(TEXT, 12),
        lambda: model.logits(TEXT),
        lambda: model.plan,
        lambda: model.stats,
        lambda: next(pieces),
    ]
    for use in uses:
        with pytest.raises(UnsupportedModelError, match="closed"):
            use()
    model.close()


def test_two_models_at_once(load: Loader) -> None:
    limits = {name: least(load(name).plan) for name in NAMES}
    models = {name: load(name, memory_limit=limits[name]) for name in NAMES}
    alone = {name: models[name].generate(TEXT, max_tokens=8, seed=1)[0] for name in NAMES}
    pieces = {name: models[name].generate_iter(TEXT, max_tokens=8, seed=1) for name in NAMES}
    together: dict[str, str] = dict.fromkeys(NAMES, "")
    for _ in range(9):
        for name in NAMES:
            together[name] += next(pieces[name], "")
    assert together == alone and len(set(alone.values())) == 2


def test_an_iterator_left_behind_ends_when_another_text_begins(load: Loader) -> None:
    for name, use in [(n, u) for n in NAMES for u in (*USES[2:], lambda m: m.logits(TEXT),
            lambda m: m.perplexity(TEXT, 12))]:  # fmt: skip
        model = load(name)
        pieces = model.generate_iter(TEXT, temperature=0, max_tokens=8)
        next(pieces)
        use(model)
        with pytest.raises(UnsupportedModelError, match="another text was begun"):
            next(pieces)


@each_model
def test_half_precision_is_float32_to_its_rounding(load: Loader, name: str) -> None:
    exact = load(name).logits(MASKED)
    for dtype, tolerance in ((torch.bfloat16, 0.3), (torch.float16, 0.05)):
        assert torch.allclose(load(name, dtype=dtype).logits(MASKED), exact, atol=tolerance)


# ---- configurations ------------------------------------------------------------------------------


def test_rotary_precision(load: Loader, folders: dict[str, Path]) -> None:
    """GLM-130B's own is the default; a configuration may say another."""
    half, exact = (load("glm130b", rotary_precision=p) for p in ("float16", "float32"))
    text = f"{TEXT} {TEXT} {TEXT}"
    assert half.config.rotary_precision == "float16" != exact.config.rotary_precision
    assert torch.equal(load("glm130b").logits(text), half.logits(text))
    distance = (half.logits(text) - exact.logits(text)).abs().max()
    assert 1e-5 < distance < 0.2
    for given in (exact.config, asdict(exact.config)):
        assert torch.equal(load("glm130b", config=given).logits(text), exact.logits(text))
        told = load("glm130b", config=given, rotary_precision="float16")
        assert torch.equal(told.logits(text), half.logits(text))


@each_model
def test_a_configuration_in_any_form(
    name: str, load: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = load(name)
    bare = tiny_glm(name).write_original(tmp_path / "outer" / "bare")
    found = bare / "config.json"
    config = json.loads(found.read_text())
    found.rename(tmp_path / "sizes.json")
    own = replace(expected.config, num_head_parts=1)
    beside = {"model": config, "tokenizer": {"file": "any"}}
    forms = (config, tmp_path / "sizes.json", str(tmp_path / "sizes.json"), own, expected.config,
             asdict(own), beside)  # fmt: skip
    for given in forms:
        model = load(name, checkpoint=bare, config=given)
        assert model.config == expected.config
        assert torch.equal(model.logits(TEXT), expected.logits(TEXT))


def test_shapes_tell_all_but_the_heads(load: Loader, tmp_path: Path) -> None:
    made = tiny_glm130b(num_attention_heads=4)
    for given in ({"num_attention_heads": 4}, {"num_attention_heads": 2}):
        model = load("glm130b", config=given)
        assert model.config.num_hidden_layers == made.config["num_layers"]
        assert model.config.intermediate_size == made.config["inner_hidden_size"]
        assert model.config.num_attention_heads == given["num_attention_heads"]
        assert model.config.max_position_embeddings == 2048
    model = load("glm10b", config={"num_attention_heads": 4})
    assert model.config.max_position_embeddings == 160


class Shaped:
    """A tensor of which nothing but the shape is looked at."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


@pytest.mark.parametrize("title", PUBLISHED_GLM)
def test_published_models_need_no_configuration(title: str) -> None:
    published = PUBLISHED_GLM[title]
    size, positions = published.hidden_size, published.max_position_embeddings
    tensors: dict[str, Any] = {
        "embed_tokens.weight": Shaped(published.vocab_size, size),
        "norm.weight": Shaped(size),
        "layers.0.feed_forward.down.weight": Shaped(size, published.intermediate_size),
        f"layers.{published.num_hidden_layers - 1}.norm.weight": Shaped(size),
    }
    if published.is_rotary:
        assert glm130b_config({}, tensors, "there") == published
        return
    tensors["embed_positions.weight"] = Shaped(positions + 1, size)
    assert glm10b_config({}, tensors, "there") == published


def test_the_published_sizes_are_those_of_the_papers() -> None:
    from bminf.models.source import meta_network

    counts = {"GLM-130B": 128_697_794_560, "GLM-10B": 9_880_682_496, "GLM-2B": 1_920_122_880}
    counts["GLM-10B-chinese"] = 9_879_633_920
    for title, count in counts.items():
        config = PUBLISHED_GLM[title]
        family = GLM130B if config.is_rotary else GLM10B
        model = meta_network(family, config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count


# ---- plans ---------------------------------------------------------------------------------------


PACKINGS = [(None, None, None), ("int8", "int4", None), ("int4", "int8", torch.float16)]
PACKINGS += [("int4-row", "int8", torch.bfloat16), (GROUPS_OF_8_BITS, None, torch.float16)]


@each_model
@pytest.mark.parametrize(("quantization", "head", "dtype"), PACKINGS)
def test_a_plan_without_a_checkpoint_is_that_of_the_model(
    load: Loader, name: str, quantization: Any, head: Any, dtype: Any
) -> None:
    packed = {"quantization": quantization, "head_quantization": head, "dtype": dtype}
    sizes = {"max_length": 64, "max_batch_size": 2}
    model = load(name, **sizes, **packed)
    half = (least(model.plan) + model.plan.total_bytes) // 2
    assert replace(plan_glm(model.config, 10**9, device="cpu", **sizes, **packed), budget=
        model.plan.budget) == model.plan  # fmt: skip
    model = load(name, memory_limit=half, **sizes, **packed)
    plan = plan_glm(model.config, half, device="cpu", **sizes, **packed)
    assert plan == model.plan
    assert model.plan.streamed and model.plan.resident
    assert plan_glm(replace(model.config, num_head_parts=1), half, device="cpu", **sizes,
        **packed) == plan  # fmt: skip


@pytest.mark.parametrize("title", PUBLISHED_GLM)
def test_plans_of_the_published_models(title: str) -> None:
    config = PUBLISHED_GLM[title]
    packed = {"quantization": "int4-row", "head_quantization": "int8"}
    whole = plan_glm(title, 2**40, **packed)
    assert not whole.streamed and plan_glm(title, least(whole), **packed).streamed
    gated = 3 * config.intermediate_size / config.hidden_size
    per_layer = 4 + gated if config.is_rotary else 12
    codes = per_layer * config.hidden_size**2 * config.num_hidden_layers / 2
    codes += config.vocab_size * config.hidden_size
    held = sum(block.nbytes for block in whole.blocks)
    assert codes < held < 1.02 * codes


def test_a_card_of_24_gb_holds_a_third_of_glm130b() -> None:
    plan = plan_glm("GLM-130B", "21.6GiB", "int4-row", max_length=512, head_quantization="int8")
    assert len(plan.blocks) > 280 and plan.slot_bytes == 2 * max(b.nbytes for b in plan.blocks)
    assert 0.2 < plan.resident_bytes / sum(b.nbytes for b in plan.blocks) < 0.4
    assert isinstance(PUBLISHED_GLM["GLM-130B"], GLMConfig)


# ---- more of the same weights --------------------------------------------------------------------


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tiny_glm10b(is_chinese=True).write_original(tmp_path_factory.mktemp("chinese") / "it")
    with GLM(folder, device="cpu", quantization=None, max_batch_size=2) as model:
        yield model


def test_glm_10b_chinese(chinese: Any) -> None:
    """Where [gMASK] and the end of an answer are one token."""
    tokenizer = chinese.tokenizer
    assert tokenizer.masks["[gMASK]"] == tokenizer.eop_id
    for text in (TEXT, "今天 [MASK] 好", "今天天气[gMASK]"):
        ids = greedy(chinese, context_of(chinese, text), 8)
        assert chinese.generate(text, max_tokens=8, temperature=0) == told(chinese, ids)
    assert len(chinese.fill_blank("今天 [MASK] 好 [MASK]。", max_tokens=3)) == 2


def test_a_deeper_model_of_odd_sizes(tmp_path: Path, load: Loader) -> None:
    made: TinyGLM = tiny_glm130b(
        num_layers=3, hidden_size=48, inner_hidden_size=88, num_attention_heads=3
    )
    model = load("glm130b", checkpoint=made.write_original(tmp_path / "a", 1))
    assert model.config.head_dim == 16 and len(model.model.layers) == 3
    ids = greedy(model, context_of(model, MASKED), 6)
    assert model.generate(MASKED, max_tokens=6, temperature=0) == told(model, ids)
    model.close()


# ---- what a review found -------------------------------------------------------------------------


def test_a_text_that_ends_in_a_mask_and_a_blank_does_not_end_in_a_mask(load: Loader) -> None:
    """Sentencepiece makes nothing of a blank, and the end is that of the text."""
    model = load("glm130b")
    eos = model.tokenizer.eos_id
    assert model._prompt("the layer [MASK]").input_ids[-1] != eos
    assert model._prompt("the layer [MASK] ").input_ids[-1] == eos


@each_model
def test_blank_i_draws_with_seed_plus_i(name: str, load: Loader) -> None:
    model = load(name)
    seeds = []
    sampler = model._sampler
    model._sampler = lambda prompts, settings: (
        seeds.append(settings.seed) or sampler(prompts, settings)
    )
    model.fill_blank(SEVERAL, max_tokens=2, seed=5)
    assert seeds == [5, 6, 7]


@each_model
def test_nothing_is_made_on_the_default_device(name: str, load: Loader) -> None:
    """Where the caller's default is another one, here one that has no values."""
    model = load(name, max_batch_size=2)
    ways: list[Callable[[], Any]] = [
        lambda: model.logits(TEXT).tolist(),
        lambda: model.score(MASKED, ["the host", "a layer"]),
        lambda: model.perplexity(TEXT, generation_length=2),
        lambda: model.generate(TEXT, max_tokens=3, num_beams=2),
        lambda: model.fill_blank(SEVERAL, max_tokens=2, temperature=0),
    ]
    if name == "glm130b":
        lot = {"deterministic": False, "seed": 1}
        ways.append(lambda: model.generate(TEXT, max_tokens=3, num_beams=2, **lot))
    expected = [way() for way in ways]
    with torch.device("meta"):
        assert [way() for way in ways] == expected


def test_perplexity_needs_a_window(load: Loader) -> None:
    for max_length in (1, 2):
        with pytest.raises(ArgumentError, match="loaded with at least 3"):
            load("glm130b", max_length=max_length).perplexity("the blocks")


@each_model
def test_scores_are_taken_some_rows_at_a_time(
    name: str, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(name)
    choices = ["the host of a layer", "a", "wait on the blocks of the layer"]
    whole, rows = model.score(MASKED, choices), []
    head = model.model.head
    monkeypatch.setattr("bminf.models.evaluate._SCORED_AT_ONCE", 2)
    model.model.head = lambda x: rows.append(len(x)) or head(x)
    assert model.score(MASKED, choices) == pytest.approx(whole, rel=1e-6)
    assert max(rows) == 2 and sum(rows) > 6


def test_an_embedding_at_an_odd_place_in_its_file_is_not_copied(
    load: Loader, tmp_path: Path
) -> None:
    """In the older files of torch tensors begin anywhere; half of the time at an odd byte."""
    expected = load("glm10b").logits(TEXT)
    made, places = tiny_glm10b(), set()
    for padding in range(2):
        folder = made.write_original(tmp_path / str(padding), form="old", note="x" * padding)
        model = load("glm10b", checkpoint=folder)
        (part,) = model.model.embed_tokens._parts
        places.add(part.dtype)
        assert torch.equal(model.logits(TEXT), expected)
    assert places == {torch.uint8, torch.float16}


def test_nothing_stays_when_the_embedding_cannot_be_mapped(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from bminf.errors import CheckpointError
    from bminf.layers.embedding import HostEmbedding

    whole = load("glm130b").plan
    slots = 2 * max(block.nbytes for block in whole.blocks)
    limit = whole.outside_bytes + whole.reserved_bytes + slots

    def gone(*arguments: Any) -> None:
        raise CheckpointError("gone")

    monkeypatch.setattr(HostEmbedding, "keep", gone)
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(CheckpointError, match="gone"):
        load("glm130b", memory_limit=limit)
    assert "bminf-reader" not in {thread.name for thread in threading.enumerate()} - before


def test_large_chinese_has_its_own_masks() -> None:
    small, large = (
        PUBLISHED_GLM["GLM-10B-chinese"],
        GLMConfig("glm-10b", 50048, 1024, 24, 16, 4096, 1024),
    )
    assert GLM10B.tokenizer_settings(large) == {"fixed_commands": True}
    assert GLM10B.tokenizer_settings(small) is None
