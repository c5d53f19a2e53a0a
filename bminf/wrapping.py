"""wrapper(model, memory_limit=...): any torch model, in less device memory than it has weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from warnings import warn

import torch

from bminf.checks import check_bool
from bminf.errors import ArgumentError, NothingToStreamError, UnsupportedModelError
from bminf.keywords import check_keywords, keywords_of, known_keywords
from bminf.layers.experts import has_experts
from bminf.layers.parallel import ALONE, Group, before_joining, join
from bminf.layers.quantize import Predicate, choice_of, choose_linears, warn_of_unquantized
from bminf.layers.saving import refuse_to_save
from bminf.layers.tensor_plan import check_ranks, cut, sample_of, shared_parts
from bminf.layout import ModuleBlock, tensors_of
from bminf.offload.backends import (
    allocated_bytes_on,
    backend_for,
    device_for,
    free_budget,
    host_budget,
    spare_bytes,
)
from bminf.offload.blob import (
    Blobs,
    check_kinds,
    check_tensors,
    lay_out,
    remedies,
    unmapped_bytes,
)
from bminf.offload.blocks import find_blocks, has_tensors
from bminf.offload.context import DEFAULT_LENGTH, context_of, generates_text
from bminf.offload.hooks import ATTRIBUTE, Scheduler, Stats, is_streaming
from bminf.offload.offloaded import fetch_offloaded
from bminf.offload.placement import place, restore
from bminf.offload.plan import Plan, Remedy
from bminf.offload.plan_experts import are_worth_choosing, idle_bytes, plan_by_need
from bminf.offload.start import plan_on, start
from bminf.offload.tables import find_tables
from bminf.offload.unregistered import (
    Originals,
    bytes_on,
    find_unregistered,
    warn_of_held,
    warn_of_unregistered,
)
from bminf.offload.uses import uses_of
from bminf.quantization.packed import INT8, Format, parse_format
from bminf.units import format_bytes, parse_bytes

Model = TypeVar("Model", bound=torch.nn.Module)


def wrapper(
    model: Model,
    quantization: bool | str | Format | None = True,
    memory_limit: int | float | str | None = None,
    device: torch.device | str | int | None = None,
    offload_dir: str | Path | None = None,
    reserve: int | float | str = 0,
    *,
    blocks: Iterable[str] | None = None,
    uses: Mapping[str, float] | None = None,
    quantize: Predicate | None = None,
    max_length: int | None = None,
    max_batch_size: int = 1,
    prefetch_experts: bool = False,
    tp: str | None = None,
    **unknown: Any,
) -> Model:
    """Make `model` run within `memory_limit`, and return it: the same object, with the same output.

    Blocks that fit stay on the device; the others are offloaded to host memory (device "cuda") or
    to a file (device "cpu", where the limit is RAM), and copied into one of two slots just before
    they are needed. What does not fit in host memory is kept in a file, too, and read ahead. Of
    input embeddings the rows that are asked for are sent; they stay where the others are. Of a
    mixture of experts each expert is streamed by itself, when it is chosen, through a pool that
    takes what the dense parts leave of the limit. What fits entirely is only moved.

    quantization: True or "int8" packs the linears of the blocks to 8 bits, with a scale a row;
        "int4" packs them to 4 bits, 4.5 with the scales, and the output head to 8; False or None
        leaves them. A quantized model gives the same output streamed as resident. A bminf.Format is
        taken too.
    memory_limit: bytes, or "6GB", "5.5GiB": parameters + buffers + slots + reserve. None takes 90%
        of what is free on the device (in the container, where there is one).
    device: None is the GPU where there is one, else the CPU.
    offload_dir: folder of the file; None is a temporary one on a disk.
    reserve: bytes of the limit to set aside for activations and the KV cache, beside what
        max_length reserves.
    blocks: names of the modules that move as one; None takes the items of the outermost lists of
        repeated modules, and in place of an item with more than an eighth of their bytes that holds
        such a list itself (a stage) the items of that one and what is beside them. A model where
        nothing repeats has none: it fits entirely, or is refused.
    uses: how often a block, or each block of a list, is used per request; by default 128 (once a
        token), and 1 for what a generating model of transformers runs once: the encoder, towers for
        images, audio and video. A block that stands n times in its list is used n times as often.
    quantize: a function of the name and the module of a linear (torch.nn.Linear, Conv1D), or of
        experts that are held as stacks, that says whether it is packed, or how: "int8", "int4", a
        bminf.Format. None packs those in the
        blocks, or all where there are no blocks, but for adapters, and what is trained beside
        frozen linears; the output head only where the others are in 4 bits. A head that is tied to
        the embedding can be packed as well: the embedding stays as it is.
    max_length: tokens of prompt and answer together that the limit is to have room for: the KV
        cache and a workspace for one pass, estimated from the model's configuration. For models of
        transformers that generate text; others take reserve. None sets nothing aside, and the plan
        says what 2,048 tokens would take.
    max_batch_size: texts at once (with beams: all of them), each of max_length.
    prefetch_experts: True asks the router of the next layer, while a layer of a mixture of experts
        is computed, what it would choose for what this layer is given, and copies that. Wrong
        guesses cost time alone; stats_of counts their bytes.
    tp: "auto" shares the model among the ranks that torchrun has started, by the plan for tensor
        parallel that transformers has of it (Llama, Qwen3 and their like): each keeps its part,
        within a limit of its own. Every rank makes the same calls; None computes on this one alone.

    A model that accelerate has offloaded is taken out of its store, and its hooks are removed.

    Raises ArgumentError, BudgetError, OffloadError or UnsupportedModelError, the model unchanged;
    only if a disk or a memory fails midway, or a weight is not finite, linears that are quantized
    by then stay quantized.
    """
    with nullcontext() if tp is None else before_joining(device):
        # A model comes without its name.
        check_keywords("wrapper", unknown, keywords_of(wrapper)[1:])
        check_bool("prefetch_experts", prefetch_experts)
    if tp is None:
        options = Options(quantization, blocks, uses, quantize, reserve, max_length, max_batch_size)
        return _wrap(model, options, memory_limit, device, offload_dir, prefetch_experts)
    group = join(device)
    form, limit = _cut(model, quantization, memory_limit, device, quantize, tp, group)
    options = Options(form or False, blocks, uses, None, reserve, max_length, max_batch_size)
    try:
        with group.agreement():
            return _wrap(
                model, options, limit, group.device(device), offload_dir, prefetch_experts, group
            )
    except BaseException:
        if (scheduler := _scheduler_of(model)) is not None:  # another rank has failed
            _unwrap(model, scheduler)
        raise


def _wrap(
    model: Model,
    options: Options,
    memory_limit: int | float | str | None,
    device: torch.device | str | int | None,
    offload_dir: str | Path | None,
    prefetch_experts: bool,
    group: Group = ALONE,
) -> Model:
    """As wrapper(), for one of these ranks, which share the memory of the host."""
    _check_model(model)
    backend = backend_for(device)
    fetch_offloaded(model)
    source_device = check_tensors(model)
    request = Request(model, options, backend.device.type, backend.keeps_addresses)
    # What lies on the device, or in host memory, is freed as it is wrapped.
    model_bytes = unmapped_bytes(model)
    if memory_limit is None:
        budget = free_budget(backend.device, model_bytes if backend.device == source_device else 0)
    else:
        budget = parse_bytes(memory_limit, "memory_limit")
    on_host = model_bytes if source_device.type == "cpu" else 0
    host_bytes = host_budget(backend.device, on_host, group.local_size)
    the_plan = request.plan(budget, host_bytes, backend.device, memory_limit is None)
    warn_of_unregistered(request.unregistered, request.blobs.nbytes, stacklevel=3)
    if request.format is not None:
        warn_of_unquantized(model, request.blocks, request.choice, stacklevel=3)
    originals = Originals(model)
    scheduler = Scheduler(the_plan, backend, source_device, prefetch_experts)
    _apply(model, request, scheduler, offload_dir, group)
    _warn_of_training(model, stacklevel=3)
    del request  # it has the linears that were packed
    kept = [table.rows for table in _scheduler_of(model).tables]  # type: ignore[union-attr]
    warn_of_held(originals, model, kept, backend.device == source_device, stacklevel=3)
    return model


def _cut(
    model: torch.nn.Module,
    quantization: bool | str | Format | None,
    memory_limit: int | float | str | None,
    device: torch.device | str | int | None,
    quantize: Predicate | None,
    tp: str,
    group: Group,
) -> tuple[Format | None, int | None]:
    """Leave one rank's part in a model; the format of the rest, and the limit of each rank.

    What can be wrong is raised before anything is cut, alike on all ranks.
    """
    with group.agreement() as terms:
        _check_model(model)
        if tp != "auto" or quantize is not None:
            given = "quantize=" if tp == "auto" else f"tp={tp!r}"
            raise ArgumentError(f'{given}; accepted: tp="auto", or None, without quantize=')
        form = parse_format(quantization, default=INT8)
        limit = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
        fetch_offloaded(model)
        shared = shared_parts(model)
        check_ranks(model, shared, form, group.size)
        own = backend_for(group.device(device)).device
        names = {"class": type(model).__name__, "quantization": str(form), "memory_limit": limit}
        terms.alike |= {**names, "config": repr(getattr(model, "config", ""))[:4000]}
        terms.alike |= sample_of(model) if group.size > 1 else {}
        terms.own["free_bytes"] = free_budget(own) // (group.local_size if own.type == "cpu" else 1)
        # What is sampled with it is the same on all ranks then, as they draw from equal logits.
        terms.own["seed"] = torch.initial_seed()
    if group.size > 1:
        cut(model, shared, form, group)
        torch.manual_seed(terms.of_all[0]["seed"])
        limit = min(said["free_bytes"] for said in terms.of_all) if limit is None else limit
    return form, limit


@known_keywords
def unwrap(model: Model) -> Model:
    """Undo wrapper(): all weights in memory again, on the device they came from; returns `model`.

    Linears that were quantized stay quantized. Raises ArgumentError if it is not wrapped.
    """
    scheduler = _scheduler_of(model)
    if scheduler is None:
        raise ArgumentError(f"this {type(model).__name__} is not wrapped")
    _unwrap(model, scheduler)
    return model


@known_keywords
def plan_of(model: torch.nn.Module) -> Plan | None:
    """What stays and what streams, as decided by wrapper(); None for a model not wrapped."""
    scheduler = _scheduler_of(model)
    return None if scheduler is None else scheduler.plan


@known_keywords
def stats_of(model: torch.nn.Module) -> Stats | None:
    """What was copied since `model` was wrapped; None if it is not wrapped."""
    scheduler = _scheduler_of(model)
    return None if scheduler is None else scheduler.stats()


def _scheduler_of(model: torch.nn.Module) -> Scheduler | None:
    _check_is_module(model)
    return model.__dict__.get(ATTRIBUTE)


@known_keywords
def plan_for(
    model: torch.nn.Module,
    quantization: bool | str | Format | None = True,
    memory_limit: int | float | str | None = None,
    reserve: int | float | str = 0,
    blocks: Iterable[str] | None = None,
    uses: Mapping[str, float] | None = None,
    quantize: Predicate | None = None,
    host_memory: int | float | str | None = None,
    *,
    max_length: int | None = None,
    max_batch_size: int = 1,
    device: torch.device | str | int | None = None,
) -> Plan:
    """The plan that wrapper() would make, for a model on any device, "meta" included.

    Nothing is moved. memory_limit: None is no limit.   host_memory: for the host copies of
    streamed blocks, bytes or "64GB"; those beyond are planned to be on disk. None is no limit.
    device: where it would run, on which the workspace that max_length= reserves depends; one that
    is not in this machine is accepted. None is the GPU where there is one, else the CPU.
    All else is as for wrapper(); `least_limit` of the plan is the smallest limit that would do.
    Raises as wrapper() does.
    """
    device_type = device_for(device).type
    _check_model(model, is_planned=True)
    check_kinds(model)
    options = Options(quantization, blocks, uses, quantize, reserve, max_length, max_batch_size)
    request = Request(model, options, device_type, keep_addresses=False)
    if memory_limit is None:
        elsewhere_bytes = bytes_on(request.unregistered, None)
        return request.plan(request.reserved_bytes + request.allocated_bytes + elsewhere_bytes)
    host_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    return request.plan(parse_bytes(memory_limit, "memory_limit"), host_bytes)


@dataclass(frozen=True)
class Options:
    """What wrapper() and plan_for() are given alike.

    packed: formats of linears that are packed on disk; None where none can be, and are chosen.
    """

    quantization: bool | str | Format | None
    blocks: Iterable[str] | None
    uses: Mapping[str, float] | None
    quantize: Predicate | None
    reserve: int | float | str
    max_length: int | None
    max_batch_size: int
    packed: Mapping[str, Format] | None = None


class Request:
    """What was asked for, resolved against the model: nothing here has touched it yet."""

    def __init__(
        self, model: torch.nn.Module, options: Options, device_type: str, keep_addresses: bool
    ) -> None:
        self._model, self._device_type = model, device_type
        self.reserved_bytes = int(parse_bytes(options.reserve, "reserve"))
        self.format = parse_format(options.quantization, default=INT8)
        self._context = self._unreserved = None
        of_text = partial(context_of, model, format_=self.format, is_cpu=device_type == "cpu")
        if options.max_length is not None or options.max_batch_size != 1:
            self._context = of_text(options.max_length, options.max_batch_size)
            self.reserved_bytes += self._context.nbytes
        elif not self.reserved_bytes and generates_text(model):
            with suppress(ArgumentError):  # it cannot be counted, and nobody asked
                self._unreserved = of_text(DEFAULT_LENGTH)
        self.blocks = find_blocks(model, options.blocks)
        if options.packed is None:
            self.choice = choose_linears(model, self.blocks, self.format, options.quantize)
        else:
            self.choice = choice_of(model, options.packed)
        replacements = self.choice.replacements
        tables = find_tables(model, replacements)
        self._lay_out = partial(lay_out, model, self.blocks, replacements, keep_addresses, tables)
        self.blobs = self._lay_out()
        self._uses = _merged_uses(model, self.blocks, options.uses)
        self.unregistered = find_unregistered(model)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the device that the whole model takes."""
        layouts = [self.blobs.outside, self.blobs.of_tables, *self.blobs.blocks.values()]
        return sum(
            map(allocated_bytes_on(self._device_type), (layout.nbytes for layout in layouts))
        )

    def plan(
        self,
        budget: int,
        host_bytes: int | None = None,
        device: torch.device | None = None,
        is_measured: bool = False,
    ) -> Plan:
        """device: what the budget is of; tensors that are not registered count where they lie.

        is_measured: whether the budget is that of free_budget().
        Where all does not fit, and there are experts to choose from, `blobs` has them one by one.
        """
        unregistered_bytes = bytes_on(self.unregistered, device)
        if not self.blocks:
            outside_bytes = allocated_bytes_on(self._device_type)(self.blobs.outside.nbytes)
            self._check_that_all_fits(outside_bytes + unregistered_bytes, budget)

        def planned(make: Callable[..., Plan], blobs: Blobs) -> Plan:
            return make(
                self._device_type, self.blocks, blobs, budget, self._uses, unregistered_bytes,
                reserved_bytes=self.reserved_bytes, host_bytes=host_bytes, remedies=self._remedies,
            )  # fmt: skip

        by_need, choosing = self._by_need(), partial(plan_by_need, self._model)
        if by_need is None:
            the_plan = planned(plan_on, self.blobs)
        elif self.allocated_bytes + unregistered_bytes + self.reserved_bytes <= budget:
            chosen = planned(choosing, by_need)
            the_plan = replace(
                planned(plan_on, self.blobs),
                least_by_need=chosen.least_limit,
                idle_bytes=idle_bytes(chosen),
            )
        else:
            self.blobs = by_need  # also for what an error may advise
            the_plan = planned(choosing, by_need)
        spare = spare_bytes(budget) if is_measured else 0
        return replace(
            the_plan, context=self._context, unreserved=self._unreserved, spare_bytes=spare
        )

    def _by_need(self) -> Blobs | None:
        """With each expert a blob; None where there are none that a token leaves out."""
        if not has_experts(self._model):
            return None
        blobs = self._lay_out(by_need=True)
        return blobs if are_worth_choosing(self._model, blobs) else None

    def _remedies(self) -> list[Remedy]:
        return remedies(
            self._model, self.blocks, self.blobs, self.format, self.reserved_bytes,
            self._context is not None, self._device_type,
        )  # fmt: skip

    def _check_that_all_fits(self, outside_bytes: int, budget: int) -> None:
        least = outside_bytes + self.reserved_bytes
        kind = type(self._model).__name__
        if least > budget:
            raise NothingToStreamError(
                f"the limit of {format_bytes(budget)} ({budget} bytes) is below the least that "
                f"would do, {format_bytes(least)} ({least} bytes): {kind} has no list "
                "of repeated modules (torch.nn.ModuleList or Sequential with two items of one "
                "class), so there are no blocks to stream and all of it has to stay; raise "
                "memory_limit, or name some modules with blocks=[...]"
            )


def _check_is_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; give a torch.nn.Module")


def _check_model(model: torch.nn.Module, is_planned: bool = False) -> None:
    """is_planned: whether it is only planned, as may be one that is wrapped, and all of it stays.

    Raises ArgumentError, UnsupportedModelError.
    """
    _check_is_module(model)
    for name, module in model.named_modules():
        if module.__dict__.get(ATTRIBUTE) is not None and not is_planned:
            what = f"its part {name!r}" if name else "this model"
            raise UnsupportedModelError(f"{what} is wrapped already; call bminf.unwrap on it first")
        if is_streaming(module):
            raise UnsupportedModelError(
                f"{name or 'this module'!r} is part of a model that is wrapped already; "
                "call bminf.unwrap on that model first"
            )
        if isinstance(module, torch.jit.ScriptModule) and tensors_of(module):
            raise UnsupportedModelError(
                f"{name or 'the model'!r} is a TorchScript module, whose weights cannot be "
                "exchanged; wrap the model it was made from"
            )


def _merged_uses(
    model: torch.nn.Module, blocks: Iterable[ModuleBlock], given: Mapping[str, float] | None
) -> dict[str, float]:
    """What the model says, but for the blocks and lists that `given` names."""
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentError(
            f"uses is a {type(given).__name__}; give a mapping from the name of a block or "
            "of a list to its uses per request"
        )
    lists, given = {block.name: block.list_name for block in blocks}, given or {}
    found = uses_of(model, blocks)
    return {**{n: uses for n, uses in found.items() if lists[n] not in given}, **given}


def _apply(
    model: torch.nn.Module,
    request: Request,
    scheduler: Scheduler,
    offload_dir: str | Path | None,
    group: Group,
) -> None:
    """Move everything to its place; on any error, put the model back together."""
    replacements = request.choice.replacements

    def move() -> None:
        place(model, request.blobs, replacements, scheduler, offload_dir)
        if replacements:
            refuse_to_save(model)

    undo = partial(_unwrap, model, scheduler)
    start(
        model, request.blobs, scheduler, offload_dir, move, undo, agreement=group.agreement
    )  # fmt: skip


def _warn_of_training(model: torch.nn.Module, stacklevel: int) -> None:
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if model.training and is_frozen and has_tensors(model):
        warn(
            f"{type(model).__name__} is in training mode, and nothing in it can be trained: its "
            "dropout is at work, and weights that are packed or frozen take no gradient; call "
            "model.eval(), or train adapters beside them (peft.get_peft_model)",
            stacklevel=stacklevel + 1,
        )


def _unwrap(model: torch.nn.Module, scheduler: Scheduler) -> None:
    restore(model, scheduler)
    model.__dict__.pop(ATTRIBUTE, None)
    scheduler.backend.close()
