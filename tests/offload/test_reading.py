"""The bytes of a block as they are read: cast, packed and tied as its layout says."""

from __future__ import annotations

import math

import pytest
import torch
from streaming import Stack

from bminf.checkpoint.recorded import InMemory
from bminf.checkpoint.stored import Stored
from bminf.errors import CheckpointError
from bminf.layers.quantize import Choice, choose_linears, install
from bminf.layout import ModuleBlock, tensors_of
from bminf.offload import reading
from bminf.offload.blob import lay_out
from bminf.offload.reading import Contents, tensors_of_block
from bminf.quantization.packed import INT4, Format
from bminf.quantization.packing import pack

BLOCKS = [ModuleBlock(f"layers.{n}", "layers") for n in range(2)]


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(num_blocks=2, width=16)


def stored(model: torch.nn.Module) -> dict[str, Stored]:
    return {name: InMemory(tensor.detach(), name) for name, _, tensor in tensors_of(model)}


def contents(weight_format: Format | None, tensors: dict[str, Stored]) -> Contents:
    network = stack().to("meta")
    choice: Choice = choose_linears(network, BLOCKS, weight_format)
    blobs = lay_out(network, BLOCKS, choice.replacements, keep_addresses=False)
    install(network, choice.replacements)
    return Contents(network, blobs, tensors)


def filled(given: Contents, block: str) -> dict[str, torch.Tensor]:
    layout = given.layout(block)
    blob = torch.zeros(layout.extent, dtype=torch.uint8)
    layout.fill(blob, tensors_of_block(given, block))
    return {name: layout.view(blob, name) for name in layout.specs}


def test_what_is_not_packed_is_cast() -> None:
    model = stack()
    found = filled(contents(None, stored(model.double())), "layers.1")
    assert found.keys() == {"up.weight", "up.bias", "down.weight", "shift"}
    for name, tensor in found.items():
        expected = model.get_submodule("layers.1").state_dict()[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected.float())


@pytest.mark.parametrize("chunk_elements", [1, 100, 10**6])
def test_weights_are_packed_some_rows_at_a_time(
    chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_CHUNK_ELEMENTS", chunk_elements)
    model = stack()
    found = filled(contents(INT4, stored(model)), "layers.0")
    for name in ("up", "down"):
        packed = pack(model.layers[0].get_submodule(name).weight, INT4)
        assert torch.equal(found[f"{name}.qweight"], packed.qweight)
        assert torch.equal(found[f"{name}.scale"], packed.scale)
    assert torch.equal(found["shift"], model.layers[0].shift)


def test_what_is_packed_already_is_taken_as_it_is() -> None:
    model = stack()
    tensors = stored(model)
    codes = torch.randint(0, 256, (32, 16), dtype=torch.uint8)
    scale, row_scale = torch.randint(0, 256, (32, 1), dtype=torch.uint8), torch.rand(32)
    del tensors["layers.0.up.weight"]
    parts = {"qweight": codes, "scale": scale, "row_scale": row_scale}
    tensors |= {f"layers.0.up.{name}": InMemory(tensor) for name, tensor in parts.items()}
    found = filled(contents(INT4, tensors), "layers.0")
    assert all(torch.equal(found[f"up.{name}"], tensor) for name, tensor in parts.items())


def test_what_lies_outside_all_blocks_is_the_block_without_a_name() -> None:
    model = stack()
    found = filled(contents(INT4, stored(model)), "")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "head.weight": model.head.weight.tolist(),
        "head.bias": model.head.bias.tolist(),
    }


def test_a_weight_that_cannot_be_packed_is_named() -> None:
    model = stack()
    model.layers[1].down.weight.data[3, 5] = math.inf
    given = contents(INT4, stored(model))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.down\.weight cannot be quantized: .*NaN"
    ):
        filled(given, "layers.1")


def test_tied_tensors_are_read_once() -> None:
    class Counted(InMemory):
        def read(self) -> torch.Tensor:
            reads.append(self.where)
            return super().read()

    reads: list[str] = []
    network = stack()
    network.head.weight = torch.nn.Parameter(torch.ones(5, 16))
    network.also = torch.nn.Linear(16, 5)
    network.also.weight = network.head.weight
    tensors = {name: Counted(one.read(), name) for name, one in stored(network).items()}
    meta = network.to("meta")
    meta.also.weight = meta.head.weight  # which moving has parted
    blobs = lay_out(meta, BLOCKS, {}, keep_addresses=False)
    found = filled(Contents(meta, blobs, tensors), "")
    assert torch.equal(found["also.weight"], torch.ones(5, 16))
    assert sorted(reads) == ["also.bias", "head.bias", "head.weight"]
    assert found["also.weight"].data_ptr() == found["head.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_that_holds_nan_is_named(dtype: torch.dtype) -> None:
    """Infinity is as good as any number, as in masks; but not where it is a scale."""
    model = stack()
    model.layers[1].shift[3] = -math.inf
    given = contents(None, stored(model.to(dtype)))
    assert filled(given, "layers.1")["shift"][3] == -math.inf
    model.layers[1].shift[7] = math.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.shift holds NaN, and no model"):
        filled(given, "layers.1")
    model.layers[0].shift[0] = math.nan  # of another block
    assert filled(given, "").keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("form", "bad"), [(Format(4, 16), "scale"), (INT4, "row_scale")], ids=str)
def test_a_scale_that_is_not_finite_is_named(form: Format, bad: str, value: float) -> None:
    tensors = stored(stack())
    parts = pack(tensors.pop("layers.0.up.weight").read(), form)._asdict()
    parts[bad][31] = value
    for key, tensor in parts.items():
        if isinstance(tensor, torch.Tensor):
            name = f"layers.0.up.{key}"
            tensors[name] = InMemory(tensor, name)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.up\.{bad} holds NaN or infinity, and"):
        filled(contents(form, tensors), "layers.0")
