"""Run by tools/experts_by_need.py, with another bminf on the path: a token of the unpacked model.

`python whole_experts.py CONFIG FOLDER TOKENS THREADS`. CONFIG is the folder that has config.json.
The weights, in bfloat16, are files in FOLDER that are mapped; made of random numbers where they are
not there yet. The model is wrapped with room for two layers beside what lies outside them. Each
line on stdin is answered by one of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

_CHUNK = 2**24  # numbers that are drawn at a time


def main(config: Path, folder: Path, num_tokens: int) -> None:
    import bminf

    model = make(config, folder)
    bminf.wrapper(model, False, least_limit(model), device="cpu", offload_dir=folder)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (num_tokens,), generator=generator)
    token_s(model, tokens[:2])
    print(json.dumps({"limit": least_limit(model)}), flush=True)
    for _ in sys.stdin:
        copied, start_s = bytes_copied(model), time.process_time()
        found = {"token_s": token_s(model, tokens)}
        found["token_cpu_s"] = (time.process_time() - start_s) / num_tokens
        found["copied_bytes"] = (bytes_copied(model) - copied) / num_tokens
        print(json.dumps(found), flush=True)


def make(config: Path, folder: Path) -> Any:
    """Of mapped files, one a parameter."""
    import transformers

    sizes = transformers.Qwen3MoeConfig.from_pretrained(config)
    sizes.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in list(model.named_parameters()):
        holder, _, key = name.rpartition(".")
        weight = mapped(folder / name, parameter.shape, "norm" in name)
        setattr(model.get_submodule(holder), key, torch.nn.Parameter(weight, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(sizes)
    return model.eval()


def mapped(path: Path, shape: torch.Size, is_norm: bool) -> torch.Tensor:
    """Small random numbers, or ones."""
    number = shape.numel()
    if not path.exists():
        with path.open("wb") as file:
            for start in range(0, number, _CHUNK):
                count = min(_CHUNK, number - start)
                drawn = torch.ones(count) if is_norm else 1e-3 * torch.randn(count)
                file.write(drawn.bfloat16().view(torch.uint8).numpy().data)
    weight = torch.from_file(str(path), shared=False, size=number, dtype=torch.bfloat16)
    return weight.view(shape)


def least_limit(model: Any) -> int:
    """In bytes."""
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return whole - sum(layers) + 2 * max(layers)


def bytes_copied(model: Any) -> int:
    import bminf

    stats = bminf.stats_of(model)
    assert stats is not None
    return stats.bytes_copied


def token_s(model: Any, tokens: torch.Tensor) -> float:
    """Seconds a token, decoded one by one with a cache."""
    past = None
    with torch.no_grad():
        start_s = time.perf_counter()
        for token in tokens:
            past = model(token.view(1, 1), past_key_values=past, use_cache=True).past_key_values
    return (time.perf_counter() - start_s) / len(tokens)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
