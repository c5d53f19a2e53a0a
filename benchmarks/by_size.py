"""The results of the kernel case, by op, size and way to compute."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
Content = dict[str, Any]
"""Of a JSON file."""
Size = tuple[str, int]
"""The weight's shape and the rows of activations."""
Variants = dict[str, Result]
"""Of one size, by the way to compute."""
FIRST = ("copy", "read")  # what the others of a group are compared with
_PLAIN = ("torch float32", "torch float16", "torch bfloat16")  # by whose time others are divided


def by_op(content: Content) -> dict[str, dict[Size, Variants]]:
    """Op -> size -> way to compute -> result, of what was measured, without copies and reads."""
    found: dict[str, dict[Size, Variants]] = {}
    for result in content["results"]:
        details = result["details"]
        if details["op"] not in FIRST and result["time_s"] is not None:
            shape = f"{details['out_features']}x{details['in_features']}"
            sizes = found.setdefault(details["op"], {})
            sizes.setdefault((shape, details["rows"]), {})[details["variant"]] = result
    return found


def ways_of(sizes: dict[Size, Variants]) -> list[str]:
    """All ways to compute, in the order of the file."""
    return list(dict.fromkeys(name for variants in sizes.values() for name in variants))


def over_plain(name: str, variants: Variants, key: str = "median") -> float | None:
    """The time over that of torch's product with the weight as it is; None without one of them."""
    plain = next((own for other, own in variants.items() if other in _PLAIN), None)
    return ratio(variants[name], plain, key) if plain and name in variants else None


def seconds(result: Result, key: str = "median") -> float:
    """The time of a call: of the CPU where one thread of it was busy, which other processes disturb
    least; otherwise on the wall."""
    is_one = result["details"].get("threads") == 1
    return float((result["cpu_s"] if is_one else result["time_s"])[key])


def bytes_per_s(result: Result) -> float:
    return float(result["details"]["num_bytes"] / seconds(result))


def ratio(one: Result, other: Result, key: str = "median") -> float:
    """Of their times."""
    return seconds(one, key) / seconds(other, key)
