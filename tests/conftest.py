from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples in every run, so that a change that fails has caused it; HYPOTHESIS_PROFILE
# set to "explore" looks for new ones.
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("repeat", derandomize=True, **UNTIMED)
hypothesis.settings.register_profile("explore", **UNTIMED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

os.environ.pop("PYTEST_ADDOPTS", None)  # it is for this pytest, not for those that tests start

# Workers of pytest-xdist share the cores; threads of each would wait for those of the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
    torch.set_num_threads(1)

# No test may reach for a network; transformers reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models and smollm2
# For benchmarks and tools, which are not installed; last, so that an installed bminf comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).parent / "kernels"))  # for its cases and launchers

import durations  # noqa: E402


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, unpacked from its GGUF file: once, because that takes 20 seconds."""
    from smollm2 import save_once_as_safetensors

    base = tmp_path_factory.getbasetemp()  # in a folder of the whole run, if there are workers
    return save_once_as_safetensors(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, written once."""
    from tiny_models import make

    root, folders = tmp_path_factory.mktemp("pretrained"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = root / name
            make(name).save_pretrained(folders[name])
        return folders[name]

    return folder


def pytest_configure(config: pytest.Config) -> None:
    if durations.IS_REWRITTEN:
        config.pluginmanager.register(durations.Recorder())
    config.option.loadscopereorder = False  # of pytest-xdist: files in the order of their length
    gc.disable()  # what is collected stays: to look for garbage among it took 2 s of 8


def pytest_collection_finish() -> None:
    gc.enable()
    leave_to_the_end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        leave_to_the_end()


def leave_to_the_end() -> None:
    """Thousands of tests, and what a file has imported, stay: no collection of garbage looks at
    them again. Many tests collect it, which took them 0.1 s each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    durations.mark_slow(items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        durations.longest_files_first(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
