"""Small models that 2 and 4 ranks can share, and programs that ranks run: forked from one process
that has imported everything, as torchrun would start them.

    python tests/ranks.py FOLDER CASE.SIZE...

writes what each rank of a case saw to FOLDER/CASE.SIZE.RANK.pt, and how it ended to CASE.SIZE.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128}
ANY_DEGREE: dict[str, dict[str, Any]] = {
    "cpm1": {"hidden_size": 64, "num_attention_heads": 4},
    "cpm2": _T5,
    "eva": _T5,
    "glm130b": {"inner_hidden_size": 128},
    "glm10b": {},
    "bloom": {"hidden_size": 64, "n_head": 4},
}
"""By name, what is changed in their configurations."""

TEXTS = {
    "cpm1": "今天天气",
    "cpm2": "今天天气",
    "eva": ["今天天气", "你是谁"],
    "glm130b": "今天天气[gMASK]",
    "glm10b": "the in[gMASK]",
    "bloom": "the in a",
}
_DEADLINE_S = 100.0
_PORT_BYTES = 8

MOST_S = 10.0
"""Until all ranks have reported the one that failed, with loading."""

Report = dict[str, Any]


def write_models(folder: Path) -> None:
    """A folder of each model, in its authors' layout as 2 ranks have it; another one of CPM-1, and
    one whose heads 2 ranks cannot share."""
    from tiny_glm import tiny_model

    for name, changed in ANY_DEGREE.items():
        tiny_model(name, **changed).write_original(folder / name, 2)
    tiny_model("cpm1", **ANY_DEGREE["cpm1"]).write_original(folder / "cpm1b")
    tiny_model("cpm1", hidden_size=63).write_original(folder / "odd" / "cpm1")


# ---- what ranks run ------------------------------------------------------------------------------


def load(folder: Path, name: str, **arguments: Any) -> Any:
    from tiny_glm import tokenizer_of

    import bminf

    kinds = {"cpm2": "CPM2", "eva": "EVA", "glm130b": "GLM", "glm10b": "GLM", "bloom": "BLOOM"}
    settings = {
        "device": "cpu", "max_length": 64, "max_batch_size": 2, "quantization": None,
        "tokenizer": tokenizer_of(name), **arguments,
    }  # fmt: skip
    return getattr(bminf.models, kinds.get(name, "CPM1"))(folder / name, **settings)


def streaming_limit(folder: Path, name: str, form: Any, size: int) -> int:
    """Bytes that are one too few for the rank that needs the least."""
    import torch

    from bminf.layers.parallel import Group
    from bminf.layers.rendezvous import Place
    from bminf.models.assemble import Formats, assemble, plan_within
    from bminf.models.source import find_sizes

    group = Group(Place(size - 1, size))
    made = assemble(find_sizes(folder / name), Formats(form), torch.float32, group=group)
    return plan_within(made, 2**60, 64, 2, "cpu").total_bytes - 1


def formats() -> dict[str, Any]:
    from bminf.quantization.packed import INT4, INT8, Format

    return {"float": None, "int8": INT8, "int4": INT4, "int4-row": Format(4)}


def zoo(folder: Path, rank: int, size: int) -> Report:
    """Every model, resident and streamed, in every format; what all its methods give, which does
    not depend on the number of ranks, of 2 at most."""
    found: Report = {}
    for name in ANY_DEGREE:
        for kind, form in formats().items():
            for is_streamed in (False, True) if kind != "int4" else (True,):
                limit = streaming_limit(folder, name, form, size) if is_streamed else None
                arguments = {"memory_limit": limit or "1GB", "quantization": form}
                with load(folder, name, **arguments) as model:
                    is_all = size <= 2 and not is_streamed and form is None
                    said = (everything if is_all else some)(model, name)
                    said["streamed"] = len(model.plan.streamed)
                    said["mapped"] = size > 1 and _is_mapped(model.model.embed_tokens)
                found[f"{name} {kind} {'streamed' if is_streamed else 'resident'}"] = said
    return found


def _is_mapped(table: Any) -> bool:
    """Whether all of an embedding lies in files, whose pages all processes share."""
    from bminf.offload.memory import mapped_files

    is_in_file = mapped_files()
    return all(is_in_file(part.data_ptr()) for part in table._parts)


def some(model: Any, name: str) -> Report:
    text, is_t5 = TEXTS[name], name in ("cpm2", "eva")
    greedy = {"temperature": 0, **({"top_n": None} if name == "eva" else {})}
    given = (text, "吃饭") if is_t5 else (text,)
    return {
        "logits": model.logits(*given),
        "texts": [model.generate(text, max_tokens=4, **greedy)],
    }


def everything(model: Any, name: str) -> Report:
    said, text = some(model, name), TEXTS[name]
    texts: list[Any] = said["texts"]
    texts.append(model.generate_batch([text, text], max_tokens=6, seed=3))
    texts.append(model.generate(text, max_tokens=5, num_beams=2))
    iterator = model.generate_iter(text, max_tokens=5, seed=1)
    texts.append([next(iterator, ""), "".join(iterator), iterator.finish_reason])
    for left in model.generate_iter(text, max_tokens=5, seed=1):
        texts.append(left)
        break
    texts.append(model.generate(text, max_tokens=3, seed=2))
    if name == "cpm2":
        texts.append(model.fill_blank("今天<span>很好<span>。", max_tokens=6, seed=1))
    if name.startswith("glm"):
        texts.append(model.fill_blank(text.replace("[gMASK]", "[MASK]"), max_tokens=3, seed=1))
        if name == "glm130b":
            found = model.generate(text, max_tokens=4, num_beams=2, num_return_sequences=2)
            texts.append([(one.text, one.stopped) for one in found])
            said["scores"] = [one.score for one in found]
    if name not in ("cpm2", "eva"):
        scores = model.score(text, ["a", "b c"])
        length = {"generation_length": 20} if name.startswith("glm") else {}
        said.setdefault("scores", []).extend([*scores, model.perplexity("a b c d e f g", **length)])
    try:
        model.generate(text, max_tokens=-1)
    except ValueError as error:
        texts.append(f"{type(error).__name__}: {error}")
    return said


def _generated(model: Any, number: int = 1) -> None:
    for _ in range(number):
        model.generate(TEXTS["cpm1"], max_tokens=6, temperature=0)


@contextmanager
def _breaking(model: Any, broken: Callable[[], object], is_here: bool) -> Iterator[None]:
    """In the second layer, once it is called for the third time."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and is_here:
            broken()

    handle = model.model.layers[1].feed_forward.up.register_forward_pre_hook(hook)
    yield
    handle.remove()


def _raise() -> None:
    raise ZeroDivisionError("of this rank alone")


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _failing(
    folder: Path, rank: int, wrong_rank: int, broken: Callable[[], object], outlives: str = ""
) -> Report:
    """outlives: the case, where the rank that fails lives on."""
    model = load(folder, "cpm1")
    _generated(model)
    with _breaking(model, broken, rank == wrong_rank):
        found = {"error": _error_of(lambda: _generated(model))}
    if outlives and rank == wrong_rank:
        _outlive(folder, outlives)
    return found


def _outlive(folder: Path, case: str, other: int = 0) -> None:
    """Live on, as a server does, or a notebook, until the other rank of 2 has reported.

    Raises TimeoutError where that waits for this process to end.
    """
    end_s = time.monotonic() + MOST_S
    while not (folder / f"{case}.2.{other}.pt").exists():
        if time.monotonic() > end_s:
            raise TimeoutError(f"rank {other} was not told")
        time.sleep(0.01)


def _error_of(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def raises(folder: Path, rank: int, size: int) -> Report:
    return _failing(folder, rank, 1, _raise)


def first_raises(folder: Path, rank: int, size: int) -> Report:
    return _failing(folder, rank, 0, _raise)


def lives_on(folder: Path, rank: int, size: int) -> Report:
    return _failing(folder, rank, 1, _raise, "lives_on")


def killed(folder: Path, rank: int, size: int) -> Report:
    return _failing(folder, rank, 1, _killed)


def script_raises(folder: Path, rank: int, size: int) -> Report:
    """Where all ranks get an error of rank 0, and then one has an error in what is its own."""

    def run() -> None:
        with load(folder, "cpm1") as model:
            _generated(model)
            if rank == 1:
                _raise()
            _generated(model)

    def wrong() -> None:
        with load(folder, "cpm1") as model:
            model.generate(TEXTS["cpm1"], no_such_option=1)

    found = {"alike": _error_of(wrong), "error": _error_of(run)}
    if rank == 1:
        _outlive(folder, "script_raises")
    return found


def first_script_raises(folder: Path, rank: int, size: int) -> Report:
    """An error in what rank 0 does with the model."""

    def run() -> None:
        with load(folder, "cpm1") as model:
            if rank == 0:
                _raise()
            _generated(model)

    found = {"error": _error_of(run)}
    if rank == 0:
        _outlive(folder, "first_script_raises", 1)
    return found


def ends(folder: Path, rank: int, size: int) -> Report:
    """By an error of the script of rank 1 that nobody catches, of which Python calls the hook."""
    sys.excepthook = lambda *_: None
    model = load(folder, "cpm1")
    if rank == 0:
        return {"error": _error_of(lambda: _generated(model))}
    try:
        _raise()
    except ZeroDivisionError:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    _outlive(folder, "ends")
    return {}


def first_interrupted(folder: Path, rank: int, size: int) -> Report:
    """Ctrl-C in a notebook on rank 0, while it reads a prompt."""

    def interrupt(_: object) -> Any:
        raise KeyboardInterrupt

    model = load(folder, "cpm1")
    if rank == 1:
        return {"error": _error_of(lambda: _generated(model))}
    model._prompt = interrupt
    try:
        _generated(model)
    except KeyboardInterrupt:
        _outlive(folder, "first_interrupted", 1)
    del model._prompt
    return {"error": _error_of(lambda: _generated(model))}


def users_group(folder: Path, rank: int, size: int) -> Report:
    """Where the script has initialised torch.distributed; on a rank that lives on."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return _failing(folder, rank, 1, _raise, "users_group")


def raises_oddly(folder: Path, rank: int, size: int) -> Report:
    """With words that are no text, as an error about a file has them whose name is none."""

    def broken() -> None:
        raise OSError("no file \udcff")

    return _failing(folder, rank, 1, broken, "raises_oddly")


def interrupted(folder: Path, rank: int, size: int) -> Report:
    """In the midst of loading a second model, on a rank that lives on, as in a notebook."""
    from bminf.offload.backends.cpu import CpuBackend

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    first = load(folder, "cpm1")
    _generated(first)
    if rank == 1:
        setattr(CpuBackend, "allocate", interrupt)  # noqa: B010
    try:
        return {"error": _error_of(lambda: load(folder, "cpm1"))}
    except KeyboardInterrupt:
        _outlive(folder, "interrupted")
        return {"error": "interrupted"}


def killed_far(folder: Path, rank: int, size: int) -> Report:
    """On another machine, where nobody sees its process."""
    from unittest.mock import patch

    from bminf.layers import rendezvous

    with patch.object(rendezvous, "_machine", lambda: f"machine{rank}"):
        return _failing(folder, rank, 1, _killed)


def killed_between(folder: Path, rank: int, size: int) -> Report:
    """Two models."""
    model = load(folder, "cpm1")
    _generated(model)
    if rank == 1:
        _killed()
    return {"error": _error_of(lambda: load(folder, "cpm1"))}


def leaves(folder: Path, rank: int, size: int) -> Report:
    """sys.exit(), where the others go on."""
    model = load(folder, "cpm1")
    _generated(model)
    if rank == 1:
        sys.exit(0)
    return {"error": _error_of(lambda: _generated(model, 2))}


def destroyed(folder: Path, rank: int, size: int) -> Report:
    """The process group, by the script of one rank."""
    import torch.distributed as dist

    model = load(folder, "cpm1")
    if rank == 1:
        dist.destroy_process_group()
    return {"error": _error_of(lambda: _generated(model, 2)), "again": _error_of(model.close)}


def refused(folder: Path, rank: int, size: int) -> Report:
    """What cannot be loaded, on one rank or on all, and that it can be loaded afterwards."""
    from bminf.offload.backends.cpu import CpuBackend

    wrong = rank == size - 1
    limit = "1GB" if wrong else "2GB"
    folders = {"folder": "cpm1" if wrong else "cpm1b", "gone": "nothing" if wrong else "cpm1"}
    allocate = CpuBackend.__dict__["allocate"]

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room on this rank \udcff")

    found = {
        "limits": _error_of(lambda: load(folder, "cpm1", memory_limit=limit)),
        "folders": _error_of(lambda: load(folder, folders["folder"])),
        "gone": _error_of(lambda: load(folder, folders["gone"])),
        "heads": _error_of(lambda: load(folder / "odd", "cpm1")),
        "low": _error_of(lambda: load(folder, "cpm1", memory_limit="10KB")),
        "argument": _error_of(lambda: load(folder, "cpm1", max_length=-1 if wrong else 8)),
        "keyword": _error_of(lambda: load(folder, "cpm1", **({"no_such": 1} if wrong else {}))),
    }
    if wrong:
        setattr(CpuBackend, "allocate", full)  # noqa: B010
    found["room"] = _error_of(lambda: load(folder, "cpm1"))
    setattr(CpuBackend, "allocate", allocate)  # noqa: B010
    found["disk"], found["reads"] = _without_disk(folder, wrong, size)
    with load(folder, "cpm1") as model:
        found["text"] = model.generate(TEXTS["cpm1"], max_tokens=6, temperature=0)
    return found


def _without_disk(folder: Path, is_full: bool, size: int) -> tuple[str, int]:
    """What is said where there is no room for what streams, and what was read before that."""
    import shutil
    from collections import namedtuple
    from unittest.mock import patch

    from bminf.offload import start

    free = namedtuple("usage", "free")(0 if is_full else 2**40)
    reads: list[str] = []
    limit = streaming_limit(folder, "cpm1", None, size)
    with (
        patch.object(shutil, "disk_usage", lambda _: free),
        patch.object(start, "read_block", lambda *given: reads.append(given[1])),
    ):
        return _error_of(lambda: load(folder, "cpm1", memory_limit=limit)), len(reads)


def server(folder: Path, rank: int, size: int) -> Report:
    """Rank 0 alone has something to do, in two threads; and a call that the others do not make."""
    from threading import Thread

    with load(folder, "cpm1") as model:
        if rank > 0:
            refused = _error_of(lambda: model.engine)
            model.follow()
            return {"refused": refused, "texts": [], "tokens": model.stats.num_tokens}
        texts: list[Any] = []
        work = [Thread(target=lambda: texts.append(model.generate("天气", 6, temperature=0)))
                for _ in range(2)]  # fmt: skip
        for one in work:
            one.start()
        for one in work:
            one.join()
        refused = _error_of(model.follow)
        return {"refused": refused, "texts": texts, "tokens": model.stats.num_tokens}


def other_call(folder: Path, rank: int, size: int) -> Report:
    model = load(folder, "cpm1")
    call = model.generate if rank == 0 else model.perplexity
    return {"error": _error_of(lambda: [call("天气今天", 4), _generated(model)])}


def memory(folder: Path, rank: int, size: int) -> Report:
    """A GLM of 320 MB, of which each rank streams most: what its process takes, and what all of
    them hold of the mapped embedding together."""
    import torch

    before = _status("RssAnon")
    with load(folder, "glm130b", memory_limit=MEMORY_LIMIT) as model:
        text = TEXTS["glm130b"]
        model.generate(text, max_tokens=4)
        # Every row of the embedding, so that all of its pages are there.
        rows = torch.arange(model.config.vocab_size)
        for some in rows.split(4096):
            model.model.embed_tokens(some)
        model.generate(text, max_tokens=1)  # which ends when all have done that
        pss = _pss_of(folder)
        peak = _status("RssAnon")
        model.generate(text, max_tokens=1)
        return {
            "grown": peak - before, "pss": pss, "total": model.plan.total_bytes,
            "streamed": len(model.plan.streamed), "table": 2 * 1024 * len(rows),
        }  # fmt: skip


def plans(folder: Path, rank: int, size: int) -> Report:
    """Models of transformers by their plans, resident and streamed, in every format; of what is
    packed as in the others, in floating point and one."""
    import torch

    import bminf

    found: Report = {}
    for name, make in transformers_models().items():
        is_alike = name in ("qwen2_moe", "phi3")
        for kind, form in formats().items():
            for place in ("resident", "streamed") if form is None else ("streamed",):
                if is_alike and (kind, place) not in (("float", "resident"), ("int8", "streamed")):
                    continue
                model = make()
                limit = 2**30 if place == "resident" else _limit_of_part(make(), form, size)
                bminf.wrapper(model, form or False, limit, "cpu", tp="auto")
                ids = torch.tensor([[5, 6, 7, 8, 9]])
                with torch.inference_mode():
                    logits = model(input_ids=ids).logits
                plan = bminf.plan_of(model)
                num_streamed = len(plan.streamed) + len(plan.tables) + (plan.experts is not None)
                said = {"logits": logits, "streamed": num_streamed}
                more = {"max_new_tokens": 4, "pad_token_id": 0}
                said["greedy"] = model.generate(ids, do_sample=False, **more).tolist()
                if place == "resident":
                    drawn = model.generate(ids, do_sample=True, top_k=0, **more)
                    said["drawn"] = drawn.tolist()
                found[f"{name} {kind} {place}"] = said
    return found


def _limit_of_part(model: Any, form: Any, size: int) -> int:
    """A byte less than the last rank needs."""
    from bminf.layers.parallel import Group
    from bminf.layers.rendezvous import Place
    from bminf.layers.tensor_plan import cut, shared_parts
    from bminf.wrapping import plan_for

    if size > 1:
        cut(model, shared_parts(model), form, Group(Place(size - 1, size)))
    return plan_for(model, form or False, device="cpu").total_bytes - 1


def transformers_models() -> dict[str, Callable[[], Any]]:
    import torch
    import transformers as tf

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 96,
        "num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

    def made(model: Any, config: Any) -> Any:
        torch.manual_seed(0)
        return model(config).eval()

    qwen = {**sizes, "head_dim": 16, "attention_bias": True}
    experts = {
        **sizes, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    }  # fmt: skip
    return {
        "llama": lambda: made(tf.LlamaForCausalLM, tf.LlamaConfig(**sizes)),
        "tied": lambda: made(
            tf.LlamaForCausalLM, tf.LlamaConfig(**sizes, tie_word_embeddings=True, mlp_bias=True)
        ),
        "qwen3": lambda: made(tf.Qwen3ForCausalLM, tf.Qwen3Config(**qwen)),
        "qwen2_moe": lambda: made(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig(**experts)),
        "phi3": lambda: made(tf.Phi3ForCausalLM, tf.Phi3Config(**{**sizes, "pad_token_id": 0})),
    }


def plans_differ(folder: Path, rank: int, size: int) -> Report:
    """Weights that each rank has drawn; one that has no room, where others have wrapped."""
    import torch

    import bminf
    from bminf import wrapping

    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room on this rank")

    make = transformers_models()["llama"]
    drawn, model = make(), make()
    with torch.no_grad():
        drawn.lm_head.weight += rank
    found = {"weights": _error_of(lambda: bminf.wrapper(drawn, False, "1GB", "cpu", tp="auto"))}
    if rank == 1:
        wrapping.warn_of_held = full
    found["room"] = _error_of(lambda: bminf.wrapper(model, False, "1GB", "cpu", tp="auto"))
    return {**found, "is_wrapped": bminf.plan_of(model) is not None}


def plan_fails(folder: Path, rank: int, size: int) -> Report:
    """A pass of a model of transformers, on rank 1."""
    import torch

    import bminf

    model = transformers_models()["llama"]()
    bminf.wrapper(model, False, "1GB", "cpu", tp="auto")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model(input_ids=ids)
    if rank == 1:
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: _raise())
    return {"error": _error_of(lambda: [model(input_ids=ids), model(input_ids=ids)])}


def plan_interrupted(folder: Path, rank: int, size: int) -> Report:
    """A streamer that fails on rank 1, which lives on; what all ranks refuse is no failure."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    import bminf

    class Streamer(BaseStreamer):
        num_given = 0

        def put(self, value: Any) -> None:
            self.num_given += 1
            if rank == 1 and self.num_given == 3:
                raise ZeroDivisionError("of this rank alone")

        def end(self) -> None: ...

    model = transformers_models()["llama"]()
    bminf.wrapper(model, False, "1GB", "cpu", tp="auto")
    ids, more = torch.tensor([[5, 6, 7]]), {"pad_token_id": 0, "do_sample": False}
    alike = _error_of(lambda: model.generate(ids, no_such=1, **more))
    run = partial(model.generate, ids, max_new_tokens=9, streamer=Streamer(), **more)
    found = {"alike": alike, "error": _error_of(run)}
    if rank == 1:
        _outlive(folder, "plan_interrupted")
    return found


def goldens(folder: Path, rank: int, size: int) -> Report:
    """The reference checkpoints, of every layout and of other numbers of ranks, in half precision
    and packed: the log-probabilities of some ids."""
    from golden import golden, is_absent

    from bminf.errors import ArgumentError
    from bminf.models import BLOOM

    found: Report = {}
    for name in ANY_DEGREE:
        given = None if is_absent(name) else golden(name)
        layouts = () if given is None else given.layouts()
        for layout in (one for one in layouts if not name.startswith("glm") or "ckpt" in one):
            quantization = "int4-row" if "int4" in layout else "int8" if "int8" in layout else None
            load_it = partial(given.load, layout)
            if name == "bloom":
                config = given.path / "hf_safetensors" / "config.json"
                load_it = partial(
                    BLOOM, given.path / layout, device="cpu", max_length=64, config=config
                )
            try:
                with load_it(quantization=quantization) as model:
                    found[f"{name} {layout}"] = _log_probabilities(model, name)
            except ArgumentError as error:
                assert "ranks cannot share" in str(error), error
    return found


def _log_probabilities(model: Any, name: str) -> list[float]:
    ids = list(range(9, 21))
    if name in ("cpm2", "eva"):
        found: list[float] = model.logits(ids, ids[:5]).log_softmax(-1).flatten()[::97].tolist()
        return found
    return [float(x) for x in model.score(ids, [[30, 31, 32], [40]])]


MEMORY_LIMIT = 150_000_000


def write_big(folder: Path) -> None:
    from tiny_glm import tiny_glm130b

    made = tiny_glm130b(image_offset=60_000, hidden_size=1024, inner_hidden_size=4096, num_layers=6)
    made.write_original(folder / "glm130b")


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
    return int(line.split()[1]) * 1024


def _pss_of(folder: Path) -> int:
    """This process's share of the pages that are mapped from files in a folder."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and ":" not in first:
            is_inside = str(folder) in line
        elif first == "Pss:" and is_inside:
            total += int(line.split()[1]) * 1024
    return total


CASES = (
    zoo, raises, first_raises, lives_on, users_group, script_raises, first_script_raises,
    raises_oddly, ends, interrupted, first_interrupted, killed, killed_far, killed_between,
    leaves, destroyed, refused, server, other_call, memory, plans, plans_differ, plan_fails,
    plan_interrupted, goldens,
)  # fmt: skip


# ---- starting them -------------------------------------------------------------------------------


def recorded() -> list[tuple[str, tuple[int, ...], str]]:
    """What this process asks of torch.distributed from now on: (kind, shape, dtype)."""
    import torch.distributed as dist

    found: list[tuple[str, tuple[int, ...], str]] = []
    for kind in ("all_reduce", "all_gather", "broadcast"):
        original, place = getattr(dist, kind), 1 if kind == "all_gather" else 0

        def call(*given: Any, _original: Any = original, _kind: str = kind, _place: int = place,
                 **more: Any) -> Any:  # fmt: skip
            x = given[_place]
            found.append((_kind, tuple(x.shape), str(x.dtype)))
            return _original(*given, **more)

        setattr(dist, kind, call)
    return found


def run_rank(case: Callable[..., Report], folder: Path, rank: int, size: int) -> None:
    import torch

    target = folder / f"{case.__name__}.{size}.{rank}"
    calls, said, status = recorded(), dict[str, Any](), 0
    try:
        said = case(folder, rank, size)
    except SystemExit:
        pass
    except BaseException:
        status = 1
        target.with_name(f"{target.name}.txt").write_text(traceback.format_exc())
    torch.save({**said, "calls": calls}, f"{target}.pt")
    os._exit(status)


def run_case(case: Callable[..., Report], folder: Path, size: int) -> None:
    """Fork the ranks, and write how each has ended, and after how many seconds."""
    start_s, processes = time.monotonic(), {}
    told, tells = os.pipe()
    for rank in range(size):
        if (process := os.fork()) == 0:
            _set_variables(rank, size, port=int(os.read(told, _PORT_BYTES)))
            run_rank(case, folder, rank, size)
        processes[process] = rank
    store = _store(tells, size)
    ended: dict[int, tuple[int, float]] = {}
    while processes and time.monotonic() < start_s + _DEADLINE_S:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = processes.pop(process)
            ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - start_s
        else:
            time.sleep(0.01)
    for process in processes:  # hung
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    for end in (told, tells):
        os.close(end)
    del store
    (folder / f"{case.__name__}.{size}.json").write_text(json.dumps(ended))


def _store(tells: int, size: int) -> Any:
    """The store, once all ranks are forked: its thread may hold a lock, which would be theirs."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(tells, str(store.port).rjust(_PORT_BYTES).encode() * size)
    return store


def _set_variables(rank: int, size: int, port: int) -> None:
    """As torchrun sets them; it has the store, too."""
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip


def main(folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    import bminf.models
    import bminf.wrapping  # noqa: F401 - once, for all that is forked

    if any(name.startswith("plan") for name in names):
        from transformers import (  # noqa: F401
            LlamaForCausalLM,
            Phi3ForCausalLM,
            Qwen2MoeForCausalLM,
            Qwen3ForCausalLM,
        )  # fmt: skip
    cases = {case.__name__: case for case in CASES}
    for name in names:
        case, _, size = name.partition(".")
        run_case(cases[case], Path(folder), int(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
