"""What MODEL means on the command line: where a configuration comes from, without any weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bminf.errors import CheckpointError

if TYPE_CHECKING:
    from bminf.models.source import Source

ACCEPTED = (
    "give a folder with config.json, that file, a .gguf file, a hub id, a folder of CPM-1, CPM-2, "
    'EVA or GLM, or the name of a published one, for example "glm-130b"'
)

HELP = (
    "a folder with config.json or that file, a .gguf file, a hub id, a folder of CPM-1, CPM-2, EVA "
    "or GLM, or a published name such as glm-130b"
)

QUANTIZATION_HELP = "default: int8, of a GLM int4; what is packed already stays as it is"

_MOST_CONFIG_BYTES = 2**24
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_POINTER = b"version https://git-lfs"
_GGUF_VERSIONS = (2, 3)
_GGUF_DTYPE = "float16"  # what the weights of such a file are unpacked to on a GPU
_ZOO_KEYS = {"d_kv", "dim_model", "block_position_encoding"}


def find(model: str) -> dict[str, Any] | Source:
    """The content of a config.json of transformers, or a model that bminf builds itself.

    model: a folder, a file, a published name or a hub id.
    Raises CheckpointError; nothing but headers and configurations is read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return _in_file(path)
    from bminf.models.source import published

    named = published(model)
    if named is not None:
        return named
    is_path = path.is_absolute() or model.startswith(("./", "../", "~"))
    if is_path or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{path} cannot be read (No such file or directory); {ACCEPTED}")
    return _of_config(read_config(_from_hub(model)), model)


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file, which may begin with a byte-order mark.

    Raises CheckpointError, before much is read, for a file that is something else.
    """
    try:
        with open(file, "rb") as opened:
            content = opened.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {ACCEPTED}") from error
    if len(content) > _MOST_CONFIG_BYTES or _is_binary(content):
        raise CheckpointError(f"{file} is no configuration but other data; {ACCEPTED}")
    _check_is_no_pointer(file, content)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}; a JSON object is needed")
    return config


def _check_is_no_pointer(file: Path, head: bytes) -> None:
    if head.startswith(_POINTER):
        raise CheckpointError(f"{file} is a pointer of git-lfs, not the file; run: git lfs pull")


def _is_binary(content: bytes) -> bool:
    """Whether it is no text in UTF-8, or in UTF-16 or UTF-32 with a mark."""
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
            return _of_config(config, str(file), error)  # which may say it all without weights
    if config is not None:
        return config
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if names:
        raise CheckpointError(f"{folder} has no config.json; name one of {', '.join(names)}")
    return read_config(file)  # whose error says what is missing


def _holds_checkpoint(folder: Path) -> bool:
    from bminf.arch.registry import checkpoint_in

    try:
        return bool(checkpoint_in(folder).tensors)
    except CheckpointError:
        return any(folder.rglob("mp_rank_*"))  # damaged, which the next one to open it will say


def _in_file(file: Path) -> dict[str, Any] | Source:
    with open(file, "rb") as opened:
        head = opened.read(len(_POINTER))
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
    """`config`, or what it describes if that is a model of the zoo.   why: no folder gave it."""
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
    """Whether a configuration is in the words of the zoo's authors, or ours."""
    if config.get("format") == "bminf" or config.get("model_type") == "eva":
        return True
    kind = config.get("model_type")
    return bool(_ZOO_KEYS & config.keys()) and kind in (None, "glm")


def _of_gguf(file: Path, head: bytes) -> dict[str, Any]:
    version = int.from_bytes(head[4:8], "little")
    if not head.startswith(b"GGUF") or version not in _GGUF_VERSIONS:
        raise CheckpointError(
            f"{file} is no GGUF file of version 2 or 3 (it begins with {head[:8]!r}); {ACCEPTED}"
        )
    from bminf.cli import models

    models.require(["transformers", "gguf"])
    import transformers

    models.quiet()
    try:
        config = transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    # Whatever a header can hold that its readers trip over.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{file} cannot be planned from its header: {reason} - give the folder with the "
            "config.json of the model that it was made from"
        ) from error
    return {**config.to_dict(), "dtype": _GGUF_DTYPE}


def _from_hub(hub_id: str) -> Path:
    from bminf.cli import models

    models.require(["huggingface_hub"])
    from huggingface_hub import hf_hub_download

    models.quiet_hub()
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    # The client's errors, those of the HTTP library below it, and of the network.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"there is no file or folder {hub_id!r}, and the hub does not give its config.json: "
            f"{reason} - {ACCEPTED}"
        ) from error
