"""GLM-130B's filter rule, against the distributions of the authors' own code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from distribution import probabilities
from golden import for_each, golden
from golden_glm import GLMSet

from bminf.engine.sampling import Sampling, top_k_then_top_p

FILE = "sampling.safetensors"
REMOVED = -65504.0


def distributions(given: GLMSet) -> Iterator[str]:
    yield from sorted(set(given.cases(FILE, "probs")) & set(given.cases(FILE, "filtered")))


def sampling_of(case: str, vocab_size: int) -> Sampling:
    """From a name such as topk40_topp0.9_temp2. With the authors 0 is no filter, and a top_k above
    the vocabulary is all of it."""
    values = {}
    for word in case.split("_"):
        found = re.fullmatch(r"(topk|topp|temp)(\d+(?:\.\d+)?)", word)
        assert found, f"case {case!r}: {word!r} is not understood"
        values[found[1]] = float(found[2])
    return Sampling(
        temperature=values.get("temp", 1.0),
        top_k=min(int(values.get("topk", 0)), vocab_size) or None,
        top_p=values.get("topp", 0) or None,
        filter=top_k_then_top_p,
    )


@for_each(("glm130b",), distributions)
def test_golden_glm130b_distribution(name: str, case: str) -> None:
    """The stored logits are those of the model; the authors divide, filter, take the softmax.
    What is kept may be too unlikely for float32, with them as with us."""
    given = golden(name).file(FILE)
    ours = probabilities(given["logits"], None, sampling_of(case, given["logits"].shape[1]))
    filtered, theirs = given[f"{case}.filtered"], given[f"{case}.probs"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours == 0, (filtered == REMOVED) | (theirs == 0))
