"""From the names of an on-disk layout to those of our models, by a table for each layout.

Before that, names lose what training code wraps around a model. Sources of its wrappers:
torch.nn.parallel (DataParallel, DistributedDataParallel), torch._dynamo (torch.compile),
torch.distributed (FSDP, activation checkpointing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bminf.checkpoint.quantized import Quantized, quantized_rows
from bminf.checkpoint.stored import Rows, Stored, Transposed
from bminf.errors import CheckpointError

_MAX_NAMES = 5  # in a message
_PARALLEL = "module."
# These stand around any module, the model or a layer of it, and no module is called so itself.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors of one name; {n} in it is the index of a layer.

    source_name: in the file.   target_name: in our model; None for a tensor that is known and not
    needed.   part, num_parts: the target is made of several sources, one below another, of which
    this is one.   is_transposed: the source is (in_features, out_features), or (heads, buckets).
    """

    source_name: str
    target_name: str | None
    part: int = 0
    num_parts: int = 1
    is_transposed: bool = False


MEGATRON_LINEARS = {
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}
"""Of a layer of Megatron-LM, which several models were trained with: source -> target."""

MEGATRON_NAMES = {
    "transformer.layers.{n}.input_layernorm": "layers.{n}.attention.norm",
    "transformer.layers.{n}.post_attention_layernorm": "layers.{n}.norm",
    "transformer.final_layernorm": "norm",
    **{
        f"transformer.layers.{{n}}.{source}": f"layers.{{n}}.{target}"
        for source, target in MEGATRON_LINEARS.items()
    },
}
"""Of its layers, and of the norm behind them; all have a weight and a bias."""


def rules_of(
    names: Mapping[str, str | None], has_bias: bool = False, is_transposed: bool = False
) -> Iterator[Rule]:
    """Rules for the weights, and the biases, of modules: source name -> target name.

    [qkv] in a source name stands for any of these letters, in the order of the parts.
    is_transposed: of the weights.
    """
    for source, target in names.items():
        before, _, bracket = source.partition("[")
        letters, _, after = bracket.partition("]")
        for kind in ("weight", "bias") if has_bias else ("weight",):
            target_name = None if target is None else f"{target}.{kind}"
            is_weight_transposed = is_transposed and kind == "weight"
            for part, letter in enumerate(letters or [""]):
                name = f"{before}{letter}{after}.{kind}"
                yield Rule(name, target_name, part, max(1, len(letters)), is_weight_transposed)


def rename(
    tensors: Mapping[str, Stored], rules: Sequence[Rule], path: Path, layout: str
) -> dict[str, Stored]:
    """`tensors` under the names of our model, put together where one is made of several.

    path, layout: for messages.   Raises CheckpointError for a name that no rule knows, and for a
    tensor that lacks a part.
    """
    table = {rule.source_name: rule for rule in rules}
    found: dict[str, list[Stored | None]] = {}
    unknown = []
    for name, stored in _with_scales(tensors).items():
        if name.endswith(".inv_freq"):  # of rotary positions: numbers that code can compute
            continue
        rule, layer = _rule_for(name, table)
        if rule is None:
            unknown.append(name)
        elif rule.target_name is not None:
            target_name = rule.target_name.replace("{n}", layer)
            pieces = found.setdefault(target_name, [None] * rule.num_parts)
            if (other := pieces[rule.part]) is not None:
                raise CheckpointError(
                    f"{path} holds {other.where} and {stored.where}, which {layout} has once; take "
                    "out the one that does not belong there"
                )
            pieces[rule.part] = Transposed(stored) if rule.is_transposed else stored
    if unknown:
        raise CheckpointError(
            f"{path} holds {listed(unknown)}, which {layout} does not have; "
            "see whether this is a checkpoint of another model"
        )
    missing = [
        name
        for target, pieces in found.items()
        if None in pieces
        for name, piece in zip(_sources(target, rules), pieces, strict=True)
        if piece is None
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}; fetch it again, or save it anew")
    return {
        target: _joined([p for p in pieces if p is not None]) for target, pieces in found.items()
    }


def num_known(names: Iterable[str], rules: Iterable[Rule]) -> int:
    """How many of `names` there is a rule for."""
    table = {rule.source_name: rule for rule in rules}
    return sum(_rule_for(name, table)[0] is not None for name in names)


def source_name_of(target_name: str, rules: Iterable[Rule]) -> str:
    """What a layout calls a tensor of our model, for messages: its parts, joined by " + "."""
    return " + ".join(_sources(target_name, rules)) or target_name


def _sources(target_name: str, rules: Iterable[Rule]) -> list[str]:
    layer = next(iter(_LAYER.findall(target_name)), "")
    template = _LAYER.sub("{n}", target_name, count=1)
    found: dict[int, str] = {}
    for rule in rules:
        if rule.target_name in (target_name, template):
            found.setdefault(rule.part, rule.source_name.replace("{n}", layer))
    return [found[part] for part in sorted(found)]


def unwrapped(tensors: Mapping[str, T]) -> dict[str, T]:
    """`tensors`, in their order, under the names that the model itself has.

    "module." is taken off, as often as it is there, where all names begin with it. Where two names
    would become one, all stay as they are.
    """
    names = {
        name: ".".join([part for part in name.split(".") if part not in _WRAPPERS])
        for name in tensors
    }
    while names and all(bare.startswith(_PARALLEL) for bare in names.values()):
        names = {name: bare.removeprefix(_PARALLEL) for name, bare in names.items()}
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def listed(names: Iterable[str]) -> str:
    """The first of `names`, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in shown[:_MAX_NAMES]) + more


def _rule_for(name: str, table: Mapping[str, Rule]) -> tuple[Rule | None, str]:
    """The rule for `name` and the index of its layer, "" where there is none."""
    match = None if name in table else _LAYER.search(name)
    if match is None:
        return table.get(name), ""
    return table.get(f"{name[: match.start()]}{{n}}{name[match.end() :]}"), match[0]


def _with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Each 8-bit matrix together with its scales, as one."""
    joined: dict[str, Stored] = {}
    for name, stored in tensors.items():
        base, _, last = name.rpartition(".")
        scale = tensors.get(f"{base}.scale")
        if last == "weight" and scale is not None:
            joined[name] = Quantized(stored, scale)
        elif last != "scale" or f"{base}.weight" not in tensors:
            joined[name] = stored
    return joined


def _joined(pieces: list[Stored]) -> Stored:
    """The pieces one below another."""
    if len(pieces) == 1:
        return pieces[0]
    quantized = [piece for piece in pieces if isinstance(piece, Quantized)]
    return quantized_rows(quantized) if len(quantized) == len(pieces) else Rows(tuple(pieces))
