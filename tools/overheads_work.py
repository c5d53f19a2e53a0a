"""What tools.overheads runs in a process of its own, with the bminf of some checkout: it reads
names of measurements, one a line, and prints what each gives, in seconds of CPU time.

Only bminf's public names are used, so that checkouts of any age can be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import bminf

HIDDEN = 32
TOKENS_AT_ONCE = 4  # enough for the copies ahead, at the end of a run, not to count
NUM_LAYERS = 2  # of the GLM that is loaded
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_CHARACTERS = [*map(chr, _BYTES), *map(chr, range(256, 512 - len(_BYTES)))]
VOCAB = [*_CHARACTERS, "<|endoftext|>"]  # GPT-2's, with no merges
NUM_ROWS = len(VOCAB) + 8


def main() -> None:
    print(json.dumps(str(bminf.__file__)), flush=True)
    torch.set_num_threads(1)
    num_blocks, num_tokens = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_glm(Path(folder))
        models = llama(num_blocks), streamed(llama(num_blocks))
        measurements: dict[str, Callable[[], float]] = {
            "token": lambda: added_s(*models, num_tokens),
            "load": lambda: load_s(checkpoint),
        }
        for line in sys.stdin:
            print(json.dumps(measurements[line.strip()]()), flush=True)


# ---- a token -------------------------------------------------------------------------------------


def llama(num_layers: int) -> Any:
    """A random model whose products take next to no time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def streamed(model: Any) -> Any:
    """`model` with all its blocks in two slots."""
    whole = bminf.plan_of(bminf.wrapper(model, False, memory_limit="1GiB", device="cpu"))
    assert whole is not None
    limit = whole.fixed_bytes + 2 * max(block.nbytes for block in whole.blocks)
    bminf.unwrap(model)
    return bminf.wrapper(model, False, memory_limit=limit, device="cpu")


def added_s(resident: Any, streams: Any, num_tokens: int) -> float:
    """What streaming adds to a token: the median of differences, each between two short runs."""
    runs = range(-(-num_tokens // TOKENS_AT_ONCE))
    return median(
        token_s(streams, TOKENS_AT_ONCE) - token_s(resident, TOKENS_AT_ONCE) for _ in runs
    )


def token_s(model: Any, num_tokens: int) -> float:
    """CPU seconds of all threads, for one token."""
    ids = torch.tensor([[5]])
    with torch.inference_mode():
        cache = model(ids).past_key_values
        began_s = time.process_time()
        for _ in range(num_tokens):
            model(ids, past_key_values=cache)
    return (time.process_time() - began_s) / num_tokens


# ---- a load --------------------------------------------------------------------------------------


def load_s(checkpoint: Path) -> float:
    """CPU seconds of all threads, without giving the model back."""
    began_s = time.process_time()
    with closing(bminf.models.GLM(checkpoint, device="cpu", max_length=32)):
        return time.process_time() - began_s


def write_glm(folder: Path) -> Path:
    """A GLM-10B of random weights in the form of Hugging Face, with its vocabulary."""
    config = {
        "model_type": "glm", "num_layers": NUM_LAYERS, "hidden_size": HIDDEN,
        "num_attention_heads": 2, "max_sequence_length": 64, "block_position_encoding": True,
        "attention_scale": 1.0, "output_predict": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ids = {token: number for number, token in enumerate(VOCAB)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tensors = {name: torch.randn(shape).half() for name, shape in shapes().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def shapes() -> dict[str, tuple[int, ...]]:
    """The names that the authors gave -> shape."""
    found: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (NUM_ROWS, HIDDEN),
        "transformer.position_embeddings.weight": (65, HIDDEN),
        "transformer.block_position_embeddings.weight": (65, HIDDEN),
    }
    norms = ["transformer.final_layernorm"]
    for number in range(NUM_LAYERS):
        layer = f"transformer.layers.{number}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        for name, rows, columns in (
            ("attention.query_key_value", 3, 1),
            ("attention.dense", 1, 1),
            ("mlp.dense_h_to_4h", 4, 1),
            ("mlp.dense_4h_to_h", 1, 4),
        ):
            found[f"{layer}.{name}.weight"] = (rows * HIDDEN, columns * HIDDEN)
            found[f"{layer}.{name}.bias"] = (rows * HIDDEN,)
    return found | {f"{norm}.{kind}": (HIDDEN,) for norm in norms for kind in ("weight", "bias")}


if __name__ == "__main__":
    main()
