"""One model, wrapped and compared with a copy of itself that is not."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import bminf
from bminf.errors import BMInfError
from bminf.wrapping import plan_for
from tools.sweep.tensors import difference, held_bytes

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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class NotBuilt(Exception):
    """The class cannot be built or run, without any bminf."""


class Wrong(Exception):
    """Streaming changed something."""


def prepare(
    builds: Iterable[Callable[[], torch.nn.Module]],
    inputs: Callable[[torch.nn.Module], Iterable[dict[str, Any]]],
) -> tuple[torch.nn.Module, dict[str, Any]] | Outcome:
    """A model that has never run, and inputs that it runs with; or why there are none."""
    reason, num_built = "", 0
    for build in builds:
        try:
            model = _built(build)
            num_built += 1
            return model, _inputs_that_run(copy.deepcopy(model), inputs)
        except Exception as error:
            reason = reason or (str(error) if isinstance(error, NotBuilt) else _named(error))
            if num_built == 2 or "ImportError" in reason or NO_INPUTS in reason:
                break
    return Outcome(NOT_BUILT, reason)


def check(
    plain: torch.nn.Module, given: dict[str, Any], quantization: str | bool = False
) -> Outcome:
    """Stream a copy of `plain`, and compare the two."""
    model = copy.deepcopy(plain)
    outcome = Outcome(OK, num_bytes=held_bytes(plain))
    try:
        _wrap_and_compare(plain, model, given, quantization, outcome)
    except BMInfError as error:
        outcome.outcome, outcome.reason = REFUSED, _named(error)
    except Exception as error:
        outcome.outcome, outcome.reason = WRONG, _named(error)
    return outcome


def _built(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        model = build().eval()
    except Exception as error:
        raise NotBuilt(f"building: {_named(error)}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _inputs_that_run(
    plain: torch.nn.Module, inputs: Callable[[torch.nn.Module], Iterable[dict[str, Any]]]
) -> dict[str, Any]:
    first: Exception | None = None
    for given in inputs(plain):
        try:
            _run(plain, given)
            return given
        except Exception as error:
            first = first or error
    raise NotBuilt(f"running: {_named(first)}" if first else NO_INPUTS)


def _run(model: torch.nn.Module, given: dict[str, Any]) -> Any:
    torch.manual_seed(2)  # some draw noise
    with torch.no_grad():
        return model(**copy.deepcopy(given))


def _wrap_and_compare(
    plain: torch.nn.Module,
    model: torch.nn.Module,
    given: dict[str, Any],
    quantization: str | bool,
    outcome: Outcome,
) -> None:
    if quantization:
        plain = bminf.wrapper(plain, quantization, "100GB", device="cpu")
        outcome.num_bytes = held_bytes(plain)
    limit = _least_limit(model, quantization)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bminf.wrapper(model, quantization, limit, device="cpu")
    outcome.warned = sorted({str(w.message) for w in caught})
    plan = bminf.plan_of(model)
    assert plan is not None
    outcome.num_blocks, outcome.num_streamed = len(plan.blocks), len(plan.streamed)
    outcome.least_part = limit / max(1, outcome.num_bytes)
    if not plan.streamed:
        outcome.outcome = RESIDENT
    calls = _compare_passes(plain, model, given, plan)
    _compare_generated(plain, model, given, outcome)
    _check_bytes(model, plan, calls, outcome)
    bminf.unwrap(model)
    if what := difference(model.state_dict(), plain.state_dict()):
        raise Wrong(f"after unwrap, {what}")
    _compare(_run(model, given), _run(plain, given), "after unwrap")


def _least_limit(model: torch.nn.Module, quantization: str | bool) -> int:
    """Room for two slots and no block beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = plan_for(model, quantization)
    return whole.outside_bytes + 2 * max((block.nbytes for block in whole.blocks), default=0)


def _compare_passes(
    plain: torch.nn.Module, model: torch.nn.Module, given: dict[str, Any], plan: bminf.Plan
) -> Counter[str]:
    """How often a pass calls each streamed block."""
    calls: Counter[str] = Counter()
    hooks = [
        plain.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: calls.update([name])
        )
        for name in plan.streamed
    ]
    expected = _run(plain, given)
    for hook in hooks:
        hook.remove()
    _compare(_run(model, given), expected, "pass 1")
    again = _run(plain, given)
    for number in range(2, PASSES + 1):
        _compare(_run(model, given), again, f"pass {number}")
    return calls


def _compare(given: Any, expected: Any, when: str) -> None:
    if what := difference(given, expected):
        raise Wrong(f"{when}: {what}")


def _compare_generated(
    plain: torch.nn.Module, model: torch.nn.Module, given: dict[str, Any], outcome: Outcome
) -> None:
    can_generate = getattr(plain, "can_generate", None)
    if not (callable(can_generate) and can_generate()):
        return
    prompt = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    try:
        expected = _generate(plain, prompt)
    except Exception:
        return  # not every class generates from these inputs
    _compare(_generate(model, prompt), expected, "generate")
    outcome.generates = True


def _generate(model: torch.nn.Module, prompt: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        if getattr(model.config, "is_encoder_decoder", False):
            settings["decoder_start_token_id"] = 1  # few configurations name one
        generate: Any = model.generate
        return generate(**copy.deepcopy(prompt), **settings)


def _check_bytes(
    model: torch.nn.Module, plan: bminf.Plan, calls: Counter[str], outcome: Outcome
) -> None:
    """The plan counts every byte; each pass copies what it calls, and little else."""
    planned = plan.outside_bytes + sum(block.nbytes for block in plan.blocks)
    if planned != outcome.num_bytes:
        raise Wrong(f"the plan counts {planned} bytes, the model has {outcome.num_bytes}")
    stats = bminf.stats_of(model)
    assert stats is not None
    outcome.bytes_copied = stats.bytes_copied
    if not calls or outcome.generates:
        return
    if stats.passes != PASSES:
        raise Wrong(f"{stats.passes} passes were counted, {PASSES} were made")
    sizes = {block.name: block.nbytes for block in plan.blocks}
    least = PASSES * sum(sizes[name] for name in calls) - plan.slot_bytes
    most = 3 * PASSES * sum(sizes[name] * n for name, n in calls.items()) + 2 * plan.slot_bytes
    if not least <= stats.bytes_copied <= most:
        raise Wrong(f"{stats.bytes_copied} bytes were copied, not {least} to {most}")


def _named(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
