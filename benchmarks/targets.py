"""What the kernels have to reach, and whether those of a file did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.by_size import Content, Size, Variants, by_op, over_plain, ratio, seconds

_LEAST_WEIGHTS = 100_000_000  # of a matrix that fills the memory of a large GPU
_LEAST_SHARE = {"int8": 0.85, "int4": 0.75}  # of the copy's bandwidth, for one row
_MOST_ROW_RATIO = {4: 1.2, 16: 1.3}  # rows: time over that of one row
_WAYS_OF_W8A8 = ("own kernel", "library", "torch._int_mm and torch")
_MOST_OVER_BEST = 1.03
_CPU_RATIOS = {  # op: variant, most over fp32, least number of weights
    "linear rotated": ("int8", 0.6, 576 * 576),
    "linear cached": ("int8, int8 activations", 0.5, 1536 * 576),
}
_LEVEL = "avx512"  # of these targets; one row, weights of 4096x4096 and more
_GROUPS_OF_32 = ("int4-g32", "int4-g32-integers")
_LEAST_READ = {"int8": 0.8} | dict.fromkeys(_GROUPS_OF_32, 0.42)  # by one thread
_LEAST_READ_OF_ALL = {"int8": 0.75}  # by all threads, of what they read together
_MOST_OVER_G32 = {"int4": 1.35, "int4-g32-minimum": 1.35}
_LEAST_OVER_TORCH = {"int8": 1.8, "int4": 14, "int4-g32": 9}  # than torch's operations, one thread
_LEAST_OF_ALL, _MOST_CPU_OF_ALL = 1.5, 1.15  # all threads over one: speed, and CPU time
_LARGE, _MOST_CONSTANT_US = 4096, 15  # of smaller ones, beyond their share of the time of a large


@dataclass(frozen=True)
class Target:
    """One of them. limit: the least `value` if `is_least`, otherwise the most."""

    name: str
    value: float
    limit: float
    is_least: bool = False

    def is_met(self, margin: float = 1.0) -> bool:
        """Whether it is reached; with a margin of 1.5, whether two thirds of it are."""
        if self.is_least:
            return self.value * margin >= self.limit
        return self.value <= self.limit * margin

    def __str__(self) -> str:
        verdict = "reached" if self.is_met() else "MISSED"
        word = "least" if self.is_least else "most"
        return f"{self.name}: {self.value:.3f}, at {word} {self.limit:.2f}: {verdict}"


def targets(content: Content) -> list[Target]:
    """All targets for which the file has numbers."""
    return [
        target
        for op, sizes in by_op(content).items()
        for size in sizes
        for target in _targets_of(op, size, sizes)
    ]


def _targets_of(op: str, size: Size, sizes: dict[Size, Variants]) -> Iterator[Target]:
    (shape, num_rows), variants, chosen = size, sizes[size], _chosen(sizes[size])
    name, num_weights = f"{shape} M={num_rows}", math.prod(map(int, shape.split("x")))
    if op in _CPU_RATIOS and num_rows == 1:
        way, most, least_weights = _CPU_RATIOS[op]
        # The least time over the least time: the machine's noise only ever adds.
        over = over_plain(way, variants, "min")
        if over is not None and num_weights >= least_weights:
            yield Target(f"CPU {way} {name} {op.split()[1]}, over fp32", over, most)
    elif op == "levels" and num_rows == 1:
        if num_weights >= _LARGE**2:
            yield from _level_targets(name, variants)
        else:
            yield from _small_targets(name, variants, sizes.get((f"{_LARGE}x{_LARGE}", 1), {}))
    elif op == "w8a8" and num_rows == 2048:
        # The chosen product is the fastest one of codes that are there already.
        ways = [variants[way] for way in _WAYS_OF_W8A8 if way in variants]
        for own in chosen.values():
            worst = max(ratio(own, other) for other in ways)
            yield Target(f"w8a8 {name}, chosen over best", worst, _MOST_OVER_BEST)
    elif op == "weight-only" and num_weights >= _LEAST_WEIGHTS:
        # One row reads codes and scales at the copy's speed, and a few rows cost hardly more.
        one_row = _chosen(sizes.get((shape, 1), {}))
        for form, own in chosen.items():
            share = own["details"].get("copy_fraction")
            if num_rows == 1 and form in _LEAST_SHARE and share is not None:
                least = _LEAST_SHARE[form]
                yield Target(f"{form} {name}, share of the copy", share, least, is_least=True)
            if num_rows in _MOST_ROW_RATIO and form in one_row:
                most = _MOST_ROW_RATIO[num_rows]
                yield Target(f"{form} {name} over M=1", ratio(own, one_row[form]), most)


def _level_targets(name: str, variants: Variants) -> Iterator[Target]:
    """Of the formats that were measured by the best level, and with torch's operations."""
    by_way = _by_level(variants)
    for way, own in by_way.items():
        form, is_one = own["details"]["format"], own["details"]["threads"] == 1
        share, torchs = own["details"].get("read_fraction"), variants.get(f"{form} none")
        g32, one = by_way.get(f"int4-g32 {_LEVEL}"), by_way.get(f"{form} {_LEVEL}")
        least = (_LEAST_READ if is_one else _LEAST_READ_OF_ALL).get(form)
        if least is not None and share is not None:
            yield Target(f"{way} {name}, share of reading", share, least, is_least=True)
        if is_one and form in _MOST_OVER_G32 and g32:
            yield Target(f"{way} {name} over g32", ratio(own, g32), _MOST_OVER_G32[form])
        if is_one and form in _LEAST_OVER_TORCH and torchs:
            least = _LEAST_OVER_TORCH[form]
            yield Target(f"{way} {name}, torch's over it", ratio(torchs, own), least, is_least=True)
        if not is_one and form in _GROUPS_OF_32 and one:
            speed, cpu = ratio(one, own), own["cpu_s"]["median"] / one["cpu_s"]["median"]
            yield Target(f"{way} {name}, speed over one", speed, _LEAST_OF_ALL, is_least=True)
            yield Target(f"{way} {name}, CPU time over one", cpu, _MOST_CPU_OF_ALL)


def _by_level(variants: Variants) -> Variants:
    """Those of the level that has targets."""
    return {way: own for way, own in variants.items() if own["details"].get("level") == _LEVEL}


def _small_targets(name: str, variants: Variants, large: Variants) -> Iterator[Target]:
    """Of one thread, for weights smaller than those of `large`."""
    for way, own in _by_level(variants).items():
        if way not in large or own["details"]["threads"] > 1:
            continue
        share = own["details"]["num_ops"] / large[way]["details"]["num_ops"]
        us = (seconds(own) - seconds(large[way]) * share) * 1e6
        yield Target(f"{way} {name}, µs beyond its share of {_LARGE}", us, _MOST_CONSTANT_US)


def _chosen(variants: Variants) -> Variants:
    """Format -> the result of the path that the op takes."""
    chosen = [result for result in variants.values() if result["details"].get("is_chosen")]
    return {result["details"]["format"]: result for result in chosen}
