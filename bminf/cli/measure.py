"""The memory of this process, and its peak during a piece of work."""

from __future__ import annotations

import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.002


def rss_anon_bytes() -> int | None:
    """Bytes of anonymous memory of this process; None where the system does not say (not Linux).

    Anonymous memory leaves out pages of mapped files, which the system can take back at any time.
    """
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


class PeakMemory:
    """Context manager that measures the peak of memory in its body, `peak_bytes` (None: unknown).

    is_cuda: bytes of torch's allocator on the GPU; otherwise anonymous memory of the process above
    `baseline_bytes`, sampled every 2 ms in a thread of its own.
    """

    def __init__(self, is_cuda: bool, baseline_bytes: int | None = 0) -> None:
        self.peak_bytes: int | None = None
        self._is_cuda = is_cuda
        self._baseline_bytes = baseline_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._is_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self._baseline_bytes is not None:
            self._sample()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_cuda:
            import torch

            self.peak_bytes = torch.cuda.max_memory_allocated()
        elif self._baseline_bytes is not None:
            self._stop.set()
            self._thread.join()
            self._sample()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        held = rss_anon_bytes()
        if held is not None and self._baseline_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, held - self._baseline_bytes)
