"""What `bminf plan` plans, without weights: a model of transformers, or a built-in one."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bminf.cli import models
from bminf.cli.wording import one_line
from bminf.errors import ArgumentError, CheckpointError
from bminf.progress import spinner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bminf.models.source import Source
    from bminf.offload.plan import Plan
    from bminf.quantization.packed import Format

HELP = (
    "a folder with config.json or that file, a .gguf file, a hub id, a folder of CPM-1, CPM-2, "
    "EVA, GLM or BLOOM, or a published name such as glm-130b"
)

ACCEPTED = f"give {HELP}"

BUILT_IN = ("cpm1", "cpm2", "eva", "glm130b", "glm10b", "bloom")
"""Models by the names of bminf.arch.registry, which `--help` is not to import."""

QUANTIZATION_HELP = "default: int8, for a GLM int4; quantized checkpoints keep their format"

_MAX_CONFIG_BYTES = 2**24
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GGUF_VERSIONS = (2, 3)
_GGUF_DTYPE = "float16"  # to which the weights of such a file are dequantized on a GPU
_ZOO_KEYS = {"d_kv", "dim_model", "block_position_encoding"}


def find(model: str) -> Transformers | Zoo:
    """The model of a folder, a file, a published name or a hub id.

    Only headers and configurations are read.   Raises CheckpointError.
    """
    found = _found(model)
    if not isinstance(found, dict):
        return Zoo(found)
    return _of_transformers(found, _packed_in(Path(model).expanduser()))


def _packed_in(path: Path) -> dict[str, Format] | None:
    """Formats of the linears of a folder that bminf.save() has written, None for any other."""
    from bminf.description import is_saved, read_description

    folder = path if path.is_dir() else path.parent
    if not path.exists() or not is_saved(folder):
        return None
    return {name: linear.form for name, linear in read_description(folder).packed.items()}


def _found(model: str) -> dict[str, Any] | Source:
    """The content of a config.json of transformers, or a built-in model."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return _in_file(path)
    from bminf.models.source import published

    named = published(model)
    if named is not None:
        return named
    if models.is_path(model) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{path} cannot be read (No such file or directory); {ACCEPTED}")
    return _of_config(read_config(_from_hub(model)), model)


class Transformers:
    """A model that transformers builds, on the meta device.

    packed: formats of the linears that are packed on disk, by name; None where none can be.
    """

    def __init__(self, model: Any, packed: dict[str, Format] | None = None) -> None:
        self._model, self._packed = model, packed
        self.title = type(model).__name__
        self.dtype = str(model.dtype).removeprefix("torch.")

    def quantization(self, arguments: argparse.Namespace) -> str:
        if self._packed:
            if arguments.quantization is not None:
                raise ArgumentError("the weights are packed already; leave out --quantization")
            return "as stored"
        return arguments.quantization or ("int8" if self._packed is None else "none")

    def plan(
        self, arguments: argparse.Namespace, memory_limit: str | None, num_ranks: int = 1
    ) -> Plan:
        """num_ranks: of which the plan is that of one; for built-in models."""
        from bminf.wrapping import plan_for

        if num_ranks > 1:
            raise ArgumentError(
                f"--tp is for built-in models, not for a {self.title}; leave it out"
            )

        # Stacks of experts are packed by their own names, and chosen by that of their module.
        packed = dict(self._packed or {})
        packed |= {name.rpartition(".")[0]: form for name, form in packed.items()} | packed
        return plan_for(
            self._model,
            quantization=self._format(arguments),
            quantize=(lambda name, _: packed.get(name)) if packed else None,
            memory_limit=memory_limit,
            reserve=arguments.reserve,
            blocks=arguments.blocks,
            host_memory=arguments.host_memory,
            max_length=arguments.max_length,
            max_batch_size=arguments.max_batch_size,
            device="cuda",
        )

    def sums(self, num_ranks: int) -> dict[str, int]:
        """See models/shard.py."""
        return {}

    def unquantized_bytes(self, arguments: argparse.Namespace) -> int:
        """Bytes of matrices in blocks that are not quantized; the reason goes to stderr."""
        weight_format = self._format(arguments)
        if weight_format is None or self._packed:
            return 0
        from bminf.layers.quantize import choose_linears, warn_of_unquantized
        from bminf.offload.blocks import find_blocks
        from bminf.quantization.packed import parse_format

        blocks = find_blocks(self._model, arguments.blocks)
        choice = choose_linears(self._model, blocks, parse_format(weight_format))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_unquantized(self._model, blocks, choice, stacklevel=1)
        for warning in caught:
            print(f"bminf: {one_line(warning.message, arguments.flags)}", file=sys.stderr)
        modules = {m for b in blocks for m in self._model.get_submodule(b.name).modules()}
        modules -= choice.replacements.keys()
        left = {id(p): p for m in modules for p in m._parameters.values()}
        return sum(p.nbytes for p in left.values() if p is not None and p.dim() > 1)

    def _format(self, arguments: argparse.Namespace) -> str | Format | None:
        if self._packed:
            return next(iter(self._packed.values()))
        kind = self.quantization(arguments)
        check_format(kind, is_glm=False)
        return None if kind == "none" else kind


class Zoo:
    """A built-in model, whose plan includes the memory of a text."""

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

    def plan(
        self, arguments: argparse.Namespace, memory_limit: str | None, num_ranks: int = 1
    ) -> Plan:
        from bminf.models.assemble import plan_model

        for option in ("blocks", "reserve"):
            if getattr(arguments, option) not in (None, "0"):
                raise ArgumentError(
                    f"--{option} is for models of transformers; {self.title} has its own: leave it "
                    "out (--max-length and --max-batch-size say what is set aside)"
                )
        asked = arguments.quantization
        weight_format = {None: "auto", "none": None}.get(asked, asked)
        return plan_model(
            self._model,
            memory_limit,
            weight_format,
            max_length=arguments.max_length,
            max_batch_size=arguments.max_batch_size,
            host_memory=arguments.host_memory,
            num_ranks=num_ranks,
        )

    def sums(self, num_ranks: int) -> dict[str, int]:
        from bminf.models.shard import sums_of

        return sums_of(self._model, num_ranks)

    def unquantized_bytes(self, arguments: argparse.Namespace) -> int:
        return 0


def check_format(given: str | None, is_glm: bool) -> None:
    """Raise ArgumentError for a --quantization that the model is not packed in."""
    if given == "int4-row" and not is_glm:
        raise ArgumentError("--quantization int4-row is for a GLM; accepted here: int8, int4, none")


# ---- where the configuration comes from ----------------------------------------------------------


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file, which may start with a byte-order mark.

    Raises CheckpointError for any other file, before much of it is read.
    """
    try:
        with open(file, "rb") as opened:
            content = opened.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {ACCEPTED}") from error
    if len(content) > _MAX_CONFIG_BYTES or _is_binary(content):
        raise CheckpointError(f"{file} is not a configuration but other data; {ACCEPTED}")
    _check_is_no_pointer(file, content)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}; a JSON object is needed")
    return config


def _check_is_no_pointer(file: Path, head: bytes) -> None:
    if head.startswith(models.LFS_POINTER):
        raise CheckpointError(f"{file} is a pointer of git-lfs, not the file; run: git lfs pull")


def _is_binary(content: bytes) -> bool:
    """Whether it is not text in UTF-8, nor in UTF-16 or UTF-32 with a byte-order mark."""
    has_mark = content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    return b"\0" in content and not has_mark


def _in_folder(folder: Path) -> dict[str, Any] | Source:
    file = folder / "config.json"
    config = read_config(file) if file.is_file() else None
    is_of_zoo = config is not None and _is_of_zoo(config)
    if config is not None and not is_of_zoo and config.get("model_type") is not None:
        return config
    from bminf.models.source import find_sizes

    if is_of_zoo or _holds_checkpoint(folder):
        try:
            return find_sizes(folder)
        except CheckpointError as error:
            if config is None or not is_of_zoo:
                raise
            return _of_config(config, str(file), error)  # which may be enough without weights
    if config is not None:
        return config
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if names:
        raise CheckpointError(f"{folder} has no config.json; name one of {', '.join(names)}")
    return read_config(file)  # which raises the error for a missing file


def _holds_checkpoint(folder: Path) -> bool:
    from bminf.arch.registry import checkpoint_in

    try:
        return bool(checkpoint_in(folder).tensors)
    except CheckpointError:
        return any(folder.rglob("mp_rank_*"))  # damaged, which raises when it is opened next


def _in_file(file: Path) -> dict[str, Any] | Source:
    with open(file, "rb") as opened:
        head = opened.read(len(models.LFS_POINTER))
    _check_is_no_pointer(file, head)
    if head.startswith(b"GGUF") or file.suffix == ".gguf":
        return _of_gguf(file, head)
    beside = file.with_name("config.json")
    if file.suffix == ".safetensors" or file.name.endswith(".index.json"):
        if not beside.is_file():
            raise CheckpointError(
                f"{file} holds weights, and there is no {beside.name} beside it; {ACCEPTED}"
            )
        return _in_folder(file.parent)
    return _of_config(read_config(file), str(file))


def _of_config(
    config: dict[str, Any], where: str, why: Exception | None = None
) -> dict[str, Any] | Source:
    """`config`, or the built-in model that it describes.   why: the folder's error, if any."""
    if not _is_of_zoo(config):
        return config
    from bminf.models.source import sizes_in

    try:
        return sizes_in(config, where)
    except CheckpointError as error:
        raise CheckpointError(
            "this is the configuration of a model that bminf builds itself, and it does not say "
            f"all that a plan needs ({why or error}); give the folder with its weights, or load it "
            "with bminf.models and a memory_limit, and print its plan"
        ) from error


def _is_of_zoo(config: dict[str, Any]) -> bool:
    """Whether a configuration is of a built-in model, by its authors or by bminf convert."""
    if config.get("format") == "bminf" or config.get("model_type") == "eva":
        return True
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind == "bloom":
        from bminf.arch.bloom import BLOOM

        return not classes or any(one in classes for one in BLOOM.classes)
    return bool(_ZOO_KEYS & config.keys()) and kind in (None, "glm")


def _of_gguf(file: Path, head: bytes) -> dict[str, Any]:
    version = int.from_bytes(head[4:8], "little")
    if not head.startswith(b"GGUF") or version not in _GGUF_VERSIONS:
        raise CheckpointError(
            f"{file} is no GGUF file of version 2 or 3 (it starts with {head[:8]!r}); {ACCEPTED}"
        )
    models.require(["transformers", "gguf"])
    import transformers

    models.quiet()
    try:
        config = transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    # Readers of the header raise errors of many types.
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be planned from its header: {models.first_line(error)} - give the "
            "folder with the config.json of the model that it was made from"
        ) from error
    return {**config.to_dict(), "dtype": _GGUF_DTYPE}


def _from_hub(hub_id: str) -> Path:
    models.require(["huggingface_hub"])
    from huggingface_hub import hf_hub_download

    models.quiet_hub()
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    # Errors of the client, of the HTTP library below it, and of the network.
    except Exception as error:
        raise CheckpointError(
            f"there is no file or folder {hub_id!r}, and the hub does not give its config.json: "
            f"{models.first_line(error)} - {ACCEPTED}"
        ) from error


# ---- models of transformers ----------------------------------------------------------------------


def _of_transformers(config: dict[str, Any], packed: dict[str, Format] | None) -> Transformers:
    models.require(["transformers"])
    if "quantization_config" in config:
        print(
            "bminf: the quantization_config of this checkpoint is left out of account: "
            "bytes are those of the type it names as dtype",
            file=sys.stderr,
        )
    with spinner("building the architecture"):
        return Transformers(build_on_meta(config), packed)


def build_on_meta(config: dict[str, Any]) -> Any:
    """The model that `config`, the content of a config.json, describes, on the meta device."""
    import torch
    import transformers

    models.quiet()
    kind = config.get("model_type")
    if kind is None:
        raise CheckpointError(
            "model_type None is not known: this configuration has no model_type, so it does not "
            "name its model; give the config.json that belongs to the weights"
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
    # A wrong config raises errors of any type, depending on the architecture.
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
    """Make new parameters of the dtype that `config` names, or else of float32."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
