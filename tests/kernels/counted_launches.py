"""How many kernels a GPU would be asked to run: launches of ours, which a NotingLauncher has, and
operations of torch that launch something, which this mode counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Not one of these runs anything on a GPU.
NO_LAUNCH = {
    "views, which are another look at the same memory": (
        "view", "_unsafe_view", "reshape", "expand", "slice", "select", "transpose", "permute",
        "t", "unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "chunk", "unbind",
        "alias", "detach", "narrow", "diagonal", "unfold",
    ),
    "memory from torch's own allocator, which is left as it is": (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    ),
    "what the host knows by itself": ("sym_size", "sym_stride", "sym_numel", "is_same_size"),
}  # fmt: skip
_NAMES = {name for names in NO_LAUNCH.values() for name in names}


class CountingMode(TorchDispatchMode):
    """counts: of each operation that would launch a kernel, or copy, how often it was called.

    One that launches several, such as a sort, counts as one; a decode step has none of those. Not
    under inference_mode(), where operations arrive before they are taken apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in _NAMES:
            self.counts[name] += 1
        return function(*arguments, **(keywords or {}))
