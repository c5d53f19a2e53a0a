"""What setup.py makes of kernels/cpu/: a wheel with them, or one without that says so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from programs import told_by

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("bminf", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FIRST_PRODUCT = """
import json, logging, torch, bminf
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("bminf").addHandler(handler)
layer = bminf.QuantizedLinear(torch.nn.Linear(64, 8))
for _ in range(2):
    y = layer(torch.ones(1, 64))
expected = torch.nn.functional.linear(torch.ones(1, 64), layer.dequantize(), layer.bias)
info = bminf.cpu_info()
print(json.dumps([info.level, info.library, bool(((y - expected).abs() < 1e-3).all()), said]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in NAMES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / name, **({"ignore": ignore} if path.is_dir() else {}))
    return folder


def made(checkout: Path, command: str, folder: Path, **environment: str) -> tuple[Path, str]:
    """The file that a command of setup.py makes, and what is said on the way."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "setup.py", command, "--dist-dir", str(folder)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file, done.stdout + done.stderr


def first_product(wheel: Path, folder: Path) -> list[object]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {k: v for k, v in os.environ.items() if k != "BMINF_CPU_LEVEL"}
    told = told_by(FIRST_PRODUCT, cwd=folder, env={**environment, "PYTHONPATH": str(folder)})
    assert isinstance(told, list)
    return told


def test_a_wheel_carries_the_kernels_for_every_python(checkout: Path, tmp_path: Path) -> None:
    wheel, _ = made(checkout, "bdist_wheel", tmp_path / "dist")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    level, library, is_right, said = first_product(wheel, tmp_path / "installed")
    assert level != "none" and is_right and not said
    assert library == str(tmp_path / "installed/bminf/cpu/_kernels.so")


def test_without_a_compiler_an_install_works_and_says_what_it_lacks(
    checkout: Path, tmp_path: Path
) -> None:
    wheel, said = made(checkout, "bdist_wheel", tmp_path / "dist", CC="false", CXX="false")
    assert "bminf is installed without its CPU kernels, which need a C++17 compiler" in said
    level, library, is_right, warnings = first_product(wheel, tmp_path / "installed")
    assert (level, library, is_right) == ("none", None, True)
    assert isinstance(warnings, list) and len(warnings) == 1
    assert "install a C++ compiler" in warnings[0]


def test_an_archive_of_the_source_has_all_that_is_compiled(checkout: Path, tmp_path: Path) -> None:
    archive, _ = made(checkout, "sdist", tmp_path / "dist")
    with tarfile.open(archive) as files:
        names = {Path(name).name for name in files.getnames() if "/kernels/cpu/" in name}
    assert names == {path.name for path in (ROOT / "kernels/cpu").iterdir()}
