"""What a limit would keep of a model of the zoo, before its weights are read, or are here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bminf.arch import registry
from bminf.arch.architecture import Architecture, Config
from bminf.arch.glm import GLM10B, GLM130B, GLM_FORMATS, PUBLISHED_GLM, GLMConfig
from bminf.arch.t5 import CPM2
from bminf.checkpoint.config import read_config
from bminf.checks import check_positive
from bminf.errors import ArgumentError, CheckpointError
from bminf.keywords import known_keywords
from bminf.models.arguments import dtype_for
from bminf.models.glm_head import head_packing, num_head_parts
from bminf.models.load import Packing, lay_out, plan_for, skeleton
from bminf.models.source import config_of, packing_in
from bminf.models.workspace import reserved_bytes
from bminf.offload.plan import Plan
from bminf.quantization.packed import Format, parse_format
from bminf.units import parse_bytes


@known_keywords
def plan_glm(
    model: str | GLMConfig,
    memory_limit: int | float | str,
    quantization: str | Format | None = "int4",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    max_batch_size: int = 1,
    head_quantization: str | Format | None = None,
    device: str = "cuda",
    host_memory: int | float | str | None = None,
) -> Plan:
    """The plan that GLM(...) would make with these arguments, for a card that need not be here.

    model: "GLM-130B", "GLM-10B", "GLM-10B-chinese", "GLM-2B", or a configuration.
    device: "cuda" or "cpu", which need room for other things beside the weights.
    host_memory: what may be page-locked for streamed blocks; the rest of them stays on the disk.
    None is as much as it takes.   Raises ArgumentError or BudgetError.
    """
    config = _config(model)
    positions = config.max_position_embeddings
    max_length = positions if max_length is None else max_length
    check_positive("max_length", max_length)
    if max_length > positions:
        raise ArgumentError(f"max_length={max_length}, but the model has {positions} positions")
    check_positive("max_batch_size", max_batch_size)
    if device not in ("cuda", "cpu"):
        raise ArgumentError(f'device={device!r}; accepted: "cuda", "cpu"')
    dtype = dtype_for(dtype, torch.device(device))
    packing = Packing(parse_format(quantization, formats=GLM_FORMATS))
    head_form = parse_format(head_quantization, "head_quantization", GLM_FORMATS)
    num_parts = num_head_parts(config, packing, head_form, dtype)
    packing = head_packing(packing, head_form, num_parts)
    config = replace(config, num_head_parts=num_parts)
    return _planned(
        _GLMS[config.architecture], config, packing, dtype, max_length,
        max_batch_size, memory_limit, device, host_memory,
    )  # fmt: skip


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo without weights.   config: one of its config_class.   title: for people.

    packing: that of a folder that convert() wrote; None elsewhere.
    """

    architecture: Architecture
    config: Any
    title: str
    packing: Packing | None = None


def published(name: str) -> ZooModel | None:
    """The published model of this name or hub id, such as "glm-130b" or "CPM-2"; None is none."""
    plain = _plain(name)
    for architecture in registry.ARCHITECTURES:
        for title, config in architecture.published.items():
            names = {_plain(title), _plain(title.rpartition("/")[2])}
            if plain in names or architecture.aliases.get(plain) == title:
                return ZooModel(architecture, config, title)
    return None


def zoo_in_folder(folder: Path) -> ZooModel:
    """What a folder of any layout holds; headers are read.   Raises CheckpointError."""
    opened = registry.checkpoint_in(folder.expanduser().absolute())
    architecture = registry.told_by(opened) or CPM2  # EVA is of the same shapes
    if opened.kind != "bminf":
        config, _ = config_of(architecture, opened, architecture.tensors(opened), None)
        return ZooModel(architecture, config, architecture.title)
    path = opened.path / "config.json"
    written = read_config(path)
    fields = written.get("config")
    if not isinstance(fields, Mapping):
        raise CheckpointError(f'{path} has no object "config"; convert the original anew')
    config = architecture.parse(fields, opened.tensors, str(path))
    return ZooModel(architecture, config, architecture.title, packing_in(written, path))


def zoo_from_config(source: Mapping[str, Any], where: str) -> ZooModel:
    """The same from a configuration alone.   Raises CheckpointError where it does not say all."""
    architecture = registry.described_by(source)
    size = source.get("vocab_size")
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{where} has no vocab_size")
    config = replace(architecture.parse(source, {}, where), vocab_size=size)
    return ZooModel(architecture, config, architecture.title)


def plan_zoo(
    model: ZooModel,
    memory_limit: int | float | str | None,
    quantization: str | Format | None = "auto",
    max_length: int | None = None,
    max_batch_size: int = 1,
    host_memory: int | float | str | None = None,
) -> Plan:
    """The plan that loading `model` on a GPU would make.   memory_limit: None is no limit.

    quantization: "auto" is that of the folder, or the one that the model is loaded with by default.
    max_length: None is what the positions allow, or 512.   Raises ArgumentError or BudgetError.
    """
    limit = 2**60 if memory_limit is None else memory_limit
    if model.packing is None and model.architecture.is_head_cut:
        form = "int4" if quantization == "auto" else quantization
        return plan_glm(
            model.config, limit, form, None, max_length, max_batch_size, host_memory=host_memory
        )
    check_positive("max_batch_size", max_batch_size)
    positions = model.config.max_position_embeddings
    length = (positions or 512) if max_length is None else max_length
    check_positive("max_length", length)
    if positions is not None and length > positions:
        raise ArgumentError(f"max_length={length}, but the model has {positions} positions")
    return _planned(
        model.architecture, model.config, _packing(model, quantization), torch.float16, length,
        max_batch_size, limit, "cuda", host_memory,
    )  # fmt: skip


def _packing(model: ZooModel, quantization: str | Format | None) -> Packing:
    if model.packing is None:
        default = model.architecture.default_format
        return Packing(default if quantization == "auto" else parse_format(quantization))
    if quantization == "auto":
        return model.packing
    if parse_format(quantization, formats=registry.all_formats()) != model.packing.form:
        raise ArgumentError(
            f"quantization={quantization!r}, but the folder is packed as {model.packing.usual}; "
            "leave it out, or plan the checkpoint that it was made from"
        )
    return model.packing


def _planned(
    architecture: Architecture,
    config: Config,
    packing: Packing,
    dtype: torch.dtype,
    max_length: int,
    max_batch_size: int,
    memory_limit: int | float | str,
    device: str,
    host_memory: int | float | str | None,
) -> Plan:
    network, blocks = skeleton(architecture, config, dtype, packing, "auto")
    reserve = reserved_bytes(
        architecture, config, max_batch_size, max_length, dtype, packing.usual, device
    )
    limit = parse_bytes(memory_limit, "memory_limit")
    host_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    return plan_for(
        blocks, lay_out(network, blocks), limit, architecture.uses, reserve, device, host_bytes,
        packing.usual,
    )  # fmt: skip


_GLMS = {"glm-130b": GLM130B, "glm-10b": GLM10B}


def _plain(name: str) -> str:
    """Of a name, its letters and digits; the owner of a hub id counts."""
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _config(model: str | GLMConfig) -> GLMConfig:
    if isinstance(model, GLMConfig):
        return model
    if not isinstance(model, str) or model not in PUBLISHED_GLM:
        raise ArgumentError(f"model={model!r}; accepted: {', '.join(PUBLISHED_GLM)}, a GLMConfig")
    return PUBLISHED_GLM[model]
