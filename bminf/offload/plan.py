"""Which blocks stay on the device, decided before a byte is moved: a pure function.

The fewest bytes x uses over the bus per request decide, and which of equal blocks stream is spread
evenly round the pass, because a copy hides behind the blocks between it and the one before
(choose.py).

Where host memory cannot hold all that streams, some blobs stay in a file and come through two
staging buffers. That is the same choice once more, one tier down, and is made by the same means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from bminf.checks import is_number
from bminf.errors import ArgumentError, BudgetError
from bminf.offload.choose import choose
from bminf.offload.hit_rates import PUBLISHED, UNIFORM, HitRates
from bminf.offload.pool import LEAST_SLOTS
from bminf.units import format_bytes

if TYPE_CHECKING:
    from bminf.offload.context import Context

DEFAULT_USES = 128
"""Uses per request of a block that nothing was said about: once a token, for 128 tokens."""

_MAX_BYTES = 2**60  # the search counts in int64
_ROW = 64
_TIMES: dict[float, str] = {1: "once", 2: "twice"}


@dataclass(frozen=True)
class Block:
    """What the planner knows of a block.

    name: for example "model.layers.3".   nbytes: bytes of its blob, at least 0; for a GPU
    those that its allocator takes.
    list_name: the list it belongs to, for example "model.layers"; ordered there as given.
    """

    name: str
    nbytes: int
    list_name: str = ""


class Remedy(NamedTuple):
    """What a caller can do about a limit that is too small.

    advice: in the words of its own arguments.   saved_bytes: by which the least limit falls.
    is_of_blocks: whether the blocks become smaller, which helps where they are kept, too.
    argument: of remedies that set the same one, only one can be carried out.
    """

    advice: str
    saved_bytes: int
    is_of_blocks: bool
    argument: str = ""


@dataclass(frozen=True)
class Experts:
    """Experts that stream by need: the pool that they share, and what is beside it. In bytes.

    number, nbytes: of all of them.   num_slots, slot_bytes: of the pool.
    bytes_per_token: of those that one token goes through.   on_disk: numbers of those that wait in
    a file, because host memory has no room for them.
    """

    number: int
    nbytes: int
    slot_bytes: int
    num_slots: int
    bytes_per_token: int
    on_disk: tuple[int, ...] = ()

    @property
    def pool_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def wanted_bytes(self, num_tokens: int = 1) -> float:
        """Of the experts that so many tokens go through together, chosen independently, each expert
        as likely as any other."""
        left_out = 1 - self.bytes_per_token / self.nbytes
        return self.nbytes * (1 - left_out**num_tokens)

    def hit_rate(self, num_tokens: int = 1, hit_rates: HitRates = UNIFORM) -> float:
        """Of those, what is in the pool. One with room for less than a pass wants forgets each
        expert before it is wanted again."""
        share = self.num_slots / self.number
        return 0.0 if self.wanted_bytes(num_tokens) > self.nbytes * share else hit_rates.at(share)

    def missed_bytes(self, num_tokens: int = 1, hit_rates: HitRates = UNIFORM) -> float:
        """What has to be copied in a pass. Routers have favourites, for a while at least: real ones
        miss less than those that the default is for, which promises nothing that only some do."""
        return self.wanted_bytes(num_tokens) * (1 - self.hit_rate(num_tokens, hit_rates))


@dataclass(frozen=True)
class Plan:
    """Which blocks are resident, and what that will cost. All sizes in bytes.

    blocks: all, in the order given.   uses: block name -> uses per request.
    resident, streamed: names of blocks, in order.   outside_bytes: what lies outside all blocks.
    resident_bytes: everything that stays, `outside_bytes` included.   slot_bytes: both slots.
    reserved_bytes: set aside for activations and KV cache.   budget: the limit planned for.
    on_disk: names of the streamed blocks that are kept in a file, in order, because host memory
    has no room for them; the other streamed ones are kept in host memory.
    context: the texts that `reserved_bytes` is to hold, where max_length was given.
    unreserved: what a text of usual length would take, where nothing was reserved for any.
    spare_bytes: of the device, free beside `budget` where that was not given but measured.
    experts: those that stream by need, one by one, and belong to no block.
    least_by_need: the least limit of a model that fits, and whose experts would stream so.
    idle_bytes: of a model that fits, the experts that one token leaves out.
    tables: names of those of which rows are read on the host, such as input embeddings, and which
    the limit does not count: all there are; none if everything fits, when they are among
    `outside_bytes`.   table_bytes: of them, wherever they are; for a GPU those that its allocator
    would take.
    """

    blocks: tuple[Block, ...]
    uses: Mapping[str, int | float]
    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    outside_bytes: int
    resident_bytes: int
    slot_bytes: int
    reserved_bytes: int
    budget: int
    on_disk: tuple[str, ...] = ()
    context: Context | None = None
    unreserved: Context | None = None
    spare_bytes: int = 0
    experts: Experts | None = None
    least_by_need: int | None = None

    @property
    def pool_bytes(self) -> int:
        """Bytes of all slots for experts."""
        return 0 if self.experts is None else self.experts.pool_bytes

    @property
    def is_streaming(self) -> bool:
        """Whether anything streams: blocks, or experts."""
        return bool(self.streamed) or self.experts is not None

    tables: tuple[str, ...] = ()
    table_bytes: int = 0
    idle_bytes: int = 0

    @property
    def least_limit(self) -> int:
        """The smallest memory limit, in bytes, that this model can be planned for."""
        return least_budget(self) if self.least_by_need is None else self.least_by_need

    @property
    def total_bytes(self) -> int:
        """Bytes of device memory that the plan takes; never more than `budget`."""
        return self.resident_bytes + self.slot_bytes + self.pool_bytes + self.reserved_bytes

    @property
    def unused_bytes(self) -> int:
        """Bytes of device memory that neither weights nor slots take: `reserved_bytes`, what is too
        small for a block, and what is spare."""
        taken = self.resident_bytes + self.slot_bytes + self.pool_bytes
        return self.budget + self.spare_bytes - taken

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all streamed blobs, each once."""
        return sum(block.nbytes for block in self._blocks_of(self.streamed))

    @property
    def streamed_bytes_per_request(self) -> int | float:
        """Bytes that come over the bus in one request: each streamed blob times its uses."""
        return self._bytes_per_request(self.streamed)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all blobs that are kept in a file, each once."""
        return sum(block.nbytes for block in self._blocks_of(self.on_disk))

    @property
    def staging_bytes(self) -> int:
        """Bytes of both staging buffers, in host memory, that blobs in a file come through."""
        return 2 * max((block.nbytes for block in self._blocks_of(self.on_disk)), default=0)

    @property
    def fixed_bytes(self) -> int:
        """What is taken under any limit: outside all blocks, without tables, and reserved."""
        outside_bytes = self.outside_bytes - self.table_bytes + self.host_table_bytes
        return outside_bytes + self.reserved_bytes

    @property
    def host_table_bytes(self) -> int:
        """Bytes of the tables that are kept on the host."""
        return self.table_bytes if self.tables else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that a GPU needs: blobs and staging, and tables read by row."""
        blob_bytes = self.streamed_bytes - self.disk_bytes
        if self.experts is not None:
            num_in_host = self.experts.number - len(self.experts.on_disk)
            blob_bytes += self.experts.nbytes * num_in_host // self.experts.number
        return blob_bytes + self.staging_bytes + self.host_table_bytes

    @property
    def disk_places(self) -> tuple[int, ...]:
        """Which of `streamed`, and of the experts behind them, are on disk, as indices: what
        Backend.open takes."""
        on_disk = set(self.on_disk)
        blocks = (index for index, name in enumerate(self.streamed) if name in on_disk)
        experts = () if self.experts is None else self.experts.on_disk
        return (*blocks, *(len(self.streamed) + number for number in experts))

    def _blocks_of(self, names: Sequence[str]) -> list[Block]:
        wanted = set(names)
        return [block for block in self.blocks if block.name in wanted]

    def _bytes_per_request(self, names: Sequence[str]) -> int | float:
        costs = [block.nbytes * self.uses[block.name] for block in self._blocks_of(names)]
        return sum(costs) if all(isinstance(cost, int) for cost in costs) else math.fsum(costs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view cannot be copied or pickled, and models, plan and all, are.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _rebuilt, ({**values, "uses": dict(self.uses)},)

    def __str__(self) -> str:
        return "\n".join(line for line in [*self._summary(), *self._picture()] if line)

    def _said_of_all(self) -> str:
        if self.tables:
            return "all blocks fit: nothing is streamed but rows"
        return "fits entirely: nothing is streamed"

    def _summary(self) -> Iterator[str]:
        outside = f"{format_bytes(self.outside_bytes)} outside all blocks"
        yield _line("limit", self.budget, f"planned {format_bytes(self.total_bytes)}")
        yield _line("resident", self.resident_bytes, outside)
        if self.streamed:
            yield _line("two slots", self.slot_bytes)
        yield _line("reserved", self.reserved_bytes, self._reserved_for())
        if self.tables:
            yield _line("by row", self.table_bytes, f"on the host: {', '.join(self.tables)}")
        if self.unreserved is not None:
            yield self.context_line
        if self.experts is not None:
            yield from _experts_lines(self.experts)
        if not self.streamed:
            yield self._said_of_all() if self.experts is None else ""
            return
        of_all = f"{len(self.streamed)} of {len(self.blocks)} blocks"
        per_request = f"{format_bytes(self.streamed_bytes_per_request)} per request"
        yield _line("streamed", self.streamed_bytes, f"{of_all}, {per_request}")
        if self.on_disk:
            yield from self._tiers()

    @property
    def context_line(self) -> str:
        """What a text of usual length would take; "" where room was made, or none is known of."""
        if self.unreserved is None:
            return ""
        length, more = self.unreserved.max_length, format_bytes(self.unreserved.nbytes)
        return (
            f"a context of {length:,} tokens would take about {more} more; "
            f"max_length={length} reserves it"
        )

    def _reserved_for(self) -> str:
        if self.context is None:
            return ""
        texts, length = self.context.max_batch_size, self.context.max_length
        cache, workspace = self.context.cache_bytes, self.context.workspace_bytes
        beside = self.reserved_bytes - self.context.nbytes
        return (
            f"estimated for {f'{texts} texts' if texts > 1 else 'one text'} of {length:,} "
            f"tokens: KV cache {format_bytes(cache)}, workspace {format_bytes(workspace)}"
            + (f"; and {format_bytes(beside)} of reserve" if beside else "")
        )

    def _tiers(self) -> Iterator[str]:
        """Where streamed blocks are kept, when that is not host memory for all."""
        num_in_host, stage = len(self.streamed) - len(self.on_disk), self.staging_bytes // 2
        beside = f"and two staging buffers of {format_bytes(stage)}"
        in_host_bytes = self.host_bytes - self.host_table_bytes
        yield _line("in host", in_host_bytes, f"{num_in_host} streamed blocks, {beside}")
        read = f"{format_bytes(self._bytes_per_request(self.on_disk))} read per request"
        yield _line("on disk", self.disk_bytes, f"{len(self.on_disk)} streamed blocks, {read}")

    def _picture(self) -> Iterator[str]:
        streamed, on_disk = set(self.streamed), set(self.on_disk)
        for list_name, order in _by_list(self.blocks).items():
            names = [self.blocks[index].name for index in order]
            moves = "".join(":" if name in on_disk else "." for name in names)
            signs = "".join(
                sign if name in streamed else "#" for name, sign in zip(names, moves, strict=True)
            )
            stay, stream, read = (signs.count(sign) for sign in "#.:")
            uses = sorted({self.uses[name] for name in names})
            ends = list(dict.fromkeys([uses[0], uses[-1]]))
            shown = " to ".join(f"{end:g}" for end in ends)
            words = " to ".join(uses_in_words(end) for end in ends)
            disk = f", {read} from disk (:)" if on_disk else ""
            yield (
                f"{list_name or 'blocks'}: {stay} stay (#), {stream} stream (.){disk}, "
                f"uses {shown} ({words})"
            )
            yield from (f"  {signs[index : index + _ROW]}" for index in range(0, len(signs), _ROW))


def _experts_lines(experts: Experts) -> Iterator[str]:
    slots = f"{experts.num_slots} slots of {format_bytes(experts.slot_bytes)} for experts"
    yield _line("pool", experts.pool_bytes, slots)
    a_token = f"{format_bytes(experts.bytes_per_token)} a token"
    on_disk = f", {len(experts.on_disk)} from disk" if experts.on_disk else ""
    least, most = (experts.missed_bytes(1, rates) for rates in (PUBLISHED, UNIFORM))
    ends = dict.fromkeys([format_bytes(least), format_bytes(most)])
    missed = f", {' to '.join(ends)} missed"
    yield _line("experts", experts.nbytes, f"{experts.number} by need, {a_token}{missed}{on_disk}")


def _line(label: str, nbytes: int, rest: str = "") -> str:
    return f"{label:<9} {format_bytes(nbytes):>10}   {rest}".rstrip()


def uses_in_words(uses: float) -> str:
    """Uses per request in words: "once a token", "twice a request"."""
    per_token, rest = divmod(uses, DEFAULT_USES)
    times, what = (per_token, "token") if per_token and not rest else (uses, "request")
    return f"{_TIMES.get(times, f'{times:g} times')} a {what}"


def _rebuilt(values: dict[str, Any]) -> Plan:
    return Plan(**{**values, "uses": MappingProxyType(values["uses"])})


def plan(
    blocks: Sequence[Block],
    budget: int,
    uses: Mapping[str, float] | None = None,
    *,
    outside_bytes: int = 0,
    reserved_bytes: int = 0,
    host_bytes: int | None = None,
    table_bytes: int = 0,
    tables: Sequence[str] = (),
    remedies: Callable[[], Sequence[Remedy]] = tuple,
    pool_bytes: int = 0,
) -> Plan:
    """Choose the blocks that stay within `budget` bytes, for the fewest bytes streamed per request.

    blocks: in the order of the pass; several lists may be mixed.   budget: bytes, for everything.
    uses: name of a block or of a list -> uses per request, above 0; a block's own name wins, and
    what is not named has 128.
    outside_bytes: what stays in any case.   reserved_bytes: what the plan has to leave free.
    host_bytes: of host memory for streamed blobs; the rest are kept in a file. None: all have room.
    table_bytes: of tables that are read by row, beside the blocks and outside_bytes; they are kept
    in host memory, unless everything fits.   tables: their names.

    If not all fits, two slots of the largest streamed blob are counted. More budget never streams
    more. The cost is the least possible where the counts of each kind (a kind: bytes and uses) have
    at most a million combinations, as those of 12 blocks have, and of any number of blocks of one
    kind; beyond, it is within one block's bytes x uses of the least. Each list streams its part of
    every kind, spread evenly over its own blocks of that kind.
    What is read from disk per request is chosen likewise among the streamed blocks, `host_bytes`
    in the budget's place and two staging buffers of the largest blob on disk in that of the slots.
    remedies: what an error may advise beside a higher limit; asked only then.
    pool_bytes: beside all that, of the least slots for experts.
    Raises ArgumentError for names, sizes or uses that cannot be, and BudgetError, with the least
    limit that would do, when not even two slots, or two staging buffers, fit.
    """
    blocks = tuple(blocks)
    _check_blocks(blocks)
    _check_bytes(budget=budget, outside_bytes=outside_bytes, reserved_bytes=reserved_bytes)
    _check_bytes(host_bytes=host_bytes or 0, table_bytes=table_bytes)
    uses_by_block = _uses_of(blocks, uses or {})
    capacity = budget - outside_bytes - reserved_bytes - pool_bytes
    _check_room(blocks, budget, outside_bytes, reserved_bytes, pool_bytes, remedies)
    block_bytes = sum(block.nbytes for block in blocks)
    streamed = set() if block_bytes <= capacity else _choose(blocks, uses_by_block, capacity)
    is_all = block_bytes + table_bytes <= capacity and not pool_bytes
    on_host = () if is_all else tuple(tables)
    if not on_host:
        outside_bytes += table_bytes
    elif host_bytes is not None:
        host_bytes = max(0, host_bytes - table_bytes)
    stay = [block for index, block in enumerate(blocks) if index not in streamed]
    move = [block for index, block in enumerate(blocks) if index in streamed]
    return Plan(
        blocks=blocks,
        uses=MappingProxyType(uses_by_block),
        resident=tuple(block.name for block in stay),
        streamed=tuple(block.name for block in move),
        outside_bytes=outside_bytes,
        resident_bytes=outside_bytes + sum(block.nbytes for block in stay),
        slot_bytes=2 * max((block.nbytes for block in move), default=0),
        reserved_bytes=reserved_bytes,
        budget=budget,
        on_disk=_on_disk(tuple(move), uses_by_block, host_bytes, remedies),
        tables=on_host,
        table_bytes=table_bytes,
    )


def _on_disk(
    streamed: tuple[Block, ...],
    uses: Mapping[str, int | float],
    host_bytes: int | None,
    remedies: Callable[[], Sequence[Remedy]],
) -> tuple[str, ...]:
    """Names of the streamed blocks that `host_bytes` of host memory have no room for."""
    if host_bytes is None or sum(block.nbytes for block in streamed) <= host_bytes:
        return ()
    least, stage = min(_needs(streamed))
    if host_bytes < least:
        helpful = [r for r in remedies() if r.is_of_blocks]
        advice = _joined(["free host memory", "raise memory_limit"], helpful, least - host_bytes)
        raise BudgetError(
            f"{format_bytes(host_bytes)} ({host_bytes} bytes) of host memory are below the least "
            f"that would do for streaming, {format_bytes(least)} ({least} bytes: two staging "
            f"buffers of {format_bytes(stage)}, for blocks that wait on disk); {advice}"
        )
    indices = _choose(streamed, uses, host_bytes)
    return tuple(block.name for index, block in enumerate(streamed) if index in indices)


def _check_blocks(blocks: tuple[Block, ...]) -> None:
    seen: set[str] = set()
    for block in blocks:
        _check_bytes(**{f"nbytes of block {block.name!r}": block.nbytes})
        if block.name in seen:
            raise ArgumentError(
                f"two blocks are named {block.name!r}; give each block its own name"
            )
        seen.add(block.name)
    if (total := sum(block.nbytes for block in blocks)) > _MAX_BYTES:
        raise ArgumentError(f"the blocks have {total} bytes in all; at most 2**60 are accepted")


def _check_bytes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"{name}={value!r}; give a whole number of bytes of at least 0")


def _uses_of(blocks: tuple[Block, ...], uses: Mapping[str, float]) -> dict[str, int | float]:
    known = {block.name for block in blocks} | {block.list_name for block in blocks}
    for name, value in uses.items():
        if name not in known:
            lists = ", ".join(sorted({repr(block.list_name) for block in blocks})) or "none"
            raise ArgumentError(
                f"uses has the unknown key {name!r}; "
                f"accepted: the name of a block or of a list ({lists})"
            )
        if not is_number(value) or value <= 0:
            raise ArgumentError(f"uses[{name!r}]={value!r}; give a finite number of uses above 0")
    of_list = {block.list_name: uses.get(block.list_name, DEFAULT_USES) for block in blocks}
    return {block.name: uses.get(block.name, of_list[block.list_name]) for block in blocks}


def least_budget(whole: Plan) -> int:
    """The smallest budget, in bytes, that the blocks of `whole` can be planned for."""
    pool_bytes = 0
    if whole.experts is not None:
        pool_bytes = min(LEAST_SLOTS, whole.experts.number) * whole.experts.slot_bytes
    return whole.fixed_bytes + least_bytes(whole.blocks) + pool_bytes


def least_bytes(blocks: Sequence[Block]) -> int:
    """Of device memory, in which `blocks` can be run."""
    return min(_needs(blocks))[0]


def _check_room(
    blocks: tuple[Block, ...],
    budget: int,
    outside_bytes: int,
    reserved_bytes: int,
    pool_bytes: int,
    remedies: Callable[[], Sequence[Remedy]],
) -> None:
    needed, slot = min(_needs(blocks))
    least = needed + outside_bytes + reserved_bytes + pool_bytes
    if least <= budget:
        return
    parts = {
        f"two slots of {format_bytes(slot)}": 2 * slot,
        f"{format_bytes(needed - 2 * slot)} of blocks that stay": needed - 2 * slot,
        f"{format_bytes(outside_bytes)} outside all blocks": outside_bytes,
        f"{format_bytes(reserved_bytes)} reserved": reserved_bytes,
        f"{format_bytes(pool_bytes)} of slots for experts": pool_bytes,
    }
    raise BudgetError(
        f"the limit of {format_bytes(budget)} ({budget} bytes) is below the least that would "
        f"do, {format_bytes(least)} ({least} bytes: "
        f"{' + '.join(part for part, nbytes in parts.items() if nbytes)}); "
        f"{_joined(['raise memory_limit'], remedies(), least - budget)}"
    )


def _joined(always: list[str], remedies: Sequence[Remedy], lack: int) -> str:
    """Advice: each remedy that helps by itself; where none does, all of them if that helps."""
    alone = [r.advice for r in remedies if r.saved_bytes >= lack]
    helpful = _compatible([r for r in remedies if r.saved_bytes > 0])
    if not alone and len(helpful) > 1 and sum(r.saved_bytes for r in helpful) >= lack:
        alone = ["do all of these: " + " and ".join(r.advice for r in helpful)]
    *first, last = [*always, *alone]
    return f"{', '.join(first)}, or {last}" if first else last


def _compatible(remedies: Sequence[Remedy]) -> list[Remedy]:
    """Those that can be carried out together: of each argument the one that saves most."""
    by_saved = sorted(remedies, key=lambda remedy: remedy.saved_bytes)
    best = {remedy.argument or remedy.advice: remedy for remedy in by_saved}
    return [remedy for remedy in remedies if remedy in best.values()]


def _needs(blocks: Sequence[Block]) -> Iterator[tuple[int, int]]:
    """For each size of slot: (bytes of two and of the blocks too large for them, bytes of one)."""
    larger = 0
    for size, same in groupby(sorted((block.nbytes for block in blocks), reverse=True)):
        yield larger + 2 * size, size
        larger += size * len(list(same))
    yield larger, 0


def _choose(
    blocks: tuple[Block, ...], uses_by_block: Mapping[str, int | float], capacity: int
) -> set[int]:
    """Indices, in the order given, of the blocks that stream when `capacity` cannot hold all."""
    sizes = [block.nbytes for block in blocks]
    uses = [uses_by_block[block.name] for block in blocks]
    return choose(sizes, uses, list(_by_list(blocks).values()), capacity)


def _by_list(blocks: tuple[Block, ...]) -> dict[str, list[int]]:
    """Name of a list -> the indices of its blocks, in the order given."""
    lists: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        lists.setdefault(block.list_name, []).append(index)
    return lists
