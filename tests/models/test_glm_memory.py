"""A layer of GLM-130B in full size keeps to its limit, and computes there what it does without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import told_by

from bminf.arch.glm import PUBLISHED_GLM
from bminf.cli.measure import rss_anon_bytes

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
LIMIT = 850 * MB
CONFIG = PUBLISHED_GLM["GLM-130B"]
UP_BYTES = 2 * CONFIG.intermediate_size * CONFIG.hidden_size // 2

# Loads layers of random weights, writes two tokens after a text, lets go, and says what it took.
SCRIPT = """
import hashlib, json, sys, warnings
from dataclasses import replace
from pathlib import Path

import torch

from bminf.cli.tables.tasks import Run, Task
from bminf.arch.glm import PUBLISHED_GLM
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling, top_k_then_top_p
from bminf.models.glm_text import GLMRows, blank
from bminf.models.source import find_sizes
from bminf.offload import memory

LENGTH = 16
warnings.simplefilter("error")
torch.set_num_threads(1)


def take(folder, limit, **sizes):
    config = replace(PUBLISHED_GLM["GLM-130B"], num_hidden_layers=1, **sizes)
    tasks = (Task("decode", LENGTH),)
    run = Run(find_sizes(config), torch.float32, "int4-row", "int8", tasks, limit,
              offload_dir=folder)
    memory.trim()
    with PeakMemory(is_cuda=False, baseline_bytes=rss_anon_bytes()) as peak:
        with run.loaded() as (network, scheduler):
            digest, plan = written(network), scheduler.plan
            copied = scheduler.stats().bytes_copied
    return {
        "used": peak.peak_bytes, "planned": plan.total_bytes, "copied": copied,
        "weights": plan.resident_bytes + plan.slot_bytes, "streamed": len(plan.streamed),
        "logits_sha256": digest,
    }


def written(network):
    ids = [i % 60 for i in range(LENGTH - 2)]
    one = blank(ids, len(ids) - 1, 0, is_continued=True)
    rows, digest = GLMRows(network, network.new_cache(1, LENGTH), LENGTH), hashlib.sha256()
    forward = rows.forward

    def watched(feeds, num_tokens):
        logits = forward(feeds, num_tokens)
        assert logits.isfinite().all()
        digest.update(logits.numpy().tobytes())
        return logits

    rows.forward = watched
    sampling, engine = Sampling(top_p=0.9, seed=1, filter=top_k_then_top_p), Engine(rows)
    request = Request(one.input_ids, 2, sampling, start_ids=one.start_ids, prompt=one)
    engine.run([engine.add(request)])
    assert len(request.tokens) == 2
    return digest.hexdigest()


folder, limit = Path(sys.argv[1]), int(sys.argv[2])
# What a process needs once, whatever the size of its model.
take(folder, 10**8, vocab_size=64, hidden_size=128, intermediate_size=256, num_attention_heads=2)
print(json.dumps(take(folder, limit, vocab_size=256)))
"""


def taken(folder: Path, limit: int) -> dict[str, Any]:
    """What a process of its own reports."""
    folder.mkdir()
    report: dict[str, Any] = told_by(SCRIPT, folder, limit, cwd=ROOT)
    return report


@pytest.mark.skipif(rss_anon_bytes() is None, reason="the system does not tell RssAnon")
def test_a_full_size_layer_within_a_limit_below_its_size(tmp_path: Path) -> None:
    """Two slots of its largest matrix leave 44 MB for all else."""
    limits = {"limited": LIMIT, "whole": 2**50}
    with ThreadPoolExecutor() as pool:
        limited, whole = pool.map(taken, (tmp_path / name for name in limits), limits.values())
    assert whole["weights"] > 900 * MB > LIMIT
    assert limited["used"] <= 1.05 * LIMIT, limited
    assert limited["planned"] <= LIMIT and limited["weights"] > 2 * UP_BYTES
    assert limited["streamed"] == 4 and limited["copied"] > whole["weights"]
    assert whole["streamed"] == whole["copied"] == 0
    assert whole["used"] <= 1.01 * whole["planned"], whole
    assert limited["logits_sha256"] == whole["logits_sha256"]
