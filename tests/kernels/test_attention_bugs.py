"""Bugs put into kernels/attention_decode.cu and attention_decode_merge.cu: the cases see each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attention_cases import (
    attention_case,
    masked_case,
    no_key_case,
    padded_attention_case,
    rows_case,
)
from case import Case
from host_launcher import HostLauncher, served_by

from bminf.cuda.source import Kernel, kernel_folder, source_of

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
SHORT = attention_case(HALF, 80, 33)
LONG = attention_case(HALF, 80, 600)
SOME = attention_case(HALF, 64, 300, "causal", 5, (6, 2))
POOL = rows_case(HALF, 64, (1, 300, 33), "causal")


@dataclass(frozen=True)
class Bug:
    """old, new: text of a source, which has the former once.   case: what sees it."""

    name: str
    old: str
    new: str
    case: Case
    file: str = "attention_decode.cu"


BUGS = [
    Bug("sees-one-more", "back >= 0 ? score", "back >= -1 ? score", SOME),
    Bug("mask-of-first", "(is_causal ? T - 1 - token : 0)", "(is_causal ? token : 0)", SOME),
    Bug("not-causal", "length - (is_causal ? T - 1 - token : 0)", "length", SOME),
    Bug("all-of-row", "lengths ? min(lengths[batch], S) : S", "S", POOL),
    Bug("first-row", "starts ? starts[batch] : 0", "0", POOL),
    Bug("other-batch", "size_t(batch) * k_batch", "size_t(0) * k_batch", SHORT),
    Bug("other-head", "blockIdx.y * group + min(", "blockIdx.y + min(", SOME),
    Bug("same-head", "first_query + r) >> token_bits", "first_query) >> token_bits",
        attention_case(HALF, 64, 33, "slopes", 1, (6, 2))),
    Bug("no-scale", "rows[r].values[i] *= scale", "rows[r].values[i] *= 1.0f", SHORT),
    Bug("not-rescaled", "seen[r].values[j] *= factor;", "seen[r].values[j] *= 1.0f;", LONG),
    Bug("total-not-rescaled", "seen[r].total *= factor;", "seen[r].total *= 1.0f;", LONG),
    Bug("maximum-not-kept", "seen[r].most = most;", "", LONG),
    Bug("lanes-not-merged", "distance >= LANES; distance", "distance > LANES; distance", SHORT),
    Bug("half-a-dot", "distance = LANES / 2", "distance = LANES / 4", SHORT),
    Bug("columns-beyond", "zeros(place, column, HEAD_DIM,", "zeros(place, column, 8 * LANES,",
        SHORT),
    Bug("key-beyond", "/ LANES), end - 1)", "/ LANES), S + 9)", SHORT),
    Bug("no-clamp", "min(first + i * STREAMS + int(threadIdx.x / LANES), end - 1)",
        "first + i * STREAMS + int(threadIdx.x / LANES)", SHORT),
    Bug("slope-forgotten", "rows[r].slope * float(back)", "0.0f",
        attention_case(HALF, 64, 33, "slopes")),
    Bug("slope-turned", "score - rows[r].slope", "score + rows[r].slope",
        attention_case(HALF, 64, 33, "slopes")),
    Bug("bucket-beyond", "min(back, max_distance)", "back",
        attention_case(HALF, 64, 300, "buckets")),
    Bug("bucket-of-head-0", "size_t(bucket) * H + rows[r].head", "size_t(bucket) * H",
        attention_case(HALF, 64, 33, "buckets")),
    Bug("bias-of-key-0", "size_t(position) * b_key", "size_t(0) * b_key",
        attention_case(HALF, 64, 33, "bias")),
    Bug("bias-of-token-0", "size_t(rows[r].token) * b_token", "size_t(0) * b_token",
        attention_case(HALF, 64, 33, "bias", 3)),
    Bug("nan-of-nothing", "most == no_score() ? 0.0f : most", "most", no_key_case(HALF, 7)),
    Bug("divided-by-zero", "total == 0.0f ? 0.0f : sum / total", "sum / total",
        no_key_case(HALF, 7)),
    Bug("warp-left-out", "w < WARPS; ++w) {", "w < WARPS - 1; ++w) {", LONG),
    Bug("no-barrier-before", "seen[r].total;\n        __syncthreads();", "seen[r].total;", SHORT),
    Bug("no-barrier-after", "        __syncthreads();\n    }\n}", "    }\n}", SOME),
    Bug("chunk-twice", "const int begin = chunk * CHUNK", "const int begin = 0", LONG),
    Bug("merge-misses-one", "+ CHUNK - 1) / CHUNK", ") / CHUNK", LONG, "attention_decode_merge.cu"),
    Bug("merge-reads-padding", "const int num_used = (u32(num_seen) + CHUNK - 1) / CHUNK",
        "const int num_used = num_chunks", padded_attention_case("causal", (5, 300), 1),
        "attention_decode_merge.cu"),
    Bug("merge-without-scale", "sum += factor * ", "sum += ", LONG, "attention_decode_merge.cu"),
    Bug("merge-nan", "if (most == __uint_as_float(0xFF800000u)) most = 0.0f;", "",
        masked_case(HALF), "attention_decode_merge.cu"),
]  # fmt: skip


def source_with(bug: Bug, kernel: Kernel) -> str:
    text = source_of(kernel)
    return text.replace(bug.old, bug.new) if kernel.file == bug.file else text


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_bug_in_the_kernel_is_seen(bug: Bug) -> None:
    assert (kernel_folder() / bug.file).read_text().count(bug.old) == 1
    failures = []
    for order in ("forward", "reverse"):
        torch.manual_seed(0)
        launcher = HostLauncher(61, order, source_of=lambda kernel: source_with(bug, kernel))
        with served_by(launcher):
            try:
                bug.case.run("cpu")
            except Exception as error:
                failures.append(error)
    assert failures, f"{bug.case} does not see it"
