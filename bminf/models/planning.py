"""What a limit would keep of a published GLM, before anything of it is on the disk."""

from __future__ import annotations

from dataclasses import replace

import torch

from bminf.arch.glm import GLM as Network
from bminf.arch.glm import GLMConfig
from bminf.errors import ArgumentError
from bminf.generation.arguments import check_positive
from bminf.keywords import known_keywords
from bminf.models.arguments import dtype_for, form_for
from bminf.models.config import PUBLISHED_GLM
from bminf.models.family import GLM_FORMATS
from bminf.models.glm_head import head_packing, num_head_parts
from bminf.models.load import Packing, lay_out, plan_for, skeleton
from bminf.models.workspace import reserved_bytes
from bminf.quantization.packed import Format
from bminf.scheduler.plan import Plan
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
    packing = Packing(form_for(quantization, GLM_FORMATS))
    head_form = form_for(head_quantization, GLM_FORMATS, "head_quantization")
    num_parts = num_head_parts(config, packing, head_form, dtype)
    packing = head_packing(packing, head_form, num_parts)
    with torch.device("meta"):
        network = Network(replace(config, num_head_parts=num_parts))
    network, blocks = skeleton(network, dtype, packing, "auto")
    reserve = reserved_bytes(config, max_batch_size, max_length, dtype, packing.usual, device)
    limit = parse_bytes(memory_limit, "memory_limit")
    host_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    return plan_for(blocks, lay_out(network, blocks), limit, {}, reserve, host_bytes, packing.usual)


def _config(model: str | GLMConfig) -> GLMConfig:
    if isinstance(model, GLMConfig):
        return model
    if not isinstance(model, str) or model not in PUBLISHED_GLM:
        raise ArgumentError(f"model={model!r}; accepted: {', '.join(PUBLISHED_GLM)}, a GLMConfig")
    return PUBLISHED_GLM[model]
