"""bminf/models/glm.py: GLM-130B and GLM-10B as users have them, compared with slow loops over the
network itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from scripted import Spied, script
from tiny_glm import tiny_glm10b, tiny_glm130b

from bminf.engine.glm_beam import glm_beam_search
from bminf.errors import ArgumentError
from bminf.models import GLM, Answer
from bminf.models.glm_text import pack_choices
from bminf.models.options import GLMOptions

Loader = Callable[..., Any]
NAMES = ("glm130b", "glm10b")
TEXT = "the blocks of a layer wait"
MASKED = "the blocks of a [MASK] wait on the host"
SEVERAL = "the [MASK] of a layer [MASK] on the [MASK]."
MASK = re.compile(r"\[MASK\]")

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
def test_out_seq_length_counts_the_text(load: Loader, name: str) -> None:
    """And its mask, and sop; it is another way to say max_tokens."""
    model = load(name, max_batch_size=2)
    for text in (TEXT, MASKED):
        length = len(context_of(model, text)) + 1
        for options in ({"temperature": 0}, {"seed": 4}, {"num_beams": 2}):
            expected = model.generate(text, max_tokens=5, **options)
            assert model.generate(text, out_seq_length=length + 5, **options) == expected
            assert model.generate_batch([text], out_seq_length=length + 5, **options) == [expected]
        pieces = model.generate_iter(text, out_seq_length=length + 5, seed=4)
        assert "".join(pieces) == model.generate(text, max_tokens=5, seed=4)[0]
        candidates = model.generate(
            text, out_seq_length=length + 5, num_beams=2, num_return_sequences=2
        )
        assert candidates == model.generate(text, 5, num_beams=2, num_return_sequences=2)


@each_model
def test_a_text_of_a_batch_ends_long_before_the_others(load: Loader, name: str) -> None:
    model = load(name, max_batch_size=3)
    texts = [MASKED, "the blocks [sMASK]", f"{TEXT} {TEXT}"]
    (stop,) = model.tokenizer.tokens([greedy(model, context_of(model, texts[2]), 2)[1]])
    options = {"max_tokens": 10, "temperature": 0, "stop_tokens": [stop]}
    together = model.generate_batch(texts, **options)
    assert together == [model.generate(text, **options) for text in texts]
    assert {stopped for _, stopped in together} == {True, False}


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
    assert [blank["position"] for blank in filled] == [m.start() for m in MASK.finditer(SEVERAL)]
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
        lengths.append(int(arguments[2].positions(arguments[0].shape[1])[-1]) + 1)
        return result

    model.model.forward = measured
    script(model, [word] * 3 * most)
    filled = model.fill_blank(SEVERAL, max_tokens=most, temperature=0)
    assert {blank["text"] for blank in filled} == {model.tokenizer.decode([word] * most)}
    assert model.max_length - 3 < max(lengths) <= model.max_length


@each_model
def test_blank_i_draws_with_seed_plus_i(name: str, load: Loader) -> None:
    model = load(name)
    seeds = []
    sampling = model._sampling
    model._sampling = lambda settings: seeds.append(settings.seed) or sampling(settings)
    model.fill_blank(SEVERAL, max_tokens=2, seed=5)
    assert seeds == [5, 6, 7]


# ---- beams ---------------------------------------------------------------------------------------


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


def test_a_search_of_glm130b_has_its_options(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do is in engine/test_glm_beam.py, and in the golden set."""
    model, given = load("glm130b", max_batch_size=2), dict[str, Any]()

    def search(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return glm_beam_search(*arguments, **options)

    monkeypatch.setattr("bminf.models.glm.glm_beam_search", search)
    settings = {"length_penalty": 0.5, "min_length": 3, "no_repeat_ngram_size": 2}
    sampled = {"deterministic": False, "seed": 7}
    model.generate(TEXT, max_tokens=8, num_beams=2, **settings, **sampled)
    context = [*context_of(model, TEXT), model.tokenizer.sop_id]
    expected = {**settings, "is_deterministic": False, "seed": 7, "contexts": [context]}
    assert {name: given[name] for name in expected} == expected
    assert (given["num_beams"], given["max_new_tokens"]) == (2, 8)


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


@each_model
def test_choices(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    size = model.tokenizer.vocab_size
    for choices in ("a", [], None, 3, {"a", "b"}, torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ArgumentError, match=r"(?s)choices=.*; give a list with at least one"):
            model.score(TEXT, choices)
    for choice, words in [
        ("", "has no tokens"),
        ([], "has no tokens"),
        ([size], f"ids from 0 to {size - 1}"),
        ([-1], "has ids outside the vocabulary"),
        ([1.5], "holds a float"),
        (None, "is a NoneType"),
        (3, "is a int"),
        (torch.tensor([0.5]), r"whole numbers \(T,\)"),
    ]:
        with pytest.raises(ArgumentError, match=rf"choices\[1\] {words}|choices\[1\] .*{words}"):
            model.score(TEXT, ["a", choice])
    for mask in ("[XMASK]", "MASK", None, 3, ["[MASK]"]):
        with pytest.raises(ArgumentError, match=r"mask=.*; this model has \[MASK\], \[sMASK\]"):
            model.score(TEXT, ["a"], mask=mask)
    for text, words in [([size], "ids from 0"), ([], "no tokens"), ([True], "holds a bool")]:
        with pytest.raises(ArgumentError, match=f"text .*{words}"):
            model.score(text, ["a"])
    with pytest.raises(
        ArgumentError, match=r"text with all choices has .* more than max_length=40"
    ):
        model.score(TEXT, ["the host"] * 20)


@each_model
def test_perplexities(name: str, silent: Callable[..., Any]) -> None:
    model = silent(name)
    for text, words in [
        (None, "text is a NoneType"),
        ([1, 2], "text is a list"),
        ("", "no tokens"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            model.perplexity(text, 9)
    for length in (0, -1, 39, 256, 9.0, True, "9", None):
        with pytest.raises(ArgumentError, match=r"generation_length=.*; accepted: 1 to 38, less"):
            model.perplexity(TEXT, length)
    for value in ("yes", 1, None):
        with pytest.raises(ArgumentError, match=r"unidirectional=.*; accepted: True, False"):
            model.perplexity(TEXT, 9, value)


# ---- configurations ------------------------------------------------------------------------------


def test_rotary_precision(load: Loader) -> None:
    """GLM-130B's own is the default; a configuration may say another."""
    half, exact = (load("glm130b", rotary_precision=p) for p in ("float16", "float32"))
    text = f"{TEXT} {TEXT} {TEXT}"
    assert half.config.rotary_precision == "float16" != exact.config.rotary_precision
    assert torch.equal(load("glm130b").logits(text), half.logits(text))
    distance = (half.logits(text) - exact.logits(text)).abs().max()
    assert 1e-5 < distance < 0.2
    said = {**tiny_glm130b().config, "rotary_precision": "float32"}
    for given in (exact.config, asdict(exact.config), said):
        assert torch.equal(load("glm130b", config=given).logits(text), exact.logits(text))
        told = load("glm130b", config=given, rotary_precision="float16")
        assert torch.equal(told.logits(text), half.logits(text))


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
