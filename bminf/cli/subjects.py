"""What `bminf plan` plans: a model that transformers builds, or one of the zoo; without weights."""

from __future__ import annotations

import argparse
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bminf.cli import models
from bminf.errors import ArgumentError, CheckpointError
from bminf.progress import spinner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bminf.models.source import Source
    from bminf.offload.plan import Plan


def subject_of(source: dict[str, Any] | Source) -> Transformers | Zoo:
    """source: what sources.find() has found."""
    return _of_transformers(source) if isinstance(source, dict) else Zoo(source)


class Transformers:
    """A model that transformers builds, on the meta device."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.title = type(model).__name__
        self.dtype = str(model.dtype).removeprefix("torch.")

    def quantization(self, arguments: argparse.Namespace) -> str:
        return arguments.quantization or "int8"

    def plan(self, arguments: argparse.Namespace, memory_limit: str | None) -> Plan:
        from bminf.wrapping import plan_for

        return plan_for(
            self._model,
            quantization=self._format(arguments),
            memory_limit=memory_limit,
            reserve=arguments.reserve,
            blocks=arguments.blocks,
            host_memory=arguments.host_memory,
            max_length=arguments.max_length,
            max_batch_size=arguments.max_batch_size,
            device="cuda",
        )

    def unquantized_bytes(self, arguments: argparse.Namespace) -> int:
        """Of the matrices in the blocks that stay as they are; the reason goes to stderr."""
        form = self._format(arguments)
        if form is None:
            return 0
        from bminf.layers.quantize import choose, warn_of_what_stays
        from bminf.offload.blocks import find_blocks
        from bminf.quantization.packed import parse_format

        blocks = find_blocks(self._model, arguments.blocks)
        choice = choose(self._model, blocks, parse_format(form))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_what_stays(self._model, blocks, choice, stacklevel=1)
        for warning in caught:
            print(f"bminf: {warning.message}", file=sys.stderr)
        modules = {m for b in blocks for m in self._model.get_submodule(b.name).modules()}
        modules -= choice.replacements.keys()
        left = {id(p): p for m in modules for p in m._parameters.values()}
        return sum(p.nbytes for p in left.values() if p is not None and p.dim() > 1)

    def _format(self, arguments: argparse.Namespace) -> str | None:
        kind = self.quantization(arguments)
        if kind == "int4-row":
            raise ArgumentError(
                "--quantization int4-row is for a GLM; accepted here: int8, int4, none"
            )
        return None if kind == "none" else kind


class Zoo:
    """A model that bminf builds itself, which knows what a text takes."""

    dtype = "float16"

    def __init__(self, model: Source) -> None:
        self._model = model
        self.title = model.title

    def quantization(self, arguments: argparse.Namespace) -> str:
        if arguments.quantization is not None:
            return str(arguments.quantization)
        if self._model.weights.packing is not None:
            return "as stored"
        return f"int{self._model.architecture.default_format.bits}"

    def plan(self, arguments: argparse.Namespace, memory_limit: str | None) -> Plan:
        from bminf.models.assemble import plan_model

        for option in ("blocks", "reserve"):
            if getattr(arguments, option) not in (None, "0"):
                raise ArgumentError(
                    f"--{option} is for models of transformers; {self.title} has its own: leave it "
                    "out (--max-length and --max-batch-size say what is set aside)"
                )
        asked = arguments.quantization
        form = {None: "auto", "none": None}.get(asked, asked)
        return plan_model(
            self._model,
            memory_limit,
            form,
            max_length=arguments.max_length,
            max_batch_size=arguments.max_batch_size,
            host_memory=arguments.host_memory,
        )

    def unquantized_bytes(self, arguments: argparse.Namespace) -> int:
        return 0


def _of_transformers(config: dict[str, Any]) -> Transformers:
    models.require(["transformers"])
    if "quantization_config" in config:
        print(
            "bminf: the quantization_config of this checkpoint is left out of account: "
            "bytes are those of the type it names as dtype",
            file=sys.stderr,
        )
    with spinner("building the architecture"):
        return Transformers(build_on_meta(config))


def build_on_meta(config: dict[str, Any]) -> Any:
    """The model that `config`, the content of a config.json, describes; it takes no memory."""
    import torch
    import transformers

    models.quiet()
    kind = config.get("model_type")
    if kind is None:
        raise CheckpointError(
            "model_type None is not known: this configuration has no model_type, so it does not "
            "say which model it is of; "
            "give the config.json that belongs to the weights"
        )
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"model_type {kind!r} is not known to transformers {transformers.__version__}; "
            "see whether a newer one knows it: pip install --upgrade transformers"
        )
    try:
        parsed = transformers.CONFIG_MAPPING[kind].from_dict(config)
        with torch.device("meta"), _default_dtype(parsed):
            return _construct(parsed).eval()
    # A config may be wrong in any way, and every architecture trips over that in its own.
    except Exception as error:
        raise CheckpointError(
            f"the {kind} model of this config.json cannot be built: "
            f"{type(error).__name__}: {error} - check the file against its source"
        ) from error


def _construct(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(config)
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config(config)
    return transformers.AutoModel.from_config(config)


@contextmanager
def _default_dtype(config: Any) -> Iterator[None]:
    """Makes new parameters of the type that `config` names; float32 where it names none."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
