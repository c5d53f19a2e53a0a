"""What setup.py makes: a wheel with the kernels, or one without that says so; what is in the
archives, what they say of themselves, and the wheel as tools/release.py repairs it.

tools/smoke.py runs in each that is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import told_by

import bminf
from tools import release

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    *("bminf", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "constraints.txt"),
)
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


def smoke(wheel: Path, folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {k: v for k, v in os.environ.items() if k != "BMINF_CPU_LEVEL"}
    told: dict[str, Any] = told_by(
        ROOT / "tools" / "smoke.py", cwd=folder, env={**environment, "PYTHONPATH": str(folder)}
    )
    assert told["is_right"] and told["version"] == bminf.__version__
    assert told["file"] == str(folder / "bminf" / "__init__.py")
    return told


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(checkout, "bdist_wheel", tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(checkout, "sdist", tmp_path_factory.mktemp("sdist"))[0]


def test_a_wheel_carries_the_kernels_for_every_python(wheel: Path, tmp_path: Path) -> None:
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    told = smoke(wheel, tmp_path)
    assert told["level"] != "none" and told["said"] == []
    assert told["library"] == str(tmp_path / "bminf/cpu/_kernels.so")
    sources = [*(ROOT / "kernels").glob("*.cu"), *(ROOT / "kernels").glob("*.cuh")]
    assert told["kernels"] == len(sources) and told["page"]


def test_without_a_compiler_an_install_works_and_says_what_it_lacks(
    checkout: Path, tmp_path: Path
) -> None:
    wheel, said = made(checkout, "bdist_wheel", tmp_path / "dist", CC="false", CXX="false")
    assert "bminf is installed without its CPU kernels, which need a C++17 compiler" in said
    told = smoke(wheel, tmp_path / "installed")
    assert (told["level"], told["library"]) == ("none", None)
    (warning,) = told["said"]
    assert "install a C++ compiler" in warning


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other tags")
def test_a_repaired_wheel_says_on_which_systems_it_runs(wheel: Path, tmp_path: Path) -> None:
    """The same files, under a name that an index takes."""
    repaired = release.repair(wheel, tmp_path)
    assert re.search(r"-py3-none-manylinux_2_\d+_", repaired.name)
    before, after = (
        {name for name in zipfile.ZipFile(path).namelist() if not name.endswith(("/RECORD", "/"))}
        for path in (wheel, repaired)
    )
    assert before == after
    assert smoke(repaired, tmp_path / "installed")["level"] != "none"


def test_an_archive_of_the_source_has_all_that_is_compiled_and_no_part_of_the_tests(
    archive: Path,
) -> None:
    with tarfile.open(archive) as files:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in files.getnames()}
    kernels = {f"kernels/cpu/{path.name}" for path in (ROOT / "kernels/cpu").iterdir()}
    assert kernels <= names and {name for name in NAMES if "." in name} <= names
    assert [name for name in names if name.startswith(("tests", "benchmarks", "tools"))] == []


def test_a_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(files.read(name))
        names = files.namelist()
    assert metadata["Name"] == "bminf" and metadata["Version"] == bminf.__version__
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# BMInf")
    classifiers = metadata.get_all("Classifier", [])
    assert "Development Status :: 4 - Beta" in classifiers
    minors = [c.rpartition(".")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert minors == ["10", "11", "12", "13"]
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Source", "Documentation", "Changelog", "Issues"}
    extras = {"demo", "icetk", "serve", "eval", "docs", "test"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))
    assert {"bminf/py.typed", "bminf/server/page.html", "bminf/cli/tables/published.json"} <= {
        *names
    }
    assert not [name for name in names if name.startswith(("tests/", "tools/", "benchmarks/"))]


def test_what_names_the_version_agrees() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bminf.__version__ and citation["license"] == "Apache-2.0"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert releases[0] == (bminf.__version__, str(citation["date-released"]))
    assert re.fullmatch(r"\d+\.\d+\.\d+", bminf.__version__)


def test_a_release_checks_what_was_installed() -> None:
    told = {"is_right": True, "kernels": 3, "page": True, "level": "avx2"}
    release.check(told, has_kernels=True)
    release.check({**told, "level": "none"}, has_kernels=False)
    for wrong in ({"is_right": False}, {"kernels": 0}, {"page": False}, {"level": "none"}):
        with pytest.raises(RuntimeError, match="not as it should be"):
            release.check({**told, **wrong}, has_kernels=True)
