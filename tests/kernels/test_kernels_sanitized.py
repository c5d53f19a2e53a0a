"""Launches of every kernel, repeated under sanitizers, and the lines that they reach.

What ran is recorded once, with its results. Each sanitizer has a process and a build of its own,
where the results must be the same bit for bit. ThreadSanitizer sees races between the threads of a
block, since the host build tells it of nothing but the kernels' own barriers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import line_coverage
import pytest
import recording
import replay
import torch
from cases import few_of_each
from grouped_cases import few_grouped
from host_launcher import HostLauncher, served_by

from bminf.cuda.source import kernel_folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    torch.manual_seed(0)
    for capability, cases in few_of_each().items():
        with served_by(HostLauncher(capability=capability, record=folder)):
            for case in cases:
                case.run("cpu")
    return folder


@pytest.mark.parametrize("sanitizer", ["address", "undefined", "thread"])
def test_kernels_are_clean_under(sanitizer: str, recorded: Path) -> None:
    done = replay.run(recorded, "--sanitizer", sanitizer)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-8000:]
    assert "0 wrong" in done.stdout


def test_every_line_of_the_kernels_is_reached(recorded: Path, tmp_path: Path) -> None:
    done = replay.run(recorded, "--coverage", str(tmp_path / "lines"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-8000:]
    files = [f"kernels/{path.name}" for path in kernel_folder().glob("*.cu*")]
    assert line_coverage.missed(tmp_path / "lines") == {name: [] for name in files}


def test_memory_behind_addresses_is_guarded_as_well(recorded: Path, tmp_path: Path) -> None:
    """The weights of routed experts, which stand in a table: here the first matrix is cut short."""
    launches = [recording.read(path) for path in sorted(recorded.glob("*linear_grouped*"))]
    assert len(launches) == len(few_grouped()) and all(one.links for one in launches)
    whole = launches[0]
    recording.write(tmp_path, replace(whole, reached=(whole.reached[0][:32], *whole.reached[1:])))
    done = replay.run(tmp_path, "--sanitizer", "address")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
