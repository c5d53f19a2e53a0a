"""What a session runs, in which order, and how long each of it may take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PROBE, ZOO, GLM, OFFLOAD = "probe.json", "zoo-cuda.json", "glm-cuda.json", "offload-cuda.json"

SECONDS = 470.0
"""Of a whole session. Where a GPU is lent for 15 minutes, two starts fit:

    start and transfer 120 + session 470 + its end 8 + giving back 30    = 628
    start and transfer 120 + inspection 90 + its end 8 + giving back 30  = 248
                                                                 of 900    876

or in place of the inspection some steps once more (--only), 90 seconds of them.
"""

START_S = 15.0
"""Of a process, with torch, before it measures; and for its last group."""


@dataclass(frozen=True)
class Step:
    """A command of Python's -m, or of a tool.

    seconds: its limit.   files: what it writes into the folder of the session.
    is_tests: it is pytest, whose reports are read.   is_spare: it runs only in time that the others
    leave, and may be left out.   tool: a program and its options, before those of Python, if any.
    environment: variables for it alone.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    files: tuple[str, ...] = ()
    is_tests: bool = False
    is_spare: bool = False
    tool: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def command(self) -> list[str]:
        """As a process gets it."""
        python = (sys.executable, "-m", *self.arguments) if self.arguments else ()
        return [*self.tool, *python]

    @property
    def reports(self) -> str:
        """The file of the reports of its tests."""
        return f"{self.name.replace(' ', '-')}.jsonl"


def steps(folder: Path) -> list[Step]:
    """What matters most comes first; all their limits together are less than SECONDS.

    No step is told to keep attention away from cuDNN (TORCH_CUDNN_SDPA_DEPRIORITIZED): models that
    are wrapped have to be right as their users run them. What it costs, the probe measures.
    """
    probe = ("benchmarks.gpu_session.probe", "--out", str(folder / PROBE))
    return [
        Step("probe", probe, 25, files=(PROBE,)),
        _tests("kernel tests", KERNEL_TESTS, 60, f"not {COMPILED} and not {SPEED}"),
        _kernels(folder, "large", 40, "--ops", "weight-only", *_LARGE, *_ROWS),
        _tests("cuda tests", CUDA_TESTS, 75),
        _zoo(folder, 70),
        _tests("zoo tests", "tests/gpu/test_zoo.py", 45),
        _glm(folder, 45),
        _kernels(folder, "w8a8", 45, "--ops", "w8a8", "gated", "rows", "dequantize", *_ROWS),
        _kernels(folder, "small", 30, "--ops", "weight-only", *_SMALL, *_ROWS, "512"),
        _kernels(folder, "bfloat16", 30, *_BFLOAT16, *_LARGE[:2], *_ROWS),
    ]


KERNEL_TESTS = "tests/gpu/test_kernels.py"
CUDA_TESTS = "tests/gpu/test_gpu_attention.py tests/gpu/test_cuda.py"
BENCHMARK_TESTS = "tests/test_benchmarks.py tests/test_model_benchmark.py"
# Of them these take long and tell least; they are steps of their own, the last ones.
COMPILED, SPEED = "test_a_compiled_layer", "test_the_targets"

_LARGE = ("--shapes", "12288x12288", "32768x12288")
_SMALL = ("--shapes", "4096x4096", "10240x4096")
_ROWS = ("--rows", "1", "4", "16", "128", "2048")
_OTHER_ROWS = ("--rows", "2", "8", "32", "64", "512")
_BFLOAT16 = ("--ops", "weight-only", "w8a8", "--dtype", "bfloat16")
_FORMATS = ("int4", "int4-g32-minimum", "int4-g64", "int4-g128", "int4-row", "int8-g128")


def spare_steps(folder: Path) -> list[Step]:
    """What is run behind the others, in the time that they leave."""
    model = ("--model", "random", "--hidden-size", "2048", "--layers", "8", "--tokens", "16")
    offload = ("benchmarks.run", "offload", "--device", "cuda", "--dtype", "float16", *model)
    runs = ("--rounds", "1", "--repeats", "2", "--out", str(folder / OFFLOAD))
    formats = ("--ops", "weight-only", "--formats", *_FORMATS, *_LARGE[:2], *_ROWS)
    return [
        Step("offload", (*offload, *runs), 50, files=(OFFLOAD,), is_spare=True),
        _kernels(folder, "formats", 32, *formats, is_spare=True),
        _tests("compiled layers", KERNEL_TESTS, 45, COMPILED, is_spare=True),
        _tests("speed", KERNEL_TESTS, 40, SPEED, is_spare=True),
        _kernels(folder, "rows", 45, "--ops", "weight-only", *_OTHER_ROWS, is_spare=True),
        _tests("benchmark tests", BENCHMARK_TESTS, 40, is_spare=True),
    ]


def _tests(name: str, files: str, seconds: float, chosen: str = "", is_spare: bool = False) -> Step:
    """-vv, as pyproject.toml has a -q: a name for each test, also where pytest is killed."""
    choice = ("-k", chosen) if chosen else ()
    arguments = ("pytest", "-m", "gpu", *files.split(), *choice, "-vv", "--durations=15")
    return Step(name, arguments, seconds, is_tests=True, is_spare=is_spare)


def _kernels(
    folder: Path, name: str, seconds: float, *arguments: str, is_spare: bool = False
) -> Step:
    file = f"kernels-cuda-{name}.json"
    own = ("benchmarks.run", "kernels", "--device", "cuda", "--out", str(folder / file))
    limit = ("--seconds", str(seconds - START_S))
    name = f"kernels {name}"
    return Step(name, (*own, *limit, *arguments), seconds, files=(file,), is_spare=is_spare)


def _zoo(folder: Path, seconds: float) -> Step:
    """CPM-2 in full, resident and then streamed as on a small card; few steps, each as any other.

    No model is begun after 40 seconds: the resident one is surely run, and the other one has time
    to be loaded.
    """
    case = ("benchmarks.run", "zoo", "--device", "cuda", "--memory-limit", "16GB", "6GB")
    runs = ("--steps", "24", "--warmup", "0", "--repeats", "2", "--seconds", "40")
    return Step("zoo", (*case, *runs, "--out", str(folder / ZOO)), seconds, files=(ZOO,))


def _glm(folder: Path, seconds: float) -> Step:
    """Some layers of GLM-130B in full size, resident and then most of them streamed."""
    case = ("benchmarks.run", "glm", "--device", "cuda", "--layers", "6", "--seconds", "25")
    runs = ("--memory-limit", "16GB", "4GB", "--encode", "512", "--decode", "16")
    return Step("glm", (*case, *runs, "--out", str(folder / GLM)), seconds, files=(GLM,))
