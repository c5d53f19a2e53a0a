"""`python -m tools.experts_by_need FOLDER`: a token of a mixture of experts that does not fit.

Makes a random model in FOLDER, of the shapes of Qwen3-30B-A3B with fewer layers, in 4 bits, block
by block; loads it on the CPU with room for some of the experts, and once more with room for all.
Then, in rounds that take turns: the time of a token of each, the bytes that the first one missed,
and how fast its file is read, expert by expert. Prints the medians, by how much anonymous memory
grew beside the limit, and the time of a token beside what the misses and the resident model take.
With --against, a process with another checkout of bminf takes its turns as well: it streams the
layers of the model unpacked, in bfloat16 (tools/whole_experts.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import bminf
from bminf.checkpoint.folder import write_weights
from bminf.cli.measure import rss_anon_bytes
from bminf.description import WEIGHTS_FILE, Description, PackedLinear
from bminf.layers.experts import PackedExperts
from bminf.layers.quantize import choose_linears, install
from bminf.layout import Chunk, Layout
from bminf.offload.blob import lay_out
from bminf.offload.blocks import find_blocks
from bminf.quantization.packed import INT4

_SHARD_BYTES = 2**32


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the medians were printed."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if not (arguments.folder / "config.json").exists():
        make(arguments.folder, arguments.layers)
    print(json.dumps(measure(arguments), indent=1))
    return 0


_SIZES = dict(
    hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=32_000,
)  # fmt: skip


def make(folder: Path, num_layers: int, **sizes: int) -> None:
    """A folder as bminf.save() writes it, of random codes.   sizes: other than Qwen3-30B-A3B's."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        **{**_SIZES, **sizes}, num_hidden_layers=num_layers, norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"], dtype="float32",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    blocks = find_blocks(model)
    choice = choose_linears(model, blocks, INT4)
    blobs = lay_out(model, blocks, choice.replacements, keep_addresses=False)
    layouts = {"": blobs.outside, **blobs.blocks}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(
        folder / WEIGHTS_FILE, layouts, lambda block: _random(layouts[block]), {"format": "pt"},
        _SHARD_BYTES,
    )  # fmt: skip
    config.save_pretrained(folder)
    _described(model, install(model, choice.replacements)).write(folder)


def _random(layout: Layout) -> Iterator[Chunk]:
    for name, spec in layout.specs.items():
        if not spec.dtype.is_floating_point:
            limit = min(256, torch.iinfo(spec.dtype).max) if name.endswith("qweight") else 8
            yield name, torch.randint(0, limit, spec.shape, dtype=spec.dtype)
        elif name.endswith("row_scale"):
            # So small that the tokens' own vectors decide which experts they go to.
            yield name, torch.full(spec.shape, 1e-5, dtype=spec.dtype)
        elif "norm" in name:
            yield name, torch.ones(spec.shape, dtype=spec.dtype)
        else:
            yield name, torch.randn(spec.shape, dtype=spec.dtype)


def _described(model: Any, replaced: Mapping[str, torch.nn.Module]) -> Description:
    packed = {}
    for name in replaced:
        module = model.get_submodule(name)
        if isinstance(module, PackedExperts):
            for key, stack in module.stacks():
                packed[f"{name}.{key}"] = PackedLinear(stack.form, stack.shape, stack.dtype)
        else:
            shape = (module.out_features, module.in_features)
            packed[name] = PackedLinear(module.form, shape, module.dtype)
    return Description(packed)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    whole = bminf.load(arguments.folder, "100GB", device="cpu")
    plan = bminf.plan_of(whole)
    generator = torch.Generator().manual_seed(1)
    count = 2 * arguments.tokens
    tokens = torch.randint(0, whole.config.vocab_size, (count,), generator=generator)
    _token_s(whole, tokens)  # what any model takes beside its weights is there before
    before = rss_anon_bytes()
    limit = _limit(arguments.folder, plan, arguments.fraction)
    model = bminf.load(
        arguments.folder, limit, device="cpu", offload_dir=arguments.folder,
        prefetch_experts=arguments.prefetch,
    )  # fmt: skip
    _token_s(model, tokens)  # until the pool is full
    grown = rss_anon_bytes() - before
    with _other(arguments) as other:
        rounds = [_round(model, whole, tokens, seed) | other() for seed in range(arguments.rounds)]
    found = {key: median(one[key] for one in rounds) for key in rounds[0]}
    predicted_s = found["missed_bytes"] / found["file_bytes_per_s"] + found["resident_s"]
    experts = bminf.plan_of(model).experts
    return {
        "limit": limit, "grown": grown, "grown_of_limit": grown / limit,
        "slots": experts.num_slots, "experts": experts.number, **found,
        "of_accounted": found["token_s"] / predicted_s,
    } | {
        f"times_{key}": found[f"against_{key}"] / found[key]
        for key in ("token_s", "token_cpu_s") if f"against_{key}" in found
    }  # fmt: skip


@contextmanager
def _other(arguments: argparse.Namespace) -> Iterator[Callable[[], dict[str, float]]]:
    """What measures the other checkout once; nothing where none is given."""
    if arguments.against is None:
        yield dict
        return
    argv = [arguments.folder, arguments.folder / "unpacked", arguments.tokens, arguments.threads]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("whole_experts.py")), *map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(arguments.against)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def answer() -> dict[str, float]:
        assert process.stdout is not None
        return {
            f"against_{key}": value for key, value in json.loads(process.stdout.readline()).items()
        }

    def measure_once() -> dict[str, float]:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return answer()

    with process:
        answer()  # it is ready
        try:
            yield measure_once
        finally:
            process.kill()


def _limit(folder: Path, whole: Any, fraction: float) -> int:
    from bminf.cli.sources import find

    arguments = argparse.Namespace(
        quantization=None, reserve=0, blocks=None, host_memory=None, max_length=None,
        max_batch_size=1,
    )  # fmt: skip
    planned = find(str(folder)).plan(arguments, str(whole.total_bytes * 9 // 10)).experts
    dense = whole.total_bytes - whole.table_bytes - planned.nbytes
    return dense + int(fraction * planned.number) * planned.slot_bytes


def _round(model: Any, whole: Any, tokens: torch.Tensor, seed: int) -> dict[str, float]:
    before, start_s = bminf.stats_of(model), time.process_time()
    token_s = _token_s(model, tokens)
    after, end_s = bminf.stats_of(model), time.process_time()
    wanted = after.expert_hits + after.expert_misses - before.expert_hits - before.expert_misses
    return {
        "token_s": token_s,
        "token_cpu_s": (end_s - start_s) / len(tokens),
        "missed_bytes": (after.expert_bytes_copied - before.expert_bytes_copied) / len(tokens),
        "unused_bytes": (after.expert_bytes_unused - before.expert_bytes_unused) / len(tokens),
        "hits": (after.expert_hits - before.expert_hits) / wanted,
        "resident_s": _token_s(whole, tokens),
        "file_bytes_per_s": _file_rate(model, seed),
    }


def _token_s(model: Any, tokens: torch.Tensor) -> float:
    """Seconds a token, decoded one by one with a cache."""
    past = None
    with torch.no_grad():
        start_s = time.perf_counter()
        for token in tokens:
            past = model(token.view(1, 1), past_key_values=past, use_cache=True).past_key_values
    return (time.perf_counter() - start_s) / len(tokens)


def _file_rate(model: Any, seed: int, number: int = 200) -> float:
    """Bytes a second of reading experts, in any order, into memory."""
    scheduler = model.__dict__["_bminf_scheduler"]
    store, blocks = scheduler.backend._opened_store(), range(len(scheduler.plan.streamed), 10**9)
    experts = scheduler.plan.experts
    layouts = [layout for one in scheduler.experts for layout in one.stack.experts]
    order = random.Random(seed).sample(range(experts.number), min(number, experts.number))
    room = torch.empty(max(layout.extent for layout in layouts), dtype=torch.uint8)
    start_s = time.perf_counter()
    for expert in order:
        store.read_into(blocks[expert], room[: layouts[expert].extent])
    taken_s = time.perf_counter() - start_s
    return sum(layouts[expert].extent for expert in order) / taken_s


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "tools.experts_by_need", description=__doc__, formatter_class=form
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the model is made")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="default: 6")
    parser.add_argument("--fraction", type=float, default=0.2, help="of the experts; default: 0.2")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="default: 8, twice")
    parser.add_argument("--prefetch", action="store_true", help="with prefetch_experts=True")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="of bminf")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
