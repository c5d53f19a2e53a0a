"""Experts that are modules of their own, in a list or a dict: each is fetched when it is called."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bminf.layout import Layout
from bminf.offload.backends.base import Backend
from bminf.offload.blob import Stack
from bminf.offload.pool import ExpertPool
from bminf.offload.ring import NUM_SLOTS
from bminf.offload.streamed_block import StreamedBlock

Read = Callable[[StreamedBlock, str], torch.Tensor]
Write = Callable[[StreamedBlock, str, torch.Tensor], None]


class ListedExpert(StreamedBlock):
    """One of them. It is in whichever slot of the pool its bytes came to last.

    number: in the pool.   around: all that stand in its list.   Else as StreamedBlock.
    """

    around: ListedExperts

    def __init__(
        self,
        name: str,
        number: int,
        index: int,
        module: torch.nn.Module,
        layout: Layout,
        backend: Backend,
        read: Read,
        write: Write,
    ) -> None:
        super().__init__(name, index, module, layout, backend, read, write, slots=())
        self.number, self._backend, self._pool_slot = number, backend, -1

    def enter(self, pool: ExpertPool) -> int:
        """Which of its slots it can be bound to: there is one, in the pool."""
        self._pool_slot = pool.enter(self.number)
        buffer = self._backend.pool[self._pool_slot]
        if self._starts != [buffer.data_ptr()]:
            self._put_in([buffer])
        return 0

    def leave(self, pool: ExpertPool) -> None:
        """Its slot may be taken, and what is expected after it begins to come."""
        pool.leave(self.number)
        self.around.left(self.number, pool)

    def write_back(self) -> None:
        """What was changed in the slot, to the host copy."""
        self._backend.write_back(self.index, NUM_SLOTS + self._pool_slot)


class ListedExperts:
    """All experts of one list.

    first: the number of the first one in the pool.   module: the list.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        stack: Stack,
        first: int,
        first_block: int,
        backend: Backend,
        read: Read,
        write: Write,
    ) -> None:
        self.name, self.module, self.stack, self._backend = name, module, stack, backend
        self.numbers = range(first, first + len(stack.members))
        self._expected: list[int] = []
        self.experts = [
            ListedExpert(
                f"{name}.{member}", number, first_block + number, module.get_submodule(member),
                layout, backend, read, write,
            )
            for number, member, layout in zip(
                self.numbers, stack.members, stack.experts, strict=True
            )
        ]  # fmt: skip
        for expert in self.experts:
            expert.around = self

    def release(self) -> None:
        """Put the lazy tensors in place."""
        for expert in self.experts:
            expert.release()

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, by its name in the list, as it lies on the host."""
        member, _, key = name.partition(".")
        expert = self.experts[self.stack.members.index(member)]
        return expert.layout.view(self._backend.host_copy(expert.index), key)

    def restore(self, blob: torch.Tensor) -> None:
        """Give the modules ordinary tensors again, views into `blob`: (whole.extent,) uint8."""
        for member, expert in zip(self.stack.members, self.experts, strict=True):
            expert.restore(blob, self.stack.whole, f"{member}.")

    def forget(self) -> None:
        """Hold no tensor any more."""
        for expert in self.experts:
            expert.forget()

    def announce(self, pool: ExpertPool, ids: torch.Tensor, is_guess: bool = False) -> None:
        """Begin to copy what a router has chosen, as far as there is room; the others as those
        before them are left.   ids: of the experts, integers; read on the host now."""
        chosen = {number for number in ids.reshape(-1).tolist() if number < len(self.numbers)}
        self._expected = [self.numbers[number] for number in sorted(chosen) if number >= 0]
        pool.expect(self._expected, self.numbers, is_guess)

    def left(self, number: int, pool: ExpertPool) -> None:
        """Expect those behind an expert: they are called in this order."""
        if self._expected:
            self._expected = [one for one in self._expected if one > number]
            pool.expect(self._expected, self.numbers)

    def settle(self, pool: ExpertPool) -> None:
        """The module around has ended."""
        self._expected = []
        pool.settle(self.numbers)
