"""Who is told of operations, and who only of their results (bminf/tracing.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bminf.tracing import is_autocast, is_recorded, is_watched

X = torch.ones(2, 3)


class Counting(TorchDispatchMode):
    """Lets all operations be."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        return function(*arguments, **(keywords or {}))


def within(context: Any) -> Callable[[Callable[[], object]], None]:
    def ask(asked: Callable[[], object]) -> None:
        with context:
            asked()

    return ask


def calling(run: Callable[[Callable[[Any], Any]], object]) -> Callable[..., None]:
    """run: is given a function of a tensor, and calls it."""

    def ask(asked: Callable[[], object]) -> None:
        def function(x: Any) -> Any:
            asked()
            return x + 1

        run(function)

    return ask


def symbolic(function: Callable[[Any], Any]) -> object:
    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    return torch.fx.symbolic_trace(Module())


RECORDING = {
    "make_fx": calling(lambda function: make_fx(function)(X)),
    "vmap": calling(lambda function: torch.vmap(function)(X)),
    "jit": calling(lambda function: torch.jit.trace(function, X, check_trace=False)),
    "fx": calling(symbolic),
    "fake": within(FakeTensorMode()),
    "forward derivatives": within(forward_ad.dual_level()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("name", RECORDING)
def test_what_records_is_noticed_while_it_does(name: str) -> None:
    answers: list[tuple[bool, bool]] = []
    RECORDING[name](lambda: answers.append((is_recorded(), is_watched())))
    assert answers and set(answers) == {(True, True)}
    assert (is_recorded(), is_watched()) == (False, False)


def test_who_only_counts_is_told_and_records_nothing() -> None:
    with Counting():
        assert (is_recorded(), is_watched()) == (False, True)
        with FakeTensorMode():
            assert is_recorded()


def test_torch_compile_is_told_that_it_records() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: x + 1 if is_recorded() and is_watched() else x, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(X), X + 1)
    torch.compiler.reset()


def test_autocast_is_noticed() -> None:
    assert not is_autocast(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_autocast(X)
