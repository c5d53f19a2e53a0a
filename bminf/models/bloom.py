"""BLOOM and BLOOMZ: 560 million to 176 billion parameters, continue a text in 46 languages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bminf.arch import bloom
from bminf.arch.bloom import Bloom, BloomConfig
from bminf.keywords import known_keywords
from bminf.models.arguments import Text, ids_of
from bminf.models.calls import loads_a_model, needs_open_model
from bminf.models.decoder_only import DecoderOnly
from bminf.models.options import Options
from bminf.models.prompt import Prompt
from bminf.quantization.packed import Format


class BLOOM(DecoderOnly):
    """BLOOM and BLOOMZ, from 560m to 176b, in any layout that they are found in.

    head_quantization: "int8", "int4", a bminf.Format, or None; of the output head, which has the
        weights of the embedding and stays as they are by default.
    max_length: None is 512; positions have no end, and the models were trained with 2048.
    The embedding stays on the host. A block is one matrix.

    All other arguments, errors and use: see LanguageModel.
    """

    _architectures = (bloom.BLOOM,)
    _defaults = Options(temperature=0)
    config: BloomConfig
    model: Bloom

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
        head_quantization: str | Format | None = None,
        deterministic: bool = False,
        fused_kernels: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        self._head_quantization = head_quantization
        super().__init__(
            checkpoint, memory_limit, quantization, activations, dtype, device, max_length,
            max_batch_size, config, tokenizer, offload_dir, deterministic, fused_kernels,
            cuda_graph,
        )  # fmt: skip

    @needs_open_model
    def generate(
        self,
        text: Text,
        max_tokens: int = 128,
        top_n: int | None = None,
        top_p: float | None = None,
        temperature: float = 0,
        frequency_penalty: float = 0,
        presence_penalty: float = 0,
        stop_tokens: Sequence[str] | str | None = None,
        **more: Any,
    ) -> tuple[str, bool]:
        """(continuation of `text`, stopped).   stopped: whether `</s>` or a stop token ended it,
        which is not part of it; otherwise max_tokens did.

        text: a str, in which `</s>` and the like are the tokens that are called so, or token ids.
        temperature: 0 always takes the most probable token, as is usual for these models.
        Arguments and other keywords (seed, num_beams, ...): see bminf.models.Options.
        Raises ArgumentError.
        """
        settings = Options(
            max_tokens, top_n, top_p, temperature, frequency_penalty, presence_penalty, stop_tokens
        )
        return self._generate([text], self._settings(settings, more))[0]

    def _prompt(self, text: Any) -> Prompt:
        ids = self._ids(text, "text")
        return Prompt(ids, ids)

    def _ids(self, text: Text, name: str) -> list[int]:
        """Rows of the embedding that no token has are read, as they may be drawn."""
        return ids_of(text, name, self.tokenizer, self.config.vocab_size)

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("</s>")]

    def _banned_ids(self, settings: Options) -> list[int]:
        """None: transformers bans none either."""
        return []

    def _unpenalized_ids(self) -> list[int]:
        return []
