"""`bminf plan`: the plan under a memory limit and the time per token, from config.json alone."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bminf.cli import sources
from bminf.cli.flags import above_zero, positive
from bminf.cli.gpus import Speeds, speeds_of
from bminf.cli.wording import in_flags
from bminf.errors import ArgumentError, BudgetError
from bminf.units import format_bytes, parse_bytes, parse_rate

if TYPE_CHECKING:
    from bminf.offload.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=sources.HELP)
    add("--memory-limit", metavar="SIZE", help='such as "6GB"; without it, only sizes are shown')
    add("--quantization", choices=("int8", "int4", "int4-row", "none"),
        help=sources.QUANTIZATION_HELP)  # fmt: skip
    add("--blocks", nargs="+", metavar="NAME", help="modules to stream, instead of those found")
    add("--max-length", type=int, metavar="N",
        help="tokens of prompt and answer to reserve KV cache and workspace for")  # fmt: skip
    add("--max-batch-size", type=int, default=1, metavar="N", help="texts at once; default: 1")
    add(
        "--reserve",
        default="0",
        metavar="SIZE",
        help="bytes to reserve in addition to --max-length",
    )
    add("--gpu", metavar="NAME", help='the GPU, such as "RTX 4090", for its two bandwidths; '
        '"this" measures this machine')  # fmt: skip
    add("--link", default=_Default("12GB"), metavar="SPEED",
        help="bus bandwidth per second; default: 12GB")  # fmt: skip
    add("--host-memory", metavar="SIZE",
        help="for streamed blocks; the others are kept on disk; default: no limit")  # fmt: skip
    add("--disk", default="2GB", metavar="SPEED", help="disk bandwidth per second; default: 2GB")
    add("--memory-bandwidth", default=_Default("150GB"), metavar="SPEED",
        help="memory bandwidth of the device per second; default: 150GB")  # fmt: skip
    add("--plot", metavar="FILE", help="draw what the limit keeps, as .png, .svg or .pdf")
    add("--tp", type=positive, metavar="N", help="show the plan of one of N ranks, each with "
        "that limit, and what 1, 2, 4 and 8 are predicted to do (built-in models)")  # fmt: skip
    add("--all-reduce", type=above_zero, default=100.0, metavar="US",
        help="microseconds that a sum over the ranks takes; default: 100")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report, and draw the plan; returns 0."""
    _check_plot(arguments)
    speeds, disk = _speeds(arguments), parse_rate(arguments.disk, "--disk")
    for option in ("memory_limit", "reserve", "host_memory"):
        given = getattr(arguments, option)
        parse_bytes(0 if given is None else given, f"--{option.replace('_', '-')}")
    subject = sources.find(arguments.model)
    num_ranks = arguments.tp or 1
    whole = subject.plan(arguments, None, num_ranks)
    report: dict[str, Any] = {
        "model": subject.title,
        "dtype": subject.dtype,
        "quantization": subject.quantization(arguments),
        "blocks": [
            {"name": b.name, "list": b.list_name, "bytes": b.nbytes, "uses": whole.uses[b.name]}
            for b in whole.blocks
        ],
        "outside_bytes": whole.outside_bytes,
        "table_bytes": whole.table_bytes,
        "reserved_bytes": whole.reserved_bytes,
        "total_bytes": whole.total_bytes,
        "least_limit": whole.least_limit,
        "not_quantized_bytes": subject.unquantized_bytes(arguments),
        "context": whole.context and asdict(whole.context),
        "usual_context": whole.unreserved and asdict(whole.unreserved),
    }
    plan = None
    if arguments.memory_limit is not None:
        plan = subject.plan(arguments, arguments.memory_limit, num_ranks)
        sums_s = _sums(subject, num_ranks, arguments.all_reduce)
        report |= _plan_entries(plan, speeds, disk, sums_s)
        if arguments.tp is not None:
            report["ranks"] = [*_ranks(subject, arguments, speeds, disk)]
        if arguments.plot is not None:
            _draw(report, plan, arguments)
    text = json.dumps(report, indent=2) if arguments.json else _text(report, whole, plan)
    print(text if arguments.json else in_flags(text, arguments.flags))
    return 0


def _check_plot(arguments: argparse.Namespace) -> None:
    """Refuse --plot before any work.   Raises ArgumentError; BMInfError without matplotlib."""
    if arguments.plot is None:
        return
    from bminf.plot.saving import check_file

    if arguments.memory_limit is None:
        raise ArgumentError("--plot draws what a limit keeps; give --memory-limit, too")
    check_file(arguments.plot, "--plot")


def _draw(report: dict[str, Any], plan: Plan, arguments: argparse.Namespace) -> None:
    from bminf.plot import plan_map, save

    save(plan_map(plan, title=_title(report, plan, arguments.gpu)), arguments.plot)


def _title(report: dict[str, Any], plan: Plan, gpu: str | None) -> str:
    kind = report["dtype"] if report["quantization"] == "none" else report["quantization"]
    stay, token_s = f"{len(plan.resident)} of {len(plan.blocks)} blocks", report["token_s"]
    said = _per_token(token_s)
    if plan.experts is not None:
        stay += f" and {plan.experts.num_slots:,} of {plan.experts.number:,} experts"
        said = f"{1 / token_s:.1f} to {1 / report['experts']['best']['token_s']:.1f} tokens/s"
    predicted = "predicted" if gpu is None else f"predicted for {gpu}"
    model = f"{report['model']}, {kind}, within {format_bytes(plan.budget)}"
    return f"{model}: {stay} stay; {predicted}: {said}"


class _Default(str):
    """A speed that was not given on the command line, so that the speed of --gpu is used."""


def _speeds(arguments: argparse.Namespace) -> Speeds:
    link = parse_rate(arguments.link, "--link")
    memory = parse_rate(arguments.memory_bandwidth, "--memory-bandwidth")
    if arguments.gpu is None:
        return Speeds(link, memory)
    card = speeds_of(arguments.gpu)
    return Speeds(
        card.link if isinstance(arguments.link, _Default) else link,
        card.memory if isinstance(arguments.memory_bandwidth, _Default) else memory,
    )


_NUMBERS = (1, 2, 4, 8)
"""Of ranks that are compared."""


def _sums(
    subject: sources.Transformers | sources.Zoo, num_ranks: int, sum_us: float
) -> dict[str, float]:
    """Block -> seconds of sums over the ranks behind it."""
    return {block: count * sum_us / 1e6 for block, count in subject.sums(num_ranks).items()}


def _ranks(
    subject: sources.Transformers | sources.Zoo,
    arguments: argparse.Namespace,
    speeds: Speeds,
    disk: int,
) -> Iterator[dict[str, Any]]:
    """What so many ranks are predicted to do, each within the limit; or why they cannot."""
    from bminf.offload.predict import predict

    for number in sorted({*_NUMBERS, arguments.tp}):
        try:
            plan = subject.plan(arguments, arguments.memory_limit, number)
        except (ArgumentError, BudgetError) as error:
            yield {"ranks": number, "error": str(error)}
            continue
        sums_s = _sums(subject, number, arguments.all_reduce)
        found = predict(plan, speeds.link, speeds.memory, disk_bytes_per_s=disk, sums_s=sums_s)
        yield {
            "ranks": number, "token_s": found.pass_s, "streamed_bytes": plan.streamed_bytes,
            "sums_s": found.sums_s, "bound": found.binds,
        }  # fmt: skip


def _plan_entries(
    plan: Plan, speeds: Speeds, disk: int, sums_s: Mapping[str, float]
) -> dict[str, Any]:
    from bminf.offload.predict import predict

    prediction = predict(plan, speeds.link, speeds.memory, disk_bytes_per_s=disk, sums_s=sums_s)
    return {
        "memory_limit": plan.budget,
        "resident": list(plan.resident),
        "streamed": list(plan.streamed),
        "on_disk": list(plan.on_disk),
        "resident_bytes": plan.resident_bytes,
        "slot_bytes": plan.slot_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "experts": _experts_entries(plan, speeds, disk),
        "tables_on_host": list(plan.tables),
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "planned_bytes": plan.total_bytes,
        "link_bytes_per_s": speeds.link,
        "memory_bytes_per_s": speeds.memory,
        "disk_bytes_per_s": disk,
        "token_s": prediction.pass_s,
        "copy_s": prediction.copy_s,
        "compute_s": prediction.compute_s,
        "disk_s": prediction.disk_s,
        "link_busy": prediction.link_busy,
        "disk_busy": prediction.disk_busy,
        "bound": prediction.bound,
        **({"sums_s": prediction.sums_s} if sums_s else {}),
    }


def _experts_entries(plan: Plan, speeds: Speeds, disk: int) -> dict[str, Any] | None:
    """What is expected of experts by need, at one end and, as "best", at the other."""
    from bminf.offload.hit_rates import PUBLISHED
    from bminf.offload.predict import predict

    experts = plan.experts
    if experts is None:
        return None
    best = predict(plan, speeds.link, speeds.memory, disk_bytes_per_s=disk, hit_rates=PUBLISHED)
    return asdict(experts) | {
        "pool_bytes": plan.pool_bytes,
        "hit_rate": experts.hit_rate(),
        "missed_bytes": experts.missed_bytes(),
        "best": {
            "hit_rate": experts.hit_rate(1, PUBLISHED),
            "missed_bytes": experts.missed_bytes(1, PUBLISHED),
            "token_s": best.pass_s,
            "bound": best.bound,
        },
    }


def _text(report: dict[str, Any], whole: Plan, plan: Plan | None) -> str:
    kind = report["quantization"]
    stored = {"none": "", "as stored": ", packed as the folder is"}.get(
        kind, f", linear weights in {kind.upper()}"
    )
    lines = [f"{report['model']}, {report['dtype']}{stored}"]
    lines += _group_lines(report["blocks"])
    lines.append(f"outside the blocks: {format_bytes(report['outside_bytes'])}")
    if report["table_bytes"]:
        lines.append(f"of these read by row: {format_bytes(report['table_bytes'])}")
    if report["not_quantized_bytes"]:
        lines.append(f"not quantized in the blocks: {format_bytes(report['not_quantized_bytes'])}")
    if report["reserved_bytes"]:
        lines.append(f"reserved: {format_bytes(report['reserved_bytes'])}")
    lines.append(f"all together: {format_bytes(report['total_bytes'])}")
    lines.append(f"least memory limit: {format_bytes(report['least_limit'])}")
    if plan is not None:
        lines += ["", str(plan), "", _time_line(report)]
        lines += [_range_line(report)] if report["experts"] else []
        lines += _rank_lines(report.get("ranks", ()))
    elif whole.unreserved is not None:
        lines.append(whole.context_line)
    return "\n".join(lines)


_BOUNDS = {"compute": "reading weights", "link": "the link", "disk": "the disk"}


def _group_lines(blocks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line for each run of blocks of the same size: first and last name, and bytes. Blocks
    whose names differ in their numbers alone stand together, as the parts of a large layer."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        alike.setdefault(re.sub(r"\d+", "#", block["name"]), []).append(block)
    for named in alike.values():
        for size, group in groupby(named, lambda block: format_bytes(block["bytes"])):
            run = [block["name"] for block in group]
            more = f" ... {run[-1]}: {len(run)} blocks of" if len(run) > 1 else ":"
            yield f"{run[0]}{more} {size}"


def _time_line(report: dict[str, Any]) -> str:
    disk, busy = "", f"link busy {report['link_busy']:.0%}"
    if report["disk_s"]:
        disk = (
            f"reading the disk {_seconds(report['disk_s'])} at "
            f"{report['disk_bytes_per_s'] / 1e9:g} GB/s, "
        )
        busy += f", disk busy {report['disk_busy']:.0%}"
    link_gbps, memory_gbps = (
        report[key] / 1e9 for key in ("link_bytes_per_s", "memory_bytes_per_s")
    )
    if report.get("sums_s"):
        disk += f"sums over ranks {_seconds(report['sums_s'])}, "
    return (
        f"predicted for a token: {_per_token(report['token_s'])} "
        f"({disk}copying {_seconds(report['copy_s'])} at {link_gbps:.4g} GB/s, "
        f"reading weights {_seconds(report['compute_s'])} at {memory_gbps:.4g} GB/s; {busy}); "
        f"bound by {_BOUNDS[report['bound']]}"
    )


def _rank_lines(ranks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One for each number of ranks, of which each has the limit."""
    for one in ranks:
        number = f"{one['ranks']} ranks" if one["ranks"] > 1 else "1 rank"
        if "error" in one:
            yield f"{number}: cannot, {one['error']}"
            continue
        yield (
            f"{number}: {_per_token(one['token_s'])}, {format_bytes(one['streamed_bytes'])} "
            f"streamed by each, sums {_seconds(one['sums_s'])}; bound by {one['bound']}"
        )


def _range_line(report: dict[str, Any]) -> str:
    """What favourites among the experts may make of that."""
    experts = report["experts"]
    best = experts["best"]
    if best["hit_rate"] == 0:
        return "that is with nothing hit in the pool, which has room for less than a token wants"
    return (
        f"that is with {experts['hit_rate']:.0%} of wanted experts in the pool, where each is as "
        f"likely as any other; with {best['hit_rate']:.0%}, the most that was published: "
        f"{_per_token(best['token_s'])}, bound by {_BOUNDS[best['bound']]}"
    )


def _per_token(token_s: float) -> str:
    """Time per token, with tokens per second unless these are 0.0."""
    rate = f"{1 / token_s:.1f}"
    return _seconds(token_s) if rate == "0.0" else f"{_seconds(token_s)} = {rate} tokens/s"


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.1f} s" if duration_s >= 10 else f"{duration_s * 1e3:.1f} ms"
