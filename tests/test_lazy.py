from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from bminf.errors import UnsupportedModelError
from bminf.lazy import LazyTensor


def lazy(real: torch.Tensor, is_parameter: bool = False) -> tuple[LazyTensor, list[int]]:
    reads: list[int] = []

    def read() -> torch.Tensor:
        reads.append(1)
        return real.detach()

    return LazyTensor(read, real, is_parameter=is_parameter), reads


def test_metadata_is_free() -> None:
    real = torch.randn(4, 6).t()
    tensor, reads = lazy(real)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (real.shape, real.stride(), real.dtype)
    assert (tensor.device, tensor.numel(), tensor.nbytes) == (real.device, 24, 96)
    assert not tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter)
    assert reads == []


def test_operations_see_the_values() -> None:
    real = torch.randn(3, 4)
    tensor, reads = lazy(real)
    x = torch.randn(2, 4, requires_grad=True)
    y = torch.nn.functional.linear(x, tensor)
    assert torch.equal(y, torch.nn.functional.linear(x, real))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], real.sum(0).expand(2, 4))
    assert torch.equal(tensor.detach(), real) and torch.equal(tensor[1:, 2], real[1:, 2])
    assert all(torch.equal(a, b) for a, b in zip(tensor.unbind(), real, strict=True))
    assert type(tensor.clone()) is type(tensor.fetch()) is torch.Tensor
    assert tensor.tolist() == real.tolist() and (tensor.numpy() == real.numpy()).all()
    assert repr(tensor).partition("(")[2].split() == repr(real).partition("(")[2].split()
    assert len(reads) >= 5


def test_writing_is_refused_and_reading_from_it_is_not() -> None:
    real = torch.ones(3)
    tensor, _ = lazy(real)
    writes = [
        lambda: tensor.add_(1),
        lambda: tensor.copy_(real),
        lambda: tensor.__setitem__(0, 3.0),
        lambda: tensor[:2].zero_(),
        lambda: tensor.detach().zero_(),
        lambda: tensor.data.zero_(),
        lambda: setattr(tensor, "data", real),
        lambda: torch.add(real, 1, out=tensor),
        lambda: torch._foreach_mul_([torch.ones(3), tensor], 2),
        lambda: torch.nn.init.zeros_(tensor),
    ]
    for number, write in enumerate(writes):
        with pytest.raises(UnsupportedModelError, match="would be lost"):
            write()
            pytest.fail(f"write {number} was accepted")
    with pytest.raises(UnsupportedModelError, match="no address"):
        tensor.data_ptr()
    assert torch.equal(torch.zeros(3).add_(tensor), real) and torch.equal(real, torch.ones(3))


def test_a_parameter_made_of_its_class_is_an_ordinary_one() -> None:
    tensor, _ = lazy(torch.nn.Parameter(torch.randn(3)), is_parameter=True)
    for made in (
        type(tensor)(torch.ones(2), requires_grad=False),
        type(tensor)(torch.ones(2), False),
    ):
        assert type(made) is torch.nn.Parameter and not made.requires_grad and made.sum() == 2


def test_copies_are_real_tensors() -> None:
    for is_parameter in (False, True):
        tensor, _ = lazy(torch.nn.Parameter(torch.randn(3)), is_parameter)
        kind = torch.nn.Parameter if is_parameter else torch.Tensor
        for copied in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
            assert type(copied) is kind and torch.equal(copied, tensor)


def test_other_libraries_get_the_values() -> None:
    for real in (torch.randn(2, 3), torch.arange(6).view(2, 3), torch.randn(4, 3)[1:, 1:]):
        tensor, _ = lazy(real)
        assert torch.equal(torch.from_dlpack(tensor), real)
        assert np.array_equal(np.from_dlpack(tensor), real)
        assert np.array_equal(np.asarray(tensor), real)
        torch.from_dlpack(tensor).zero_()  # a copy: nobody else's memory
        assert real.abs().sum() > 0
        assert repr(tensor) == repr(real) and f"{tensor}" == f"{real}"
    assert f"{lazy(torch.tensor(2.5))[0]:.2f}" == "2.50"


def test_the_memory_itself_is_not_there() -> None:
    tensor, _ = lazy(torch.randn(2, 3))
    asks = [
        lambda view: view.data_ptr(),
        lambda view: view.untyped_storage(),
        lambda view: view.storage(),
        lambda view: view.share_memory_(),
        lambda view: view.apply_(lambda value: value),
        lambda view: view.__cuda_array_interface__,
        lambda view: safetensors.torch.save({"weight": view}),
    ]
    for number, ask in enumerate(asks):
        for view in (tensor, tensor[0], tensor.detach()):
            with pytest.raises(UnsupportedModelError, match="no memory of its own"):
                ask(view)
                pytest.fail(f"{number} was answered")
    assert not tensor.is_shared()
    with pytest.raises(RuntimeError, match="data pointer"):  # C++, without our words
        torch._C._to_dlpack(tensor)


def test_an_operation_inside_another_is_taken_apart() -> None:
    """Inside a dispatch, .to(dtype) arrives whole, and is no view of the weight."""
    inner, _ = lazy(torch.arange(6.0))
    outer = LazyTensor(lambda: inner.double().mul_(2), torch.empty(6, dtype=torch.double))
    assert torch.equal(outer + 0, torch.arange(6.0).double() * 2)


def test_an_array_of_it_is_read_only() -> None:
    """A write would not reach the weight."""
    tensor, _ = lazy(torch.randn(2, 3))
    for array in (tensor.numpy(), np.asarray(tensor), tensor.detach().numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
