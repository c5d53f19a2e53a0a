"""What models would give on a machine that was measured, and where another tool would give more.

Models of usual sizes are planned as any other, from their shapes alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bminf.errors import BudgetError
from bminf.offload.plan import Block, Plan, plan
from bminf.offload.predict import Prediction, predict
from bminf.quantization.packed import INT4, INT8

if TYPE_CHECKING:
    from bminf.cli.gpus import Speeds
    from bminf.cli.machine import Rate

CALLS_OF_LAYER = 105
"""What a layer of a Llama of transformers costs beside its products, in calls: torch dispatches 73
operations for a token, and there is more Python around them than around those of a probe."""

CALLS_OF_TOKEN = 500
"""What generate() costs outside the layers, likewise."""

CALLS_OF_COPY = 75
"""What handing a block over costs that is streamed, likewise."""

_TEXT = 2048  # tokens that there is room for
_OTHERS_BITS = 4.5  # a weight of llama.cpp's Q4_0
_CLEARLY = 1.1
_LARGE = 2.0**28  # weights, as heads have them
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4.5}  # a weight
_MATRICES = 7  # of a layer, of which the mean size is taken


@dataclass(frozen=True)
class Machine:
    """Measured: speeds, host_memory and disk in bytes a second (None where it cannot be), call_s
    for one call, rates of products.   room_bytes: of the device, for all that a limit counts;
    host_bytes: of host memory.   is_gpu: whether the device is one."""

    speeds: Speeds
    host_memory: int
    disk: int | None
    call_s: float
    rates: Sequence[Rate]
    room_bytes: int
    host_bytes: int
    is_gpu: bool

    def rate(self, form: str, weights: float) -> float:
        """Of a product of so many weights: that of the measured ones whose size is nearest."""
        known = [rate for rate in self.rates if rate.form == form]
        nearest = min(known, key=lambda rate: abs(math.log(rate.weights / max(1.0, weights))))
        return nearest.bytes_per_s

    @property
    def plain(self) -> str:
        """Of the measured dtypes, the one of 16 bits."""
        return next(rate.form for rate in self.rates if _BITS[rate.form] == 16)


@dataclass(frozen=True)
class Shape:
    """A decoder of transformers; `is_tied` is whether its head is its embedding."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool

    @property
    def layer_weights(self) -> int:
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def cache_bytes(self) -> int:
        """Of keys and values in 16 bits."""
        return 2 * 2 * self.num_layers * self.kv_heads * self.head_dim * _TEXT


# The config.json of each.
SHAPES = (
    Shape("SmolLM2 135M", 30, 576, 1536, 9, 3, 64, 49152, True),
    Shape("Llama 3.2 1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("Llama 3.1 8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
    Shape("Qwen3 14B", 40, 5120, 17408, 40, 8, 128, 151936, False),
    Shape("Qwen3 32B", 64, 5120, 25600, 64, 8, 128, 151936, False),
    Shape("Llama 3.3 70B", 80, 8192, 28672, 64, 8, 128, 128256, False),
)
QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True)
class Expected:
    """Of a model in one format.

    total_bytes: of all weights and the text.   memory_limit: that was asked about.
    resident_bytes, streamed_bytes: under it.   tokens_per_s: None where it does not fit, or where
    nothing is known of the disk that it would need.   bound: "compute", "link" or "disk".
    elsewhere: a tool that should be faster, and why; None where none is known.
    """

    model: str
    quantization: str
    total_bytes: int
    memory_limit: int
    resident_bytes: int | None = None
    streamed_bytes: int | None = None
    tokens_per_s: float | None = None
    bound: str | None = None
    elsewhere: str | None = None


@dataclass(frozen=True)
class _Form:
    """How the weights of layers, and those of the head, are named among the rates."""

    layers: str
    head: str


def of_sizes(machine: Machine) -> Iterator[Expected]:
    """Of each of SHAPES in each of QUANTIZATIONS, within the room that there is."""
    for shape in SHAPES:
        for quantization in QUANTIZATIONS:
            yield _of_shape(shape, quantization, machine)


def of_model(arguments: argparse.Namespace, machine: Machine) -> Iterator[Expected]:
    """Of a MODEL: with everything resident, with half of it streamed, and under --memory-limit."""
    from bminf.cli import sources
    from bminf.cli.demo import half_limit

    subject = sources.find(arguments.model)
    quantization = subject.quantization(arguments)
    form = _form(quantization, subject.dtype, machine)
    whole = subject.plan(arguments, None)
    limits = [max(whole.total_bytes, whole.least_limit), half_limit(whole)]
    limits += [] if arguments.memory_limit is None else [arguments.memory_limit]
    for limit in limits:
        try:
            made = subject.plan(arguments, str(limit))
        except BudgetError:
            yield Expected(subject.title, quantization, whole.total_bytes, limit)
            continue
        found = Expected(subject.title, quantization, whole.total_bytes, made.budget)
        yield _predicted(found, form, made, machine)


def _of_shape(shape: Shape, quantization: str, machine: Machine) -> Expected:
    bits = {"none": 16.0, "int8": INT8.bits_per_weight(shape.hidden)}
    bits_of_layer = bits.get(quantization, INT4.bits_per_weight(shape.hidden))
    layer_bytes = int(shape.layer_weights * bits_of_layer / 8)
    head_bytes = int(shape.vocab * shape.hidden * (8 if quantization == "int4" else 16) / 8)
    is_shared = shape.is_tied and quantization != "int4"
    table_bytes = 0 if is_shared else shape.vocab * shape.hidden * 2
    blocks = [Block(f"layers.{at}", layer_bytes, "layers") for at in range(shape.num_layers)]
    total = layer_bytes * shape.num_layers + head_bytes + table_bytes + shape.cache_bytes
    try:
        made = plan(
            blocks, machine.room_bytes, outside_bytes=head_bytes, reserved_bytes=shape.cache_bytes,
            host_bytes=machine.host_bytes if machine.is_gpu else None,
            table_bytes=table_bytes, tables=["embedding"] if table_bytes else (),
        )  # fmt: skip
    except BudgetError:
        return Expected(shape.name, quantization, total, machine.room_bytes)
    expected = Expected(shape.name, quantization, total, machine.room_bytes)
    found = _predicted(expected, _form(quantization, "", machine), made, machine)
    # Others are asked about 4 bits, which are the fastest there as here.
    return found if quantization == "int4" else replace(found, elsewhere=None)


def _predicted(expected: Expected, form: _Form, made: Plan, machine: Machine) -> Expected:
    found = _prediction(form, made, machine)
    rate = None if found is None else 1 / _token_s(found, made, machine)
    return replace(
        expected,
        resident_bytes=made.resident_bytes,
        streamed_bytes=made.streamed_bytes,
        tokens_per_s=rate,
        bound=None if found is None else _bound(found.bound, made, machine),
        elsewhere=elsewhere(made, _BITS[form.layers], rate, machine),
    )


def _token_s(found: Prediction, made: Plan, machine: Machine) -> float:
    calls = CALLS_OF_TOKEN + CALLS_OF_COPY * len(made.streamed)
    return found.pass_s + calls * machine.call_s


def _prediction(form: _Form, made: Plan, machine: Machine) -> Prediction | None:
    """None where the disk is needed and its speed is not known."""
    link = machine.disk if _is_from_disk(made, machine) else machine.speeds.link
    if link is None or (made.on_disk and machine.disk is None):
        return None
    layer_bytes = sum(block.nbytes for block in made.blocks) / max(1, len(made.blocks))
    weights = layer_bytes * 8 / _BITS[form.layers] / _MATRICES
    return predict(
        made, link, machine.rate(form.layers, weights), disk_bytes_per_s=machine.disk,
        calls_s=CALLS_OF_LAYER * machine.call_s,
        outside_bytes_per_s=machine.rate(form.head, _LARGE),
    )  # fmt: skip


def _is_from_disk(made: Plan, machine: Machine) -> bool:
    """Without a GPU: whether the file of streamed blocks is more than the page cache has room for,
    beside all else."""
    beside = made.resident_bytes + made.slot_bytes + made.reserved_bytes
    return not machine.is_gpu and made.streamed_bytes + beside > machine.host_bytes


def _bound(bound: str, made: Plan, machine: Machine) -> str:
    return "disk" if bound == "link" and _is_from_disk(made, machine) else bound


def _form(quantization: str, dtype: str, machine: Machine) -> _Form:
    """quantization: as on the command line.   dtype: of what is not packed."""
    plain = dtype if dtype == "float32" else machine.plain
    if quantization.startswith("int4"):
        return _Form("int4", "int8")
    return _Form(plain if quantization == "none" else "int8", plain)


# ---- other tools ---------------------------------------------------------------------------------


def elsewhere(made: Plan, bits: float, tokens_per_s: float | None, machine: Machine) -> str | None:
    """llama.cpp, where its weights in 4 bits, read as fast as memory gives them, would take less
    time for a token; what does not fit on a GPU it computes on the CPU.

    That is the most it can give, not a measurement.   bits: of a weight in `made`.
    """
    if tokens_per_s is None or made.experts is not None:
        return None
    num_bytes = sum(block.nbytes for block in made.blocks) * min(1.0, _OTHERS_BITS / bits)
    num_bytes += made.fixed_bytes - made.reserved_bytes  # the head, at least
    room = machine.room_bytes - made.reserved_bytes if machine.is_gpu else 0
    on_device = min(num_bytes, max(0, room))
    if num_bytes - on_device > machine.host_bytes:
        return None
    on_host_s = (num_bytes - on_device) / machine.host_memory
    most = 1 / (on_device / machine.speeds.memory + on_host_s)
    if most < _CLEARLY * tokens_per_s:
        return None
    return f"llama.cpp, in 4 bits: up to {most:.3g} tokens/s by the bandwidth of memory"
