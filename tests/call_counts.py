"""Prints, as JSON, how many calls some pieces of work take. It is a program of its own, because
what other tests have imported changes the numbers."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from streaming import stream
from tiny_glm import ice_tokenizer, tiny_glm130b
from tiny_models import LLAMA
from traced import Trace

from bminf.arch.glm import GLM as Network
from bminf.layers.quantized_linear import QuantizedLinear
from bminf.models import GLM

NUM_BLOCKS = 30
TEXT = "the blocks of a layer wait"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_glm130b().write_original(Path(folder))
        counts = {**token_of_llama(), **token_of_glm(path), **load_of_glm(path)}
    print(json.dumps(counts))


# ---- a token -------------------------------------------------------------------------------------


def token_of_llama() -> dict[str, float]:
    """Nothing of transformers is counted, so that a resident one takes no call."""
    ten, thirty = (calls_of_step(stream(llama(n))) for n in (10, NUM_BLOCKS))
    return {
        "token of a resident Llama": calls_of_step(llama(NUM_BLOCKS)),
        "token of a streamed Llama of 30 blocks": thirty,
        "one more streamed block of a Llama": (thirty - ten) / (NUM_BLOCKS - 10),
    }


def llama(num_layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": num_layers})
    return transformers.LlamaForCausalLM(config).eval()


def calls_of_step(model: Any) -> int:
    """Of one decode step, when the order of the blocks is known."""
    ids = torch.tensor([[5]])
    with torch.inference_mode():
        cache = model(ids).past_key_values
        model(ids, past_key_values=cache)
        with Trace() as trace:
            model(ids, past_key_values=cache)
    return trace.calls.total()


def token_of_glm(path: Path) -> dict[str, float]:
    with closing(load(path)) as model:
        resident, limit = calls_of_token(model), model.plan.least_limit
    with closing(load(path, memory_limit=limit)) as model:
        num_blocks, streamed = len(model.plan.streamed), calls_of_token(model)
    return {
        "token of a resident GLM": resident,
        "token of a streamed GLM": streamed,
        "a streamed block of a GLM": (streamed - resident) / num_blocks,
    }


def calls_of_token(model: GLM) -> int:
    """What an answer of 6 tokens takes more than one of 5."""
    counts = []
    for max_tokens in (5, 5, 6):
        with Trace() as trace:
            model.generate(TEXT, max_tokens=max_tokens, temperature=0)
        counts.append(trace.calls.total())
    return counts[2] - counts[1]


# ---- a load --------------------------------------------------------------------------------------


def load(path: Path, memory_limit: int = 2**30) -> GLM:
    """With a limit, because looking for free memory takes other calls on other machines."""
    return GLM(path, memory_limit, device="cpu", max_length=64, tokenizer=ice_tokenizer())


def load_of_glm(path: Path) -> dict[str, float]:
    load(path).close()  # what is imported on the way
    with counted(Network) as networks, counted(QuantizedLinear) as linears, opened() as files:
        with Trace() as trace:
            model = load(path)
    model.close()
    public = {name: n for (file, name), n in trace.calls.items() if is_public(file, name)}
    return {
        "load: files of bminf": len(trace.entries),
        "load: moves between files": trace.entries.total(),
        "load: calls": trace.calls.total(),
        "load: networks built": len(networks),
        "load: QuantizedLinears made": len(linears),
        "load: opens of the weights": sum(file.endswith(".pt") for file in files),
        "load: most calls of one function of source.py": max(public.values()),
    }


def is_public(file: str, name: str) -> bool:
    """Whether it is a function that puts a model together."""
    return file in ("models/source.py", "models/assemble.py") and name[0] not in "_<"


@contextmanager
def counted(kind: type) -> Iterator[list[None]]:
    """One item for each object of the class that is made."""
    made: list[None] = []
    begin = kind.__init__

    def counting(self: Any, *arguments: Any, **keywords: Any) -> None:
        made.append(None)
        begin(self, *arguments, **keywords)

    with replaced(kind, "__init__", counting):
        yield made


@contextmanager
def opened() -> Iterator[list[str]]:
    """The path of each file that is opened, as often as it is."""
    paths: list[str] = []
    is_over = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not is_over:
            paths.append(str(arguments[0]))

    sys.addaudithook(hook)  # it cannot be taken off again
    try:
        yield paths
    finally:
        is_over = True


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    main()
