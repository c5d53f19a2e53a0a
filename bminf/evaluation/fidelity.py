"""What packing does to a model's predictions.

The weights of all linears but the output head are packed and unpacked again, and the model reads a
text: its perplexity, and how far its predictions are from those of the unpacked weights
(Kullback-Leibler divergence, in nats a token).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bminf.errors import ArgumentError, UnsupportedModelError
from bminf.models.evaluate import perplexity, window_losses
from bminf.quantization.packed import Format, dequantize
from bminf.quantization.packing import DIVISORS, pack, pack_rows

WINDOW = 512
"""Tokens that are read together."""

KL_STEP = 5
"""Of the windows, every fifth: the predictions of the plain weights are kept for these."""

FORMATS = (
    Format(8),
    Format(8, 128),
    Format(4, 16),
    Format(4, 16, scale_bits=8),
    Format(4, 32, scale_bits=8),
    Format(4, 32, True, 8),
    *(
        Format(4, size, has_minimum)
        for size in (32, 64, 128, None)
        for has_minimum in (True, False)
    ),
)

_FEW = 0.01  # of all weights, such as routers and the kernels of short convolutions

Sample = dict[str, Any]
"""One reading of the text.

seed: of the order of the columns; None is their own.   nll: mean negative log-likelihood of the
tokens of each window.   kl: mean KL(plain || this) over each fifth window, in nats.
"""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids (1, T) -> (1, T, V), after each of them."""


class Reader:
    """A model in its own weights, the ids of a text, and what the model makes of it: `plain`.

    head: how the output head is packed in every other reading; the embedding stays as it is.
    window: tokens that are read together.   logits: of the model; None calls it as one of
    transformers.   Raises ArgumentError for a text that fills no window; a rest that fills none is
    left out. Raises UnsupportedModelError for a model without linears; a warning tells of weights
    in other modules, such as stacks of experts, which are read as they are.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        head: Format | None = None,
        window: int = WINDOW,
        logits: Logits | None = None,
    ) -> None:
        if len(ids) < window:
            raise ArgumentError(
                f"{len(ids)} tokens do not fill a window of {window}; give a longer text"
            )
        self.model, self.ids, self._window = model, ids[: len(ids) // window * window], window
        self._logits = logits or (lambda ids: model(ids, use_cache=False).logits)
        self._heads, self._head_form = _heads_of(model), head
        linears = (one for one in model.modules() if isinstance(one, torch.nn.Linear))
        self.linears = [linear for linear in linears if linear not in self._heads]
        _check_are_linears(model, self.linears, self._heads)
        self._references: list[torch.Tensor] = []
        self.plain = self._sample(None)

    def read(self, seed: int | None, replace: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        """With `replace(weight)` in place of each weight, columns in the order of `seed`.

        They are put back afterwards, which is the same as to permute the input alike.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        weights = [linear.weight.data for linear in self.linears]
        tied = [head.weight for head in self._heads]
        try:
            if self._head_form is not None:
                for head in self._heads:
                    head.weight = torch.nn.Parameter(repacked(head.weight.data, self._head_form))
            for linear in self.linears:
                order = torch.arange(linear.in_features)
                if seed is not None:
                    order = torch.randperm(linear.in_features, generator=generator)
                linear.weight.data = replace(linear.weight.data[:, order])[:, order.argsort()]
            return self._sample(seed)
        finally:
            for head, own in zip(self._heads, tied, strict=True):
                head.weight = own
            for linear, weight in zip(self.linears, weights, strict=True):
                linear.weight.data = weight

    @torch.inference_mode()
    def _sample(self, seed: int | None) -> Sample:
        kept: list[torch.Tensor] = []  # the logits of the window that was read last

        def logits(ids: torch.Tensor) -> torch.Tensor:
            kept[:] = [self._logits(ids)]
            return kept[0]

        sample: Sample = {"seed": seed, "nll": [], "kl": []}
        for i, losses in enumerate(window_losses(logits, self.ids, self._window, self._window)):
            sample["nll"].append(round(losses.mean().item(), 6))
            if i % KL_STEP == 0:
                log_probs = kept[0][0, :-1].log_softmax(-1)
                sample["kl"].append(round(self._divergence(i // KL_STEP, log_probs), 6))
        return sample

    def _divergence(self, index: int, log_probs: torch.Tensor) -> float:
        """KL of the first reading, which is kept, against this one."""
        if index == len(self._references):
            self._references.append(log_probs)
        reference = self._references[index]
        return F.kl_div(log_probs, reference, reduction="batchmean", log_target=True).item()


def _heads_of(model: Any) -> list[torch.nn.Linear]:
    """The output head, or its parts; none where the head is the embedding's own weight."""
    own = getattr(model, "get_output_embeddings", None)
    head = getattr(model, "lm_head", None) if own is None else own()
    found = () if head is None else head.modules()
    return [one for one in found if isinstance(one, torch.nn.Linear)]


def _check_are_linears(
    model: Any, linears: Sequence[torch.nn.Linear], heads: Sequence[torch.nn.Linear]
) -> None:
    """What is packed is to be most of the model, or the table would be of another one."""
    if not linears:
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no torch.nn.Linear but its head: nothing would be packed"
        )
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    known = {id(one.weight) for one in (*linears, *heads, *tables)}
    weights = [(name, one) for name, one in model.named_parameters() if one.dim() > 1]
    others = {name: one.numel() for name, one in weights if id(one) not in known}
    share = sum(others.values()) / sum(one.numel() for _, one in weights)
    if share > _FEW:
        warnings.warn(
            f"{share:.0%} of the weights, such as {max(others, key=others.__getitem__)}, are in no "
            "torch.nn.Linear and are read as they are in every format: the table is of the rest",
            stacklevel=3,
        )


def repacked(
    weight: torch.Tensor, form: Format, divisors: Sequence[float] = DIVISORS
) -> torch.Tensor:
    """What is left of `weight` after it was packed and unpacked again."""
    return dequantize(pack(weight, form, partial(pack_rows, divisors=divisors)), weight.dtype)


def name_of(form: Format | None) -> str:
    """As tables have it."""
    if form is None:
        return "fp32"
    group = "row" if form.group_size is None else f"g{form.group_size}"
    kind = "minimum" if form.has_minimum else "symmetric"
    return f"int{form.bits} {group} {kind}{', 8-bit scales' if form.scale_bits == 8 else ''}"


def mean_bits(linears: Sequence[torch.nn.Linear], form: Format) -> float:
    """Bits for a weight, scales and minima included, over all `linears`."""
    bits = sum(
        form.bits_per_weight(linear.in_features) * linear.weight.numel() for linear in linears
    )
    return bits / sum(linear.weight.numel() for linear in linears)


# ---- a table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fidelity:
    """name: of the format.   ratio: of its perplexity, and that of the plain weights.   kl: in
    nats a token."""

    name: str
    bits_per_weight: float
    perplexity: float
    ratio: float
    kl: float


def fidelities(reader: Reader, forms: Sequence[Format]) -> Iterator[Fidelity]:
    """Of the plain weights, and of each format."""
    of_plain = _perplexity(reader.plain)
    plain_bits = 8.0 * reader.linears[0].weight.element_size()
    yield _fidelity(name_of(None), plain_bits, reader.plain, of_plain)
    for form in forms:
        sample = reader.read(None, partial(repacked, form=form))
        yield _fidelity(name_of(form), mean_bits(reader.linears, form), sample, of_plain)


def _fidelity(name: str, bits: float, sample: Sample, of_plain: float) -> Fidelity:
    kl = sum(sample["kl"]) / len(sample["kl"])
    found = _perplexity(sample)
    return Fidelity(name, bits, found, found / of_plain, kl)


def _perplexity(sample: Sample) -> float:
    return perplexity(sum(sample["nll"]), len(sample["nll"]))


def reader_of(
    model: Any, text: str, tokenizer: Any = None, most: int | None = None, window: int = WINDOW
) -> Reader:
    """A reader for a model of bminf.models, in floating point and with all blocks resident, or one
    of transformers, which is not wrapped.

    tokenizer: of a model of transformers.   most: tokens of the text.
    Raises ArgumentError, or UnsupportedModelError for a model with an encoder.
    """
    from bminf.models import GLM, LanguageModel
    from bminf.models.decoder_only import DecoderOnly

    if not isinstance(model, LanguageModel):
        ids = tokenizer(text)["input_ids"][:most]
        return Reader(model, torch.tensor(ids), None, window)
    if not isinstance(model, GLM | DecoderOnly):
        raise UnsupportedModelError(
            f"a {type(model).__name__} has an encoder, which needs a context: no text has a "
            "perplexity by itself"
        )
    logits = _logits_of_glm(model) if isinstance(model, GLM) else _logits_of_zoo(model)
    tokens = torch.tensor(list(model.tokenizer.encode(text))[:most])
    return Reader(model.model, tokens, None, min(window, model.max_length - 2), logits)


def _logits_of_zoo(model: Any) -> Logits:
    return lambda ids: model.logits(ids[0])[None]


def _logits_of_glm(model: Any) -> Logits:
    """A window as the answer to a mask with nothing before it."""
    return lambda ids: model._answer_logits(ids[0].tolist())[None]
