"""`bminf plan`: what a memory limit keeps, and what a token will cost, from config.json alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bminf.cli import models
from bminf.cli.progress import spinner
from bminf.errors import ArgumentError, CheckpointError
from bminf.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bminf.scheduler.backends.simulated import Prediction
    from bminf.scheduler.plan import Block, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, or a config.json")
    add("--memory-limit", metavar="SIZE", help='such as "6GB"; without it, bytes are shown only')
    add("--quantization", choices=("int8", "int4", "none"), default="int8", help="default: int8")
    add("--blocks", nargs="+", metavar="NAME", help="modules to move, instead of those found")
    add("--reserve", default="0", metavar="SIZE", help="set aside for activations and KV cache")
    add("--link", default="12GB", metavar="SIZE", help="bytes a second of the bus; default: 12GB")
    add("--host-memory", metavar="SIZE",
        help="for what does not stay; the rest waits on disk; default: enough for all")  # fmt: skip
    add("--disk", default="2GB", metavar="SIZE", help="bytes a second of the disk; default: 2GB")
    add("--memory-bandwidth", default="150GB", metavar="SIZE",
        help="bytes a second that the device reads of its memory; default: 150GB")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """0, after the report was printed."""
    speeds = _Speeds(
        _bytes_per_s(arguments.link, "--link"),
        _bytes_per_s(arguments.memory_bandwidth, "--memory-bandwidth"),
        _bytes_per_s(arguments.disk, "--disk"),
    )
    for option in ("memory_limit", "reserve", "host_memory"):
        parse_bytes(getattr(arguments, option) or 0, f"--{option.replace('_', '-')}")
    config = _read_config(Path(arguments.model))
    models.require(["transformers"])
    if "quantization_config" in config:
        print(
            "bminf: the quantization_config of this checkpoint is left out of account: "
            "bytes are those of the type it names as dtype",
            file=sys.stderr,
        )
    from bminf.scheduler.plan import least_budget

    with spinner("building the architecture"):
        model = build_on_meta(config)
    whole = _plan(model, arguments, None)
    report: dict[str, Any] = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": arguments.quantization,
        "blocks": [_block_entry(block, whole) for block in whole.blocks],
        "outside_bytes": whole.outside_bytes,
        "total_bytes": whole.total_bytes,
        "least_limit": least_budget(whole),
    }
    plan = None
    if arguments.memory_limit is not None:
        plan = _plan(model, arguments, arguments.memory_limit)
        report |= _plan_entries(plan, speeds)
    print(json.dumps(report, indent=2) if arguments.json else _text(report, plan))
    return 0


class _Speeds(NamedTuple):
    """Bytes a second."""

    link: int
    memory: int
    disk: int


def build_on_meta(config: dict[str, Any]) -> Any:
    """The model that `config`, the content of a config.json, describes; it takes no memory."""
    import torch
    import transformers

    models.quiet()
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        if config.get("format") == "bminf" or {"d_kv", "dim_model"} & config.keys():
            raise CheckpointError(
                "this is the configuration of a model that bminf builds itself; load it with "
                "bminf.models and a memory_limit, and print its plan"
            )
        raise CheckpointError(
            f"model_type {kind!r} is not known to transformers {transformers.__version__}; "
            "see whether a newer one knows it: pip install --upgrade transformers"
        )
    try:
        parsed = transformers.CONFIG_MAPPING[kind].from_dict(config)
        with torch.device("meta"), _default_dtype(parsed):
            return _construct(parsed).eval()
    # A config may be wrong in any way, and every architecture trips over that in its own.
    except Exception as error:
        raise CheckpointError(
            f"the {kind} model of this config.json cannot be built: "
            f"{type(error).__name__}: {error} - check the file against its source"
        ) from error


def _construct(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(config)
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config(config)
    return transformers.AutoModel.from_config(config)


@contextmanager
def _default_dtype(config: Any) -> Iterator[None]:
    """Makes new parameters of the type that `config` names; float32 where it names none."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); give a folder with config.json, or the file"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}; a JSON object is needed")
    return config


def _bytes_per_s(text: str, option: str) -> int:
    speed = parse_bytes(text.removesuffix("/s"), option)
    if speed == 0:
        raise ArgumentError(f'{option}={text!r}; give more than 0, for example "12GB/s"')
    return speed


def _plan(model: Any, arguments: argparse.Namespace, memory_limit: str | None) -> Plan:
    from bminf.wrapping import plan_for

    return plan_for(
        model,
        quantization=None if arguments.quantization == "none" else arguments.quantization,
        memory_limit=memory_limit,
        reserve=arguments.reserve,
        blocks=arguments.blocks,
        host_memory=arguments.host_memory,
    )


def _block_entry(block: Block, whole: Plan) -> dict[str, Any]:
    uses = whole.uses[block.name]
    return {"name": block.name, "list": block.list_name, "bytes": block.nbytes, "uses": uses}


def _plan_entries(plan: Plan, speeds: _Speeds) -> dict[str, Any]:
    prediction = _predict(plan, speeds)
    return {
        "memory_limit": plan.budget,
        "resident": list(plan.resident),
        "streamed": list(plan.streamed),
        "on_disk": list(plan.on_disk),
        "resident_bytes": plan.resident_bytes,
        "slot_bytes": plan.slot_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "planned_bytes": plan.total_bytes,
        "link_bytes_per_s": speeds.link,
        "memory_bytes_per_s": speeds.memory,
        "disk_bytes_per_s": speeds.disk,
        "token_s": prediction.pass_s,
        "copy_s": prediction.copy_s,
        "compute_s": prediction.compute_s,
        "disk_s": prediction.disk_s,
        "link_busy": prediction.link_busy,
        "disk_busy": prediction.disk_busy,
        "bound": prediction.bound,
    }


def _predict(plan: Plan, speeds: _Speeds) -> Prediction:
    from bminf.scheduler.backends.simulated import predict

    return predict(plan, speeds.link, speeds.memory, disk_bytes_per_s=speeds.disk)


def _text(report: dict[str, Any], plan: Plan | None) -> str:
    kind = report["quantization"]
    stored = "" if kind == "none" else f", linear weights in {kind.upper()}"
    lines = [f"{report['model']}, {report['dtype']}{stored}"]
    lines += _group_lines(report["blocks"])
    lines.append(f"outside the blocks: {format_bytes(report['outside_bytes'])}")
    lines.append(f"all together: {format_bytes(report['total_bytes'])}")
    lines.append(f"least memory limit: {format_bytes(report['least_limit'])}")
    if plan is not None:
        lines += ["", str(plan), "", _time_line(report)]
    return "\n".join(lines)


_BOUNDS = {"compute": "reading weights", "link": "the link", "disk": "the disk"}


def _group_lines(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each run of neighbours of one size: name or first and last name, and bytes."""
    runs: list[list[dict[str, Any]]] = []
    for block in blocks:
        if runs and runs[-1][0]["bytes"] == block["bytes"]:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [_group_line(run) for run in runs]


def _group_line(run: Sequence[dict[str, Any]]) -> str:
    size = format_bytes(run[0]["bytes"])
    if len(run) == 1:
        return f"{run[0]['name']}: {size}"
    return f"{run[0]['name']} ... {run[-1]['name']}: {len(run)} blocks of {size}"


def _time_line(report: dict[str, Any]) -> str:
    disk, busy = "", f"link busy {report['link_busy']:.0%}"
    if report["on_disk"]:
        disk = (
            f"reading the disk {report['disk_s'] * 1e3:.1f} ms at "
            f"{report['disk_bytes_per_s'] / 1e9:g} GB/s, "
        )
        busy += f", disk busy {report['disk_busy']:.0%}"
    link_gbps, memory_gbps = (
        report[key] / 1e9 for key in ("link_bytes_per_s", "memory_bytes_per_s")
    )
    return (
        f"predicted for a token: {report['token_s'] * 1e3:.1f} ms = "
        f"{1 / report['token_s']:.1f} tokens/s "
        f"({disk}copying {report['copy_s'] * 1e3:.1f} ms at {link_gbps:g} GB/s, "
        f"reading weights {report['compute_s'] * 1e3:.1f} ms at {memory_gbps:g} GB/s; {busy}); "
        f"bound by {_BOUNDS[report['bound']]}"
    )
