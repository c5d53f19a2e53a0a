"""`python -m tools.predictions --out FILE.json`: tokens/s of known models on known cards.

Nothing is measured, and no GPU, weight or network is needed: each model is planned from its sizes
under 90% of a card's memory, with room for a text, and its pass is timed on the virtual clock of
`bminf plan`. The host has room for all that streams. The file also has the sizes, and the
predictions of single plans, that the documents mention in their text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import bminf
from benchmarks.harness import write_json
from bminf.cli.gpus import Card, card_of
from bminf.cli.sources import build_on_meta
from bminf.cli.tables.document import document
from bminf.cli.tables.text import markdown
from bminf.errors import BudgetError
from bminf.offload.hit_rates import PUBLISHED
from bminf.offload.plan import Plan
from bminf.offload.predict import Rows, predict

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("GTX 1060", "RTX 3060", "RTX 4060", "RTX 4080", "RTX 3090", "RTX 4090", "RTX 5090")
SHARE = 0.9  # of a card's memory, as without memory_limit
TEXTS, BITS = 16, 4.5
CONTEXT = 2048  # tokens; of the models with keys of all heads 512
ACCELERATE_LINK = 0.48
"""Of the link, that copies of single tensors from pageable memory reach: what accelerate's own
benchmark page gives for OPT-30B, 2.37 s for 14.1 GB over PCIe 3, against 12.4 GB/s."""
HOST_MEMORY = 50e9
"""Bytes a second that the processor of a desktop reads: two channels of DDR4-3200."""


@dataclass(frozen=True, eq=False)
class Model:
    """config: of a model of transformers, or None for a published one of the zoo.

    formats: what to plan it in; "int4-row, head int8" packs the head of a GLM too.
    """

    name: str
    formats: tuple[str, ...]
    config: dict[str, Any] | None = None
    context: int = CONTEXT


def _dense(
    kind: str, hidden: int, inner: int, layers: int, heads: int, rows: int
) -> dict[str, Any]:
    """Eight heads of keys, of 128; an output head of its own."""
    return {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": rows, "tie_word_embeddings": False, "dtype": "bfloat16",
        "max_position_embeddings": 32768,
    }  # fmt: skip


_BOTH = ("int8", "int4")
MODELS = (
    Model("Llama 3.1 8B", _BOTH, _dense("llama", 4096, 14336, 32, 32, 128256)),
    Model("Qwen3 14B", _BOTH, _dense("qwen3", 5120, 17408, 40, 40, 151936)),
    Model("Qwen3 32B", _BOTH, _dense("qwen3", 5120, 25600, 64, 64, 151936)),
    Model("Llama 3.3 70B", _BOTH, _dense("llama", 8192, 28672, 80, 64, 128256)),
    Model("Qwen3.6 35B-A3B", ("int4",), {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
    }),
    Model("gpt-oss-120b", ("int4",), {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "dtype": "bfloat16",
    }),
    Model("CPM-2", _BOTH, context=512),
    Model("GLM-130B", ("int4-row",), context=512),
    Model("BLOOM-176B", ("int4",), context=512),
)  # fmt: skip
_PUBLISHED = {
    "CPM-2": "CPM-2 (Chinese), CPM-2.1", "GLM-130B": "GLM-130B", "BLOOM-176B": "BLOOM-176B",
}  # fmt: skip


@cache
def _on_meta(name: str) -> Any:
    return build_on_meta(next(model.config or {} for model in MODELS if model.name == name))


def plan_of(model: Model, form: str, memory_limit: int) -> Plan:
    """Raises BudgetError where not even two slots fit."""
    if model.config is not None:
        return bminf.plan_for(
            _on_meta(model.name), form, memory_limit, max_length=model.context, device="cuda"
        )
    head = None if model.name == "CPM-2" else "int8"
    return bminf.models.plan_model(
        _PUBLISHED[model.name], memory_limit, form, max_length=model.context,
        head_quantization=head,
    )  # fmt: skip


def results() -> Iterator[dict[str, Any]]:
    """One for each model, format and card."""
    for model in MODELS:
        for form in model.formats:
            for name in CARDS:
                yield _result(model, form, card_of(name))


def _result(model: Model, form: str, card: Card) -> dict[str, Any]:
    details = {"model": model.name, "format": form, "card": card.name}
    found: dict[str, Any] = {"name": ", ".join(details.values()), "details": details}
    try:
        plan = plan_of(model, form, int(SHARE * card.memory_bytes))
    except BudgetError:
        return found | {"prediction": None}
    is_last = model.config is not None and form == model.formats[-1]
    others = _others(model, card, plan) if is_last else {}
    return found | {"prediction": prediction_of(plan, card) | others}


def prediction_of(plan: Plan, card: Card) -> dict[str, Any]:
    """Tokens/s of one text, where experts are by need between two ends, and of TEXTS together."""
    link, memory = card.speeds
    least = predict(plan, link, memory)
    most = predict(plan, link, memory, hit_rates=PUBLISHED)
    moved, experts = plan.streamed_bytes, plan.experts
    if experts is not None:
        moved += int(experts.missed_bytes())
    together = {}
    if card.flops is not None:
        rows = _together(plan, card, card.flops)
        many = predict(plan, link, memory, rows=rows)
        together = {"together_tokens_per_s": TEXTS / many.pass_s, "together_bound": many.binds}
    return {
        "tokens_per_s": 1 / least.pass_s,
        "most_tokens_per_s": 1 / most.pass_s,
        "bound": least.binds,
        "memory_limit_bytes": plan.budget,
        "resident_bytes": plan.resident_bytes,
        "host_bytes": plan.host_bytes,
        "copied_bytes_per_token": moved,
        **together,
    }


def _together(plan: Plan, card: Card, flops: float) -> Rows:
    """Of TEXTS texts, whose weights have BITS. Pascal multiplies such ones in float32, which is a
    quarter of what its cards are known to do."""
    weights = {block.name: int(block.nbytes * 8 / BITS) for block in plan.blocks}
    return Rows(TEXTS, weights, flops / 4 if card.name.startswith("GTX 10") else flops)


def _others(model: Model, card: Card, plan: Plan) -> dict[str, float]:
    """What others could reach under the same limit, if nothing but bytes took time.

    llama.cpp, with as many bits a weight, computes on the processor what does not fit, of a mixture
    those experts that are wanted. accelerate keeps 16 bits, and copies what does not fit for each
    token, with the experts that are not wanted.
    """
    link, memory = card.speeds
    room = plan.budget - plan.reserved_bytes
    packed, half = _sizes(model, model.formats[-1]), _sizes(model, None)
    outside = max(0.0, packed.total - room)
    on_host = min(1.0, outside / packed.experts) * packed.wanted if packed.experts else outside
    moved = max(0.0, half.total - room)
    return {
        "llama_cpp_tokens_per_s": 1 / (on_host / HOST_MEMORY + (packed.read - on_host) / memory),
        "accelerate_tokens_per_s": 1 / (moved / (ACCELERATE_LINK * link) + half.read / memory),
    }


class _Sizes(NamedTuple):
    """Bytes of all weights, and of those that a token reads; of experts, and of the wanted ones."""

    total: float
    read: float
    experts: float
    wanted: float


@cache
def _sizes(model: Model, form: str | None) -> _Sizes:
    """form: None is 16 bits a weight."""
    plan = bminf.plan_for(_on_meta(model.name), form or False, device="cuda")
    least = bminf.plan_for(_on_meta(model.name), form or False, plan.least_limit, device="cuda")
    dense = plan.resident_bytes - plan.table_bytes
    if least.experts is None:
        return _Sizes(dense, dense, 0, 0)
    total, wanted = least.experts.nbytes, least.experts.bytes_per_token
    return _Sizes(dense, dense - total + wanted, total, wanted)


# ---- what the text mentions ----------------------------------------------------------------------


def figures() -> dict[str, float]:
    """Sizes in bytes and predictions of single plans, by the names that documents call them by."""
    return {name: value() for name, value in _FIGURES.items()}


CPM2, EVA, BLOOM = "CPM-2 (Chinese), CPM-2.1", "thu-coai/EVA1.0", "bigscience/bloom"


def _packed_bytes(name: str, form: str | None, head: str | None = None) -> int:
    """Of all weights, in memory: with the table of the embedding."""
    plan = bminf.models.plan_model(name, None, form, head_quantization=head, max_length=1)
    return plan.resident_bytes + plan.host_table_bytes


def _head_bytes(name: str) -> int:
    """Of an output head in half precision, beyond one in 8 bits."""
    form = "int8"
    return _packed_bytes(name, form) - _packed_bytes(name, form, "int8")


@cache
def _glm130b() -> Plan:
    """On a card of 24 GB, in the format of its authors."""
    return bminf.models.plan_model(
        "GLM-130B", "21.6GiB", "int4-row", max_length=512, head_quantization="int8"
    )


def _layer_bytes(plan: Plan) -> int:
    return sum(block.nbytes for block in plan.blocks if ".1." in block.name)


_FIGURES: dict[str, Callable[[], float]] = {
    "cpm1_int8_bytes": lambda: _packed_bytes("TsinghuaAI/CPM-Generate", "int8"),
    "cpm2_int8_bytes": lambda: _packed_bytes(CPM2, "int8"),
    "cpm2_half_bytes": lambda: _packed_bytes(CPM2, None),
    "eva_int8_bytes": lambda: _packed_bytes(EVA, "int8"),
    "glm130b_int8_bytes": lambda: _packed_bytes("GLM-130B", "int8", "int8"),
    "glm130b_int4_row_bytes": lambda: _packed_bytes("GLM-130B", "int4-row", "int8"),
    "glm130b_half_bytes": lambda: _packed_bytes("GLM-130B", None),
    "glm130b_layer_bytes": lambda: _layer_bytes(_glm130b()),
    "glm130b_head_bytes": lambda: 2 * _head_bytes("GLM-130B"),
    "glm130b_24gb_resident_bytes": lambda: _glm130b().resident_bytes,
    "glm130b_24gb_token_s": lambda: predict(_glm130b(), 25e9, 936e9).pass_s,
    "glm10b_int8_bytes": lambda: _packed_bytes("GLM-10B", "int8"),
    "bloom_int8_bytes": lambda: _packed_bytes(BLOOM, "int8"),
    "bloom_int4_bytes": lambda: _packed_bytes(BLOOM, "int4"),
    "bloom_head_bytes": lambda: 2 * _head_bytes(BLOOM),
}


# ---- the command ---------------------------------------------------------------------------------


COMPARED = (
    ("Llama 3.1 8B", "GTX 1060"), ("Qwen3 14B", "GTX 1060"), ("Qwen3 32B", "RTX 4080"),
    ("Qwen3.6 35B-A3B", "GTX 1060"), ("Llama 3.3 70B", "RTX 3090"), ("CPM-2", "GTX 1060"),
    ("GLM-130B", "RTX 3090"),
)  # fmt: skip
"""What the README shows: each in its last format."""


def table_parts(content: dict[str, Any], view: str = "") -> Iterator[str]:
    """By cards, or, as "compared", beside what others can reach."""
    return _compared(content["results"]) if view == "compared" else _by_card(content)


def _compared(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    last = {(r["details"]["model"], r["details"]["card"]): r["prediction"] for r in results}
    others = ("llama_cpp_tokens_per_s", "accelerate_tokens_per_s")
    yield markdown(
        ["tokens/s", "card", "memory limit", "BMInf", f"{TEXTS} texts together",
         "llama.cpp, at most", "accelerate, at most"],
        [
            [model, card, f"{own['memory_limit_bytes'] / 1e9:.1f} GB", _range(own),
             _rate(own["together_tokens_per_s"]),
             *(_rate(own[key]) if key in own else "not known to it" for key in others)]
            for model, card in COMPARED
            for own in [last[model, card]]
        ],
    )  # fmt: skip


def _by_card(content: dict[str, Any]) -> Iterator[str]:
    """Models and formats down, cards across; bold where all weights stay on the card."""
    parameters = content["parameters"]
    yield (
        "Predicted, not measured: tokens/s of one text, by bandwidths of data sheets, with "
        f"{parameters['share']:.0%} of the card's memory as limit. **Bold**: nothing streams. Of "
        "mixtures of experts two ends: each expert as likely as any other, and the most hits that "
        "were published."
    )
    cards = {result["details"]["card"]: None for result in content["results"]}
    rows: dict[tuple[str, str], list[str]] = {}
    for result in content["results"]:
        key = result["details"]["model"], result["details"]["format"]
        rows.setdefault(key, []).append(_cell(result["prediction"]))
    yield markdown(
        ["", "format", *(f"{card} {parameters['gibibytes'][card]} GB" for card in cards)],
        [[*key, *cells] for key, cells in rows.items()],
    )


def _cell(prediction: dict[str, Any] | None) -> str:
    if prediction is None:
        return "too small"
    text = _range(prediction)
    return text if prediction["copied_bytes_per_token"] else f"**{text}**"


def _range(prediction: dict[str, Any]) -> str:
    least, most = prediction["tokens_per_s"], prediction["most_tokens_per_s"]
    return _rate(least) if most < 1.05 * least else f"{_rate(least)} to {_rate(most)}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def main() -> int:
    """0, after the file was written."""
    parser = argparse.ArgumentParser("python -m tools.predictions", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    parameters = {
        "share": SHARE, "threads": 1, "device": "cpu",
        "gibibytes": {name: card_of(name).memory_bytes >> 30 for name in CARDS},
        "models": [{"name": m.name, "config": m.config, "context": m.context} for m in MODELS],
    }  # fmt: skip
    content = document("predictions", parameters, {}, ROOT)
    content["results"] = list(results())
    content["figures"] = figures()
    write_json(arguments.out, content)
    print("\n\n".join(table_parts(content)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
