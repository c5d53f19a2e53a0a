"""bminf/server/bodies.py: fields are of a type and within bounds, or refused by their name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bminf.server.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from bminf.server.errors import ApiError

MESSAGES = [{"role": "user", "content": "a"}]
MINIMAL: dict[type[Body], dict[str, Any]] = {
    CompletionBody: {"prompt": "a"},
    ChatBody: {"messages": MESSAGES},
}


def refused(kind: type[Body], content: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, content)
    assert caught.value.status == 400
    return caught.value


WRONG: list[tuple[type[Body], str, Any]] = [
    *((CompletionBody, "prompt", value) for value in (1, [], [True], [-1], [1.0], [[]], {})),
    (CompletionBody, "prompt", [2**31]),
    *((CompletionBody, "prompt", [value]) for value in (["a", 1], [[1], [True]])),
    *((CompletionBody, "max_tokens", value) for value in (-1, "5", 5.0, True, [1])),
    (CompletionBody, "max_tokens", 0),  # without echo
    *((CompletionBody, "temperature", value) for value in (-1, "hot", True, 1e9)),
    *((CompletionBody, "top_p", value) for value in (-0.1, 1.1, "all")),
    *((CompletionBody, "top_k", value) for value in (-2, 1.5)),
    *((CompletionBody, "n", value) for value in (0, 1000, "2")),
    *((CompletionBody, "seed", value) for value in (2**64, -(2**63) - 1, 10**100, 1.5)),
    *((CompletionBody, "stop", value) for value in ("", [""], 1, [str(i) for i in range(65)])),
    *((CompletionBody, "logprobs", value) for value in (-1, 21, True)),
    *((CompletionBody, "logit_bias", value) for value in ({"1": 101}, {"1": "a"}, [1])),
    *((CompletionBody, "stream", value) for value in (1, "true")),
    *((CompletionBody, "stream_options", value) for value in ({"what": 1}, True)),
    (CompletionBody, "best_of", 2),
    (CompletionBody, "no_such_thing", 1),
    *((ChatBody, "messages", value) for value in ([], "a", [1], [{"content": "a"}])),
    *((ChatBody, "messages", [{"role": role, "content": "a"}]) for role in ("tool", "me", 1)),
    *((ChatBody, "messages", [{"role": "user", "content": [part]}]) for part in (
        {"type": "image_url", "image_url": {"url": "a"}}, {"type": "input_audio"}, {"text": "a"},
    )),
    *((ChatBody, "max_tokens", value) for value in (0, -1)),
    (ChatBody, "max_completion_tokens", 0),
    *((ChatBody, "top_logprobs", value) for value in (1, 21)),  # without logprobs
    (ChatBody, "tools", [{"type": "function"}]),
    (ChatBody, "functions", [{"name": "a"}]),
    (ChatBody, "tool_choice", "required"),
    (ChatBody, "response_format", {"type": "json_object"}),
    (ChatBody, "audio", {"voice": "a"}),
    (ChatBody, "modalities", ["audio"]),
    *((kind, "repetition_penalty", 1.2) for kind in MINIMAL),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    kind: type[Body], name: str, value: Any
) -> None:
    error = refused(kind, json.dumps({**MINIMAL[kind], name: value}).encode())
    assert error.param == name and name in error.message


KINDS: list[tuple[type[Body], dict[str, Any], str]] = [
    *((CompletionBody, {"prompt": value}, "prompt: give a text, a list of token ids, or a list of")
      for value in (1, {}, [True], ["a", 1])),
    (CompletionBody, {"stop": 1}, "stop: give a text, or a list of texts"),
    (ChatBody, {"messages": [{"role": "user", "content": 1}]}, "messages: the content of a"),
    (TokenizeBody, {"prompt": 1}, "prompt: Input should be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "text"), KINDS)
def test_a_value_of_a_wrong_kind_is_told_all_that_are_right(
    kind: type[Body], given: dict[str, Any], text: str
) -> None:
    content = json.dumps({**MINIMAL.get(kind, {}), **given}).encode()
    assert refused(kind, content).message.startswith(text)


NOT_JSON = {
    "malformed": b'{"prompt": "a"',
    "empty": b"",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "lone surrogate": b'{"prompt": "\\ud83d"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "a number of 5000 digits": b'{"prompt": "a", "seed": %s}' % (b"9" * 5000),
    "deep": b'{"prompt": %s}' % (b"[" * 100_000),
    "a list": b"[1]",
    "no prompt": b"{}",
    "prompt null": b'{"prompt": null}',
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_refused_and_not_repeated(content: bytes) -> None:
    error = refused(CompletionBody, content)
    json.dumps(error.as_json()).encode()  # a surrogate would fail here
    assert len(error.message) < 200


def test_null_is_as_if_a_field_were_left_out() -> None:
    fields = [name for name in CompletionBody.model_fields if name != "prompt"]
    nulls = {"prompt": "a", **dict.fromkeys([*fields, "tools", "response_format"], None)}
    assert parse(CompletionBody, json.dumps(nulls).encode()) == parse(
        CompletionBody, b'{"prompt": "a"}'
    )


HARMLESS: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatBody, {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
    (ChatBody, {"user": "me", "store": True, "metadata": {"a": 1}, "service_tier": "auto"}),
    (ChatBody, {"parallel_tool_calls": True, "reasoning_effort": "low", "prompt_cache_key": "a"}),
    (ChatBody, {"stream_options": {"include_usage": True, "include_obfuscation": False}}),
    (CompletionBody, {"best_of": 1, "n": 2, "logit_bias": {}, "presence_penalty": 0}),
    (CompletionBody, {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0}),
]


@pytest.mark.parametrize(("kind", "fields"), HARMLESS)
def test_what_asks_for_nothing_is_taken(kind: type[Body], fields: dict[str, Any]) -> None:
    parse(kind, json.dumps({**MINIMAL[kind], **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_a_list_of_them(prompt: Any, expected: Any) -> None:
    assert parse(CompletionBody, json.dumps({"prompt": prompt}).encode()).prompts == expected


def test_parts_of_a_message_are_one_text_and_a_developer_is_a_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    content = json.dumps({"messages": [{"role": "developer", "content": parts}]}).encode()
    (message,) = parse(ChatBody, content).messages
    assert message.as_message == {"role": "system", "content": "ab"}


def test_choices_draw_from_seeds_of_their_own() -> None:
    seeds = {
        parse(CompletionBody, b'{"prompt": "a", "seed": %d}' % seed).seed_of(choice)
        for seed in range(-8, 8)
        for choice in range(8)
    }
    assert len(seeds) == 16 * 8 and all(0 <= seed < 2**64 for seed in seeds)
    assert parse(CompletionBody, b'{"prompt": "a"}').seed_of(1) is None
    assert parse(CompletionBody, b'{"prompt": "a", "seed": 5}').seed_of(0) == 5


def test_negative_ids_are_refused() -> None:
    assert refused(DetokenizeBody, b'{"tokens": [-1]}').param == "tokens"
