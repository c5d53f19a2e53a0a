"""What could be done about a memory limit that is too small, and how much each would save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import starmap

import torch

from bminf.offload.blob import Blobs, survey
from bminf.offload.blocks import ModuleBlock
from bminf.offload.device import taken_bytes
from bminf.offload.plan import Block, Remedy, least_budget, plan
from bminf.offload.stand_ins import choose
from bminf.quantization.packed import FORMATS, Format


def remedies(
    model: torch.nn.Module,
    blocks: Sequence[ModuleBlock],
    blobs: Blobs,
    form: Format | None,
    reserved_bytes: int,
    has_context: bool,
    device_type: str,
) -> list[Remedy]:
    """In the words of wrapper().   blobs: as they will be, packed in `form`.

    reserved_bytes: in all.   has_context: whether max_length is a reason of them.
    device_type: "cpu" or "cuda", where the model is to run.
    """
    least = _least_of(blobs, device_type)
    found = []
    for name, packed in FORMATS.items():
        if form is None or packed.bits < form.bits:
            stand_ins = choose(model, blocks, packed).stand_ins
            smaller = survey(model, blocks, stand_ins, keep_addresses=False)
            saved = least - _least_of(smaller, device_type)
            found.append(
                Remedy(f'quantize with quantization="{name}"', saved, True, "quantization")
            )
    if blobs.blocks:
        finer = least - taken_bytes(blobs.outside.nbytes, device_type) - 2 * _largest_part(blobs)
        found.append(Remedy("cut finer blocks with blocks=", finer, True))
    if reserved_bytes:
        advice = "lower max_length or max_batch_size" if has_context else "lower reserve"
        found.append(Remedy(advice, reserved_bytes, False))
    return found


def _least_of(blobs: Blobs, device_type: str) -> int:
    taken = {name: taken_bytes(x.nbytes, device_type) for name, x in blobs.blocks.items()}
    outside = taken_bytes(blobs.outside.nbytes, device_type)
    return least_budget(
        plan(
            list(starmap(Block, taken.items())),
            outside + sum(taken.values()),
            outside_bytes=outside,
        )
    )


def _largest_part(blobs: Blobs) -> int:
    """Bytes of the module with the most tensors of its own: no block can be cut finer."""
    sizes: Counter[tuple[str, str]] = Counter()
    for block, layout in blobs.blocks.items():
        for name, spec in layout.specs.items():
            sizes[block, name.rpartition(".")[0]] += spec.nbytes
    return max(sizes.values(), default=0)
