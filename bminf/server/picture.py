"""What a server tells of its plan and of its speed, for the page."""

from __future__ import annotations

from typing import Any

from bminf.offload.plan import Plan
from bminf.server.worker import Worker


def plan_json(worker: Worker) -> dict[str, Any]:
    """Sizes in bytes, times in seconds; counters since the model was loaded, and what bound the
    sweeps that read prompts and those that decoded: "copying" or "computing"."""
    queue = {"running": worker.num_running, "waiting": worker.num_waiting,
             "max_waiting": worker.max_waiting}  # fmt: skip
    if worker.texts is None:
        return {"state": worker.state, "queue": queue}
    plan, stats, engine = worker.texts.plan, worker.texts.stats, worker.texts.engine.stats
    return {
        "state": worker.state,
        "queue": queue,
        "plan": _plan_json(plan),
        "stats": {
            "tokens": engine.num_tokens,
            "sweeps": engine.num_sweeps,
            "rows_per_sweep": engine.rows_per_sweep,
            "busy_s": engine.busy_s,
            "prefill": engine.prefill.as_json(),
            "decode": engine.decode.as_json(),
            "bytes_copied": stats.bytes_copied,
            "copied_s": stats.copied_s,
            "waited_s": stats.waited_s,
            "link_gbps": stats.link_gbps,
        },
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    streamed, on_disk = set(plan.streamed), set(plan.on_disk)

    def place(name: str) -> str:
        if name not in streamed:
            return "resident"
        return "disk" if name in on_disk else "streamed"

    blocks = [
        {"name": block.name, "bytes": block.nbytes, "place": place(block.name)}
        for block in plan.blocks
    ]
    return {
        "limit_bytes": plan.budget,
        "total_bytes": plan.total_bytes,
        "outside_bytes": plan.outside_bytes,
        "resident_bytes": plan.resident_bytes,
        "slot_bytes": plan.slot_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "blocks": blocks,
    }
