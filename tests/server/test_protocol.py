"""What clients send, and what they read of each kind of reply: docs/serving-checks.md.

bminf/server/replies.py, bminf/server/sending.py, bminf/server/bodies.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from fake_texts import END, START, FakeTexts, logits_of
from openai import OpenAI
from running_server import Answer, Running, Serve, running, until

from bminf.engine.row_sampler import log_probabilities
from bminf.server.replies import LEAST_LOGPROB

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OK_REASONS = {"stop", "length"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeTexts) as one:
        yield one


@dataclass(frozen=True)
class Form:
    """One kind of reply.   own: the key of what a choice says.   kind: "object" of each part."""

    path: str
    stream: bool
    prefix: str
    kind: str
    own: str

    def ask(self, server: Running, prompt: str = ">ab", **more: Any) -> Answer:
        given = {"messages": messages(prompt)} if self.path == CHAT else {"prompt": prompt}
        body = {**given, "temperature": 0, "max_tokens": 40, "stream": self.stream, **more}
        answer = server.post(self.path, body)
        assert answer.status == 200
        return answer

    def parts(self, server: Running, prompt: str = ">ab", **more: Any) -> list[Any]:
        """The events of a stream, or the whole reply."""
        answer = self.ask(server, prompt, **more)
        return answer.events if self.stream else [answer.json]

    def said(self, choice: Any) -> str:
        found = choice[self.own]
        return found if self.path == COMPLETIONS else found.get("content", "")


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


FORMS = {
    "text": Form(COMPLETIONS, False, "cmpl-", "text_completion", "text"),
    "streamed text": Form(COMPLETIONS, True, "cmpl-", "text_completion", "text"),
    "chat": Form(CHAT, False, "chatcmpl-", "chat.completion", "message"),
    "streamed chat": Form(CHAT, True, "chatcmpl-", "chat.completion.chunk", "delta"),
}
STREAMED = [form for form in FORMS.values() if form.stream]
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_stream = pytest.mark.parametrize("form", STREAMED, ids=["text", "chat"])


def choices_of(parts: list[Any]) -> list[Any]:
    return [choice for part in parts for choice in part["choices"]]


# ---- what a reply has ----------------------------------------------------------------------------


@each_form
def test_each_part_says_what_it_is_of(server: Running, form: Form) -> None:
    parts = form.parts(server, n=2, stream_options={"include_usage": True})
    assert {part["object"] for part in parts} == {form.kind}
    ((name, created, model),) = {(part["id"], part["created"], part["model"]) for part in parts}
    assert name.startswith(form.prefix) and type(created) is int and model == "tiny"
    assert all(type(part["choices"]) is list for part in parts)


@each_form
def test_each_choice_has_an_index_and_what_it_says(server: Running, form: Form) -> None:
    choices = choices_of(form.parts(server, n=3))
    assert {choice["index"] for choice in choices} == {0, 1, 2}
    said = dict.fromkeys(range(3), "")
    for choice in choices:
        assert {"index", "logprobs", "finish_reason", form.own} == choice.keys()
        said[choice["index"]] += form.said(choice)
    assert said == dict.fromkeys(range(3), "ab")
    if form.path == CHAT:
        roles = [choice[form.own].get("role") for choice in choices]
        assert roles.count("assistant") == 3 and set(roles[3:]) <= {None}


@each_form
@pytest.mark.parametrize(("max_tokens", "reason"), [(2, "length"), (3, "stop")])
def test_each_choice_ends_once_and_says_why(
    server: Running, form: Form, max_tokens: int, reason: str
) -> None:
    choices = choices_of(form.parts(server, n=2, max_tokens=max_tokens))
    reasons: dict[int, list[str]] = {0: [], 1: []}
    for choice in choices:
        assert choice["finish_reason"] in {None, *OK_REASONS}
        if choice["finish_reason"] is not None:
            reasons[choice["index"]].append(choice["finish_reason"])
    assert reasons == {0: [reason], 1: [reason]}


@each_form
def test_usage_is_the_same_streamed_as_whole_and_comes_if_asked(
    server: Running, form: Form
) -> None:
    given = len(server.worker.texts.dialogue(messages(">今")).prompt.input_ids)
    num_read = given if form.path == CHAT else len(">今".encode()) + 1
    *others, last = form.parts(server, ">今", n=2, stream_options={"include_usage": True})
    assert last["usage"] == {
        "prompt_tokens": num_read, "completion_tokens": 8, "total_tokens": num_read + 8,
    }  # fmt: skip
    assert all("usage" not in part for part in others)
    if form.stream:
        assert last["choices"] == []
        assert all("usage" not in part for part in form.parts(server, ">今"))


SAID = {
    "characters of several tokens": (">今天🙂é", {}),
    "a character that is cut": (">今天", {"max_tokens": 4}),
    "a stop string over tokens": (">one two", {"stop": "e t"}),
    "what looked like a stop string at the end": (">one two", {"stop": "two!"}),
    "what looked like one, twice": (">ababab abc", {"stop": ["abc", "x"]}),
    "a stop string of several bytes": (">第一，第二", {"stop": "，"}),
    "nothing": (">", {}),
    "a stop string at once": (">ab", {"stop": "a"}),
}


@pytest.mark.parametrize(("prompt", "more"), SAID.values(), ids=SAID)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_says_what_the_whole_reply_says(
    server: Running, path: str, prompt: str, more: Mapping[str, Any]
) -> None:
    whole, stream = (form for form in FORMS.values() if form.path == path)
    (choice,) = choices_of(whole.parts(server, prompt, **more))
    chunks = choices_of(stream.parts(server, prompt, **more))
    assert "".join(map(stream.said, chunks)) == whole.said(choice)
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    if not more:
        assert whole.said(choice) == prompt.removeprefix(">")


# ---- events --------------------------------------------------------------------------------------


@each_stream
def test_events_are_lines_of_data_with_a_blank_line_behind_each(
    server: Running, form: Form
) -> None:
    text = "a\n\nb\r\u2028c\x85d\u2029e"
    answer = form.ask(server, f">{text}")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.body.split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")  # nothing comes after it
    assert all(event.startswith(b"data: {") for event in events)
    # Readers of lines in Python end them at characters that others take for text.
    assert all(len(event.decode().splitlines()) == 1 for event in events)
    assert "".join(map(form.said, choices_of(answer.events))) == text


@each_stream
def test_a_stream_that_is_refused_is_no_stream(serve: Serve, form: Form) -> None:
    """An event stream without events is no error to clients, but an empty answer."""
    server = serve(max_waiting=1)
    given = {"messages": messages("a")} if form.path == CHAT else {"prompt": "a"}
    wrong = ({"model": "gpt-5"}, {"temperature": -1}, {"n": 2}, {"logit_bias": {"a": 1}})
    for more in wrong:
        answer = server.post(form.path, {**given, "stream": True, **more})
        assert answer.status in (400, 404) and answer.error["message"]
        assert answer.headers["content-type"] == "application/json"


def client_of(server: Running, **settings: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", **{"api_key": "none", **settings})


def ended_by(server: Running) -> list[str | None]:
    """Why each request ended, from now on."""
    found: list[str | None] = []
    server.worker._on_end = lambda request: found.append(request.finish_reason)
    return found


def test_a_client_that_leaves_behind_the_last_event_cancels_nothing(serve: Serve) -> None:
    server = serve()
    reasons = ended_by(server)
    with client_of(server) as client:  # which closes the connection at [DONE]
        stream: Any = client.completions.create(model="tiny", prompt=">ab", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "ab"
    until(lambda: bool(reasons))
    assert reasons == ["stop"]


def test_a_stream_that_is_held_but_not_read_ends_by_itself(serve: Serve) -> None:
    """A loop that is left early closes nothing while its stream lives."""
    server = serve()
    reasons = ended_by(server)
    with client_of(server) as client:
        stream: Any = client.completions.create(
            model="tiny", prompt=">" + "a" * 99, max_tokens=50, stream=True
        )
        assert next(iter(stream)).choices[0].text.startswith("a")
        until(lambda: bool(reasons))
        assert reasons == ["length"] and server.is_idle()


def test_an_error_of_the_servers_own_is_not_asked_again(serve: Serve) -> None:
    texts: Any = FakeTexts()
    texts.prompt = lambda *_: 1 / 0
    server = serve(texts)
    with client_of(server, max_retries=2) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="a")
    assert b'bminf_requests_total{status="500"} 1.0' in server.get("/metrics").body


# ---- what clients send ---------------------------------------------------------------------------

IDS = [*b">ab", START]
SETTINGS = {"model": "tiny", "temperature": 0, "max_tokens": 9}
CLIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": (CHAT, {"model": "tiny", "messages": messages(">ab"), "top_k": 5}),
    "lm-eval, text": (COMPLETIONS, {
        **SETTINGS, "prompt": [IDS], "stop": ["\n\n", "Q:", "<end>"], "seed": 1234,
    }),
    "lm-eval, text not as ids": (COMPLETIONS, {
        **SETTINGS, "prompt": ">ab", "stop": ["\n\n", "<end>"], "seed": 1234,
    }),
    "lm-eval, chat": (CHAT, {
        **SETTINGS, "messages": messages(">ab"), "stop": ["\n", "x", "y", "<end>"], "seed": 1234,
    }),
    "langchain, chat": (CHAT, {
        "model": "tiny", "messages": messages(">ab"), "max_completion_tokens": 9, "n": 1,
        "temperature": 0.0, "stream": False,
    }),
    "langchain, text": (COMPLETIONS, {
        **SETTINGS, "prompt": [">ab"], "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1,
        "n": 1, "logit_bias": {}, "logprobs": None, "seed": None,
    }),
    "litellm, hosted_vllm": (CHAT, {**SETTINGS, "messages": messages(">ab"), "top_k": 5}),
    "llm": (CHAT, {
        "model": "tiny", "messages": messages(">ab"), "stream": True,
        "stream_options": {"include_usage": True},
    }),
    "llm --no-stream": (CHAT, {"model": "tiny", "messages": messages(">ab"), "stream": False}),
    "open-webui": (CHAT, {"model": "tiny", "messages": messages(">ab"), "stream": True}),
    "aider": (CHAT, {
        "model": "tiny", "messages": messages(">ab"), "stream": True, "temperature": 0,
    }),
    "continue": (COMPLETIONS, {
        **SETTINGS, "prompt": ">ab", "stream": True, "stop": [f"<{i}>" for i in range(16)],
    }),
}  # fmt: skip
HEADERS = {
    "accept": "application/json", "authorization": "Bearer undefined",
    "user-agent": "OpenAI/Python 3.57.0", "x-stainless-retry-count": "0",
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), CLIENTS.values(), ids=CLIENTS)
def test_a_request_as_a_client_sends_it_is_answered(
    server: Running, path: str, body: dict[str, Any]
) -> None:
    answer = server.post(path, body, **HEADERS)
    (form,) = (f for f in FORMS.values() if (f.path, f.stream) == (path, body.get("stream", False)))
    assert answer.status == 200
    choices = choices_of(answer.events if form.stream else [answer.json])
    assert "".join(map(form.said, choices)) == "ab"
    assert choices[-1]["finish_reason"] == "stop"


def scored(server: Running, prompts: Any) -> list[Any]:
    """As lm-eval asks for the log-probabilities of texts."""
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip
    answer = server.post(COMPLETIONS, body)
    assert answer.status == 200
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(prompts)))
    return [choice["logprobs"] for choice in choices]


SCORED = [[*b"ab>", START], [*b"ab>cd", START], [START, *b"xy"]]


def test_scores_have_an_entry_for_each_token_and_for_the_one_behind(server: Running) -> None:
    """The last entry is cut off by lm-eval: an end token that is left out would take another."""
    found = scored(server, SCORED)
    assert found[0]["tokens"][-1] == "<end>"
    for ids, one in zip(SCORED, found, strict=True):
        assert all(len(values) == len(ids) + 1 for values in one.values())
        assert one["token_logprobs"][0] is None and one["top_logprobs"][0] is None
        for end in range(1, len(ids)):
            logits = torch.tensor(logits_of(ids[:end]))
            expected, top = log_probabilities(logits, ids[end], 1)
            assert one["token_logprobs"][end] == expected
            assert max(one["top_logprobs"][end].values()) == top[0][1]


def test_the_best_token_is_known_by_its_score_bit_for_bit(server: Running) -> None:
    (found,) = scored(server, [[*b">ab", START, *b"ab", END]])
    greedy = [
        own == max(top.values())
        for own, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
    ]
    assert greedy[3:] == [True, True, True, True] and not all(greedy)


def test_texts_are_scored_as_their_ids(server: Running) -> None:
    """With no mark put before either."""
    by_text, by_ids = scored(server, [">ab", "x"]), scored(server, [IDS, [*b"x", START]])
    assert by_text == by_ids
    assert by_ids[0]["tokens"] == [">", "a", "b", "<end>", "a"]


def test_as_many_texts_as_an_evaluation_sends_at_once_have_room(server: Running) -> None:
    assert server.worker.max_waiting >= 64
    answer = server.complete([">a"] * 64)
    assert [choice["text"] for choice in answer.json["choices"]] == ["a"] * 64


REFUSED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_schema"},
    "audio": {"voice": "a"},
    "repetition_penalty": 1.1,
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_and_named(server: Running, name: str) -> None:
    """A client that binds tools takes an answer without any for the model's own."""
    body = {"messages": messages(">ab"), name: REFUSED[name]}
    answer = server.post(CHAT, body)
    assert (answer.status, answer.error["param"]) == (400, name)


# ---- what must not become an error of the server -------------------------------------------------

SURROGATE = '"a\\ud83d"'
HALVES = {
    COMPLETIONS: '{"prompt": %s}', CHAT: '{"messages": [{"role": "user", "content": %s}]}',
    "/v1/fill": '{"text": %s}', "/tokenize": '{"prompt": %s}',
}  # fmt: skip


@pytest.mark.parametrize("path", HALVES)
def test_half_a_surrogate_pair_is_the_fault_of_the_request(server: Running, path: str) -> None:
    answer = server.ask("POST", path, (HALVES[path] % SURROGATE).encode(),
                        {"content-type": "application/json"})  # fmt: skip
    assert answer.status == 400 and answer.error["message"]


@each_form
def test_a_probability_of_zero_has_a_number(serve: Serve, form: Form) -> None:
    texts = FakeTexts()
    texts.rows.logits_of = lambda history: [0.0, *[-math.inf] * 257]
    asked = {"logprobs": 2} if form.path == COMPLETIONS else {"logprobs": True, "top_logprobs": 2}
    answer = form.ask(serve(texts), "a", max_tokens=1, **asked)
    assert str(LEAST_LOGPROB).encode() in answer.body and b"Infinity" not in answer.body
