"""What a model of the zoo is made from: weights, configuration and tokenizer, found and checked,
with nothing but headers read so far."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bminf.arch import registry
from bminf.arch.architecture import Architecture, Config
from bminf.checkpoint.config import CONFIG_FILES, as_mapping, read_config
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.stored import Rows, Scaled, Stored
from bminf.errors import ArgumentError, CheckpointError
from bminf.models.load import Packing, Weights, check_shapes, skeleton, skeleton_of
from bminf.quantization.packed import Format
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.find import find_tokenizer, tokenizer_from

FORMAT_VERSION = 1
"""Of the folders that convert() writes."""

HEAD = "lm_head.parts."
"""What the parts of an output head that is cut are called before their number."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.bin", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True)
class Source:
    """weights: under the names of the architecture.   config: one of its config_class.

    dtype: that of the embedding, on disk.
    """

    architecture: Architecture
    weights: Weights
    config: Any
    tokenizer: Tokenizer
    dtype: torch.dtype


def open_source(
    architectures: Sequence[Architecture],
    checkpoint: str | Path | None,
    config: Any = None,
    tokenizer: Any = None,
) -> Source:
    """Find everything that a model needs in `checkpoint`, a folder or a hub id.

    architectures: those that it may be of.   config, tokenizer: see LanguageModel.
    Raises ArgumentError or CheckpointError.
    """
    opened = registry.checkpoint_in(_folder(architectures, checkpoint))
    architecture = _told(architectures, opened)
    if opened.kind == "bminf":
        return _own(architecture, opened, config, tokenizer)
    renamed = architecture.tensors(opened)
    parsed, source = config_of(architecture, opened, renamed, config)
    tensors = _as_configured(renamed, source)
    weights = Weights(
        tensors,
        opened.path,
        original_name=partial(architecture.original_name, opened.kind),
        pack=architecture.pack,
    )
    if architecture.is_head_cut:
        parsed = replace(parsed, num_head_parts=1)  # that of another model's config is its own
        weights = _with_table(weights)
    check_shapes(skeleton_of(architecture, parsed), weights)
    found = tokenizer_of(architecture, opened, tokenizer, parsed)
    return Source(architecture, weights, parsed, found, tensors["embed_tokens.weight"].dtype)


def _told(architectures: Sequence[Architecture], opened: Checkpoint) -> Architecture:
    """The one of `architectures` that the checkpoint is of."""
    told = registry.told_by(opened)
    if told is None and opened.kind != "bminf" and len(architectures) == 1:
        return architectures[0]
    for architecture in architectures:
        if told is not None and architecture.name == told.name:
            return architecture
    wanted = " or ".join(architecture.title for architecture in architectures)
    if told is not None:
        raise CheckpointError(f"{opened.path} holds {told.title}, not {wanted}")
    if opened.kind == "bminf":
        name = read_config(opened.path / "config.json").get("model")
        raise CheckpointError(f"{opened.path} holds {name!r}, not {wanted}")
    raise CheckpointError(f"{opened.path} holds another model than {wanted}")


def _with_table(weights: Weights) -> Weights:
    """The embedding, which is gathered on the host, apart; the head has the same weights."""
    tensors = dict(weights.tensors)
    table = tensors.pop("embed_tokens.weight", None)
    if table is not None:
        tensors[f"{HEAD}0.weight"] = table

    def original_name(name: str) -> str:
        return weights.original_name("embed_tokens.weight" if name.startswith(HEAD) else name)

    return replace(weights, tensors=tensors, table=table, original_name=original_name)


def _folder(architectures: Sequence[Architecture], checkpoint: str | Path | None) -> Path:
    titles = " or ".join(architecture.title for architecture in architectures)
    accepted = f"a folder with a {titles} checkpoint" + "".join(
        f', "{hub_id}"' for architecture in architectures for hub_id in architecture.hub_ids
    )
    if checkpoint is None:
        raise ArgumentError(f"no checkpoint is given; accepted: {accepted}")
    if not isinstance(checkpoint, str | Path):
        raise ArgumentError(f"checkpoint is a {type(checkpoint).__name__}; accepted: {accepted}")
    path = Path(checkpoint).expanduser().absolute()
    if str(checkpoint) and path.exists():
        return path
    if isinstance(checkpoint, str) and _HUB_ID.fullmatch(checkpoint):
        return _download(checkpoint, accepted)
    raise CheckpointError(f"there is no {str(checkpoint)!r}; accepted: {accepted}")


def _download(hub_id: str, accepted: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and the hub does not give it: {reason}; "
            f"accepted: {accepted}"
        ) from error


def _own(architecture: Architecture, opened: Checkpoint, config: Any, tokenizer: Any) -> Source:
    """A folder that convert() wrote."""
    path = opened.path / "config.json"
    written = read_config(path)
    if written.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format_version {written.get('format_version')!r}; this library reads "
            f"{FORMAT_VERSION}: take the one that wrote it, or convert the original anew"
        )
    fields = written.get("config") if config is None else _given_config(config)[0]
    if not isinstance(fields, Mapping):
        raise CheckpointError(f'{path} has no object "config"; convert the original anew')
    parsed = architecture.parse(fields, opened.tensors, str(path))
    packing = packing_in(written, path)
    weights = Weights(opened.tensors, opened.path, packing, pack=architecture.pack)
    if architecture.is_head_cut:
        weights = _with_own_table(weights, parsed)
    model, _ = skeleton(architecture, parsed, torch.float32, packing or Packing(), "auto")
    check_shapes(model, weights)
    found = tokenizer_of(architecture, opened, tokenizer, parsed, written.get("tokenizer"))
    table = weights.table or weights.tensors["embed_tokens.weight"]
    return Source(architecture, weights, parsed, found, table.dtype)


def _with_own_table(weights: Weights, config: Any) -> Weights:
    """As _with_table: a head that is not packed stands for the embedding, too."""
    tensors = dict(weights.tensors)
    table = tensors.pop("embed_tokens.weight", None)
    if table is None:
        names = [f"{HEAD}{number}.weight" for number in range(config.num_head_parts)]
        lacking = [name for name in names if name not in tensors]
        if lacking:
            raise CheckpointError(f"{weights.path} lacks {lacking[0]!r}; convert the original anew")
        table = Rows(tuple(tensors[name] for name in names))
    return replace(weights, tensors=tensors, table=table)


def packing_in(written: Mapping[str, Any], path: Path) -> Packing | None:
    """How a folder of ours is packed, by its configuration; None where it is not."""
    exceptions = written.get("exceptions", {})
    if not isinstance(exceptions, Mapping):
        raise CheckpointError(f"{path}: exceptions is {exceptions!r}; convert the original anew")
    own = {name: _format(given, path) for name, given in exceptions.items()}
    packing = Packing(_format(written.get("quantization"), path), own)
    return None if packing == Packing() else packing


def _format(given: Any, path: Path) -> Format | None:
    if given is None:
        return None
    try:
        return Format(**given)
    except (TypeError, ArgumentError) as error:
        raise CheckpointError(f"{path}: quantization is {given!r}: {error}") from error


def config_of(
    architecture: Architecture, opened: Checkpoint, tensors: Mapping[str, Stored], given: Any
) -> tuple[Config, Mapping[str, Any]]:
    """The configuration, and what it was read from.   given: see LanguageModel.

    Raises ArgumentError or CheckpointError.
    """
    if given is not None:
        source, where = _given_config(given)
        return architecture.parse(source, tensors, where), source
    path = registry.config_in(opened.path)
    if path is not None:
        source = read_config(path)
        return architecture.parse(source, tensors, str(path)), source
    if architecture.is_told_by_shapes:
        return architecture.parse({}, tensors, str(opened.path)), {}
    return _published(architecture, opened, tensors), {}


def _given_config(given: Any) -> tuple[Mapping[str, Any], str]:
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / "config.json" if path.is_dir() else path
        read = read_config(path)
        own = read.get("config") if read.get("format") == "bminf" else None  # what convert() wrote
        return own if isinstance(own, Mapping) else read, str(path)
    source = as_mapping(given)
    if source is None:
        classes = list(dict.fromkeys(one.config_class.__name__ for one in registry.ARCHITECTURES))
        raise ArgumentError(
            f"config is a {type(given).__name__}; accepted: the path of a JSON file, a mapping, "
            f"a {', '.join(classes[:-1])} or {classes[-1]}"
        )
    return source, "config"


def _published(
    architecture: Architecture, opened: Checkpoint, tensors: Mapping[str, Stored]
) -> Config:
    """The published model whose shapes all match, if there is exactly one."""
    candidates = {
        name: config
        for name, config in architecture.published.items()
        # BMInf 1.x never scaled attention, so its files are not of a model that needs it.
        if not (opened.kind == "bminf1" and getattr(config, "is_attention_scaled", False))
        and _fits(architecture, config, tensors, opened.path)
    }
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    looked = " or ".join(CONFIG_FILES)
    if candidates:
        raise CheckpointError(
            f"{opened.path} has the shapes of {' and of '.join(candidates)}, which differ in "
            f"attention scaling, and neither it nor its parent has a {looked}; say which it is: "
            'config={..., "attn_scale": true or false}, or the configuration file that came with it'
        )
    raise CheckpointError(
        f"neither {opened.path} nor its parent has a {looked}, and its shapes are of no published "
        f"{architecture.title} ({', '.join(architecture.published)}); give config=..., a path or a "
        f"mapping with {architecture.needed_fields}"
    )


def _fits(
    architecture: Architecture, config: Config, tensors: Mapping[str, Stored], path: Path
) -> bool:
    try:
        check_shapes(skeleton_of(architecture, config), Weights(tensors, path))
    except CheckpointError:
        return False
    return True


def _as_configured(
    tensors: Mapping[str, Stored], source: Mapping[str, Any]
) -> Mapping[str, Stored]:
    """What a configuration says of the weights themselves (ModelCenter's).

    tied: the head is the embedding.   length_scale: each product is divided by the square root of
    its number of inputs, and the embedding by that of its width; here the weights are.
    """
    changed = dict(tensors)
    if source.get("tied") is True:
        changed["lm_head.weight"] = tensors["embed_tokens.weight"]
    if source.get("length_scale") is True:
        for name, stored in changed.items():
            if len(stored.shape) == 2 and not name.endswith("position_bias.weight"):
                changed[name] = Scaled(stored, stored.shape[1] ** -0.5)
    return changed


def tokenizer_of(
    architecture: Architecture,
    opened: Checkpoint,
    given: Any,
    config: Config | None,
    settings: Any = None,
) -> Tokenizer:
    """The tokenizer that is given, or that of the folder.

    config: which it has to go with; None where it is not known.   settings: see find_tokenizer().
    Raises ArgumentError or CheckpointError.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{opened.path}: tokenizer is {settings!r}; convert the original anew"
        )
    kind = architecture.tokenizer or architecture.name
    if given is None:
        own = settings
        if config is not None and settings is None:
            own = architecture.tokenizer_settings(config)
        found = find_tokenizer(kind, opened.path, own)
    else:
        found = tokenizer_from(kind, given)
    if config is None:
        return found
    num_unused = config.vocab_size - found.vocab_size
    if num_unused < 0 or (num_unused > 0 and not architecture.has_spare_rows):
        raise CheckpointError(
            f"the vocabulary has {found.vocab_size} tokens ({_origin(found)}), the embedding of "
            f"{opened.path} {config.vocab_size} rows; take the vocabulary that came with it"
        )
    return found


def _origin(tokenizer: Tokenizer) -> str:
    files = getattr(tokenizer, "files", ())
    return ", ".join(str(file) for file in files) or type(tokenizer).__name__
