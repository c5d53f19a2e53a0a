"""Memory and bus bandwidth of known GPUs, and measuring those of this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

from bminf.errors import ArgumentError

THIS = "this"

_LANE_GBPS = {3: 0.985, 4: 1.969, 5: 3.938}
"""Per lane and direction. PCI Express Base Specification: 8, 16 and 32 GT/s, 128b/130b coded."""

_BUS_EFFICIENCY = 0.8  # of the bus bandwidth, by large copies from page-locked memory

_GB = 10**9
_PROBE_BYTES = 2**27
_ROUNDS = 5


class Speeds(NamedTuple):
    """Bytes a second."""

    link: int
    memory: int


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
    if _plain(name) in (THIS, "thismachine"):
        import torch

        return _of_gpu() if torch.cuda.is_available() else _of_cpu()
    cards = {_plain(known): card for known, card in _CARDS.items()}
    cards |= {_plain(printed): _CARDS[known] for printed, known in _PRINTED.items()}
    card = cards.get(_plain(name))
    if card is None:
        raise ArgumentError(
            f'--gpu={name!r} is not known; accepted: "this" (measures this machine), '
            f"{', '.join(_CARDS)}; for another one, give --memory-bandwidth and --link"
        )
    link = card.lanes * _LANE_GBPS[card.generation] * _BUS_EFFICIENCY
    return Speeds(int(link * _GB), card.memory_gbps * _GB)


def _plain(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" and "rtx4090" are the same."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _of_gpu() -> Speeds:
    import torch

    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(_PROBE_BYTES, dtype=torch.uint8).pin_memory()
    copy_s = _min_s(lambda: target.copy_(source), torch.cuda.synchronize)
    link_s = _min_s(lambda: target.copy_(host, non_blocking=True), torch.cuda.synchronize)
    # A copy on the device reads and writes each byte.
    return Speeds(int(_PROBE_BYTES / link_s), int(2 * _PROBE_BYTES / copy_s))


def _of_cpu() -> Speeds:
    """Of RAM, and of a file, from which the CPU streams blocks."""
    import tempfile

    import torch

    numbers = torch.ones(_PROBE_BYTES // 4)
    buffer = memoryview(bytearray(_PROBE_BYTES))
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(buffer)

        def read() -> None:
            file.seek(0)
            file.readinto(buffer)

        file_s = _min_s(read)
    return Speeds(int(_PROBE_BYTES / file_s), int(_PROBE_BYTES / _min_s(numbers.sum)))


def _min_s(work: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of some runs; other load on the machine only makes runs slower."""
    times = []
    for _ in range(_ROUNDS):
        wait()
        start_s = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start_s)
    return max(min(times), 1e-9)
