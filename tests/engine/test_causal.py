"""Rows of transformers' models: bminf/engine/causal.py, bminf/engine/alone.py,
bminf/engine/seq2seq.py, bminf/engine/pool_rows.py and bminf/engine/wrapped.py."""

from __future__ import annotations

import inspect
import math
import random
import re
import threading
import warnings
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from streaming import stream
from tiny_models import TINY, VOCAB, make

import bminf
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, BudgetError
from bminf.offload import memory

GREEDY = Sampling(0.0)
TOGETHER = [
    "llama", "qwen2", "glm4", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe",
    "gpt_oss", "gpt_neox", "gpt2", "opt",
]  # fmt: skip
WITH_ENCODERS = ["t5", "mt5", "bart", "umt5", "mbart", "pegasus", "marian", "blenderbot"]
ALONE = ["gptj", "bloom", "mamba"]
LENGTHS = (3, 11, 1, 20, 7)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def generated(model: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """What the model's own generate() adds to one text."""
    given = torch.tensor([ids])
    found = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    return found[1:] if model.config.is_encoder_decoder else found[len(ids) :]


def made(name: str) -> Any:
    """Of tiny_models, or as those of the same architecture there."""
    if name in TINY:
        return make(name)
    arguments = TINY["t5" if name == "umt5" else "bart"].arguments
    kind = {"umt5": tf.UMT5Config, "mbart": tf.MBartConfig, "pegasus": tf.PegasusConfig,
        "marian": tf.MarianConfig, "blenderbot": tf.BlenderbotConfig}[name]  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForSeq2SeqLM.from_config(kind(**arguments)).eval()


@cache
def said_alone(name: str) -> list[list[int]]:
    model = made(name)
    return [generated(model, ids, 8) for ids in prompts()]


def engine_of(model: Any, **more: Any) -> Engine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after another")
        return Engine(model, max_length=64, max_batch_size=8, **more)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_the_name_that_the_model_takes_it_by(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.24 has renamed it, and warns of the other one."""
    model, ids = make("llama"), prompts()[0]
    expected, forward, given = generated(model, ids, 4), model.forward, []
    own = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def renamed(**arguments: Any) -> Any:
        given.append(arguments.keys())
        return forward(**{own if key == name else key: one for key, one in arguments.items()})

    names = [name if n == own else n for n in inspect.signature(forward).parameters]
    parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    renamed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    monkeypatch.setitem(model.__dict__, "forward", renamed)
    request, engine = Request(ids, 4, GREEDY), engine_of(model)
    engine.run([engine.add(request)])
    assert request.tokens == expected
    assert len(given) == 4 and all(name in names for names in given)


@pytest.mark.parametrize(
    ("name", "is_streamed"),
    [
        *((name, True) for name in (*TOGETHER, *WITH_ENCODERS, *ALONE)),
        *((name, False) for name in ("llama", "gemma3_text", "bart", "mamba")),
    ],
)
def test_rows_of_unequal_lengths_say_what_generate_says_of_each(
    name: str, is_streamed: bool
) -> None:
    model, expected = made(name), said_alone(name)
    if is_streamed:
        model = stream(model)
    engine = engine_of(model, chunk=6)
    requests = [Request(ids, 8, GREEDY) for ids in prompts()]
    for request in requests:  # each joins while others are under way
        engine.add(request)
        engine.step()
    engine.run(requests)
    assert [request.tokens for request in requests] == expected
    if is_streamed:
        bminf.unwrap(model)
    assert generated(model, prompts()[0], 8) == expected[0]  # it is what it was


def test_sixteen_requests_share_what_is_copied() -> None:
    """Prompts of 4 to 64 tokens, answers of 16 to 64, added at random steps, on a model of which
    nearly all is streamed. Together they take about as many passes as the longest answer has
    tokens; the bytes copied a token fall as the passes do."""
    chance = random.Random(55)
    lengths = [chance.randint(4, 64) for _ in range(16)]
    numbers = [chance.randint(16, 64) for _ in range(16)]
    asked = list(zip(prompts(tuple(lengths), seed=5), numbers, strict=True))
    model = stream(make("llama", num_hidden_layers=4, max_position_embeddings=128))
    engine = Engine(model, max_length=128, max_batch_size=16)
    copied, passes = [], []
    for probability in (0.0, 0.8):
        before, rest = bminf.stats_of(model), list(asked)
        while rest or engine.num_running or engine.num_waiting:
            is_free = not engine.num_running and not engine.num_waiting
            while rest and (chance.random() < probability or (is_free and not probability)):
                is_free = False
                ids, max_new_tokens = rest.pop()
                engine.add(Request(ids, max_new_tokens, GREEDY))
            engine.step()
        after = bminf.stats_of(model)
        copied.append(after.bytes_copied - before.bytes_copied)
        passes.append(after.passes - before.passes)
    assert passes[0] == sum(numbers) and passes[1] <= max(numbers) + 16
    assert engine.stats.num_tokens == 2 * sum(numbers)
    assert copied[1] <= copied[0] / 10
    told, plan = engine.stats, bminf.plan_of(model)
    assert 0 <= sum(copied) - told.bytes_copied <= plan.slot_bytes
    assert min(told.prefill.bytes_copied, told.decode.bytes_copied) > plan.streamed_bytes


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_runs_once_for_all_rows(name: str) -> None:
    model, calls = make(name), list[int]()
    decoder = model.get_decoder()
    layer = decoder.layers[0] if name == "bart" else decoder.block[0]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    engine = engine_of(model)
    requests = [engine.add(Request(ids, 12, GREEDY)) for ids in prompts()]
    engine.run(requests)
    handle.remove()
    assert len(calls) == 12


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "gpt2"])
def test_logits_of_a_row_are_those_of_the_row_alone(name: str) -> None:
    """To rounding, over chunks and steps: by the log-probabilities that are told."""
    model, told = make(name), []
    for texts in (prompts()[3:4], prompts()):
        engine = engine_of(model, chunk=6)
        requests = [Request(ids, 12, GREEDY, num_logprobs=5) for ids in texts]
        engine.add(requests[0])
        engine.step()
        for request in requests[1:]:
            engine.add(request)
        engine.run(requests)
        told.append(next(one for one in requests if one.input_ids == prompts()[3]).logprobs)
    assert len(told[0]) == len(told[1]) == 12
    for alone, beside in zip(*told, strict=True):
        assert alone.token == beside.token
        assert beside.logprob == pytest.approx(alone.logprob, abs=2e-5)


def test_no_logits_are_made_of_the_parts_of_a_prompt() -> None:
    """But for one row, which a head needs at the least."""
    model, sizes = make("llama"), list[int]()
    handle = model.lm_head.register_forward_pre_hook(
        lambda _, given: sizes.append(given[0].shape[1])
    )
    engine = engine_of(model, chunk=6)
    first, second = Request(prompts()[2], 9, GREEDY), Request(prompts()[3], 9, GREEDY)
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.run([first, second])
    handle.remove()
    assert sizes == [1] * 4 + [2] * 5 + [1] * 4  # a prompt of 20 in parts of 6


@pytest.mark.parametrize("num_forgotten", [0, 3], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "deepseek_v3"])
def test_a_chat_goes_on_from_the_row_that_was_kept(name: str, num_forgotten: int) -> None:
    """And its second turn runs only what is new through the model, also where the end of an answer
    was not shown; gemma3_text has windows of 8 tokens."""
    model = make(name)
    engine, seen = engine_of(model), list[int]()
    ids, sizes = prompts()[1], []
    for reply in ([5, 6, 7], [8, 9], []):
        with model.get_input_embeddings().register_forward_pre_hook(
            lambda _, given: seen.append(given[0].shape[1])
        ):
            request = engine.add(Request(ids, 6, GREEDY, keep=True))
            engine.run([request])
        sizes.append(seen.copy())
        seen.clear()
        assert request.tokens == generated(model, ids, 6)
        ids = [*ids, *request.tokens[: 6 - num_forgotten], *reply]
    unread = 0 if num_forgotten else 1  # the last token of an answer was not fed
    assert sizes == [[n, *[1] * 5] for n in (11, unread + 3, unread + 2)]
    engine.close()


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_what_cannot_go_on_begins_anew(name: str) -> None:
    model = make(name)
    engine, ids = engine_of(model), prompts()[1]
    for _ in range(2):
        request = engine.add(Request(ids, 6, GREEDY, keep=True))
        engine.run([request])
        assert request.tokens == generated(model, ids, 6)
        ids = [*ids, *request.tokens[:4], 5]


def test_a_model_that_is_called_by_another_thread_meanwhile_is_itself() -> None:
    """While one thread is in a pass of the engine, the attention of the other is the model's."""
    model, found = make("gemma3_text"), list[torch.Tensor]()
    ids = torch.tensor(prompts()[3:4])
    expected = model(ids).logits

    def call_it(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
        thread.start()
        thread.join(60)

    handle = model.model.layers[3].register_forward_pre_hook(call_it)
    request = Request(prompts()[1], 6, GREEDY)
    engine = engine_of(model)
    engine.run([engine.add(request)])
    assert torch.equal(found[0], expected)
    assert request.tokens == generated(model, prompts()[1], 6)


def test_room_is_what_wrapping_set_aside() -> None:
    model = bminf.wrapper(
        make("llama"), memory_limit="50MB", device="cpu", max_length=32, max_batch_size=3
    )
    engine = Engine(model)
    for _ in range(4):
        engine.add(Request([5], 32, GREEDY))
    with pytest.raises(ArgumentError, match="max_length=32"):
        engine.add(Request([5], 33, GREEDY))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (3, 1)


def wide(memory_limit: int | None, **more: Any) -> Any:
    """A token of its cache has 896 bytes."""
    model = make("llama", max_position_embeddings=10**6)
    return bminf.wrapper(model, False, memory_limit, device="cpu", **more)


TOKEN_BYTES = 7 * 2 * 2 * 8 * 4


def longest(engine: Engine) -> int:
    with pytest.raises(ArgumentError, match="max_length=") as refused:
        engine.add(Request([5], 10**7, GREEDY))
    number = int(re.findall(r"max_length=(\d+);", str(refused.value))[0])
    engine.add(Request([5], number, GREEDY))
    return number


def held_bytes(engine: Engine) -> int:
    """By the cache, once a pass has run."""
    engine.step()
    layers: Any = engine._rows
    return sum(tensor.nbytes for tensors in layers._layers.values() for tensor in tensors)


def test_room_is_a_fifth_of_the_limit_unless_told() -> None:
    engine = Engine(wide(200_000_000))
    assert longest(engine) == 200_000_000 // 5 // TOKEN_BYTES
    assert held_bytes(engine) <= 40_000_000


@pytest.mark.parametrize("is_given", [True, False])
def test_room_is_within_what_the_plan_leaves(
    is_given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a limit that was given, or of all that is free, of which a tenth is no part of the limit.
    Nearly all of it is for a pass over 512 tokens."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 15_000_000)
    model = wide(15_000_000 if is_given else None)
    plan = bminf.plan_of(model)
    assert (plan.spare_bytes > 0) == (not is_given)
    layers = plan.resident_bytes + plan.slot_bytes
    engine = Engine(model)
    assert 512 <= longest(engine) < plan.budget // 5 // TOKEN_BYTES
    assert layers + held_bytes(engine) <= 15_000_000


def test_a_plan_that_leaves_no_room_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    limit = bminf.plan_for(make("llama"), quantization=False, device="cpu").least_limit
    with pytest.raises(BudgetError, match="max_length=512") as refused:
        Engine(wide(limit))
    needed = re.findall(r"text take ([\d.]+) MiB", str(refused.value))
    assert needed and "leaves" in str(refused.value)
    limit += math.ceil(float(needed[0]) * 2**20 * 1.1)
    engine = Engine(wide(limit, max_length=512))
    assert longest(engine) == 512
    assert not caplog.records
    Engine(wide(limit, max_length=512), max_length=2048, max_batch_size=90)
    (record,) = caplog.records
    assert "max_length=2048 and max_batch_size=90" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mamba", "attention"), ("bloom", "attention"), ("gptj", "attention")],
)
def test_what_cannot_share_a_pass_says_so_once(name: str, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"decoded one after another.*{reason}") as said:
        engine = Engine(make(name), max_length=64, max_batch_size=4)
        engine.run([engine.add(Request([5, 6], 3, GREEDY)) for _ in range(3)])
    assert len(said) == 1


@pytest.mark.parametrize(("name", "is_bounded"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_a_row_is_no_longer_than_a_table_of_positions(name: str, is_bounded: bool) -> None:
    model = make(name)
    positions = model.config.max_position_embeddings
    engine = Engine(model, max_length=positions + 9)
    (ids,) = prompts((positions - 1,))
    engine.run([engine.add(Request(ids, 2, GREEDY))])  # the last one is not fed
    longer = Request(ids, 3, GREEDY)
    if is_bounded:
        with pytest.raises(ArgumentError, match=f"are more than max_length={positions}"):
            engine.add(longer)
    else:
        engine.run([engine.add(longer)])


def test_models_that_generate_no_text_are_refused() -> None:
    for model in (make("bert"), torch.nn.Linear(2, 2), object()):
        with pytest.raises(ArgumentError, match="give a model of the zoo"):
            Engine(model)
    with pytest.raises(ArgumentError, match="max_length=0"):
        Engine(make("llama"), max_length=0)


def test_a_pass_cut_short_is_repeated_by_a_row_alone() -> None:
    """Its cache has been written to by some layers: it begins anew."""
    model = make("mamba")
    engine = engine_of(model)
    request = engine.add(Request(prompts()[1], 8, GREEDY))
    expected = generated(model, prompts()[1], 8)
    for _ in range(3):
        engine.step()
    handle = model.backbone.layers[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    handle.remove()
    engine.run([request])
    assert request.tokens == expected


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
