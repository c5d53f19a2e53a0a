"""One model, wrapped and compared with a copy of itself that is not."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

import bminf
from bminf.errors import BMInfError
from bminf.wrapping import plan_for
from tools.sweep.inputs import Build, Feed, Inputs

OK, RESIDENT, REFUSED, NOT_BUILT, WRONG = "ok", "resident", "refused", "not built", "WRONG"
PASSES = 2
NEW_TOKENS = 4
NO_INPUTS = "no inputs are known for its forward"


@dataclass
class Outcome:
    """What came out for one class.

    outcome: "ok" (streamed), "resident" (ran, but there was nothing to stream), "refused" (an error
    of bminf's), "not built" (it does not run without bminf either) or "WRONG".
    """

    outcome: str
    reason: str = ""
    num_bytes: int = 0
    num_blocks: int = 0
    num_streamed: int = 0
    bytes_copied: int = 0
    least_part: float = 0.0
    generates: bool = False
    warned: list[str] = field(default_factory=list)


class NotBuilt(Exception):
    """The class cannot be built or run, without any bminf."""


class Wrong(Exception):
    """Streaming changed something."""


# ---- without bminf -------------------------------------------------------------------------------


def prepare(builds: Iterable[Build], feed: Feed) -> tuple[torch.nn.Module, Inputs] | Outcome:
    """A model that has never run, and inputs that it runs with; or why there are none."""
    reason, num_built = "", 0
    for build in builds:
        try:
            model = _built(build)
            num_built += 1
            return model, _inputs_that_run(copy.deepcopy(model), feed)
        except Exception as error:
            reason = reason or (str(error) if isinstance(error, NotBuilt) else _named(error))
            if num_built == 2 or "ImportError" in reason or NO_INPUTS in reason:
                break
    return Outcome(NOT_BUILT, reason)


def _built(build: Build) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        return build().eval().requires_grad_(False)
    except Exception as error:
        raise NotBuilt(f"building: {_named(error)}") from error


def _inputs_that_run(plain: torch.nn.Module, feed: Feed) -> Inputs:
    first: Exception | None = None
    for given in feed(plain):
        try:
            _run(plain, given)
            return given
        except Exception as error:
            first = first or error
    raise NotBuilt(f"running: {_named(first)}" if first else NO_INPUTS)


def _run(model: torch.nn.Module, given: Inputs) -> Any:
    torch.manual_seed(2)  # some draw noise
    with torch.no_grad():
        return model(**copy.deepcopy(given))


def _generate(model: torch.nn.Module, prompt: Inputs) -> Any:
    torch.manual_seed(2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        if getattr(model.config, "is_encoder_decoder", False):
            settings["decoder_start_token_id"] = 1  # few configurations name one
        generate: Any = model.generate
        return generate(**copy.deepcopy(prompt), **settings)


# ---- with it -------------------------------------------------------------------------------------


def check(plain: torch.nn.Module, given: Inputs, quantization: str | bool = False) -> Outcome:
    """Stream a copy of `plain`, and compare the two."""
    outcome = Outcome(OK, num_bytes=held_bytes(plain))
    try:
        _Pair(plain, copy.deepcopy(plain), given, outcome).compare(quantization)
    except BMInfError as error:
        outcome.outcome, outcome.reason = REFUSED, _named(error)
    except Exception as error:
        outcome.outcome, outcome.reason = WRONG, _named(error)
    return outcome


@dataclass
class _Pair:
    """A model that is wrapped, and a copy that is not; what they are fed with, what comes out."""

    plain: torch.nn.Module
    model: torch.nn.Module
    given: Inputs
    outcome: Outcome

    def compare(self, quantization: str | bool) -> None:
        """Raises Wrong, or whatever the wrapped model raises."""
        if quantization:
            self.plain = bminf.wrapper(self.plain, quantization, "100GB", device="cpu")
            self.outcome.num_bytes = held_bytes(self.plain)
        plan = self._wrap(quantization)
        calls = self._compare_passes(plan.streamed)
        self._compare_generated()
        self._check_bytes(plan, calls)
        bminf.unwrap(self.model)
        compare(self.model.state_dict(), self.plain.state_dict(), "after unwrap")
        compare(_run(self.model, self.given), _run(self.plain, self.given), "after unwrap")

    def _wrap(self, quantization: str | bool) -> bminf.Plan:
        limit = _least_limit(self.model, quantization)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bminf.wrapper(self.model, quantization, limit, device="cpu")
        plan = bminf.plan_of(self.model)
        assert plan is not None
        outcome = self.outcome
        outcome.warned = sorted({str(warning.message) for warning in caught})
        outcome.num_blocks, outcome.num_streamed = len(plan.blocks), len(plan.streamed)
        outcome.least_part = limit / max(1, outcome.num_bytes)
        outcome.outcome = OK if plan.streamed else RESIDENT
        return plan

    def _compare_passes(self, streamed: Iterable[str]) -> Counter[str]:
        """How often a pass calls each streamed block."""
        calls: Counter[str] = Counter()
        hooks = [
            self.plain.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: calls.update([name])
            )
            for name in streamed
        ]
        for number in range(1, PASSES + 1):
            expected = _run(self.plain, self.given)  # anew: some have a state
            for hook in hooks:
                hook.remove()
            compare(_run(self.model, self.given), expected, f"pass {number}")
        return calls

    def _compare_generated(self) -> None:
        can_generate = getattr(self.plain, "can_generate", None)
        if not (callable(can_generate) and can_generate()):
            return
        prompt = {k: v for k, v in self.given.items() if not k.startswith("decoder_")}
        try:
            expected = _generate(self.plain, prompt)
        except Exception:
            return  # not every class generates from these inputs
        compare(_generate(self.model, prompt), expected, "generate")
        self.outcome.generates = True

    def _check_bytes(self, plan: bminf.Plan, calls: Counter[str]) -> None:
        """The plan counts every byte; each pass copies what it calls, and little else."""
        planned = plan.outside_bytes + plan.host_table_bytes
        planned += sum(block.nbytes for block in plan.blocks)
        planned += 0 if plan.experts is None else plan.experts.nbytes
        if planned != self.outcome.num_bytes:
            raise Wrong(f"the plan counts {planned} bytes, the model has {self.outcome.num_bytes}")
        stats = bminf.stats_of(self.model)
        assert stats is not None
        self.outcome.bytes_copied = stats.bytes_copied
        if not calls or self.outcome.generates:
            return
        if stats.passes != PASSES:
            raise Wrong(f"{stats.passes} passes were counted, {PASSES} were made")
        sizes = {block.name: block.nbytes for block in plan.blocks}
        least = PASSES * sum(sizes[name] for name in calls) - plan.slot_bytes
        most = 3 * PASSES * sum(sizes[name] * n for name, n in calls.items()) + 2 * plan.slot_bytes
        if not least <= stats.bytes_copied <= most:
            raise Wrong(f"{stats.bytes_copied} bytes were copied, not {least} to {most}")


def _least_limit(model: torch.nn.Module, quantization: str | bool) -> int:
    """Room for two slots and no block beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = plan_for(model, quantization)
    return whole.fixed_bytes + 2 * max((block.nbytes for block in whole.blocks), default=0)


def _named(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


# ---- tensors -------------------------------------------------------------------------------------


def compare(given: Any, expected: Any, when: str) -> None:
    """Raises Wrong where the tensors of two outputs are not the same bit for bit; nan is nan."""
    ours, theirs = dict(_tensors_in(given)), dict(_tensors_in(expected))
    try:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        raise Wrong(f"{when}: {error}") from None


def _tensors_in(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each tensor in nested outputs; caches and other objects are passed over."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        held = getattr(value, "__dict__", {})  # some configurations have fields that raise
        items = ((item.name, held.get(item.name)) for item in fields(value))
    for key, item in items:
        yield from _tensors_in(item, f"{name}.{key}")


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters, buffers, and tensors in attributes, lists and dicts of modules; those
    that lie in the same memory count once."""
    kept = [t for module in model.modules() for _, t in _tensors_in(vars(module))]
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _span_bytes(tensor))
        for tensor in [*model.parameters(), *model.buffers(), *kept]
        if tensor.numel()
    )
    total = end = 0
    for first, last in spans:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _span_bytes(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
