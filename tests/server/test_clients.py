"""OpenAI's own client against the server: what it sends, reads, raises and asks again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_texts import FakeTexts
from openai import APIError, AsyncOpenAI, OpenAI
from running_server import Running, Serve, running, until

import bminf

MESSAGES: Any = [{"role": "user", "content": ">hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeTexts) as one:
        yield one


def client_of(server: Running, **settings: Any) -> OpenAI:
    """Strict: a reply that is not as OpenAI says is an error."""
    more = {"api_key": "none", "_strict_response_validation": True, "max_retries": 0, **settings}
    return OpenAI(base_url=f"{server.url}/v1", **more)


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as one:
        yield one


# ---- replies -------------------------------------------------------------------------------------


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "bminf"


def test_a_completion(client: OpenAI) -> None:
    given = {"prompt": [">ab", ">cd"], "n": 2, "seed": 3, "temperature": 0, "logprobs": 2,
             "logit_bias": {"7": -100}, "stop": ["x"], "user": "me"}  # fmt: skip
    reply = client.completions.create(model="tiny", **given)
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "cd", "cd"]
    assert reply.usage is not None and reply.usage.completion_tokens == 12
    nulls = dict.fromkeys(("logprobs", "seed", "stop", "n", "max_tokens", "best_of", "echo"))
    plain: Any = client.completions.create(model="tiny", prompt=">ab", temperature=0, **nulls)
    assert plain.choices[0].text == "ab"


def test_a_streamed_completion(server: Running) -> None:
    # OpenAI's own have a finish_reason of null here, which the strict client refuses.
    with client_of(server, _strict_response_validation=False) as client:
        chunks = list(
            client.completions.create(
                model="tiny", prompt=">今天", max_tokens=20, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == "今天"
    assert chunks[-1].usage.completion_tokens == 7 and chunks[-1].choices == []


def test_a_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2, n=2,
        extra_body={"top_k": 5},
    )  # fmt: skip
    assert [choice.message.content for choice in reply.choices] == ["hello", "hello"]
    assert reply.choices[0].finish_reason == "stop"
    scores = reply.choices[0].logprobs
    assert scores is not None and scores.content is not None and len(scores.content) == 6


def test_a_streamed_chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.delta.content or "" for chunk in chunks for c in chunk.choices]
    assert "".join(pieces) == "hello"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6


def test_the_helper_of_streams(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[-1] == "content.done" and "content.delta" in kinds
    assert final.choices[0].message.content == "hello"


def test_many_at_once_with_the_async_client(server: Running) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        messages: Any = [{"role": "user", "content": f">hello {number}"}]
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(12)))

    assert asyncio.run(ask_all()) == [f"hello {number}" for number in range(12)]


# ---- errors --------------------------------------------------------------------------------------

TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
ERRORS = [
    (openai.NotFoundError, {"model": "gpt-5"}, "no model of that name"),
    (openai.BadRequestError, {"temperature": -1}, "temperature"),
    (openai.BadRequestError, {"tools": [TOOL]}, "tools is not supported"),
    (openai.BadRequestError, {"response_format": {"type": "json_object"}}, "response_format"),
    (openai.BadRequestError, {"extra_body": {"guided_json": {}}}, "guided_json is not"),
    (openai.BadRequestError, {"max_tokens": 10**9}, "max_tokens"),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "refuse"}]}, "refuses"),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "a" * 9999}]}, "too long"),
]


@pytest.mark.parametrize(("kind", "given", "text"), ERRORS)
def test_errors_are_of_the_right_kind(
    client: OpenAI, kind: type[Exception], given: Any, text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **given})
    assert caught.value.body.keys() == {"message", "type", "param", "code"}  # type: ignore


def test_other_errors_have_their_kinds(serve: Serve) -> None:
    server = serve(api_key="secret", max_waiting=1)
    with client_of(server) as client, pytest.raises(openai.AuthenticationError, match="API key"):
        client.models.list()
    with client_of(server, api_key="secret") as client:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="a", n=2)
        with pytest.raises(openai.NotFoundError, match="base_url"):
            client.embeddings.create(model="tiny", input="a")
        with pytest.raises(openai.APIStatusError, match="too large"):
            client.completions.create(model="tiny", prompt="a" * 5_000_000)
        server.worker.stop_admission()
        with pytest.raises(openai.InternalServerError, match="stopping"):
            client.completions.create(model="tiny", prompt="a")


def test_an_error_in_the_middle_of_a_stream_is_raised(client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="NaN>a", stream=True)
    with pytest.raises(APIError, match="not finite"):
        list(stream)


# ---- patience ------------------------------------------------------------------------------------


def test_a_client_that_waits_for_a_byte_gets_a_slow_answer_once(serve: Serve) -> None:
    server = serve(ping_s=0.05)
    texts: Any = server.worker.texts
    pauses = iter([2.5])
    texts.rows.before = lambda feeds: time.sleep(next(pauses, 0))
    with client_of(server, timeout=2.0, max_retries=2) as client:
        reply = client.completions.create(model="tiny", prompt=">ab", temperature=0)
    assert reply.choices[0].text == "ab"
    assert b'bminf_requests_total{status="200"} 1.0' in server.get("/metrics").body


def test_a_full_queue_is_asked_again(serve: Serve) -> None:
    server = serve(max_waiting=1)
    texts: Any = server.worker.texts
    texts.gate.shut()
    server.worker._mean_s = 0.1
    for _ in range(2):
        server.begin("/v1/completions", {"prompt": ">ab", "temperature": 0})
        until(lambda: bool(texts.rows.passes))
    until(lambda: server.worker.num_waiting == 1)
    opened: list[Any] = []

    def open_gate(request: Any) -> None:
        opened.append(request)
        texts.gate.open()

    hooked = openai.DefaultHttpxClient(event_hooks={"response": [open_gate]})
    with client_of(server, max_retries=2, http_client=hooked) as client:
        reply = client.completions.create(model="tiny", prompt=">ab", temperature=0)
    assert reply.choices[0].text == "ab" and len(opened) >= 1
    assert b'{status="429"} 1.0' in server.get("/metrics").body


def test_close_stops_a_stream(serve: Serve) -> None:
    server = serve()
    texts: Any = server.worker.texts
    with client_of(server) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": ">" + "a" * 3000}], stream=True
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        texts.gate.shut()
        stream.close()
        until(lambda: all(one.request.is_done for one in server.worker._choices))
        texts.gate.open()
        until(server.is_idle)
    with texts.engine.exclusive():  # without the rows that chats may go on from
        assert texts.rows.pool.num_free == texts.rows.pool.num_tokens


# ---- a real model, half of it streamed -----------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Iterator[Running]:
    from bminf.server.pretrained import PretrainedTexts

    limit = 420e6
    model = bminf.load(smollm2_folder, limit, quantization=None, device="cpu", max_length=256)
    tokenizer = model.tokenizer

    def dialogue(messages: Any) -> list[int]:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = PretrainedTexts(
        model, tokenizer, lambda text: tokenizer(text)["input_ids"], dialogue,
        [tokenizer.eos_token_id], tokenizer.chat_template,
    )  # fmt: skip
    plan = texts.plan
    assert 0.4 < len(plan.streamed) / len(plan.blocks) < 0.6
    with running(lambda: texts, name="smollm2") as server:
        yield server


@pytest.mark.slow  # the fixture takes twenty seconds
def test_a_real_model_answers_while_half_of_it_streams(smollm2: Running) -> None:
    with client_of(smollm2) as client:
        reply = client.chat.completions.create(
            model="smollm2", temperature=0, max_tokens=16,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
        )  # fmt: skip
        content = reply.choices[0].message.content
        assert content is not None and "Paris" in content
        completion = client.completions.create(
            model="smollm2", temperature=0, max_tokens=6, prompt="The capital of France is", n=2
        )
    assert [choice.text for choice in completion.choices] == [completion.choices[0].text] * 2
    assert "Paris" in completion.choices[0].text
    assert smollm2.get("/plan").json["stats"]["bytes_copied"] > 0


@pytest.mark.slow  # the fixture takes twenty seconds
def test_a_real_model_streams_what_it_says_as_a_whole(smollm2: Running) -> None:
    async def ask() -> str:
        async with AsyncOpenAI(base_url=f"{smollm2.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="smollm2", temperature=0, max_tokens=16, stream=True,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
            )  # fmt: skip
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert "Paris" in asyncio.run(ask())
