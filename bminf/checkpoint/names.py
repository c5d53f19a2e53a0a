"""From the names of an on-disk layout to those of our models: a table a layout, and its use.

Before that, names lose what training code wraps around a model. Sources of its wrappers:
torch.nn.parallel (DataParallel, DistributedDataParallel), torch._dynamo (torch.compile),
torch.distributed (FSDP, activation checkpointing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bminf.checkpoint.quantized import Quantized, quantized_rows
from bminf.checkpoint.stored import Rows, Stored, Transposed
from bminf.errors import CheckpointError

_MOST_NAMES = 5  # in a message
_PARALLEL = "module."
# These stand around any module, the model or a layer of it, and no module is called so itself.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors of one name; {n} in it is the number of a layer.

    ours: the name in our model; None for a tensor that is known and not needed.
    part, num_parts: ours is made of several of theirs, one below another, of which this is one.
    is_transposed: theirs is (in_features, out_features), or (heads, buckets).
    """

    theirs: str
    ours: str | None
    part: int = 0
    num_parts: int = 1
    is_transposed: bool = False


def parts(theirs: Iterable[str], ours: str) -> Iterator[Rule]:
    """Rules for a tensor of ours that is several of theirs, one below another."""
    names = list(theirs)
    for part, name in enumerate(names):
        yield Rule(name, ours, part, len(names))


def rename(
    tensors: Mapping[str, Stored], rules: Iterable[Rule], path: Path, layout: str
) -> dict[str, Stored]:
    """`tensors` under our names, put together where ours are made of several.

    path, layout: for messages.   Raises CheckpointError for a name that no rule knows, and for a
    tensor of ours that lacks a part.
    """
    known = list(rules)
    table = {rule.theirs: rule for rule in known}
    found: dict[str, list[Stored | None]] = {}
    unknown = []
    for name, stored in _with_scales(tensors).items():
        if name.endswith(".inv_freq"):  # of rotary positions: numbers that code can compute
            continue
        rule, number = _rule_for(name, table)
        if rule is None:
            unknown.append(name)
        elif rule.ours is not None:
            pieces = found.setdefault(rule.ours.replace("{n}", number), [None] * rule.num_parts)
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
        for ours, pieces in found.items()
        if None in pieces
        for name, piece in zip(_sources(ours, known), pieces, strict=True)
        if piece is None
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}; fetch it again, or save it anew")
    return {ours: _joined([p for p in pieces if p is not None]) for ours, pieces in found.items()}


def num_known(names: Iterable[str], rules: Iterable[Rule]) -> int:
    """How many of `names` there is a rule for."""
    table = {rule.theirs: rule for rule in rules}
    return sum(_rule_for(name, table)[0] is not None for name in names)


def theirs_of(ours: str, rules: Iterable[Rule]) -> str:
    """What a layout calls a tensor of ours, for messages: all its parts, joined by " + "."""
    return " + ".join(_sources(ours, rules)) or ours


def _sources(ours: str, rules: Iterable[Rule]) -> list[str]:
    number = next(iter(_NUMBER.findall(ours)), "")
    template = _NUMBER.sub("{n}", ours, count=1)
    found: dict[int, str] = {}
    for rule in rules:
        if rule.ours in (ours, template):
            found.setdefault(rule.part, rule.theirs.replace("{n}", number))
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
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return ", ".join(repr(name) for name in shown[:_MOST_NAMES]) + more


def _rule_for(name: str, table: Mapping[str, Rule]) -> tuple[Rule | None, str]:
    """The rule for `name` and the number of its layer, "" where there is none."""
    match = None if name in table else _NUMBER.search(name)
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
