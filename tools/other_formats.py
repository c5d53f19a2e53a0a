"""4 and 8 bits as other libraries store them: what is left of a weight, and the bytes it takes.

A library packs and unpacks by itself, on the CPU and with its own defaults. Bytes are those of the
codes and of all scales. Tables of constants, such as the 16 values of NF4, are not counted, though
bitsandbytes keeps some with each weight: 0.02 bits a weight in SmolLM2, with double quantization.

Not here: Q4_K, which gguf 0.19 reads and does not write, and whose blocks of 256 columns do not
divide a row of 576; torchao 0.18's other packings of int4, which a CPU does not have.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch


class Stored(NamedTuple):
    """A weight after it was quantized.

    weight: (N, K) float32, unpacked again.   num_bytes: what it takes packed, scales and all.
    """

    weight: torch.Tensor
    num_bytes: int


@dataclass(frozen=True)
class OtherFormat:
    """A format of another library.

    module: what of the library is imported.   group_size: columns that share a scale.
    pack: the module, a weight (N, K) float32 with K a multiple of group_size -> Stored.
    """

    library: str
    title: str
    module: str
    group_size: int
    pack: Callable[[Any, torch.Tensor], Stored]

    @property
    def name(self) -> str:
        """Such as "gguf Q4_0"."""
        return f"{self.library} {self.title}"

    @property
    def version(self) -> str | None:
        """That of the library; None where it does not say."""
        with suppress(PackageNotFoundError):
            return version(self.library)
        return None

    def quantize(self, weight: torch.Tensor) -> Stored:
        """What the library makes of `weight`, (N, K) float32.

        Raises ImportError where it is not installed.
        """
        return self.pack(importlib.import_module(self.module), weight)

    def obstacle(self, widths: Iterable[int]) -> str | None:
        """Why weights of so many columns cannot be stored so here; None where they can."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.library} cannot be imported ({error})"
        # torchao would leave such a weight as it is, and bitsandbytes and HQQ would let a group go
        # on in the next row.
        ragged = sorted({width for width in widths if width % self.group_size})
        columns = " and ".join(map(str, ragged))
        return f"{columns} columns are no whole groups of {self.group_size}" if ragged else None


def _gguf(quants: Any, weight: torch.Tensor, kind: str) -> Stored:
    """Blocks of 32 columns, and in each a scale, and in Q4_1 a minimum, of float16."""
    number = quants.GGMLQuantizationType[kind]
    packed = quants.quantize(weight.numpy(), number)
    return Stored(torch.from_numpy(quants.dequantize(packed, number)), packed.nbytes)


def _torchao(int4: Any, weight: torch.Tensor, group_size: int) -> Stored:
    """The only one of torchao's packings of int4 that a CPU has; scale and zero point are those of
    the type of the model, bfloat16 as the other packings want it.

    It cannot be unpacked, but multiplied: a one in each column gives its weights.
    """
    packed = int4.Int4OpaqueTensor.from_hp(weight.bfloat16(), [1, group_size])
    ones = torch.eye(weight.shape[1], dtype=torch.bfloat16)
    unpacked = torch.nn.functional.linear(ones, packed).T.float()
    return Stored(unpacked.contiguous(), _bytes_of(packed.qdata, packed.scale_and_zero))


def _hqq(quantize: Any, weight: torch.Tensor, group_size: int) -> Stored:
    """Codes, and float16 for scales and zero points: its type where none is named."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=group_size)
    packed = quantize.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    num_bytes = _bytes_of(packed.W_q, packed.meta["scale"], packed.meta["zero"])
    return Stored(packed.dequantize().float(), num_bytes)


def _nf4(functional: Any, weight: torch.Tensor, is_double: bool) -> Stored:
    """Blocks of 64; their largest absolute values in float32, or, where these are quantized in
    their turn, in 8 bits with a float32 for 256 of them and one for all."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=is_double, quant_type="nf4"
    )
    scales = [state.absmax]
    if is_double:
        scales += [state.state2.absmax, state.offset]
    unpacked = functional.dequantize_4bit(packed, state)
    return Stored(unpacked, _bytes_of(packed, *scales))


def _bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


_AO = "torchao.prototype.quantization.int4"
_HQQ = "hqq.core.quantize"
_BNB = "bitsandbytes.functional"
OTHER_FORMATS = (
    OtherFormat("gguf", "Q8_0", "gguf.quants", 32, partial(_gguf, kind="Q8_0")),
    OtherFormat("gguf", "Q4_1", "gguf.quants", 32, partial(_gguf, kind="Q4_1")),
    OtherFormat("gguf", "Q4_0", "gguf.quants", 32, partial(_gguf, kind="Q4_0")),
    OtherFormat("torchao", "int4 g32", _AO, 32, partial(_torchao, group_size=32)),
    OtherFormat("torchao", "int4 g64", _AO, 64, partial(_torchao, group_size=64)),
    OtherFormat("torchao", "int4 g128", _AO, 128, partial(_torchao, group_size=128)),
    OtherFormat("hqq", "int4 g32", _HQQ, 32, partial(_hqq, group_size=32)),
    OtherFormat("hqq", "int4 g64", _HQQ, 64, partial(_hqq, group_size=64)),
    OtherFormat("bitsandbytes", "NF4 g64", _BNB, 64, partial(_nf4, is_double=False)),
    OtherFormat("bitsandbytes", "NF4 g64 double", _BNB, 64, partial(_nf4, is_double=True)),
)


def possible(
    formats: Sequence[OtherFormat], linears: Sequence[torch.nn.Linear]
) -> Iterator[OtherFormat]:
    """Those of `formats` that can store all `linears` here; the others with a printed line."""
    widths = {linear.in_features for linear in linears}
    for form in formats:
        reason = form.obstacle(widths)
        if reason is None:
            yield form
        else:
            print(f"left out: {form.name}: {reason}")
