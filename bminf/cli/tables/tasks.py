"""What the models of tables are timed with: tasks of whole passes, on random weights.

An encoder-decoder is timed as BMInf's published table measured CPM-2, and as text is generated; a
decoder as the tables of GLM-130B's authors have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bminf.arch.glm import GLM as GLMNetwork
from bminf.arch.t5 import T5
from bminf.models import assemble
from bminf.models.assemble import Assembly, Formats
from bminf.models.fill import fill
from bminf.models.glm_text import blank, pack_choices, position_tensor
from bminf.models.random_weights import random_weights
from bminf.models.source import Source, find_sizes
from bminf.offload.backends import backend_for, free_budget, host_budget
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.quantization.packed import parse_format
from bminf.units import format_bytes

_ID = 1  # of all tokens that are read, as in the benchmark of GLM-130B's authors
ENCODER, ANEW, ONCE = "encoder", "decoder, projections anew", "decoder, projections once"
LISTS = {
    ENCODER: ("encoder.layers",),
    ANEW: ("cross_projections.layers", "decoder.layers"),
    ONCE: ("decoder.layers",),
}
"""The blocks that one step of a task of an encoder-decoder goes through, in order."""
_KINDS = {"encoder": ENCODER, "anew": ANEW, "once": ONCE}
_KINDS |= {kind: kind for kind in ("encode", "decode", "cola")}


@dataclass(frozen=True)
class Task:
    """What is timed.

    kind: of an encoder-decoder ENCODER, which reads `length` tokens, and ANEW or ONCE, which take
    `length` steps, a token each, after a prompt of `prompt` tokens, with its keys and values
    projected once more in each step, or not. Nothing is embedded, scored or drawn.
    Of a decoder "encode" reads `length` tokens in one pass, of a GLM with half of the cells of the
    mask hidden, and scores what comes next; "decode" writes `length` tokens, a pass each, from an
    empty text on, the likeliest each time; "cola" reads texts of `length` tokens in one pass, each
    with its blank and two choices for it, and scores the choices.   rows: texts at once.
    """

    kind: str
    length: int
    rows: int = 1
    prompt: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length if self.rows == 1 else f'{self.rows} x {self.length}'}"

    @property
    def num_steps(self) -> int:
        return self.length if self.kind in (ANEW, ONCE, "decode") else 1

    def streamed_bytes(self, plan: Plan) -> int:
        """That come over the link in one step."""
        streamed, lists = set(plan.streamed), LISTS.get(self.kind)
        blocks = [block for block in plan.blocks if block.name in streamed]
        return sum(block.nbytes for block in blocks if lists is None or block.list_name in lists)


def parse_task(text: str) -> Task:
    """encoder=N, anew=PROMPT+N, once=PROMPT+N, encode=N, decode=N or cola=ROWSxN; N is the length.

    Raises ValueError.
    """
    kind, _, sizes = text.partition("=")
    *prompt, sizes = sizes.split("+")
    *rows, length = sizes.split("x")
    (num_rows,), (num_prompt,) = ([int(one) for one in given or ["1"]] for given in (rows, prompt))
    task = Task(_KINDS.get(kind, ""), int(length), num_rows, num_prompt)
    least = 2 if kind == "cola" else 1  # a text has its blank and one more token
    if not task.kind or task.length < least or min(task.rows, task.prompt) < 1:
        raise ValueError(text)
    return task


Pass = Callable[[], torch.Tensor]


def t5_pass(network: T5, task: Task) -> tuple[Pass, Any]:
    """What does a task of an encoder-decoder, and the cache for it. What it reads is made here,
    which is not timed; the same hidden state goes into the decoder at each step."""
    generator = torch.Generator().manual_seed(0)
    cache = network.new_cache(1, task.prompt, task.length)

    def hidden(num_tokens: int) -> torch.Tensor:
        x = torch.randn(1, num_tokens, network.config.hidden_size, generator=generator)
        return x.to(network.embed_tokens.weight)

    x, encoded = hidden(task.length if task.kind == ENCODER else 1), hidden(task.prompt)

    def decode() -> torch.Tensor:
        y = x
        for step in range(task.length):
            if step == 0 or task.kind == ANEW:
                cache.cross.reset()
                network.cross_projections(encoded, cache.cross)
            y = network.decoder(x, cache)
        return y[:, -1]

    return (lambda: network.encoder(x)[:, -1]) if task.kind == ENCODER else decode, cache


def decoder_pass(network: Any, task: Task) -> tuple[Pass, Any]:
    """As t5_pass(), of the others. The positions and what is hidden are a GLM's."""
    cache, num_tokens, at = network.new_cache(task.rows, task.length), task.length, [-1]
    generator, device = torch.Generator().manual_seed(0), cache.keys.device
    row, positions = [_ID] * num_tokens, [(i, 0) for i in range(num_tokens)]
    is_hidden = torch.rand(num_tokens, num_tokens, generator=generator) < 0.5
    if task.kind == "cola":
        one = blank(row[1:], num_tokens - 2, _ID, is_continued=False)
        row, positions, is_hidden, (at, _) = pack_choices(one, [[0], [_ID]])
    ids, is_hidden = torch.tensor([row] * task.rows).to(device), is_hidden[None].to(device)
    places = None
    if isinstance(network, GLMNetwork):
        own = position_tensor([positions] * task.rows, not network.config.is_rotary)
        places = own.to(device)

    def read(ids: torch.Tensor, part: slice, hidden: torch.Tensor | None) -> Any:
        if places is None:
            return network(ids, cache)
        return network(ids, places[..., part], cache, hidden)

    def decode() -> torch.Tensor:
        """The logits of the last token."""
        token: torch.Tensor = ids[:, :1]
        logits = torch.empty(0)
        for i in range(num_tokens):
            logits = network.head(read(token, slice(i, i + 1), None)[:, -1])
            token = logits.argmax(-1, keepdim=True)
        return logits

    def encode() -> torch.Tensor:
        """The logits of the last token, or (rows, 2): the log-probability of each choice."""
        logits: torch.Tensor = network.head(read(ids, slice(None), is_hidden)[:, at[0]])
        return logits.log_softmax(-1)[:, :2] if task.kind == "cola" else logits

    return decode if task.kind == "decode" else encode, cache


# ---- a model that does it ------------------------------------------------------------------------

_RESERVED_LENGTH = 512  # tokens of prompt and answer each of an encoder-decoder, or more


@dataclass(frozen=True)
class Run:
    """A model and what it is to do.

    source: its architecture and sizes.   dtype: of what is not packed.   quantization,
    head_quantization: by the names of the architecture's formats; "none" is not packed.
    tasks: memory is reserved for one of them at a time.
    limit: bytes; None is 90% of what is free on `device`, "cpu" or "cuda".
    offload_dir: for streamed blocks in a file.
    """

    source: Source
    dtype: torch.dtype
    quantization: str
    head_quantization: str
    tasks: tuple[Task, ...]
    limit: int | None = None
    device: str = "cpu"
    offload_dir: Path | None = None

    @property
    def formats(self) -> str:
        """For names."""
        is_cut = self.source.architecture.split_head is not None
        return f"{self.quantization}{f', head {self.head_quantization}' if is_cut else ''}"

    @property
    def name(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        return f"{self.device} {self.formats}, {limit}"

    def assembled(self) -> Assembly:
        """The network on the meta device.   Raises ArgumentError."""
        known = self.source.architecture.formats
        layers, head = (
            None if name == "none" else parse_format(name, formats=known)
            for name in (self.quantization, self.head_quantization)
        )
        return assemble.assemble(find_sizes(self.source), Formats(layers, head), self.dtype)

    def planned(self, limit: int, host_bytes: int | None = None) -> tuple[Assembly, Plan]:
        """The network on the meta device, and what stays within `limit` bytes, as in the zoo.

        host_bytes: of host memory for streamed blocks; None is as much as it takes.
        Raises ArgumentError or BudgetError, with numbers.
        """
        made = self.assembled()
        least = _RESERVED_LENGTH if isinstance(made.network, T5) else 1
        length, rows = max(
            ((max(task.length, task.prompt, least), task.rows) for task in self.tasks),
            key=lambda size: assemble.reserved_bytes(made, size[0], size[1], self.device),
        )
        return made, assemble.plan_within(made, limit, length, rows, self.device, host_bytes)

    @contextmanager
    def loaded(self) -> Iterator[tuple[Any, Scheduler]]:
        """The network with the weights of the source, or random ones where that has none, streaming
        as planned; let go of at the end."""
        backend = backend_for(self.device)
        limit = free_budget(backend.device) if self.limit is None else self.limit
        made, plan = self.planned(limit, host_budget(backend.device))
        if not made.source.weights.tensors:
            source = replace(made.source, weights=random_weights(made.network))
            made = replace(made, source=source)
        scheduler = fill(made, plan, backend, self.offload_dir)
        try:
            yield made.network, scheduler
        finally:
            scheduler.uninstall()
            backend.close()


def shortened(whole: Source, num_layers: int | None) -> Source:
    """The model with so many layers in each stack, which its title says; None is all of them."""
    names = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers")
    own = {name: count for name, count in vars(whole.config).items() if name in names}
    if num_layers is None or set(own.values()) == {num_layers}:
        return whole
    counts = " + ".join([str(num_layers)] * len(own))
    title = f"{whole.title}, shortened: {counts} layers of {' + '.join(map(str, own.values()))}"
    config = replace(whole.config, **dict.fromkeys(own, num_layers))
    return replace(whole, config=config, title=title)
