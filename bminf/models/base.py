"""What CPM-1, CPM-2 and EVA have in common as models for users: text in, text out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bminf.arch.gpt import GPT, GPTConfig
from bminf.arch.t5 import T5
from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.generation.beam import beam_search
from bminf.generation.loop import Decoder, decode
from bminf.generation.sampling import Sampler, Sampling
from bminf.layers.quantized_linear import format_for
from bminf.models.decoders import GPTDecoder, T5Decoder, padded
from bminf.models.family import Family
from bminf.models.load import fill, lay_out, plan_for, skeleton
from bminf.models.options import Options
from bminf.models.source import Source, open_source, skeleton_of
from bminf.models.workspace import reserved_bytes
from bminf.quantization.packed import Format
from bminf.scheduler.device import backend_for, free_budget
from bminf.scheduler.hooks import Scheduler, Stats
from bminf.scheduler.plan import Plan
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.stream import TextStream
from bminf.units import parse_bytes

Text = str | Sequence[int] | torch.Tensor
"""A text, or its token ids: a sequence of ints or a tensor (T,)."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEFAULT_MAX_LENGTH = 512  # of models whose positions have no end


@dataclass(frozen=True)
class Prompt:
    """input_ids: what the model reads; for a T5, what its encoder does.   start_ids: what is fed
    to the decoder first; for a GPT, input_ids."""

    input_ids: list[int]
    start_ids: list[int]


@dataclass(frozen=True)
class ModelStats(Stats):
    """What the scheduler did, and how fast texts came. Bytes; times in seconds.

    num_tokens, generated_s: tokens generated since loading, over all rows, and the time that took.
    """

    num_tokens: int = 0
    generated_s: float = 0.0
    resident_bytes: int = 0
    streamed_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.generated_s if self.generated_s else 0.0


class LanguageModel:
    """A model of the zoo; made by its subclasses.

    checkpoint: a folder in any of the layouts the model is found in (the authors' mp_rank files at
        any degree, BMInf 1.x, ModelCenter, Hugging Face, or what `bminf convert` writes), or a hub
        id, which is downloaded.
    memory_limit: bytes, or "6GB": weights + slots + KV cache + workspace. None takes 90% of what is
        free on the device.
    quantization: "int8", "int4", a bminf.Format, or None; what is packed in the folder stays as it
        is there, and "int8" then stands for that.
    activations: see bminf.QuantizedLinear.
    dtype: of all that is not packed: torch.float32, float16 or bfloat16; None is float16 on a GPU
        and float32 on the CPU.   device: None is the GPU where there is one.
    max_length: tokens of prompt and answer together (CPM-1), or of each (CPM-2, EVA); None is what
        the positions allow, or 512.   max_batch_size: prompts, or beams, at once.
    config: the path of a JSON file, a mapping, a GPTConfig or a T5Config; None looks for
        config.json or model_config.json in the folder and its parent, and otherwise takes the
        published model whose shapes all match, if there is exactly one.
    tokenizer: a path or an object with encode() and decode(); None looks in the folder and its
        parent.
    offload_dir: folder for streamed blocks, device "cpu" only.

    One text is generated at a time; an iterator that was left unfinished ends when the next one
    begins. Use it as a context manager, or call close(), to give the memory back at once.
    Raises ArgumentError, CheckpointError, BudgetError or OffloadError, and nothing stays loaded.
    """

    _family: Family
    _defaults = Options()
    tokenizer: Tokenizer

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        memory_limit: int | float | str | None = None,
        quantization: str | Format | None = "int8",
        activations: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        max_length: int | None = None,
        max_batch_size: int = 1,
        config: Any = None,
        tokenizer: Any = None,
        offload_dir: str | Path | None = None,
    ) -> None:
        _check_count("max_batch_size", max_batch_size)
        if max_length is not None:
            _check_count("max_length", max_length)
        form = None if quantization is None else format_for(quantization)
        limit = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
        backend = backend_for(device, offload_dir, stacklevel=3)
        dtype = _dtype(dtype, backend.device)
        source = open_source(self._family, checkpoint, config, tokenizer)
        self.config, self.tokenizer, self.device = source.config, source.tokenizer, backend.device
        self.max_length = _max_length(max_length, source)
        self.max_batch_size = max_batch_size
        form = _format(form, source)
        model = skeleton_of(self._family, source.config)
        self.model, blocks = skeleton(model, dtype, form, activations)
        blobs = lay_out(self.model, blocks)
        reserve = reserved_bytes(source.config, max_batch_size, self.max_length, dtype, form)
        budget = free_budget(backend.device) if limit is None else limit
        the_plan = plan_for(blocks, blobs, budget, self._family.uses, reserve)
        self._scheduler: Scheduler | None = fill(
            self.model, blobs, the_plan, backend, source.weights, offload_dir
        )
        self._cache = self._new_cache()
        self._lock = threading.RLock()
        self._turn = 0  # which generation the cache belongs to
        self._num_tokens, self._generated_s = 0, 0.0

    # ---- what users call ------------------------------------------------------------------------

    def generate_iter(self, text: Any, **options: Any) -> Iterator[str]:
        """The text as it comes, piece by piece; together, what generate() returns.

        options: see Options. Stop early by leaving the loop; the model stays usable.
        Raises ArgumentError before anything is generated; UnsupportedModelError when another text
        was begun on this model since.
        """
        settings = self._defaults.with_keywords(options)
        if settings.num_beams > 1:
            raise ArgumentError("a beam search knows its text only at the end; use generate()")
        prompts = [self._checked_prompt(text, settings)]
        sampler = self._sampler(prompts, settings)
        stop_ids = self._stop_ids(settings)
        return self._pieces(prompts, sampler, stop_ids, settings.max_tokens)

    def generate_batch(self, texts: Sequence[Any], **options: Any) -> list[tuple[str, bool]]:
        """(text, stopped) for each of `texts`, which are generated together.

        A text does not depend on the others, but for rounding; text i draws with seed + i.
        Raises ArgumentError, also for more texts (times num_beams) than max_batch_size.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise ArgumentError(f"texts={texts!r}; give a list with at least one text")
        return self._generate(texts, self._defaults.with_keywords(options))

    @property
    def plan(self) -> Plan:
        """Which blocks are resident and which are streamed."""
        return self._open().plan

    @property
    def stats(self) -> ModelStats:
        """What was copied and generated since loading."""
        scheduler = self._open()
        return ModelStats(
            **vars(scheduler.stats()),
            num_tokens=self._num_tokens,
            generated_s=self._generated_s,
            resident_bytes=scheduler.plan.resident_bytes,
            streamed_bytes=scheduler.plan.streamed_bytes,
        )

    def close(self) -> None:
        """Give back all memory. The model cannot be used afterwards; closing twice is no error."""
        with self._lock:
            scheduler, self._scheduler = self._scheduler, None
            self._turn += 1
            if scheduler is not None:
                scheduler.uninstall()
                scheduler.backend.close()
                del self.model, self._cache

    def __enter__(self) -> Any:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what subclasses say --------------------------------------------------------------------

    def _prompt(self, text: Any) -> Prompt:
        """The ids for what a user gave.   Raises ArgumentError."""
        raise NotImplementedError

    def _end_ids(self) -> list[int]:
        """Tokens that end every answer."""
        raise NotImplementedError

    # ---- generating -----------------------------------------------------------------------------

    def _generate(self, texts: Sequence[Any], settings: Options) -> list[tuple[str, bool]]:
        prompts = [self._checked_prompt(text, settings) for text in texts]
        stop_ids = self._stop_ids(settings)
        if settings.num_beams > 1:
            answers = self._search(prompts, settings, stop_ids)
        else:
            answers = self._draw(prompts, self._sampler(prompts, settings), stop_ids, settings)
        texts = []
        for ids in answers:
            stopped = bool(ids) and ids[-1] in stop_ids
            texts.append((self.tokenizer.decode(ids[:-1] if stopped else ids), stopped))
        return texts

    def _draw(
        self,
        prompts: list[Prompt],
        sampler: Sampler,
        stop_ids: frozenset[int],
        settings: Options,
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        with self._lock:
            for step in self._steps(prompts, sampler, stop_ids, settings.max_tokens):
                for answer, token in zip(answers, step, strict=True):
                    if token is not None:
                        answer.append(token)
        return answers

    def _search(
        self, prompts: list[Prompt], settings: Options, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        banned = {*self._banned_ids(), *settings.banned_ids(self.tokenizer)}
        self._check_rows(len(prompts) * settings.num_beams)
        with self._lock, torch.inference_mode():
            self._begin()
            began = time.perf_counter()
            decoder, start = self._decoder(prompts)
            found = beam_search(
                decoder, start, settings.num_beams, stop_ids, settings.max_tokens,
                settings.length_penalty, banned_ids=sorted(banned),
            )  # fmt: skip
            answers = [list(hypotheses[0].ids) for hypotheses in found]
            self._count(sum(map(len, answers)), began)
        return answers

    def _pieces(
        self,
        prompts: list[Prompt],
        sampler: Sampler,
        stop_ids: frozenset[int],
        max_tokens: int,
    ) -> Iterator[str]:
        stream = TextStream(self.tokenizer)
        for (token,) in self._steps(prompts, sampler, stop_ids, max_tokens):
            if token is None or token in stop_ids:
                break
            if piece := stream.feed(token):
                yield piece
        if piece := stream.finish():
            yield piece

    def _steps(
        self,
        prompts: list[Prompt],
        sampler: Sampler,
        stop_ids: frozenset[int],
        max_tokens: int,
    ) -> Iterator[list[int | None]]:
        """The tokens of all rows, step by step; the lock is held within a step only."""
        with self._lock, torch.inference_mode():
            turn = self._begin()
            began = time.perf_counter()
            decoder, start = self._decoder(prompts)
            steps = decode(decoder, start, sampler, stop_ids, max_tokens)
        while True:
            with self._lock, torch.inference_mode():
                self._check_turn(turn)
                step = next(steps, None)
                if step is None:
                    return
                self._count(sum(token is not None for token in step), began)
            yield step
            began = time.perf_counter()

    def _begin(self) -> int:
        self._open()
        self._turn += 1
        return self._turn

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UnsupportedModelError(
                "another text was begun on this model, or it was closed, before this iterator was "
                "at its end; finish one text before the next, or load a second model"
            )

    def _count(self, num_tokens: int, began: float) -> None:
        self._num_tokens += num_tokens
        self._generated_s += time.perf_counter() - began

    def _decoder(self, prompts: list[Prompt]) -> tuple[Decoder, torch.Tensor]:
        """A batch under way, and what it is fed first."""
        starts = [prompt.start_ids for prompt in prompts]
        start = padded(starts, self._pad_id, is_at_end=False, device=self.device)
        if isinstance(self.model, GPT):
            return GPTDecoder(self.model, self._cache, [len(ids) for ids in starts]), start
        inputs = [prompt.input_ids for prompt in prompts]
        input_ids = padded(inputs, self._pad_id, is_at_end=True, device=self.device)
        assert isinstance(self.model, T5)
        lengths = [len(ids) for ids in inputs]
        return T5Decoder(self.model, self._cache, input_ids, lengths), start

    # ---- checks ---------------------------------------------------------------------------------

    def _checked_prompt(self, text: Any, settings: Options) -> Prompt:
        prompt = self._prompt(text)
        self._check_room(prompt, settings)
        return prompt

    def _check_room(self, prompt: Prompt, settings: Options) -> None:
        self._check_length(prompt.input_ids, "text")
        num_tokens = len(prompt.start_ids) + settings.max_tokens
        if num_tokens > self.max_length:
            raise ArgumentError(
                f"{len(prompt.start_ids)} tokens to begin with and max_tokens="
                f"{settings.max_tokens} are more than max_length={self.max_length}; lower "
                f"max_tokens, shorten the text, or {self._remedy()}"
            )

    def _check_length(self, ids: Sequence[int], name: str) -> None:
        if len(ids) > self.max_length:
            raise ArgumentError(
                f"{name} has {len(ids)} tokens, more than max_length={self.max_length}; shorten "
                f"it, or {self._remedy()}"
            )

    def _remedy(self) -> str:
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions == self.max_length:
            return "take a model with more positions"
        return "load the model with a larger max_length"

    def _sampler(self, prompts: list[Prompt], settings: Options) -> Sampler:
        self._check_rows(len(prompts))
        sampling = self._sampling(settings)
        counted = [prompt.input_ids for prompt in prompts]
        return Sampler(sampling, counted, self.config.vocab_size, self.device)

    def _sampling(self, settings: Options) -> Sampling:
        banned = {*self._banned_ids(), *settings.banned_ids(self.tokenizer)}
        return settings.sampling(sorted(banned), self._unpenalized_ids())

    def _check_rows(self, num_rows: int) -> None:
        self._open()
        if num_rows > self.max_batch_size:
            raise ArgumentError(
                f"{num_rows} rows at once (texts times num_beams), but max_batch_size is "
                f"{self.max_batch_size}; load the model with a larger one"
            )

    def _stop_ids(self, settings: Options) -> frozenset[int]:
        return frozenset([*self._end_ids(), *settings.stop_ids(self.tokenizer)])

    def _banned_ids(self) -> list[int]:
        """No text holds an unknown token."""
        return [self.tokenizer.token_id("<unk>")]

    def _unpenalized_ids(self) -> list[int]:
        """The bare word boundary of sentencepiece, as BMInf has it."""
        return _present(self.tokenizer, ["\u2581"])

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.token_id("<pad>")

    def _ids(self, text: Text, name: str) -> list[int]:
        """The token ids of a text, or the checked ids themselves."""
        if isinstance(text, str):
            ids = self.tokenizer.encode(text)
        elif isinstance(text, torch.Tensor):
            ids = text.flatten().tolist()
        else:
            ids = list(text)
        size = self.config.vocab_size
        if not ids or any(type(i) is not int or not 0 <= i < size for i in ids):
            raise ArgumentError(
                f"{name} has {'no tokens' if not ids else 'ids outside the vocabulary'}; give a "
                f"text that is not empty, or ids from 0 to {size - 1}"
            )
        return ids

    def _encoded(self, text: Any, name: str = "text") -> list[int]:
        if not isinstance(text, str):
            raise ArgumentError(f"{name} is a {type(text).__name__}; give a str")
        return self._ids(text, name)

    def _open(self) -> Scheduler:
        if self._scheduler is None:
            raise UnsupportedModelError(
                f"this {type(self).__name__} was closed; load it again to use it"
            )
        return self._scheduler

    def _new_cache(self) -> Any:
        model, batch_size, length = self.model, self.max_batch_size, self.max_length
        if isinstance(model, T5):
            return model.new_cache(batch_size, length, length)
        assert isinstance(model, GPT)
        return model.new_cache(batch_size, length)


def _present(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    found = []
    for token in tokens:
        try:
            found.append(tokenizer.token_id(token))
        except ArgumentError:
            continue
    return found


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ArgumentError(f"{name}={value!r}; accepted: an int of at least 1")


def _dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; accepted: {', '.join(map(str, _DTYPES))}, or None")
    return dtype


def _max_length(max_length: int | None, source: Source) -> int:
    if not isinstance(source.config, GPTConfig):
        return _DEFAULT_MAX_LENGTH if max_length is None else max_length
    positions = source.config.max_position_embeddings
    if max_length is not None and max_length > positions:
        raise ArgumentError(f"max_length={max_length}, but the model has {positions} positions")
    return positions if max_length is None else max_length


def _format(form: Format | None, source: Source) -> Format | None:
    """How the linears will be packed: as in the folder, where they are."""
    stored = source.weights.form
    if stored is None or form == stored or form == format_for("int8"):
        return form if stored is None else stored
    raise ArgumentError(
        f"quantization is {form}, but {source.weights.path} is packed as {stored}; leave "
        "quantization out, or convert the original to what you want"
    )
