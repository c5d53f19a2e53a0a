"""What known GPUs can do: their memory, their bus, their arithmetic; "this" is measured."""

from __future__ import annotations

import re
from typing import NamedTuple

from bminf.errors import ArgumentError

THIS = "this"

_LANE_GBPS = {3: 0.985, 4: 1.969, 5: 3.938}
"""Per lane and direction. PCI Express Base Specification: 8, 16 and 32 GT/s, 128b/130b coded."""

_BUS_EFFICIENCY = 0.8  # of the bus bandwidth, by large copies from page-locked memory

_GB = 10**9


class Speeds(NamedTuple):
    """Bytes a second."""

    link: int
    memory: int


class Card(NamedTuple):
    """A GPU, or this machine.

    memory_bytes: that it has.   flops: operations a second at most, of products of many rows; None
    where it is not known.
    """

    name: str
    memory_bytes: int
    speeds: Speeds
    flops: float | None


class _Card(NamedTuple):
    memory_gbps: int
    generation: int  # of PCI Express
    lanes: int = 16


# Memory bandwidth and bus of NVIDIA's own data sheets and product pages.
_CARDS = {
    # GeForce 10 series, "GeForce GTX 10-series specifications", nvidia.com/geforce
    "GTX 1060": _Card(192, 3), "GTX 1070": _Card(256, 3), "GTX 1080": _Card(320, 3),
    "GTX 1080 Ti": _Card(484, 3),
    # Turing architecture whitepaper (WP-09183), appendices; GeForce RTX 2060 product page
    "RTX 2060": _Card(336, 3), "RTX 2070": _Card(448, 3), "RTX 2080": _Card(448, 3),
    "RTX 2080 Ti": _Card(616, 3),
    # Ampere GA102 architecture whitepaper, table of GeForce cards; GeForce RTX 3060 product page
    "RTX 3060": _Card(360, 4), "RTX 3070": _Card(448, 4), "RTX 3080": _Card(760, 4),
    "RTX 3090": _Card(936, 4),
    # Ada GPU architecture whitepaper, appendix A; GeForce RTX 4060 family product page
    "RTX 4060": _Card(272, 4, 8), "RTX 4060 Ti": _Card(288, 4, 8), "RTX 4070": _Card(504, 4),
    "RTX 4080": _Card(716, 4), "RTX 4090": _Card(1008, 4),
    # RTX Blackwell GPU architecture whitepaper, table of GeForce cards
    "RTX 5070": _Card(672, 5), "RTX 5080": _Card(960, 5), "RTX 5090": _Card(1792, 5),
    # Data sheets: Tesla P40, Tesla P100 PCIe (16 GB), V100 PCIe, T4
    "P40": _Card(346, 3), "P100": _Card(732, 3), "V100": _Card(900, 3), "T4": _Card(300, 3),
    # Data sheets: A10, A30, A40, A100 PCIe 40 GB, A100 PCIe 80 GB, RTX A6000
    "A10": _Card(600, 4), "A30": _Card(933, 4), "A40": _Card(696, 4),
    "A100 40GB": _Card(1555, 4), "A100 80GB": _Card(1935, 4), "RTX A6000": _Card(768, 4),
    # Data sheets: L4, L40, L40S, RTX 6000 Ada generation
    "L4": _Card(300, 4), "L40": _Card(864, 4), "L40S": _Card(864, 4),
    "RTX 6000 Ada": _Card(960, 4),
    # Data sheets: H100 PCIe, H100 SXM, H200
    "H100 PCIe": _Card(2000, 5), "H100": _Card(3350, 5), "H200": _Card(4800, 5),
    # Data sheet of the A100: the SXM module of 80 GB; that of 40 GB reads as fast as the PCIe card
    "A100 SXM4 80GB": _Card(2039, 4),
}  # fmt: skip

# GiB, which the same pages call GB; of cards with two sizes the smaller one.
_GIBIBYTES = {
    "GTX 1060": 6, "GTX 1070": 8, "GTX 1080": 8, "GTX 1080 Ti": 11, "RTX 2060": 6, "RTX 2070": 8,
    "RTX 2080": 8, "RTX 2080 Ti": 11, "RTX 3060": 12, "RTX 3070": 8, "RTX 3080": 10,
    "RTX 3090": 24, "RTX 4060": 8, "RTX 4060 Ti": 8, "RTX 4070": 12, "RTX 4080": 16,
    "RTX 4090": 24, "RTX 5070": 12, "RTX 5080": 16, "RTX 5090": 32, "P40": 24, "P100": 16,
    "V100": 16, "T4": 16, "A10": 24, "A30": 24, "A40": 48, "A100 40GB": 40, "A100 80GB": 80,
    "RTX A6000": 48, "L4": 24, "L40": 48, "L40S": 48, "RTX 6000 Ada": 48, "H100 PCIe": 80,
    "H100": 80, "H200": 140, "A100 SXM4 80GB": 80,
}  # fmt: skip

# TFLOPS of dense products in float16, summed up in float32, as ours are: of the same whitepapers
# and data sheets, which give the double where zeros are skipped. The GeForce 10 series and the P40
# have no fast half precision: here are 8-bit integers, four times float32, which products of many
# rows take there. Cards whose page does not tell are left out.
_TFLOPS = {
    "GTX 1060": 17.5, "GTX 1070": 25.8, "GTX 1080": 35.5, "GTX 1080 Ti": 45.4, "P40": 47,
    "RTX 2080 Ti": 53.8, "RTX 3070": 40.6,
    "RTX 3080": 59.5, "RTX 3090": 71, "RTX 4080": 97.5, "RTX 4090": 165.2, "RTX 5090": 209.5,
    "V100": 112, "T4": 65, "A10": 125, "A30": 165, "A40": 149.7, "RTX A6000": 154.8,
    "A100 40GB": 312, "A100 80GB": 312, "A100 SXM4 80GB": 312, "L4": 121, "L40": 181,
    "L40S": 362, "RTX 6000 Ada": 364.2, "H100 PCIe": 756, "H100": 989, "H200": 989,
}  # fmt: skip

# As the driver (nvidia-smi) prints the names of cards that are sold in several forms.
_PRINTED = {
    "A100-PCIE-40GB": "A100 40GB", "A100-SXM4-40GB": "A100 40GB", "A100 80GB PCIe": "A100 80GB",
    "H100 80GB HBM3": "H100", "H100 SXM": "H100", "H100 SXM5": "H100",
    "P100-PCIE-16GB": "P100", "P100-SXM2-16GB": "P100",
    "V100-PCIE-16GB": "V100", "V100-PCIE-32GB": "V100", "V100-SXM2-16GB": "V100",
    "V100-SXM2-32GB": "V100", "GTX 1060 6GB": "GTX 1060", "RTX 3060 12GB": "RTX 3060",
    "RTX 6000 Ada Generation": "RTX 6000 Ada",
}  # fmt: skip


def speeds_of(name: str) -> Speeds:
    """The speeds of a GPU by its name, or measured ones for the name "this".

    Raises ArgumentError, with the known names.
    """
    return _of_this_machine() if _is_this(name) else _speeds(_CARDS[_known(name)])


def card_of(name: str) -> Card:
    """All of a GPU, as speeds_of(); the arithmetic of this machine is not measured."""
    if not _is_this(name):
        known = _known(name)
        flops = _TFLOPS[known] * 1e12 if known in _TFLOPS else None
        return Card(known, _GIBIBYTES[known] * 2**30, _speeds(_CARDS[known]), flops)
    import torch

    from bminf.offload.memory import free_bytes

    if not torch.cuda.is_available():
        return Card("CPU of this machine", free_bytes(), _of_this_machine(), None)
    own = torch.cuda.get_device_properties(0)
    return Card(own.name, own.total_memory, _of_this_machine(), None)


def _is_this(name: str) -> bool:
    return _plain(name) in (THIS, "thismachine")


def _known(name: str) -> str:
    """What it is called here.   Raises ArgumentError."""
    cards = {_plain(known): known for known in _CARDS}
    cards |= {_plain(printed): known for printed, known in _PRINTED.items()}
    found = cards.get(_plain(name))
    if found is None:
        raise ArgumentError(
            f'--gpu={name!r} is not known; accepted: "this" (measures this machine), '
            f"{', '.join(_CARDS)}; for another one, bminf plan takes --memory-bandwidth and --link"
        )
    return found


def _speeds(card: _Card) -> Speeds:
    link = card.lanes * _LANE_GBPS[card.generation] * _BUS_EFFICIENCY
    return Speeds(int(link * _GB), card.memory_gbps * _GB)


def _of_this_machine() -> Speeds:
    from bminf.cli.machine import speeds_of_machine

    return speeds_of_machine()


def _plain(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" and "rtx4090" are the same."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
