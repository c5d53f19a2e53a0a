"""Completions, chats and blanks over HTTP, from a model that says what it is told.

bminf/server/generating.py, bminf/server/replies.py, bminf/server/choice.py, bminf/server/texts.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from fake_texts import END, START, FakeTexts
from running_server import Running, Serve, running

from bminf.engine.request import TokenLogprob
from bminf.server.choice import Piece, Token
from bminf.server.replies import LEAST_LOGPROB, ChatShape


@pytest.fixture(scope="module")
def server() -> Any:
    with running(FakeTexts) as one:
        yield one


def streamed(server: Running, path: str, body: Any) -> list[Any]:
    answer = server.post(path, {**body, "temperature": 0, "stream": True})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return answer.events


# ---- text ----------------------------------------------------------------------------------------


def test_a_completion_is_what_openai_sends(server: Running) -> None:
    answer = server.complete("say>hello")
    body = answer.json
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"cmpl-\w+", body["id"]) and body["created"] > 1.7e9
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    ]
    # The end token counts.
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}


def test_without_max_tokens_a_completion_has_sixteen(server: Running) -> None:
    choice = server.complete(">" + "a" * 40).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 16, "length")


STOPS = [
    ("say>one two", "two", "one "),
    ("say>one two", ["x", "wo"], "one t"),
    ("say>one two", "e t", "on"),  # over the borders of tokens
    ("say>one two", "two!", "one two"),  # what was held back comes at the end
    ("say>第一，第二", "，", "第一"),
]


@pytest.mark.parametrize(("prompt", "stop", "expected"), STOPS)
def test_text_ends_before_a_stop_string_streamed_as_whole(
    server: Running, prompt: str, stop: Any, expected: str
) -> None:
    whole = server.complete(prompt, stop=stop, max_tokens=40).json
    assert whole["choices"][0]["text"] == expected
    assert whole["choices"][0]["finish_reason"] == "stop"
    events = streamed(
        server, "/v1/completions", {"prompt": prompt, "stop": stop, "max_tokens": 40,
                                    "stream_options": {"include_usage": True}}
    )  # fmt: skip
    assert "".join(c["text"] for event in events for c in event["choices"]) == expected
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])


def test_a_request_ends_with_the_token_that_completes_a_stop_string(server: Running) -> None:
    usage = server.complete(">abcdefgh", stop="cd").json["usage"]
    assert usage["completion_tokens"] == 4


def test_a_stop_string_in_the_very_last_token_is_a_stop(server: Running) -> None:
    choice = server.complete(">abcd", stop="cd", max_tokens=4).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")


def test_characters_of_several_tokens_come_whole(server: Running) -> None:
    text = "今天🙂é"
    events = streamed(server, "/v1/completions", {"prompt": f">{text}", "max_tokens": 40})
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)


def test_a_character_that_max_tokens_cuts_is_shown_as_cut(server: Running) -> None:
    body = {"prompt": ">今天", "max_tokens": 4}
    assert server.complete(**body).text == "今\N{REPLACEMENT CHARACTER}"
    events = streamed(server, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events).startswith("今")


# ---- choices, seeds, several prompts -------------------------------------------------------------


def test_n_choices_are_n_rows_and_differ(server: Running) -> None:
    def drawn(**more: Any) -> list[str]:
        body = {"prompt": "random>", "n": 4, "max_tokens": 8, **more}
        choices = server.post("/v1/completions", body).json["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        return [choice["text"] for choice in choices]

    seeded = drawn(seed=1234)
    assert len(set(seeded)) == 4 and seeded == drawn(seed=1234)
    assert set(seeded) != set(drawn(seed=1235))
    assert drawn() != drawn()  # a fresh seed where none is given
    assert drawn(seed=-5) == drawn(seed=2**64 - 5)  # any signed number of 64 bits


def test_a_seed_draws_the_same_beside_others(server: Running) -> None:
    body = {"prompt": "random>", "max_tokens": 8, "seed": 7}
    alone = server.post("/v1/completions", body).text
    both = server.post("/v1/completions", {**body, "prompt": ["random>", "random, too>"]}).json
    assert both["choices"][0]["text"] == alone


def test_several_prompts_each_have_their_choices(server: Running) -> None:
    body = server.complete([">ab", ">cd"], n=2).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "cd", "cd"]
    # Prompts once each, whatever n is; answers all.
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}


def test_streams_of_several_choices_say_which_is_meant(server: Running) -> None:
    body = {"prompt": [">ab", ">cd"], "n": 2, "max_tokens": 9}
    events = streamed(server, "/v1/completions", body)
    texts, reasons = dict.fromkeys(range(4), ""), dict[int, list[str]]()
    for (choice,) in (event["choices"] for event in events):
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert texts == {0: "ab", 1: "ab", 2: "cd", 3: "cd"}
    assert reasons == {i: ["stop"] for i in range(4)}  # one each
    assert all("usage" not in event for event in events)  # it was not asked for


def test_token_ids_are_taken_as_they_are(server: Running) -> None:
    ids = [*b">abc", START]
    assert server.complete(ids).text == "abc"
    assert server.complete([ids, ids]).json["usage"]["prompt_tokens"] == 10


def test_a_bias_moves_and_bans_tokens(server: Running) -> None:
    other = {str(ord("x")): 100, str(ord("a")): -100}
    assert server.complete(">a", max_tokens=1, logit_bias=other).text == "x"
    both = server.complete(">a", max_tokens=1, logit_bias={str(ord("a")): -100}).text
    assert both != "a"
    for key in ("-1", "a", str(10**30), "258", "٣"):
        answer = server.complete(">a", logit_bias={key: 1})
        assert (answer.status, answer.error["param"]) == (400, "logit_bias")


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_p": 0}])
def test_temperature_zero_and_top_p_zero_are_greedy(server: Running, greedy: Any) -> None:
    answer = server.post("/v1/completions", {"prompt": ">abc", **greedy})
    assert answer.text == "abc"


# ---- log-probabilities and echo ------------------------------------------------------------------


def test_logprobs_have_an_entry_a_token_the_end_too(server: Running) -> None:
    choice = server.complete(">今", logprobs=2).json["choices"][0]
    scores = choice["logprobs"]
    assert scores["tokens"] == ["bytes:\\xe4", "bytes:\\xbb", "bytes:\\x8a", "<end>"]
    assert scores["text_offset"] == [0, 0, 0, 1]
    for own, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert own == max(top.values()) and -0.01 < own < 0  # bitwise: both are of one softmax
        assert len(top) == 2


def test_a_drawn_token_stands_beside_the_most_probable_ones(server: Running) -> None:
    bias = {str(ord("x")): 50}
    scores = server.complete(">a", max_tokens=1, logit_bias=bias, logprobs=1).json
    scores = scores["choices"][0]["logprobs"]
    # Those of the model itself, whatever the request adds.
    assert scores["top_logprobs"][0].keys() == {"a", "x"}
    assert scores["token_logprobs"][0] == scores["top_logprobs"][0]["x"] < -19


def test_what_is_impossible_has_a_number(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    texts = FakeTexts()
    texts.rows.logits_of = lambda history: [0.0, *[-math.inf] * 257]
    answer = serve(texts).complete("a", max_tokens=1, logprobs=2)
    tops = answer.json["choices"][0]["logprobs"]["top_logprobs"][0]
    assert sorted(tops.values()) == [LEAST_LOGPROB, 0.0]


def test_an_echo_has_the_prompt_and_its_scores(server: Running) -> None:
    ids = [*b">ab", START]
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    answer = server.complete(**body)  # as lm-eval asks
    choice = answer.json["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"] == ">aba"
    assert all(len(values) == len(ids) + 1 for values in scores.values())
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["tokens"] == [">", "a", "b", "<end>", "a"]
    assert scores["text_offset"] == [0, 1, 2, 3, 3]
    assert answer.json["usage"]["completion_tokens"] == 1
    (event, *_, last) = streamed(server, "/v1/completions", body)
    assert event["choices"][0]["text"] == ">ab" and last["choices"][0]["finish_reason"]


def test_an_echo_alone_generates_nothing(server: Running) -> None:
    body = server.complete(">ab", echo=True, max_tokens=0, logprobs=0).json
    assert body["choices"][0]["text"] == ">ab"
    assert body["choices"][0]["logprobs"]["tokens"] == [">", "a", "b", "<end>"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}


def test_a_model_that_cannot_score_says_so(serve: Serve) -> None:
    texts = FakeTexts()
    texts.can_score = False
    server = serve(texts)
    assert server.complete(">ab", echo=True).text == ">abab"
    answer = server.complete(">ab", echo=True, logprobs=1)
    assert (answer.status, answer.error["param"]) == (400, "echo")


def test_prompts_are_read_once_and_together_to_be_scored(serve: Serve) -> None:
    server = serve()
    texts: Any = server.worker.texts
    asked = [*b">ab", START]
    prompts = [asked[:end] for end in (2, 3, 4)]
    body = server.complete([*prompts], echo=True, logprobs=1, max_tokens=1).json
    numbers = [len(choice["logprobs"]["tokens"]) for choice in body["choices"]]
    assert numbers == [3, 4, 5]
    assert texts.rows.passes == [prompts]


# ---- chat ----------------------------------------------------------------------------------------


def chat(server: Running, *contents: Any, **more: Any) -> Any:
    messages = [{"role": "user", "content": content} for content in contents]
    return server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **more})


def test_a_chat_is_what_openai_sends(server: Running) -> None:
    answer = chat(server, ">hello", model="tiny")
    body = answer.json
    assert re.fullmatch(r"chatcmpl-\w+", body["id"]) and body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["completion_tokens"] == 6


def test_a_chat_streams_a_role_pieces_and_a_reason(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": ">hey"}], "n": 2}
    events = streamed(server, "/v1/chat/completions", body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"]) for event in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    for index in (0, 1):
        first, *pieces, last = [choice for choice in choices if choice["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"]["content"] for piece in pieces) == "hey"
        assert (last["delta"], last["finish_reason"]) == ({}, "stop")
        assert all(piece["finish_reason"] is None for piece in pieces)


def test_a_chat_has_the_rest_of_the_context_unless_told(server: Running) -> None:
    assert chat(server, ">" + "a" * 40).json["choices"][0]["finish_reason"] == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        choice = chat(server, ">" + "a" * 40, **{name: 3}).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("aaa", "length")
    both = chat(server, ">aaaa", max_tokens=3, max_completion_tokens=2).json["choices"][0]
    assert both["message"]["content"] == "aa"


def test_a_chat_goes_on_from_what_was_read(serve: Serve) -> None:
    """The prompt that its first answer had; and it is not in the way of others."""
    server = serve(FakeTexts(num_tokens=100))
    texts: Any = server.worker.texts
    first = {"role": "user", "content": ">hello"}
    more = [first, {"role": "assistant", "content": "hello"}, {"role": "user", "content": ">you"}]
    for messages, expected in (([first], "hello"), (more, "you")):
        body = {"messages": messages, "temperature": 0, "max_tokens": 9}
        message = server.post("/v1/chat/completions", body).json["choices"][0]["message"]
        assert message["content"] == expected
    read = [feeds[0] for feeds in texts.rows.passes if len(feeds[0]) > 1]
    assert read == [[*b"user:>hello", START], [*b"\nassistant:hello\nuser:>you", START]]
    assert server.worker.num_running == 0 and texts.rows.pool.num_free < 100
    assert server.complete([65] * 100, max_tokens=1).status == 200  # which takes all of the room
    assert texts.rows.pool.num_free == 100


def test_logprobs_of_a_chat(server: Running) -> None:
    content = chat(server, ">é", logprobs=True, top_logprobs=1).json
    entries = content["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [[0xC3], [0xA9], [*b"<end>"]]
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)
    events = streamed(server, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": ">é"}], "logprobs": True
    })  # fmt: skip
    chunks = [choice["logprobs"] for event in events for choice in event["choices"]]
    assert sum(len(one["content"]) for one in chunks if one) == 3


def test_a_token_without_text_has_a_chunk_and_the_end_has_its_own() -> None:
    shape = ChatShape("tiny", lambda token: bytes([token]), [0], has_logprobs=True)
    tokens = (Token(0xC3, TokenLogprob(0xC3, -1.0, ()), 0),)
    (held,) = shape.chunks(Piece(0, "", tokens))
    assert len(held["choices"][0]["logprobs"]["content"]) == 1
    text, end = shape.chunks(Piece(0, "é", tokens, "stop"))
    assert text["choices"][0]["delta"] == {"content": "é"}
    assert text["choices"][0]["finish_reason"] is None
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")


def test_a_template_that_refuses_is_the_fault_of_the_request(server: Running) -> None:
    answer = chat(server, "refuse")
    assert answer.status == 400 and "refuses these messages" in answer.error["message"]


def test_a_model_without_a_template_says_what_to_do(serve: Serve) -> None:
    texts = FakeTexts()
    texts.can_chat = False
    answer = chat(serve(texts), "hello")
    assert (answer.status, answer.error["code"]) == (400, "chat_not_supported")
    assert "/v1/completions" in answer.error["message"]
    assert "--chat-template" in answer.error["message"]


# ---- blanks --------------------------------------------------------------------------------------


def test_blanks_are_filled_one_after_another(server: Running) -> None:
    body = server.post("/v1/fill", {"text": "ab_c_d", "temperature": 0, "max_tokens": 9}).json
    assert [blank["text"] for blank in body["blanks"]] == ["ab", "c"]
    assert body["usage"]["completion_tokens"] == 5


def test_a_suffix_makes_a_blank(server: Running) -> None:
    assert server.complete("before", suffix="behind").text == "blank"
    answer = server.complete("before", suffix="behind", echo=True)
    assert (answer.status, answer.error["param"]) == (400, "suffix")


def test_models_without_blanks_say_so(serve: Serve) -> None:
    texts = FakeTexts()
    texts.can_fill = False
    server = serve(texts)
    answer = server.complete("before", suffix="behind")
    assert (answer.status, answer.error["param"]) == (400, "suffix")
    assert server.post("/v1/fill", {"text": "ab_c"}).status == 400


def test_a_text_without_blanks_is_refused(server: Running) -> None:
    answer = server.post("/v1/fill", {"text": "ab"})
    assert answer.status == 400 and "no blanks" in answer.error["message"]


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "status"), [(99, 200), (100, 200), (101, 400), (9999, 400)])
def test_prompts_up_to_the_context_are_read(serve: Serve, length: int, status: int) -> None:
    server = serve(FakeTexts(num_tokens=100))
    answer = server.complete([65] * length, max_tokens=5)
    assert answer.status == status
    if status == 200:  # what is left of the context is all that there is
        choice = answer.json["choices"][0]
        assert answer.json["usage"]["completion_tokens"] == 101 - length
        assert choice["finish_reason"] == "length"
    else:
        assert answer.error["code"] == "context_length_exceeded"
        assert f"prompt is too long: {length} tokens" in answer.error["message"]
        assert answer.error["param"] == "prompt"


def test_more_tokens_than_the_context_are_refused(server: Running) -> None:
    for max_tokens in (4097, 10**12, 10**30):
        answer = server.complete(">a", max_tokens=max_tokens)
        assert (answer.status, answer.error["param"]) == (400, "max_tokens")
    assert server.complete(">a", max_tokens=4096).status == 200


def test_texts_too_long_for_any_tokenizer_are_not_read(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr(server.worker.texts, "encode", encode)
    text = "a" * (64 * 4096 + 1)
    bodies = {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/fill": {"text": text},
        "/tokenize": {"prompt": text},
    }
    for path, body in bodies.items():
        answer = server.post(path, body)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded"), path


def test_ids_beyond_the_vocabulary_are_refused(server: Running) -> None:
    assert server.complete([1, 258]).status == 400
    assert server.complete([1, 258], echo=True, logprobs=1).status == 400
    assert server.complete([END]).status == 200


def test_an_empty_prompt_is_refused(server: Running) -> None:
    assert server.complete("").status == 400


def test_a_model_that_draws_nan_fails_this_request_alone(server: Running) -> None:
    answer = server.complete("NaN>a")
    assert answer.status == 400 and "not finite" in answer.error["message"]
    answer = server.post("/v1/completions", {"prompt": "NaN>a", "stream": True})
    assert answer.status == 200
    assert b'data: {"error": {"message": "the model' in answer.body
    assert b"[DONE]" not in answer.body
    assert server.complete(">a").text == "a"
