"""`python -m benchmarks.glm_memory check --folder FOLDER`: what full-size layers of GLM-130B take.

Three layers and the output head are loaded and write a few tokens, all resident and then within
1.2 GB; a checkpoint of one layer in half precision is converted. Each is a process of its own whose
anonymous memory is watched. It needs 10 GB of disk, 6 GB of memory and a few minutes. The other
commands are its single steps; `decode` with one layer is part of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.glm_model import GLM_FORMATS, PUBLISHED, Loaded, Sizes, loaded, planned
from benchmarks.model_options import count
from benchmarks.random_model import random_matrix, random_weights
from bminf.checkpoint.binary_file import BinaryFile
from bminf.checkpoint.stored import InFile, contiguous, pieces
from bminf.checkpoint.torch_writer import Saved, write_torch_file
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.generation.loop import decode
from bminf.generation.sampling import Sampler, Sampling, top_k_then_top_p
from bminf.layers.kv_cache import KVCache
from bminf.models.convert import WEIGHTS_FILE, convert
from bminf.models.glm_text import Blank, GLMDecoder, blank
from bminf.models.prompt import padded
from bminf.offload import memory
from bminf.offload.backends.cpu import CpuBackend
from bminf.tokenizers.icetk import IceTokenizer
from bminf.tokenizers.pieces import sentencepiece
from bminf.units import parse_bytes

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 2  # to write: a pass over the text, and one over a token
NUM_RANKS, SMALL_VOCABULARY = 8, 512

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """0, after a report in JSON; of check 1 where something took more than it may."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glm_memory", description=__doc__)
    steps = parser.add_subparsers(metavar="COMMAND", required=True)
    for run in (_check, _decode, _write, _convert):
        step = steps.add_parser(run.__name__[1:], help=run.__doc__)
        step.add_argument("--folder", type=Path, required=True, help="for files of any size")
        step.add_argument("--threads", type=count, default=1, metavar="N", help="default: 1")
        step.set_defaults(run=run)
        if run is _decode:
            add = step.add_argument
            add("--layers", type=count, default=3, metavar="N")
            add("--vocabulary", type=count, default=PUBLISHED.vocab_size, metavar="N")
            add("--memory-limit", metavar="SIZE", help="default: enough for all")
            add("--max-length", type=count, default=128, metavar="N", help="default: 128")
            add("--quantization", choices=GLM_FORMATS, default="int4-row")
            add("--head-quantization", choices=GLM_FORMATS, default="int8")
        if run is _convert:
            step.add_argument("--quantization", default="auto", metavar="FORMAT")
    return parser


def _check(arguments: argparse.Namespace) -> bool:
    """all of it, with what each step may take"""
    folder, threads = str(arguments.folder), str(arguments.threads)

    def step(*command: str) -> Report:
        own = (*command, "--folder", folder, "--threads", threads)
        report = step_in_a_process(*own)
        print(json.dumps({"command": " ".join(command)} | report), flush=True)
        return report

    whole, limited = step("decode"), step("decode", "--memory-limit", "1.2GB")
    for table in arguments.folder.glob(f"{_TABLE}-*"):
        table.unlink()
    step("write")
    converted = [
        step("convert", "--quantization", quantization)
        for quantization in ("auto", "int4-row", "none")
    ]
    shutil.rmtree(_source(arguments.folder))
    found = list(_verdicts(whole, limited, converted))
    print("\n".join(f"{'yes' if holds else 'NO '} {text}" for text, holds in found))
    return not all(holds for _, holds in found)


def _verdicts(
    whole: Report, limited: Report, converted: Sequence[Report]
) -> Iterator[tuple[str, bool]]:
    """What has to hold, in words, and whether it does."""
    for name, report, most in (
        ("three layers", whole, 5.2e9),
        ("three layers within 1.2 GB", limited, 1.05 * 1.2e9),
        *((f"converting to {one['quantization']}", one, 1e9) for one in converted),
    ):
        used = report["used"]
        yield f"{name}: {used / 1e9:.3f} GB, at most {most / 1e9:g}", used <= most
    yield "bytes were streamed within 1.2 GB alone", limited["copied"] > 0 == whole["copied"]
    yield "the logits are the same", whole["logits_sha256"] == limited["logits_sha256"]


def step_in_a_process(*command: str) -> Report:
    """What a command reports.   Raises RuntimeError with all that it wrote where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.glm_memory", *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


# ---- writing -------------------------------------------------------------------------------------

_TABLE = "embedding"


def _decode(arguments: argparse.Namespace) -> bool:
    """load layers of random weights, and write a few tokens"""
    config = replace(PUBLISHED, num_hidden_layers=arguments.layers, vocab_size=arguments.vocabulary)
    sizes = Sizes(
        config, torch.float32, arguments.quantization, arguments.head_quantization,
        batches=((1, arguments.max_length),),
    )  # fmt: skip
    given = arguments.memory_limit
    limit = 2**50 if given is None else parse_bytes(given, "--memory-limit")
    tiny = replace(config, hidden_size=128, intermediate_size=256, num_attention_heads=2)
    # What a process needs once, whatever the size of its model.
    _take(replace(sizes, config=replace(tiny, vocab_size=64), batches=((1, 8),)), 10**8, arguments)
    print(json.dumps(_take(sizes, limit, arguments)))
    return False


def _take(sizes: Sizes, limit: int, arguments: argparse.Namespace) -> Report:
    """Load, write, let go; what it took."""
    table = _table(sizes, arguments.folder / f"{_TABLE}-{sizes.config.vocab_size}")
    before = _settled()
    with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
        with loaded(sizes, limit, CpuBackend(), arguments.folder, table) as opened:
            loading, logits = rss_anon_bytes() or 0, _written(opened, *sizes.batches[0])
            plan, copied = opened.scheduler.plan, opened.scheduler.stats().bytes_copied
    return {
        "used": peak.peak_bytes,
        "loaded": loading - before,
        "limit": plan.budget,
        "planned": plan.total_bytes,
        "reserved": plan.reserved_bytes,
        "weights": plan.resident_bytes + plan.slot_bytes,
        "streamed": len(plan.streamed),
        "copied": copied,
        "logits_sha256": logits,
    }


def _table(sizes: Sizes, path: Path) -> InFile:
    """An embedding in a file."""
    config = sizes.config
    shape = (config.vocab_size, config.hidden_size)
    if not path.exists():
        assembly, _ = planned(sizes, 2**50)
        table = random_weights(assembly.network).table
        assert table is not None
        with path.open("wb") as file:
            for _, rows in pieces(table):
                file.write(rows.contiguous().numpy().tobytes())
    return contiguous(BinaryFile(path), 0, shape, torch.float16, _TABLE)


def _written(opened: Loaded, num_rows: int, max_length: int) -> str:
    """The digest of all logits of texts as long as there is room for, every second one shorter."""
    longest = max_length - NUM_TOKENS
    lengths = [longest - number % 2 for number in range(num_rows)]
    blanks = [
        blank([at % 60 for at in range(length)], length - 1, 0, is_continued=True)
        for length in lengths
    ]
    decoder = _Watched(opened, opened.model.new_cache(num_rows, max_length), blanks)
    sampling = Sampling(top_p=0.9, seed=1, filter=top_k_then_top_p)
    vocab_size = opened.model.config.vocab_size
    sampler = Sampler(sampling, [one.input_ids for one in blanks], vocab_size, "cpu")
    start = torch.tensor(padded([one.start_ids for one in blanks], 0, padding_side="left"))
    with torch.inference_mode():
        steps = list(decode(decoder, start, sampler, [], NUM_TOKENS))
    assert len(steps) == NUM_TOKENS
    return decoder.digest.hexdigest()


class _Watched(GLMDecoder):
    """A decoder that keeps a digest of the logits it has given."""

    def __init__(self, opened: Loaded, cache: KVCache, blanks: Sequence[Blank]) -> None:
        super().__init__(opened.model, cache, blanks)
        self.digest = hashlib.sha256()

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(input_ids)
        if not logits.isfinite().all():
            raise ArithmeticError("the random model gives NaN or infinity")
        self.digest.update(logits.numpy().tobytes())
        return logits


def _settled() -> int:
    """Anonymous memory after what can be given back was."""
    memory.trim()
    held = rss_anon_bytes()
    if held is None:
        raise SystemExit("this system does not tell RssAnon")
    return held


# ---- converting ----------------------------------------------------------------------------------


def _write(arguments: argparse.Namespace) -> bool:
    """write a checkpoint of one layer in half precision, in the authors' layout of 8 ranks"""
    folder = _source(arguments.folder)
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text("1", encoding="utf-8")
    for rank in range(NUM_RANKS):
        path = folder / "1" / f"mp_rank_{rank:02d}_model_states.pt"
        write_torch_file(path, {"module": _rank()})
    text = "the weights of a layer wait on the host until it is their turn"
    with (folder / "ice_text.model").open("wb") as file:
        sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter([text]), model_writer=file, vocab_size=60, unk_id=0, bos_id=1,
            eos_id=2, pad_id=3, user_defined_symbols=["<n>"], hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    written = sum(file.stat().st_size for file in (folder / "1").iterdir())
    print(json.dumps({"written": written}))
    return False


def _rank() -> Mapping[str, Saved]:
    """All ranks have the same numbers."""
    size, wide = PUBLISHED.hidden_size, PUBLISHED.intermediate_size
    layer = "transformer.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (SMALL_VOCABULARY // NUM_RANKS, size),
        f"{layer}.attention.query_key_value.weight": (3 * size // NUM_RANKS, size),
        f"{layer}.attention.query_key_value.bias": (3 * size // NUM_RANKS,),
        f"{layer}.attention.dense.weight": (size, size // NUM_RANKS),
        f"{layer}.attention.dense.bias": (size,),
        f"{layer}.mlp.dense_h_to_4h.weight": (2 * wide // NUM_RANKS, size),
        f"{layer}.mlp.dense_h_to_4h.bias": (2 * wide // NUM_RANKS,),
        f"{layer}.mlp.dense_4h_to_h.weight": (size, wide // NUM_RANKS),
        f"{layer}.mlp.dense_4h_to_h.bias": (size,),
    }
    norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    for norm in (*norms, "transformer.final_layernorm"):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    return {name: Saved(random_matrix(name, shape)) for name, shape in shapes.items()}


def _convert(arguments: argparse.Namespace) -> bool:
    """convert what `write` has written"""
    source, destination = _source(arguments.folder), arguments.folder / "converted"
    shutil.rmtree(destination, ignore_errors=True)
    wanted = None if arguments.quantization == "none" else arguments.quantization
    tokenizer = IceTokenizer(source / "ice_text.model", image_offset=0)
    before = _settled()
    with PeakMemory(is_cuda=False, baseline_bytes=before) as peak:
        convert(source, destination, wanted, config=_config(), tokenizer=tokenizer)
    made = (destination / WEIGHTS_FILE).stat().st_size
    shutil.rmtree(destination)
    report = {"quantization": arguments.quantization, "used": peak.peak_bytes, "written": made}
    print(json.dumps(report))
    return False


def _source(folder: Path) -> Path:
    return folder / "original"


def _config() -> dict[str, Any]:
    return {"num_layers": 1, "num_attention_heads": PUBLISHED.num_attention_heads}


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.exit(main())
