"""`bminf doctor`: what this machine is and can do, what models would give on it, and whether
another tool would give more. In some seconds; nothing is downloaded, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bminf.cli import flags, sources, system
from bminf.errors import OffloadError
from bminf.progress import spinner
from bminf.units import format_bytes

if TYPE_CHECKING:
    from bminf.cli.expected import Expected, Machine

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?",
        help=f"what is predicted, in place of models of usual sizes: {sources.HELP}")  # fmt: skip
    add("--quantization", choices=("int8", "int4", "int4-row", "none"),
        help=f"of MODEL; {sources.QUANTIZATION_HELP}")  # fmt: skip
    add("--memory-limit", type=flags.size, metavar="SIZE",
        help='such as "6GB"; default: 90%% of the free memory')  # fmt: skip
    add("--max-length", type=flags.positive, default=160, metavar="N",
        help="tokens of prompt and answer that MODEL has room for; default: 160")  # fmt: skip
    add("--offload-dir", metavar="DIR", help="folder whose disk is measured")
    add("--json", action="store_true", help="print one JSON object")
    # Of `bminf plan`, which plans MODEL here as well.
    parser.set_defaults(reserve="0", blocks=None, host_memory=None, max_batch_size=1)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print; returns 0."""
    with spinner("importing torch"):
        import torch  # noqa: F401
    start_s = time.perf_counter()
    machine = measured(arguments)
    report: Report = {
        "versions": system.versions(),
        "processors": system.processors(),
        "memory": system.memory(),
        "gpu": system.gpu(),
        "measured": measurements(machine),
        "models": [asdict(one) for one in expected(arguments, machine)],
    }
    report["seconds"] = time.perf_counter() - start_s
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(_lines(report)))
    return 0


def measured(
    arguments: argparse.Namespace, clock: Callable[[], float] = time.perf_counter
) -> Machine:
    """clock: of all but the disk, at which a process waits."""
    import torch

    from bminf.cli import machine
    from bminf.cli.expected import Machine
    from bminf.offload.backends import device_for, free_budget
    from bminf.offload.memory import free_bytes

    with spinner("measuring link and memory"):
        speeds = machine.speeds_of_machine(clock)
        host = machine.host_memory_speed(clock)
    with spinner("measuring the disk"):
        disk = _disk_speed(arguments.offload_dir)
    with spinner("measuring products"):
        call_s, rates = machine.call_seconds(clock), machine.product_rates(clock)
    limit = arguments.memory_limit
    room = free_budget(device_for(None)) if limit is None else limit
    return Machine(speeds, host, disk, call_s, rates, room, free_bytes(), torch.cuda.is_available())


def _disk_speed(folder: str | None) -> int | None:
    """None, and a warning, where the usual folder has no room: all else can be told.

    Raises OffloadError for a folder that was asked about.
    """
    from bminf.cli import machine

    try:
        return machine.disk_speed(folder)
    except OSError as error:
        if folder is not None:
            raise OffloadError(f"the disk of {folder} cannot be measured: {error}") from error
        warnings.warn(
            f"the disk is not measured: {error}; give a folder on another one: --offload-dir",
            stacklevel=2,
        )
        return None


def measurements(machine: Machine) -> Report:
    """Bytes and seconds, as JSON has them."""
    return {
        "link_bytes_per_s": machine.speeds.link,
        "memory_bytes_per_s": machine.speeds.memory,
        "host_memory_bytes_per_s": machine.host_memory,
        "disk_bytes_per_s": machine.disk,
        "call_s": machine.call_s,
        "products": [asdict(rate) for rate in machine.rates],
    }


def expected(arguments: argparse.Namespace, machine: Machine) -> Sequence[Expected]:
    """Of MODEL, or of models of usual sizes."""
    from bminf.cli.expected import of_model, of_sizes

    if arguments.model is None:
        return list(of_sizes(machine))
    return list(of_model(arguments, machine))


# ---- for people ----------------------------------------------------------------------------------


def _lines(report: Report) -> Iterator[str]:
    versions = (f"{name} {value}" for name, value in report["versions"].items() if value)
    yield f"versions    {', '.join(versions)}"
    yield f"processors  {_processors(report['processors'])}"
    yield f"GPU         {_gpu(report['gpu'])}"
    yield f"memory      {_memory(report['memory'])}"
    yield from _measured(report["measured"], report["gpu"] is not None)
    yield ""
    yield from _table(report["models"])
    yield from _elsewhere(report["models"])


def _processors(found: Mapping[str, Any]) -> str:
    limit = found["container_limit"]
    parts = [
        f"{found['name']}, {found['usable']} of {found['number']} usable",
        *([] if limit is None else [f"the container has {limit:g} of them"]),
        f"{found['threads']} threads",
        f"kernels of level {found['level']}",
    ]
    return ", ".join(parts) + (f" ({found['level_reason']})" if found["level_reason"] else "")


def _gpu(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none that torch sees; models run on the CPU"
    free, total = (format_bytes(found[f"{which}_bytes"]) for which in ("free", "total"))
    return f"{found['name']}, compute capability {found['capability']}, {free} of {total} free"


def _memory(found: Mapping[str, Any]) -> str:
    limit, lockable = found["container_limit_bytes"], found["lockable_bytes"]
    container = "no limit" if limit is None else f"a limit of {format_bytes(limit)}"
    locked = "any of it" if lockable is None else format_bytes(lockable)
    free = format_bytes(found["free_bytes"])
    return f"{free} free; the container has {container}; {locked} may be page-locked"


def _measured(found: Mapping[str, Any], is_gpu: bool) -> Iterator[str]:
    yield f"link        {_rate(found['link_bytes_per_s'])}, {_LINKS[is_gpu]}"
    device = _rate(found["memory_bytes_per_s"])
    host = _rate(found["host_memory_bytes_per_s"])
    yield "bandwidth   " + (f"{device} of the GPU, {host} of host memory" if is_gpu else host)
    disk = found["disk_bytes_per_s"]
    yield f"disk        {'not measured on this system' if disk is None else _rate(disk)}"
    yield f"a call      {found['call_s'] * 1e6:.1f} us"
    for name in dict.fromkeys(rate["form"] for rate in found["products"]):
        rates = [rate for rate in found["products"] if rate["form"] == name]
        shown = ", ".join(_rate(rate["bytes_per_s"]) for rate in rates)
        yield f"{name:<12}{shown} of weights, in small, middling and large products"


_LINKS = {True: "from page-locked memory", False: "from the page cache"}


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


_HEADS = ("model", "weights in", "all together", "limit", "resident", "tokens/s", "bound by")
_BOUNDS = {"compute": "computing", "link": "the link", "disk": "the disk", None: ""}


def _table(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is predicted, for text one by one."""
    rows = [_HEADS, *map(_row, models)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADS))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    resident, rate = one["resident_bytes"], one["tokens_per_s"]
    streamed = one["streamed_bytes"]
    share = "does not fit" if resident is None else f"{resident / (resident + streamed):.0%}"
    return (
        one["model"], one["quantization"], format_bytes(one["total_bytes"]),
        format_bytes(one["memory_limit"]), share, "-" if rate is None else f"{rate:.3g}",
        _BOUNDS[one["bound"]],
    )  # fmt: skip


def _elsewhere(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {one["model"]: one["elsewhere"] for one in models if one["elsewhere"]}
    if found:
        yield ""
        yield "another tool should be faster for:"
    for model, tool in found.items():
        yield f"{model}: {tool}"
