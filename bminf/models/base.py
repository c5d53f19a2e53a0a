"""What all models have in common for users: text in, text out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bminf.arch.architecture import Architecture
from bminf.checks import check_banned, check_bool, check_positive, plain
from bminf.cuda.launcher import fused_by_default, fused_kernels
from bminf.engine.beam import Decoder, Hypothesis, beam_search
from bminf.engine.engine import Engine
from bminf.engine.request import Request
from bminf.engine.sampling import Sampling
from bminf.errors import ArgumentError, BudgetError, RankError, UnsupportedModelError
from bminf.keywords import known_keywords
from bminf.layers.parallel import Group, join
from bminf.models.arguments import Text, ids_of, ids_of_str, present_ids
from bminf.models.assemble import (
    LOGITS_CHUNK,
    Formats,
    assemble,
    dtype_for,
    max_length_for,
    plan_within,
)
from bminf.models.calls import loads_a_model, needs_open_model
from bminf.models.decode_step import Capture, DecodeSteps, check_graphs
from bminf.models.fill import fill
from bminf.models.leading import Following, Leading, LedCache, LedNetwork
from bminf.models.options import Options
from bminf.models.prompt import Prompt
from bminf.models.rows import DecoderRows
from bminf.models.source import open_source
from bminf.models.stats import ModelStats
from bminf.models.text import StopWatch, TextIterator
from bminf.offload import memory
from bminf.offload.backends import backend_for, free_budget, host_budget
from bminf.offload.backends.base import Backend
from bminf.offload.hooks import Scheduler
from bminf.offload.plan import Plan
from bminf.quantization.packed import Format, parse_format
from bminf.tokenizers.base import TextStream, Tokenizer
from bminf.tokenizers.stop_strings import StopStrings
from bminf.units import parse_bytes

logger = logging.getLogger("bminf")

BeamSearch = Callable[..., list[list[Hypothesis]]]


class LanguageModel:
    """A model of the zoo; made by its subclasses.

    checkpoint: a folder in any of the layouts the model is found in (the authors' mp_rank files at
        any degree, BMInf 1.x, ModelCenter, Hugging Face, or what `bminf convert` writes), or a hub
        id, which is downloaded.
    memory_limit: bytes, or "6GB": weights + slots + KV cache + workspace. None takes 90% of what is
        free on the device.
    quantization: "int8", "int4", a bminf.Format, or None; what `bminf convert` has packed stays as
        it is in the folder, and the default then stands for that. The 8 bits of a BMInf 1.x file
        are taken as they are for "int8", and packed or unpacked for anything else.
    activations: see bminf.QuantizedLinear.
    dtype: of all that is not packed: torch.float32, float16 or bfloat16; None is float16 on a GPU
        and float32 on the CPU.   device: None is the GPU where there is one.
    max_length: tokens of prompt and answer together, or of each in encoder-decoder models (CPM-2,
        EVA); None is what the positions allow, or 512.
    max_batch_size: prompts, or beams, at once.
    config: the path of a JSON file, a mapping, or a configuration such as a T5Config; None looks
        for config.json or model_config.json in the folder and its parent, and otherwise takes the
        published model whose shapes all match, if there is exactly one.
    tokenizer: a path or an object with encode() and decode(); None looks in the folder and its
        parent.
    offload_dir: folder for the streamed blocks that host memory has no room for; on the CPU, for
        all of them. None is a temporary folder, but for what `bminf convert` has written: its
        blocks are read where they lie.
    deterministic: every method gives a text the same bits in any company: whatever other texts
        share its passes, whenever it begins, and, but for beams, with any number of threads.
        Slower, above all for long prompts and for one text alone; at most 16 texts go on at once,
        and others wait. The option of a GLM's beam search that is called so is another one.
    fused_kernels: on a GPU, False takes torch's operators for norms, positions and attention in
        place of kernels that do several steps of them at once; so does the environment variable
        BMINF_FUSED_KERNELS=0. Slower; to find out whether a kernel is to blame. A CPU has none.
    cuda_graph: on a GPU, and with all blocks on it, tokens of up to max_batch_size texts are
        computed by CUDA graphs, which are captured when a number of texts, or a length, rounded up,
        is first met: one call in place of some hundred. They take memory, which the limit holds.

    Where torchrun has started several ranks, each has its part of the model, its own limit, and a
    GPU of its own; every call is made on all of them alike, see docs/several-cards.md.

    Several threads may generate at once, and share each pass over the weights: there is room for
    max_length times max_batch_size tokens in all. An iterator that was left unfinished keeps its
    room until another text needs that. Use a model as a context manager, or call close(), to give
    the memory back at once.
    Raises ArgumentError, CheckpointError, BudgetError, OffloadError or RankError, and nothing stays
    loaded.
    """

    _architectures: Sequence[Architecture]  # that a checkpoint may be of
    _defaults: Options = Options()
    _head_quantization: str | Format | None = None  # of an output head that is split
    tokenizer: Tokenizer
    model: Any  # the network

    @loads_a_model
    @known_keywords
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
        deterministic: bool = False,
        fused_kernels: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        start_s = time.perf_counter()
        self._scheduler: Scheduler | None = None
        self._engine: Engine | None = None
        self._leading: Leading | None = None  # of several ranks, on the first
        self._following: Following | None = None  # and on all others
        self._lock = threading.RLock()  # of closing
        self._num_searched, self._searched_s = 0, 0.0
        group = join(device)
        max_length, max_batch_size = plain(max_length), plain(max_batch_size)
        with group.agreement() as terms:
            check_positive("max_batch_size", max_batch_size)
            check_bool("deterministic", deterministic)
            check_bool("fused_kernels", fused_kernels)
            fused_by_default()  # which may refuse what the environment says
            self._uses_fused_kernels, self._has_graphs = fused_kernels, cuda_graph
            if max_length is not None:
                check_positive("max_length", max_length)
            formats = self._architectures[0].formats
            layers = parse_format(quantization, formats=formats)
            head = parse_format(self._head_quantization, "head_quantization", formats)
            limit = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
            backend = backend_for(group.device(device))
            check_graphs(cuda_graph, backend.device, deterministic, fused_kernels, group.size)
            dtype = dtype_for(dtype, backend.device.type)
            source = open_source(
                self._architectures, checkpoint, config, tokenizer, self._configured
            )
            self.path, self.device = source.weights.path, backend.device
            self.max_length = max_length_for(max_length, source)
            self.max_batch_size, self._is_deterministic = max_batch_size, deterministic
            is_auto = layers == source.architecture.default_format
            assembly = assemble(source, Formats(layers, head, is_auto), dtype, activations, group)
            self.config, self.tokenizer = assembly.source.config, source.tokenizer
            self.model = assembly.network
            self._architecture, self._packing = source.architecture, assembly.packing
            if group.size > 1:
                terms.alike |= {
                    "checkpoint": str(self.path), "memory_limit": limit,
                    "quantization": str(layers), "head_quantization": str(head),
                    "activations": activations, "dtype": str(dtype), "device": self.device.type,
                    "max_length": self.max_length, "max_batch_size": max_batch_size,
                    "config": str(source.config), "deterministic": deterministic,
                }  # fmt: skip
            terms.own["budget"] = _free(backend, group) if limit is None else limit
        budget = min(own["budget"] for own in terms.of_all)
        host_bytes = host_budget(backend.device, num_processes=group.local_size)
        try:
            with group.agreement():
                the_plan = plan_within(
                    assembly,
                    budget,
                    self.max_length,
                    max_batch_size,
                    backend.device.type,
                    host_bytes,
                    deterministic,
                    cuda_graph,
                )
                self._attach(fill(assembly, the_plan, backend, offload_dir), group)
        except BaseException:
            self._release()  # another rank may have failed
            raise
        self._ready_s = time.perf_counter() - start_s

    # ---- what users call ------------------------------------------------------------------------

    @needs_open_model
    def generate_iter(self, text: Any, **options: Any) -> TextIterator:
        """The text as it comes, piece by piece; together, what generate() returns.

        options: see bminf.models.Options. Stop early by leaving the loop; the model stays usable.
        Its `finish_reason` says why it ended.
        Raises ArgumentError before anything is generated; UnsupportedModelError when another text
        that was begun on this model since has needed its room.
        """
        settings = self._settings(self._defaults, options)
        if settings.num_beams > 1:
            raise ArgumentError("a beam search knows its text only at the end; use generate()")
        prompts, settings = self._checked_prompts([text], settings)
        (request,) = self._requests(prompts, settings, self._stop_ids(settings))
        return TextIterator(request, self._pieces(request, settings))

    @needs_open_model
    def generate_batch(self, texts: Sequence[Any], **options: Any) -> list[tuple[str, bool]]:
        """(text, stopped) for each of `texts`, which are generated together.

        A text does not depend on the others, but for rounding; text i draws with seed + i. Each
        pass over the weights is shared with what other threads generate.
        Raises ArgumentError, also for more texts (times num_beams) than max_batch_size.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise ArgumentError(f"texts={texts!r}; give a list with at least one text")
        return self._generate(texts, self._settings(self._defaults, options))

    @property
    def plan(self) -> Plan:
        """Which blocks are resident and which are streamed."""
        return self._open().plan

    @property
    def stats(self) -> ModelStats:
        """What was copied and generated since loading."""
        scheduler = self._open()
        assert self._engine is not None
        engine = self._engine.stats
        return ModelStats(
            **vars(scheduler.stats()),
            num_tokens=engine.num_tokens + self._num_searched,
            generated_s=engine.busy_s + self._searched_s,
            resident_bytes=scheduler.plan.resident_bytes,
            streamed_bytes=scheduler.plan.streamed_bytes,
            num_sweeps=engine.num_sweeps,
            rows_per_sweep=engine.rows_per_sweep,
            num_requests=engine.num_requests,
            first_token_s=engine.first_token_s,
            prefill=engine.prefill,
            decode=engine.decode,
            ready_s=self._ready_s,
            loaded_bytes=scheduler.loaded_bytes,
        )

    @property
    def engine(self) -> Engine:
        """What decodes the texts of this model, for requests made of token ids (bminf.Request);
        of several ranks, only the first has one."""
        self._open()
        if self._following is not None:
            raise UnsupportedModelError(
                "of several ranks only rank 0 has an engine; call follow() on this one"
            )
        assert self._engine is not None
        return self._engine

    def follow(self) -> None:
        """Compute with rank 0 until that closes its model: for ranks other than 0 of a program that
        does nothing there, because a server, say, runs on rank 0."""
        self._open()
        if self._following is None:
            raise UnsupportedModelError("follow() is for ranks other than 0 of several")
        self._following.until_end()

    def close(self) -> None:
        """Give back all memory. The model cannot be used afterwards; closing twice is no error.

        Of several ranks, each closes its own: those other than 0 compute until rank 0 does.
        """
        with self._lock:
            if self._engine is not None:
                self._engine.close(self._closed_error())
            with suppress(RankError):  # one that has failed is no reason not to end
                if self._leading is not None:
                    self._leading.close()
                if self._following is not None:
                    self._following.until_end()
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._leading = self._following = None
            if self._scheduler is not None:  # until all is done: an interrupted run is repeated
                self._scheduler.uninstall()
                self._scheduler.backend.close()
                self.__dict__.pop("model", None)
                self.__dict__.pop("_cache", None)
                self.__dict__.pop("row_model", None)
                self._engine = None
                self._scheduler = None

    def __enter__(self) -> Any:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        rank = self._leading or self._following
        if error is not None and rank is not None:
            rank.leave(error)
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._scheduler is None else f"on {self.device}"
        return f"<{type(self).__name__} from {str(self.path)!r}, {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedModelError(
            f"a {type(self).__name__} cannot be copied or pickled; load another one from its folder"
        )

    @property
    def _num_extra_tokens(self) -> int:
        return self._architecture.num_extra_tokens

    # ---- what subclasses say --------------------------------------------------------------------

    def _configured(self, config: Any) -> Any:
        """A configuration that was read, as the user wants it.   Raises ArgumentError."""
        return config

    def _prompt(self, text: Any) -> Prompt:
        """The ids for what a user gave.   Raises ArgumentError."""
        raise NotImplementedError

    def _end_ids(self) -> list[int]:
        """Tokens that end every answer."""
        raise NotImplementedError

    def _new_cache(self) -> Any:
        """A cache for max_batch_size and max_length."""
        raise NotImplementedError

    def _new_rows(self) -> DecoderRows:
        """The rows of an engine, in the cache."""
        return DecoderRows(
            self.model, self._cache, self.max_length, self._begin, self._uses_fused_kernels
        )

    def _decoder(self, prompts: Sequence[Any]) -> tuple[Decoder, torch.Tensor]:
        """A decoder of these prompts in the whole cache, and what it is fed first; for beams."""
        raise NotImplementedError

    def _settings(self, options: Options, keywords: dict[str, Any]) -> Options:
        """`options` but for `keywords`, for this model.   Raises ArgumentError."""
        settings = options.with_keywords(keywords)
        settings.check(self.config.vocab_size)
        return settings.with_stop_tokens() if settings.num_beams > 1 else settings

    def _within(self, settings: Options, prompts: Sequence[Any]) -> Any:
        """`settings` with the max_tokens that these prompts leave.   Raises ArgumentError."""
        return settings

    def _beam_search(self, prompts: Sequence[Any], settings: Any) -> BeamSearch:
        """beam_search(), or one that takes the same keywords."""
        return partial(beam_search, length_penalty=settings.length_penalty)

    # ---- generating -----------------------------------------------------------------------------

    def _generate(self, texts: Sequence[Any], settings: Options) -> list[tuple[str, bool]]:
        prompts, settings = self._checked_prompts(texts, settings)
        stop_ids = self._stop_ids(settings)
        answers = self._answers(prompts, settings, stop_ids)
        return [self._answer(ids, stop_ids, settings.stop) for ids in answers]

    def _answer(self, ids: list[int], stop_ids: frozenset[int], stop: Any = ()) -> tuple[str, bool]:
        stopped, stops = bool(ids) and ids[-1] in stop_ids, StopStrings(stop)
        text = stops.feed(self.tokenizer.decode(ids[:-1] if stopped else ids))
        return text + stops.finish(), stopped or stops.is_found

    def _answers(
        self, prompts: Sequence[Any], settings: Any, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """The tokens of each answer, sampled or searched for, with the one that ended it."""
        if settings.num_beams > 1:
            found = [
                hypotheses
                for some, settings_of in self._searched_together(prompts, settings)
                for hypotheses in self._search(some, settings_of, stop_ids)
            ]
            return [list(hypotheses[0].ids) for hypotheses in found]
        requests = self._requests(prompts, settings, stop_ids)
        engine = self.engine
        engine.run([engine.add(request) for request in requests])
        return [request.tokens for request in requests]

    def _requests(
        self, prompts: Sequence[Any], settings: Any, stop_ids: frozenset[int]
    ) -> list[Request]:
        """One for each prompt, checked.   Raises ArgumentError."""
        self._check_rows(len(prompts))
        sampling = self._sampling(settings)
        requests = [
            Request(
                prompt.input_ids,
                settings.max_tokens,
                replace(sampling, seed=_seed_of(i, settings)),
                stop_ids,
                on_token=StopWatch(self.tokenizer, settings) if settings.stop else None,
                start_ids=prompt.start_ids,
                prompt=prompt,
            )
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            self.engine.check(request)
        return requests

    def _searched_together(
        self, prompts: Sequence[Any], settings: Any
    ) -> list[tuple[Sequence[Any], Any]]:
        """Prompts whose beams may share passes, and the settings for them."""
        if not self._is_deterministic:
            return [(prompts, settings)]
        return [
            ([prompt], replace(settings, seed=_seed_of(i, settings)))
            for i, prompt in enumerate(prompts)
        ]

    def _search(
        self, prompts: Sequence[Any], settings: Any, stop_ids: frozenset[int]
    ) -> list[list[Hypothesis]]:
        """What a beam search finds for each prompt, best first."""
        banned = sorted({*self._banned_ids(settings), *settings.banned_ids(self.tokenizer)})
        check_banned(banned, self.config.vocab_size)
        self._check_rows(len(prompts) * settings.num_beams)
        search = self._beam_search(prompts, settings)
        with self._whole_cache():
            start_s = time.perf_counter()
            decoder, start = self._decoder(prompts)
            found = search(
                decoder, start, num_beams=settings.num_beams, stop_ids=stop_ids,
                max_new_tokens=settings.max_tokens, banned_ids=banned,
            )  # fmt: skip
            self._num_searched += sum(len(hypotheses[0].ids) for hypotheses in found)
            self._searched_s += time.perf_counter() - start_s
        return found

    def _pieces(self, request: Request, settings: Options) -> Generator[str, None, None]:
        stream, engine = TextStream(self.tokenizer), self.engine
        stops = StopStrings(settings.stop)
        for token in engine.tokens(engine.add(request)):
            if token in request.stop_ids:
                break
            if piece := stops.feed(stream.feed(token)):
                yield piece
        if piece := stops.feed(stream.finish()) + stops.finish():
            yield piece

    @contextmanager
    def _whole_cache(self) -> Iterator[None]:
        """For passes that fill the cache from its beginning: when no text is under way."""
        with self.engine.exclusive(), torch.inference_mode(), self._kernels():
            self._begin()
            yield

    def _kernels(self) -> AbstractContextManager[None]:
        """For a pass."""
        return nullcontext() if self._uses_fused_kernels else fused_kernels(False)

    def _begin(self) -> None:
        if self.device.type == "cpu":
            memory.trim()  # the holes that the last text left in malloc's heap

    # ---- checks ---------------------------------------------------------------------------------

    def _checked_prompts(
        self, texts: Sequence[Any], settings: Options
    ) -> tuple[list[Prompt], Options]:
        """The prompts of `texts`, and the settings for them.   Raises ArgumentError."""
        prompts = [self._prompt(text) for text in texts]
        settings = self._within(settings, prompts)
        for prompt in prompts:
            self._check_room(prompt, settings)
        return prompts, settings

    def _check_room(self, prompt: Prompt, settings: Options) -> None:
        self._check_length(prompt.input_ids, "text")
        num_tokens = len(prompt.start_ids) + settings.max_tokens - 1  # the last one is not fed
        if (
            num_tokens > self.max_length + self._num_extra_tokens
            or settings.max_tokens > self.max_length
        ):
            raise ArgumentError(
                f"{len(prompt.start_ids)} tokens to start with and max_tokens="
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

    def _sampling(self, settings: Options) -> Sampling:
        banned = {*self._banned_ids(settings), *settings.banned_ids(self.tokenizer)}
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

    def _banned_ids(self, settings: Options) -> list[int]:
        """No text holds an unknown token."""
        return [self.tokenizer.token_id("<unk>")]

    def _unpenalized_ids(self) -> list[int]:
        """The bare word boundary of sentencepiece, as BMInf has it."""
        return present_ids(self.tokenizer, ["\u2581"])

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        """(B, T) int64 on the device."""
        return torch.tensor(rows, device=self.device)

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.token_id("<pad>")

    def _ids(self, text: Text, name: str) -> list[int]:
        return ids_of(text, name, self.tokenizer)

    def _encoded(self, text: Any, name: str = "text") -> list[int]:
        return ids_of_str(text, name, self.tokenizer)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, C) -> (T, V) float32 on the CPU, a few at a time: a vocabulary is wide,
        and the device has no room set aside for all of them."""
        return torch.cat([self._network.head(part).cpu() for part in x.split(LOGITS_CHUNK)])

    @property
    def _network(self) -> Any:
        """The network, for passes that fill the whole cache; on rank 0, with all other ranks."""
        return self.model if self._leading is None else LedNetwork(self.model, self._leading)

    def _called(self, name: str, run: Callable[[], Any]) -> Any:
        """What the public method of this name gives: the same on all ranks."""
        if self._leading is not None:
            return self._leading.call(name, run)
        return run() if self._following is None else self._following.call(name)

    def _open(self) -> Scheduler:
        if self._scheduler is None:
            raise self._closed_error()
        return self._scheduler

    def _closed_error(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"this {type(self).__name__} was closed; load it again to use it"
        )

    def _attach(self, scheduler: Scheduler, group: Group) -> None:
        """Take over what is loaded; if there is no room for the cache, nothing stays loaded."""
        self._scheduler = scheduler
        try:
            self._cache = self._new_cache()
            if group.size > 1 and group.rank == 0:
                self._leading = Leading(group)
                self._cache = LedCache(self._cache, self._leading)
            self.row_model = self._new_rows()
            rows = self.row_model
            if self._leading is not None:
                rows.lead(self._leading)
            if group.rank > 0:
                self._following = Following(
                    group, self.model, self._cache, rows, self.device, self._kernels
                )
            # So many logits are set aside for; tokens are, by the room in the cache.
            self.row_model.max_rows = max(LOGITS_CHUNK, self.max_batch_size)
            if self._has_graphs:
                rows.steps = DecodeSteps(rows, self.max_batch_size, Capture(self.device))
            self._engine = Engine(self.row_model, deterministic=self._is_deterministic)
            logger.info(
                "the KV cache has room for %d tokens; max_length=%d and max_batch_size=%d set it",
                self.max_length * self.max_batch_size,
                self.max_length,
                self.max_batch_size,
            )
        except BaseException as error:
            self._release()
            if not isinstance(error, RuntimeError):  # torch's, of a CPU and of a GPU
                raise
            raise BudgetError(
                f"the KV cache of max_batch_size={self.max_batch_size} and "
                f"max_length={self.max_length} cannot be allocated on {self.device}; lower one "
                "of them"
            ) from error


def _free(backend: Backend, group: Group) -> int:
    """What a rank may take: the memory of a CPU is that of all ranks of its machine."""
    free = free_budget(backend.device)
    return free // group.local_size if backend.device.type == "cpu" else free


def _seed_of(number: int, settings: Options) -> int | None:
    """That of a text of a batch."""
    return None if settings.seed is None else settings.seed + number
