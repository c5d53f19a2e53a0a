"""litellm against a server: text, chat, streams, and errors as it names them.   URL"""

from __future__ import annotations

import sys
from typing import Any

import litellm

litellm.suppress_debug_info = True
URL = f"{sys.argv[1]}/v1"
SETTINGS: dict[str, Any] = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 12}
ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]

for provider in ("openai", "hosted_vllm"):
    reply = litellm.completion(f"{provider}/smollm2", ASKED, **SETTINGS)
    assert "Paris" in reply.choices[0].message.content, reply
    assert reply.usage.completion_tokens > 0
    chunks = litellm.completion(f"{provider}/smollm2", ASKED, stream=True, **SETTINGS)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content, text
    print(f"litellm {provider}: chat, streamed and whole")

prompt = "The capital of France is"
reply = litellm.text_completion(prompt, "text-completion-openai/smollm2", **SETTINGS)
assert "Paris" in reply.choices[0].text, reply
print("litellm text-completion-openai: text")

too_long = [{"role": "user", "content": "word " * 3000}]
try:
    litellm.completion("openai/smollm2", too_long, **SETTINGS)
    raise AssertionError("it was read")
except litellm.ContextWindowExceededError:
    print("litellm: ContextWindowExceededError")
try:
    litellm.completion("openai/no-such-model", ASKED, **SETTINGS)
    raise AssertionError("it was found")
except litellm.NotFoundError:
    print("litellm: NotFoundError")
