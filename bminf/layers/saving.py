"""What save_pretrained() may do with packed weights: nothing, for from_pretrained() knows none.

It would put random weights in their place without a word. A state dict may hold packed weights, as
load_state_dict() takes them back, and so may the base that adapters are saved without.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any

import torch

from bminf.errors import UnsupportedModelError

_REFUSAL = (
    "from_pretrained() does not know the packed weights of a quantized model and would put random "
    "ones in their place; save with torch.save(model.state_dict()), or wrap with quantization=False"
)
PART = "this is one rank's part of a model, and no model by itself; save it from one process"
_SAVERS = ("save_pretrained", "_save_pretrained")  # transformers, diffusers; huggingface_hub


def refuse_to_save(model: torch.nn.Module) -> None:
    """Let save_pretrained() of `model`, and of each part that has it, raise before it begins."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _SavePretrained(module)


def check_not_saved(reason: str = _REFUSAL) -> None:
    """Raise UnsupportedModelError if a packed weight is asked for inside save_pretrained().

    Whoever saves a model around a packed part, or calls something else that ends there, asks the
    packed linears for their state; only the calls on the stack tell for what.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in _SAVERS:
        frame = frame.f_back
    if frame is not None and not _saves_adapters_only(frame.f_locals.get("self")):
        raise UnsupportedModelError(reason)


class _SavePretrained:
    """Stands in the __dict__ of a module, in front of the method.

    It does not hold the module, which would then wait for the collector of cycles to be freed.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module(),)  # a copy of the module gets one of its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if not _saves_adapters_only(module):
            raise UnsupportedModelError(_REFUSAL)
        return type(module).save_pretrained(module, *args, **kwargs)


def _saves_adapters_only(module: Any) -> bool:
    """Whether save_pretrained() of `module` leaves out the weights that adapters stand beside."""
    if any(kind.__name__ == "PeftModel" for kind in type(module).__mro__):
        return True
    # transformers' own way to adapters; those of diffusers save all the same.
    has_adapters = bool(getattr(module, "_hf_peft_config_loaded", False))
    return has_adapters and hasattr(module, "get_adapter_state_dict")
