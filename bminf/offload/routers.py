"""Routers: what chooses the experts of a layer is asked as early as it can be.

The module around experts calls a router, and before that perhaps an expert that all tokens go
through. So the router is run first, on what the module around it was given, and the copies of the
experts that it chooses begin; when it is called with just that, what it returned is returned. That
it will be is learned from the last pass. What it was not asked for costs time, and changes nothing.

A router may also be asked what the next layer's would choose: the next one, on what this one is
given. That is a guess, which is right where a layer changes little of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bminf.checks import is_number
from bminf.layout import tensors_of
from bminf.lazy import LazyTensor
from bminf.offload.context import first_of, text_config
from bminf.offload.listed_experts import ListedExperts
from bminf.offload.pool import ExpertPool
from bminf.offload.streamed_experts import StreamedExperts, version_of

_NAMES = ("gate", "router")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
    "num_selected_experts")  # fmt: skip
_MOST_GUESSED = 8  # tokens: more of them want most experts anyway


class Router:
    """What chooses for `experts`.

    module: it.   around: the module that holds both, and calls them.   may_guess: whether this
    router asks the one after it.   num_chosen: experts of a token, where something says how many.
    """

    name = ""

    def __init__(
        self,
        module: torch.nn.Module,
        around: torch.nn.Module,
        experts: StreamedExperts | ListedExperts,
        pool: ExpertPool,
        may_guess: bool,
        num_chosen: int | None,
    ) -> None:
        self.module, self.around, self._experts, self._pool = module, around, experts, pool
        self.after: Router | None = None  # that of the next layer
        self._forward = module.forward
        self._may_guess, self._num_chosen = may_guess, num_chosen
        # One that comes to a slot with its block has no values before.
        self._is_resident = not any(isinstance(t, LazyTensor) for _, _, t in tensors_of(module))
        self._given: torch.Tensor | None = None  # to the module around, while that runs
        self._kept: _Kept | None = None
        self._form: tuple[Any, ...] = ()  # of what it was called with alone: see _form()
        self._takes_given = False  # whether that was what the module around was given

    @property
    def is_early(self) -> bool:
        """Whether it is run before the module around calls it, by what the last pass has shown."""
        return self._takes_given

    def run_around(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module around."""
        try:
            if not torch.is_grad_enabled() and not self.module.training:
                self._given = _first_tensor(args, kwargs)
                self._run_ahead()
            return forward(*args, **kwargs)
        finally:
            self._given = self._kept = None
            self._experts.settle(self._pool)

    def run(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the router."""
        if torch.is_grad_enabled() or self.module.training:
            return forward(*args, **kwargs)
        x = _first_tensor(args, kwargs) if len(args) + len(kwargs) == 1 else None
        kept, self._kept = self._kept, None  # whoever takes it may write to it
        if x is not None and kept is not None and kept.is_of(x):
            outputs = kept.outputs
        else:
            outputs = forward(*args, **kwargs)
            self._announce(outputs)
        self._learn(x)
        if x is not None and self._may_guess and self.after is not None:
            self.after._guess(x)
        return outputs

    def _run_ahead(self) -> None:
        x = self._given
        if x is None or not self._takes_given or not x.is_contiguous():
            return
        if _form(x)[1:] != self._form[1:]:  # it may not take such
            return
        if x.dim() != self._form[0]:
            x = x.view(-1, x.shape[-1])
        self._kept = _Kept(x, self._forward(x))
        self._announce(self._kept.outputs)

    def _learn(self, x: torch.Tensor | None) -> None:
        """x: what it was called with alone."""
        given, self._takes_given = self._given, False
        self._form = () if x is None else _form(x)
        if x is not None and given is not None and x.is_contiguous() and given.is_contiguous():
            is_view = self._form in (_form(given), (2, *_form(given)[1:]))
            is_whole = is_view and x.numel() == given.numel()
            self._takes_given = is_whole and _address(x) == _address(given) is not None

    def _guess(self, x: torch.Tensor) -> None:
        """Begin to copy what this router would choose for another layer's input."""
        num_rows = x.numel() // max(1, x.shape[-1])
        is_able = self._is_resident and self._form == _form(x) and not self.module.training
        if is_able and num_rows <= _MOST_GUESSED:
            self._announce(self._forward(x), is_guess=True)

    def _announce(self, outputs: Any, is_guess: bool = False) -> None:
        ids = _ids_in(outputs)
        if ids is None and isinstance(self._experts, ListedExperts):
            # Written by hand, it leaves the choice to the module around: mostly of the largest.
            ids = _largest_in(outputs, len(self._experts.numbers), self._num_chosen)
        if ids is not None:
            self._experts.announce(self._pool, ids, is_guess)


def find_routers(
    model: torch.nn.Module,
    experts: Sequence[StreamedExperts | ListedExperts],
    pool: ExpertPool,
    may_guess: bool,
) -> Iterator[Router]:
    """The routers that stand beside modules of experts, in their order."""
    before: Router | None = None
    seen = {model}
    for one in experts:
        around = model.get_submodule(one.name.rpartition(".")[0])
        module = next((m for n in _NAMES if (m := around._modules.get(n)) is not None), None)
        if module is None or around in seen:
            continue
        seen.add(around)
        num_chosen = experts_per_token(model, one.name)
        router = Router(module, around, one, pool, may_guess, num_chosen)
        if before is not None:
            before.after = router
        before = router
        yield router


def experts_per_token(model: torch.nn.Module, name: str) -> int | None:
    """How many experts of the module `name` one token goes through; None where nothing says."""
    own = getattr(model.get_submodule(name), "config", None)
    for config in (own, text_config(getattr(model, "config", None))):
        chosen = first_of(config, *_CHOSEN)  # one number, or one for each layer, if it has experts
        each = chosen if isinstance(chosen, list | tuple) else [chosen]
        if numbers := [int(n) for n in each if is_number(n) and n >= 1]:
            return max(numbers)
    return None


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    first = next(iter((*args, *kwargs.values())), None)
    return first if isinstance(first, torch.Tensor) and first.dim() > 1 else None


def _form(x: torch.Tensor) -> tuple[Any, ...]:
    """Dimensions, then what a token has."""
    return x.dim(), x.shape[-1], x.dtype


def _ids_in(outputs: Any) -> torch.Tensor | None:
    """(T, k) integers."""
    found = outputs if isinstance(outputs, tuple | list) else (outputs,)
    kinds = (torch.int64, torch.int32)
    return next(
        (x for x in found if isinstance(x, torch.Tensor) and x.dim() > 1 and x.dtype in kinds),
        None,
    )


def _largest_in(outputs: Any, num_experts: int, num_chosen: int | None) -> torch.Tensor | None:
    """Of the first scores, (.., num_experts), in what a router returned: (.., num_chosen) ids."""
    found = outputs if isinstance(outputs, tuple | list) else (outputs,)
    for scores in found:
        if isinstance(scores, torch.Tensor) and scores.is_floating_point():
            if num_chosen is not None and scores.dim() > 1 and scores.shape[-1] == num_experts:
                return scores.topk(min(num_chosen, num_experts), dim=-1).indices
    return None


class _Kept:
    """outputs: what a router made of x, while somebody holds that."""

    def __init__(self, x: torch.Tensor, outputs: Any) -> None:
        self.outputs, self._kind, self._version = outputs, _kind(x), version_of(x)
        # Of an inference tensor nothing tells whether it was written to.
        self._copy = x.clone() if self._version is None else None

    def is_of(self, x: torch.Tensor) -> bool:
        if _kind(x) != self._kind or version_of(x) != self._version:
            return False
        return self._copy is None or torch.equal(x.view(torch.uint8), self._copy.view(torch.uint8))


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    """Where it lies, and what else a router sees of it."""
    is_autocast = torch.is_autocast_enabled(x.device.type)
    return _address(x), x.shape, x.stride(), x.dtype, x.device, is_autocast


def _address(x: torch.Tensor) -> int | None:
    try:
        return x.data_ptr()
    except RuntimeError:  # inside torch.func transforms there is none
        return None
