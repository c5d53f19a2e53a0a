"""A model of transformers behind the verbs of the command line: of a folder, or a .gguf file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bminf.cli import models, sources
from bminf.cli.session import NEW_TOKENS, Answer, Message, Meter, Options, Session, Write
from bminf.errors import ArgumentError, BMInfError, CheckpointError, UnsupportedModelError
from bminf.progress import spinner
from bminf.tokenizers.pretrained_stream import PretrainedStream
from bminf.tokenizers.stop_strings import StopStrings

if TYPE_CHECKING:
    from bminf.evaluation.scorers import TokenScorer
    from bminf.offload.hooks import Stats
    from bminf.server.texts import Texts


class PretrainedSession(Session):
    """A prompt is a list of token ids."""

    _not_taken: Mapping[str, str] = {
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), "--repetition-penalty"),
        "deterministic": "--seed or --temperature 0, since its text shares no pass with others",
        "tp": "none, since it runs on one GPU",
        "no_fused_kernels": "none, since transformers calls torch's operators in any case",
    }

    _needs: Sequence[str] = ("transformers",)

    def __init__(self, arguments: argparse.Namespace, path: Path) -> None:
        super().__init__(arguments)
        sources.check_format(arguments.quantization, is_glm=False)
        models.require(self._needs)
        with spinner("importing transformers"):
            models.quiet()
        self._path, self.title = path, arguments.model
        self._model: Any = None
        self._length: int | None = arguments.max_length
        self._kept = KeptCache()
        self._tokenizer = self._tokenizer_in(path)
        if self._tokenizer is None:
            raise CheckpointError(
                f"{path} has no tokenizer; put tokenizer.json and tokenizer_config.json, which "
                "belong to the weights, into it"
            )

    def prompt(self, text: str) -> list[int]:
        ids: list[int] = list(self._tokenizer(text)["input_ids"])
        if not ids and self._tokenizer.bos_token_id is None:
            raise ArgumentError(f"{text!r} has no tokens; give a longer text")
        return ids or [self._tokenizer.bos_token_id]

    def dialogue(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        if template is None and not getattr(self._tokenizer, "chat_template", None):
            raise UnsupportedModelError(
                f"{self.title} has no chat template, as base models have none; use bminf generate "
                "to continue a text, or give the template of its authors: --chat-template FILE"
            )
        is_continued = messages[-1]["role"] == "assistant"
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False,
                add_generation_prompt=not is_continued, continue_final_message=is_continued,
            )  # fmt: skip
        # It is a program: it raises what its author, jinja2 or its own errors make it raise.
        except Exception as error:
            raise ArgumentError(
                f"the chat template of {self.title} refuses these messages: "
                f"{type(error).__name__}: {models.first_line(error)}"
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, prompt: list[int]) -> int:
        return len(prompt)

    def length_for(self, prompt: list[int], options: Options) -> int:
        return len(prompt) + int(options.get("max_new_tokens", NEW_TOKENS))

    def room(self, prompt: list[int]) -> int | None:
        length = self.max_length
        if length is None:
            return None
        is_apart = self.has_encoder and len(prompt) <= length
        return length if is_apart else max(length - len(prompt), 0)

    def load(self, usual_length: int | None) -> None:
        import bminf
        from bminf.offload.backends import device_for
        from bminf.offload.context import first_of, text_config

        if self._length is None:
            self._length = usual_length
        given = self._arguments
        # Without a limit a tenth of the memory is left for the text.
        is_reserved = given.memory_limit is not None or given.max_length is not None
        with spinner(f"loading {self.title}"):
            self._model = self._load(self._length if is_reserved else None)
        if not self._model.can_generate():
            raise UnsupportedModelError(f"a {type(self._model).__name__} generates no text")
        plan = bminf.plan_of(self._model)
        assert plan is not None, "it is wrapped"
        self.plan, self.device = plan, str(device_for(given.device))
        positions = first_of(text_config(self._model.config), "max_position_embeddings")
        bounds = (n for n in (self._length, positions) if n is not None)
        self.max_length = min(bounds, default=None)
        self.has_encoder = bool(self._model.config.is_encoder_decoder)

    def answer(
        self,
        prompt: list[int],
        options: Options,
        write: Write,
        ignores_end: bool = False,
        goes_on: bool = False,
    ) -> Answer:
        import torch

        num_tokens = self._num_new_tokens(prompt, options)
        settings = self._settings(options)
        _seed(options)
        stream = Stream(self._tokenizer, write, self._offload_stats, options.get("stop", ()))
        ids = torch.tensor([prompt], device=self.device)
        with _as_our_error(self.title):
            output = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=1,
                num_return_sequences=1, max_new_tokens=num_tokens, tokenizer=self._tokenizer,
                stopping_criteria=[stream], **settings,
                **({"min_new_tokens": num_tokens} if ignores_end else {}),
                **self._kept.arguments(prompt), return_dict_in_generate=goes_on,
            )  # fmt: skip
        stream.end()
        if goes_on:
            self._kept.keep([*prompt, *stream.ids[:-1]], output)
        stats = stream.meter.stats(len(prompt))
        is_full = stats.new_tokens == num_tokens and not stream.stops.is_found
        is_cut = is_full and stream.ids[-1] not in (settings["eos_token_id"] or ())
        return Answer(stream.text, "length" if is_cut else "stop", stats)

    def close(self) -> None:
        self._kept = KeptCache()

    def served(self, template: str | None, deterministic: bool) -> Texts:
        from bminf.server.pretrained import PretrainedTexts

        own = template or getattr(self._tokenizer, "chat_template", None)
        if isinstance(own, dict):  # several, by their names
            own = own.get("default", next(iter(own.values())))
        return PretrainedTexts(
            self._model, self._tokenizer, self.prompt, partial(self.dialogue, template=template),
            self._end_ids(()), own, deterministic,
        )  # fmt: skip

    def scorer(self) -> TokenScorer:
        from bminf.evaluation.scorers import PretrainedScorer

        return PretrainedScorer(self._model, self._tokenizer, self.max_length)

    def plain(self) -> tuple[Any, Any]:
        import torch

        with spinner(f"loading {self.title}"):
            return models.load_model(self._path, torch.float32), self._tokenizer

    def _tokenizer_in(self, path: Path) -> Any:
        from bminf.pretrained import tokenizer_in

        return tokenizer_in(path, self._arguments.trust_remote_code)

    def _load(self, max_length: int | None) -> Any:
        import bminf

        given = self._arguments
        return bminf.load(
            self._path, given.memory_limit, _quantization(given.quantization, "auto"),
            device=given.device, max_length=max_length, max_batch_size=given.max_batch_size,
            offload_dir=given.offload_dir, tokenizer=self._tokenizer,
            trust_remote_code=given.trust_remote_code,
        )  # fmt: skip

    def _settings(self, options: Options) -> dict[str, Any]:
        """`options` as generate() takes them. Those that choose how to sample ask for sampling."""
        given = {n: v for n, v in options.items() if n not in ("max_new_tokens", "seed", "stop")}
        given["eos_token_id"] = self._end_ids(options.get("stop", ())) or None
        if given.get("temperature") == 0:
            return {**given, "do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        is_asked = bool(given.keys() & {"temperature", "top_k", "top_p"})
        return {**given, "do_sample": True} if is_asked else given

    def _end_ids(self, stop: Sequence[str]) -> list[int]:
        """Of the model and of its tokenizer: that of a dialogue is often known to this alone.

        stop: of which some may be the names of special tokens, which texts do not show.
        """
        known = getattr(self._model.generation_config, "eos_token_id", None)
        ids = known if isinstance(known, list) else [known]
        added = self._tokenizer.added_tokens_encoder
        named = [added[text] for text in stop if text in added]
        return sorted({i for i in (*ids, *named, self._tokenizer.eos_token_id) if i is not None})

    def _num_new_tokens(self, prompt: list[int], options: Options) -> int:
        """The most tokens of an answer.   Raises ArgumentError where there is no room for them."""
        asked, room = options.get("max_new_tokens"), self.room(prompt)
        if room is None:
            return int(asked or NEW_TOKENS)
        if room < (asked or 1):
            raise ArgumentError(
                f"{len(prompt)} tokens to start with leave no room for {asked or 'any'} new ones "
                f"in {self.max_length}, which is --max-length or all that the model has positions "
                "for; shorten the text, or change --max-new-tokens or --max-length"
            )
        return int(asked or min(NEW_TOKENS, room))

    def _offload_stats(self) -> Stats:
        import bminf

        stats = bminf.stats_of(self._model)
        assert stats is not None, "it is wrapped"
        return stats


class GGUFSession(PretrainedSession):
    """A .gguf file, whose weights transformers unpacks."""

    _needs = models.DEMO_PACKAGES

    def _tokenizer_in(self, path: Path) -> Any:
        return models.load_tokenizer(path)

    def _load(self, max_length: int | None) -> Any:
        import torch

        import bminf
        from bminf.offload.backends import device_for

        given = self._arguments
        is_cpu = device_for(given.device).type == "cpu"
        model = models.load_model(self._path, torch.float32 if is_cpu else torch.float16)
        return bminf.wrapper(
            model, _quantization(given.quantization, True), given.memory_limit, given.device,
            given.offload_dir, max_length=max_length, max_batch_size=given.max_batch_size,
        )  # fmt: skip


class KeptCache:
    """The cache of a prompt and its answer, for the next prompt, if that begins with them. There is
    one at a time, that of a text which has its room anyway."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = None
        self._can_be_cut = False

    def keep(self, ids: Sequence[int], output: Any) -> None:
        """ids: that the model was fed in all.   output: of generate(), with its cache; those of
        encoders, and of layers that do not hold keys by their tokens, are not kept."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        cache: Any = getattr(output, "past_key_values", None)
        kinds = {type(layer) for layer in getattr(cache, "layers", ())}
        is_known = bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        if is_known and cache.get_seq_length() == len(ids):
            self._ids, self._cache = [*ids], cache
            self._can_be_cut = kinds == {DynamicLayer}

    def arguments(self, prompt: Sequence[int]) -> dict[str, Any]:
        """For generate(): the cache, cut back to what the prompt begins with, or nothing. It is not
        kept any more: what is interrupted leaves it in between."""
        ids, cache = self._ids, self._cache
        self._ids, self._cache = [], None
        most = min(len(ids), len(prompt) - 1)
        length = next((at for at in range(most) if ids[at] != prompt[at]), most)
        if length == 0 or (length < len(ids) and not self._can_be_cut):
            return {}
        if length < len(ids):
            cache.crop(length - len(ids))  # tokens to remove
        return {"past_key_values": cache}


class Stream:
    """A stopping criterion of one generate(), which asks it with each token, before the next pass:
    writes what is final of the text as it comes. A streamer is told later.

    stop: texts that end it.   ids: that were generated.   text: that was written.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Write,
        copied: Callable[[], Stats],
        stop: Sequence[str] = (),
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.meter = Meter(lambda: (len(self.ids), copied()))
        self._pieces, self._write, self.stops = (
            PretrainedStream(tokenizer),
            write,
            StopStrings(stop),
        )

    def __call__(self, ids: Any, *_: Any, **__: Any) -> Any:
        """(1,) bool, whether a stop string has come.   ids: (1, T), of which the last is new."""
        self.ids.append(int(ids[0, -1]))
        self.meter.text_came()
        self._show(self.stops.feed(self._pieces.feed(self.ids[-1])))
        return ids.new_full((1,), self.stops.is_found).bool()

    def end(self) -> None:
        """Writes what was held back."""
        self._show(self.stops.feed(self._pieces.finish()))
        self._show(self.stops.finish())

    def _show(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)


def _quantization(given: str | None, default: bool | str) -> bool | str | None:
    if given is None:
        return default
    return None if given == "none" else given


def _seed(options: Options) -> None:
    """Without a seed, another one each time: torch begins with the same in every process."""
    import torch

    if "seed" in options:
        torch.manual_seed(options["seed"])
    else:
        torch.seed()


@contextmanager
def _as_our_error(title: str) -> Iterator[None]:
    """Errors of torch and transformers in generate(), for which there is no one class."""
    try:
        yield
    except (BMInfError, OSError):  # also of a pipe that is written to
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{title} cannot generate: {type(error).__name__}: {models.first_line(error)}"
        ) from error
