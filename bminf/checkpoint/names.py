"""From the names of an on-disk layout to those of our models: a table a layout, and its use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bminf.checkpoint.quantized import Quantized, quantized_rows
from bminf.checkpoint.stored import Rows, Stored, Transposed
from bminf.errors import CheckpointError

_MOST_NAMES = 5  # in a message
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


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
    table = {rule.theirs: rule for rule in rules}
    found: dict[str, dict[int, Stored]] = {}
    wanted: dict[str, list[str]] = {}  # ours -> theirs that it is made of
    unknown = []
    for name, stored in _with_scales(tensors).items():
        if name.endswith(".inv_freq"):  # of rotary positions: numbers that code can compute
            continue
        rule, number = _rule_for(name, table)
        if rule is None:
            unknown.append(name)
        elif rule.ours is not None:
            ours = rule.ours.replace("{n}", number)
            piece = Transposed(stored) if rule.is_transposed else stored
            made = found.setdefault(ours, {})
            if rule.part in made:
                raise CheckpointError(
                    f"{path} holds {made[rule.part].where} and {stored.where}, which {layout} has "
                    "once; take out the one that does not belong there"
                )
            made[rule.part] = piece
            wanted[ours] = [r.theirs.replace("{n}", number) for r in _siblings(rule, table)]
    if unknown:
        raise CheckpointError(
            f"{path} holds {listed(unknown)}, which {layout} does not have; "
            "see whether this is a checkpoint of another model"
        )
    _check_parts(found, wanted, path)
    return {ours: _below_another(pieces) for ours, pieces in found.items()}


def num_known(names: Iterable[str], rules: Iterable[Rule]) -> int:
    """How many of `names` there is a rule for."""
    table = {rule.theirs: rule for rule in rules}
    return sum(_rule_for(name, table)[0] is not None for name in names)


def theirs_of(ours: str, rules: Iterable[Rule]) -> str:
    """What a layout calls a tensor of ours, for messages: all its parts, joined by " + "."""
    number = next(iter(_NUMBER.findall(ours)), "")
    template = _NUMBER.sub("{n}", ours, count=1)
    found: dict[int, str] = {}
    for rule in rules:
        if rule.ours in (ours, template):
            found.setdefault(rule.part, rule.theirs.replace("{n}", number))
    return " + ".join(found[part] for part in sorted(found)) or ours


def listed(names: Iterable[str]) -> str:
    """The first of `names`, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - _MOST_NAMES} more" if len(shown) > _MOST_NAMES else ""
    return ", ".join(repr(name) for name in shown[:_MOST_NAMES]) + more


def _rule_for(name: str, table: Mapping[str, Rule]) -> tuple[Rule | None, str]:
    """The rule for `name` and the number of its layer, "" where there is none."""
    if name in table:
        return table[name], ""
    numbers = _NUMBER.findall(name)
    if len(numbers) == 0:
        return None, ""
    return table.get(_NUMBER.sub("{n}", name, count=1)), numbers[0]


def _siblings(rule: Rule, table: Mapping[str, Rule]) -> list[Rule]:
    if rule.num_parts == 1:
        return [rule]
    return [other for other in table.values() if other.ours == rule.ours]


def _check_parts(
    found: Mapping[str, Mapping[int, Stored]], wanted: Mapping[str, list[str]], path: Path
) -> None:
    missing = [
        name
        for ours, pieces in found.items()
        for part, name in enumerate(wanted[ours])
        if len(wanted[ours]) > 1 and part not in pieces
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}; fetch it again, or save it anew")


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


def _below_another(pieces: Mapping[int, Stored]) -> Stored:
    ordered = [pieces[part] for part in sorted(pieces)]
    if len(ordered) == 1:
        return ordered[0]
    quantized = [piece for piece in ordered if isinstance(piece, Quantized)]
    if len(quantized) == len(ordered):
        return quantized_rows(quantized)
    return Rows(tuple(ordered))
