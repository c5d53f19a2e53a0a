"""langchain-openai against a server.   URL"""

from __future__ import annotations

import sys

import openai
from langchain_openai import ChatOpenAI, OpenAI

SETTINGS = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "smollm2",
            "temperature": 0, "max_tokens": 12}  # fmt: skip
QUESTION = "What is the capital of France?"

chat = ChatOpenAI(**SETTINGS)
answer = chat.invoke(QUESTION)
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0, answer
assert "".join(piece.content for piece in chat.stream(QUESTION)) == answer.content
print("langchain ChatOpenAI: whole and streamed")

text = OpenAI(**SETTINGS, n=2, best_of=2)
assert "Paris" in text.invoke("The capital of France is")
print("langchain OpenAI: text")

try:
    chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("a")
    raise AssertionError("tools were ignored")
except openai.BadRequestError as error:
    assert "tools is not supported" in str(error)
    print("langchain bind_tools: refused")
try:
    chat.invoke("word " * 3000)
    raise AssertionError("it was read")
except openai.BadRequestError as error:
    assert type(error).__name__ == "OpenAIContextOverflowError", type(error)
    print("langchain: OpenAIContextOverflowError")
