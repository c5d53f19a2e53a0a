"""What a model of the zoo is made from, found and checked, with nothing but headers read so far:
the files of a folder, which are opened once, or the sizes of a published model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bminf.arch import registry
from bminf.arch.architecture import Architecture, Config
from bminf.arch.t5 import CPM2
from bminf.checkpoint.binary_file import read_json
from bminf.checkpoint.config import CONFIG_FILES, as_mapping
from bminf.checkpoint.folder import Checkpoint
from bminf.checkpoint.names import listed
from bminf.checkpoint.sealed import check_sealed
from bminf.checkpoint.stored import Rows, Scaled, Stored
from bminf.errors import ArgumentError, CheckpointError
from bminf.layers.embedding import HostEmbedding
from bminf.models.recognition import recognized
from bminf.quantization.packed import PACKED_FIELDS, Format, Packing, empty
from bminf.tokenizers.base import Tokenizer
from bminf.tokenizers.find import find_tokenizer, tokenizer_from

FORMAT_VERSION = 1
"""Of the folders that convert() writes."""

HEAD = "lm_head.parts."
"""What the parts of an output head that is split are called before their index."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # not "./folder"
_HUB_FILES = ("*.json", "*.bin", "*.safetensors", "*.model", "*.txt")


@dataclass(frozen=True)
class Weights:
    """Tensors that are not read yet, under the names of the architecture.

    packing: how the linears in the blocks are packed there already (named as a QuantizedLinear's
    buffers); None where they are not.   original_name: what the files call a tensor.
    table: of a HostEmbedding, if the model has one.   has_own_head: whether the head, which is not
    packed, has other weights than that.
    """

    tensors: Mapping[str, Stored]
    path: Path
    packing: Packing | None = None
    original_name: Callable[[str], str] = str
    table: Stored | None = None
    has_own_head: bool = False


@dataclass(frozen=True)
class Source:
    """network: on the meta device, in float32, with nothing packed: for assemble() to change.

    config: one of the architecture's config_class.   title: of the model, for people.
    weights: without tensors where sizes are all that is known.   tokenizer: None for a plan.
    """

    architecture: Architecture
    config: Any
    network: torch.nn.Module
    weights: Weights
    title: str
    tokenizer: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding, on disk."""
        return (self.weights.table or self.weights.tensors["embed_tokens.weight"]).dtype


def open_source(
    architectures: Sequence[Architecture] | None,
    checkpoint: str | Path | None,
    config: Any = None,
    tokenizer: Any = None,
    configure: Callable[[Any], Any] = lambda config: config,
) -> Source:
    """Find everything that a model needs in `checkpoint`, a folder or a hub id.

    architectures: those that it may be of; None is any that its files tell without doubt.
    config, tokenizer: see LanguageModel.   configure: what changes a configuration that was read.
    Raises ArgumentError or CheckpointError.
    """
    opened = registry.checkpoint_in(_folder(architectures or registry.ARCHITECTURES, checkpoint))
    if architectures is None:
        architecture = recognized(opened, has_tokenizer=tokenizer is not None)
    else:
        architecture = _detected(architectures, opened)
    saved = _saved_config(opened)
    source = _with_network(architecture, opened, saved, config, configure)
    settings = saved.get("tokenizer")
    if settings is None:
        settings = architecture.tokenizer_settings(source.config)
    found = tokenizer_of(architecture, opened, tokenizer, source.config, settings)
    return replace(source, tokenizer=found)


def find_sizes(model: Any) -> Source:
    """What a plan needs: a source whose tokenizer is not looked for, and that may lack weights.

    model: a folder, the name or hub id of a published model such as "CPM-2", a configuration of an
    architecture, or a source, which is not changed.
    Raises ArgumentError or CheckpointError.
    """
    if isinstance(model, Source):
        return replace(model, network=meta_network(model.architecture, model.config))
    for architecture in registry.ARCHITECTURES:
        if isinstance(model, architecture.config_class) and architecture.is_config_of(model):
            return sizes_of(architecture, model, architecture.title)
    if not isinstance(model, str | Path):
        raise ArgumentError(f"model is a {type(model).__name__}; accepted: {_accepted_sizes()}")
    path = Path(model).expanduser()
    if str(model) and path.exists():
        opened = registry.checkpoint_in(path.absolute())
        architecture = registry.detect(opened) or CPM2  # EVA is of the same shapes
        return _with_network(architecture, opened, _saved_config(opened), None)
    found = published(str(model))
    if found is None:
        raise ArgumentError(f"model={str(model)!r}; accepted: {_accepted_sizes()}")
    return found


def published(name: str) -> Source | None:
    """The sizes of the published model of this name or hub id; None is none."""
    plain = _plain(name)
    for architecture in registry.ARCHITECTURES:
        for title, config in architecture.published.items():
            names = {_plain(title), _plain(title.rpartition("/")[2])}
            if plain in names or architecture.aliases.get(plain) == title:
                return sizes_of(architecture, config, title)
    return None


def sizes_in(fields: Mapping[str, Any], where: str) -> Source:
    """Those that a configuration tells alone.   Raises CheckpointError where it does not say all.

    fields: what is in its file.   where: that file, for messages.
    """
    architecture = registry.detect_from_config(fields)
    size = fields.get("vocab_size")
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{where} has no vocab_size")
    config = replace(architecture.parse(fields, {}, where), vocab_size=size)
    return sizes_of(architecture, config, architecture.title)


def sizes_of(architecture: Architecture, config: Config, title: str) -> Source:
    """A source without weights."""
    if architecture.split_head is not None:
        config = replace(config, num_head_parts=1)
    network = meta_network(architecture, config)
    return Source(architecture, config, network, Weights({}, Path(title)), title)


def meta_network(architecture: Architecture, config: Config) -> torch.nn.Module:
    """The network on the meta device, in float32, with nothing packed."""
    with torch.device("meta"):
        return architecture.build(config)


def check_shapes(network: torch.nn.Module, weights: Weights, blocks: Sequence[str]) -> None:
    """Raise CheckpointError where tensors are missing, unexpected, or of another shape or kind.

    network: on the meta device, with nothing packed.   blocks: names of those that may be packed in
    `weights`, or of lists of them.
    """
    expected = dict(_expected(network, weights.packing, blocks))
    call = weights.original_name
    missing = [call(name) for name in expected if name not in weights.tensors]
    unexpected = [call(name) for name in weights.tensors if name not in expected]
    if missing or unexpected:
        lacking = f"lacks {listed(missing)}" if missing else ""
        more = f"has unexpected tensors: {listed(unexpected)}" if unexpected else ""
        raise CheckpointError(
            f"for a {type(network).__name__} of this configuration, {weights.path} "
            f"{' and '.join(part for part in (lacking, more) if part)}; see whether the "
            "configuration is that of the checkpoint, and whether the checkpoint is complete"
        )
    for name, (shape, dtype) in expected.items():
        _check_alike(weights.tensors[name], shape, dtype)
    for module in network.modules():
        if isinstance(module, HostEmbedding):
            if weights.table is None:
                raise CheckpointError(f"{weights.path} has no embedding; fetch it again")
            _check_alike(weights.table, (module.num_rows, module.hidden_size), None)


def config_of(
    architecture: Architecture, opened: Checkpoint, tensors: Mapping[str, Stored], given: Any
) -> tuple[Config, Mapping[str, Any]]:
    """The configuration, and what it was read from.   given: see LanguageModel.

    Raises ArgumentError or CheckpointError.
    """
    if given is not None:
        fields, where = _given_config(given)
        return architecture.parse(fields, tensors, where), fields
    path = registry.config_in(opened.path)
    if path is not None:
        fields = read_json(path)
        return architecture.parse(fields, tensors, str(path)), fields
    if architecture.is_implied_by_shapes:
        return architecture.parse({}, tensors, str(opened.path)), {}
    return _published_of(architecture, opened, tensors), {}


def tokenizer_of(
    architecture: Architecture,
    opened: Checkpoint,
    given: Any,
    config: Config | None,
    settings: Any = None,
) -> Tokenizer:
    """The tokenizer that is given, or that of the folder.

    config: which it has to match; None where it is not known.   settings: see find_tokenizer().
    Raises ArgumentError or CheckpointError.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{opened.path}: tokenizer is {settings!r}; convert the original anew"
        )
    kind = architecture.tokenizer or architecture.name
    if given is None:
        found = find_tokenizer(kind, opened.path, settings)
    else:
        found = tokenizer_from(kind, given)
    if config is not None:
        _check_vocabulary(found, config, architecture, opened.path)
    return found


def vocabulary_files(architecture: Architecture, tokenizer: Tokenizer) -> dict[str, Path]:
    """By what find_tokenizer() looks for, whatever they are called where they come from.

    Raises ArgumentError for a tokenizer that was not made of files.
    """
    files: Sequence[Path] = tokenizer.files
    if not files:
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__} of no files, and the folder needs "
            "them to load by itself; give the path of a vocabulary"
        )
    return {architecture.vocabulary_name(file): file for file in files}


# ---- where it lies -------------------------------------------------------------------------------


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
    if isinstance(checkpoint, str) and HUB_ID.fullmatch(checkpoint):
        return download(checkpoint, accepted)
    raise CheckpointError(f"there is no {str(checkpoint)!r}; accepted: {accepted}")


def download(hub_id: str, accepted: str, patterns: Sequence[str] = _HUB_FILES) -> Path:
    """The folder that a hub id is downloaded to, of files that match `patterns`.

    accepted: what else could have been given, for the CheckpointError where the hub has none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"there is no folder {hub_id!r}, and the hub does not give it: {reason}; "
            f"accepted: {accepted}"
        ) from error


def _plain(name: str) -> str:
    """Of a name, its letters and digits; the owner of a hub id counts."""
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _accepted_sizes() -> str:
    names = ", ".join(f'"{name}"' for one in registry.ARCHITECTURES for name in one.published)
    return f"a folder that exists, a configuration, or a published model: {names}"


# ---- which architecture --------------------------------------------------------------------------


def _detected(architectures: Sequence[Architecture], opened: Checkpoint) -> Architecture:
    """The one of `architectures` that the checkpoint is of."""
    detected = registry.detect(opened)
    if detected is None and opened.kind != "bminf" and len(architectures) == 1:
        return architectures[0]
    for architecture in architectures:
        if detected is not None and architecture.name == detected.name:
            return architecture
    wanted = " or ".join(architecture.title for architecture in architectures)
    held = "another model" if detected is None else detected.title
    if detected is None and opened.kind == "bminf":
        held = repr(_saved_config(opened).get("model"))
    raise CheckpointError(f"{opened.path} holds {held}, not {wanted}")


# ---- configuration, weights, network -------------------------------------------------------------


def _with_network(
    architecture: Architecture,
    opened: Checkpoint,
    saved: Mapping[str, Any],
    config: Any,
    configure: Callable[[Any], Any] = lambda config: config,
) -> Source:
    if opened.kind == "bminf":
        weights, parsed = _converted(architecture, opened, saved, config)
    else:
        weights, parsed = _original(architecture, opened, config)
    if architecture.split_head is not None:
        weights = _with_table(weights, parsed.num_head_parts)
    parsed = configure(parsed)
    network = meta_network(architecture, parsed)
    check_shapes(network, weights, architecture.blocks(network))
    return Source(architecture, parsed, network, weights, architecture.title)


def _original(architecture: Architecture, opened: Checkpoint, given: Any) -> tuple[Weights, Any]:
    """A folder of any other layout."""
    renamed = architecture.tensors(opened)
    parsed, fields = config_of(architecture, opened, renamed, given)
    if architecture.split_head is not None:
        parsed = replace(parsed, num_head_parts=1)  # that of another model's config is its own

    def original_name(name: str) -> str:
        target = "embed_tokens.weight" if name.startswith(HEAD) else name
        return architecture.original_name(opened.kind, target)

    tensors = _as_configured(renamed, fields)
    return Weights(tensors, opened.path, original_name=original_name), parsed


def _with_table(weights: Weights, num_head_parts: int) -> Weights:
    """The embedding, which is gathered on the host, apart. A head that is not packed has the same
    weights, unless it is there beside it: one of the two stands for both."""
    tensors = dict(weights.tensors)
    table = tensors.pop("embed_tokens.weight", None)
    heads = [f"{HEAD}{index}.weight" for index in range(num_head_parts)]
    if table is not None and weights.packing is None:
        tensors.setdefault(heads[0], table)
        weights = replace(weights, has_own_head=tensors[heads[0]] is not table)
    elif table is None and all(name in tensors for name in heads):
        table = Rows(tuple(tensors[name] for name in heads))
    return replace(weights, tensors=tensors, table=table)


def _saved_config(opened: Checkpoint) -> Mapping[str, Any]:
    """What convert() wrote beside the weights; nothing in a folder of others."""
    return read_json(opened.path / "config.json") if opened.kind == "bminf" else {}


def _converted(
    architecture: Architecture, opened: Checkpoint, saved: Mapping[str, Any], given: Any
) -> tuple[Weights, Any]:
    """A folder that convert() wrote."""
    path = opened.path / "config.json"
    if saved.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format_version {saved.get('format_version')!r}; this library reads "
            f"{FORMAT_VERSION}: take the one that wrote it, or convert the original anew"
        )
    check_sealed(path, saved)
    fields = saved.get("config") if given is None else _given_config(given)[0]
    if not isinstance(fields, Mapping):
        raise CheckpointError(f'{path} has no object "config"; convert the original anew')
    parsed = architecture.parse(fields, opened.tensors, str(path))
    return Weights(opened.tensors, opened.path, _packing_in(saved, path)), parsed


def _packing_in(saved: Mapping[str, Any], path: Path) -> Packing | None:
    """How such a folder is packed, by its configuration; None where it is not."""
    exceptions = saved.get("exceptions", {})
    if not isinstance(exceptions, Mapping):
        raise CheckpointError(f"{path}: exceptions is {exceptions!r}; convert the original anew")
    formats = {name: _format(given, path) for name, given in exceptions.items()}
    packing = Packing(_format(saved.get("quantization"), path), formats)
    return None if packing == Packing() else packing


def _format(given: Any, path: Path) -> Format | None:
    if given is None:
        return None
    try:
        return Format(**given)
    except (TypeError, ArgumentError) as error:
        raise CheckpointError(f"{path}: quantization is {given!r}: {error}") from error


def _given_config(given: Any) -> tuple[Mapping[str, Any], str]:
    if isinstance(given, str | Path):
        path = Path(given)
        path = path / "config.json" if path.is_dir() else path
        read = read_json(path)
        config = (
            read.get("config") if read.get("format") == "bminf" else None
        )  # what convert() wrote
        return config if isinstance(config, Mapping) else read, str(path)
    fields = as_mapping(given)
    if fields is None:
        classes = list(dict.fromkeys(one.config_class.__name__ for one in registry.ARCHITECTURES))
        raise ArgumentError(
            f"config is a {type(given).__name__}; accepted: the path of a JSON file, a mapping, "
            f"a {', '.join(classes[:-1])} or {classes[-1]}"
        )
    return fields, "config"


def _published_of(
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
    embedding = tensors.get("embed_tokens.weight")
    if embedding is None or embedding.shape[0] != config.vocab_size:
        return False  # without building it
    try:
        check_shapes(meta_network(architecture, config), Weights(tensors, path), ())
    except CheckpointError:
        return False
    return True


def _as_configured(
    tensors: Mapping[str, Stored], fields: Mapping[str, Any]
) -> Mapping[str, Stored]:
    """What a configuration says of the weights themselves (ModelCenter's).

    tied: the head is the embedding.   length_scale: each product is divided by the square root of
    its number of inputs, and the embedding by that of its width; here the weights are.
    """
    changed = dict(tensors)
    if fields.get("tied") is True:
        changed["lm_head.weight"] = tensors["embed_tokens.weight"]
    if fields.get("length_scale") is True:
        for name, stored in changed.items():
            if len(stored.shape) == 2 and not name.endswith("position_bias.weight"):
                changed[name] = Scaled(stored, stored.shape[1] ** -0.5)
    return changed


# ---- checks --------------------------------------------------------------------------------------


def _expected(
    network: torch.nn.Module, packing: Packing | None, blocks: Sequence[str]
) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype | None]]]:
    """(name, (shape, dtype)) of each tensor that the checkpoint must have; None is any that is
    floating point."""
    inside = tuple(f"{name}." for name in blocks)
    for prefix, module in network.named_modules():
        start = f"{prefix}." if prefix else ""
        weight_format = None
        if packing is not None and type(module) is torch.nn.Linear and start.startswith(inside):
            weight_format = packing.of(prefix)
        if weight_format is not None:
            packed = empty(module.out_features, module.in_features, weight_format, "meta")
            for key in PACKED_FIELDS:
                code: torch.Tensor | None = getattr(packed, key)
                if code is not None:
                    yield start + key, (tuple(code.shape), code.dtype)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not (weight_format is not None and key == "weight"):
                yield start + key, (tuple(tensor.shape), None)


def _check_alike(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(stored.shape) != shape:
        raise CheckpointError(
            f"{stored.where} has the shape {tuple(stored.shape)}; the configuration asks for "
            f"{shape}: it is of another model, or the configuration is"
        )
    if stored.dtype != dtype if dtype is not None else not stored.dtype.is_floating_point:
        raise CheckpointError(
            f"{stored.where} is {stored.dtype}; it must be {dtype or 'floating point'}"
        )


def _check_vocabulary(
    tokenizer: Tokenizer, config: Config, architecture: Architecture, path: Path
) -> None:
    num_unused = config.vocab_size - tokenizer.vocab_size
    if num_unused < 0 or (num_unused > 0 and not architecture.has_padded_vocabulary):
        files = getattr(tokenizer, "files", ())
        origin = ", ".join(str(file) for file in files) or type(tokenizer).__name__
        raise CheckpointError(
            f"the vocabulary has {tokenizer.vocab_size} tokens ({origin}), the embedding of "
            f"{path} {config.vocab_size} rows; take the vocabulary that came with it"
        )
