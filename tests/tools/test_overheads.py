"""tools.overheads measures the bminf of each checkout, and says what it has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.overheads import Checkout, main, measure, running, table

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of a time before there were tools."""
    checkout, out = tmp_path / "checkout", tmp_path / "out.json"
    checkout.mkdir()
    (checkout / "bminf").symlink_to(ROOT / "bminf")
    sizes = ["--repeats", "1", "--blocks", "4", "--tokens", "2"]
    assert main([str(checkout), *sizes, "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert found["checkout"] == str(checkout)
    assert {name: len(samples) for name, samples in found["samples_s"].items()} == {
        "token": 1, "load": 1, "block": 1,
    }  # fmt: skip
    assert found["samples_s"]["block"] == [sample / 4 for sample in found["samples_s"]["token"]]
    assert min(found["samples_s"]["load"]) > 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "token", "load", "block",
    ]  # fmt: skip


def test_a_folder_without_bminf_is_refused(tmp_path: Path) -> None:
    """Otherwise an installed one would be compared with itself."""
    with pytest.raises(RuntimeError, match="has no bminf"), running(tmp_path, (1, 1)):
        raise AssertionError("it was started")


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    """As one whose bminf cannot be imported."""
    (tmp_path / "bminf").mkdir()
    (tmp_path / "bminf" / "__init__.py").write_text("raise SystemExit")
    with pytest.raises(RuntimeError, match="has ended"), running(tmp_path, (1, 1)):
        raise AssertionError("it was started")


class Told(Checkout):
    """A checkout whose measurements are written down; `order` is what was asked of all."""

    order: list[tuple[Path, str]]

    def ask(self, name: str) -> float:
        self.order.append((self.folder, name))
        return float(len(self.order))


def test_checkouts_take_turns_and_the_first_round_is_dropped() -> None:
    order: list[tuple[Path, str]] = []
    both = []
    for name in ("a", "b"):
        both.append(Told(Path(name), None))  # type: ignore[arg-type]
        both[-1].order = order
    measure(both, 2, ["token", "load"])
    a, b = Path("a"), Path("b")
    assert order == 3 * [(a, "token"), (b, "token"), (a, "load"), (b, "load")]
    assert both[0].samples_s == {"token": [5.0, 9.0], "load": [7.0, 11.0]}
    shown = table([checkout.as_json(2) for checkout in both])
    assert "7000.000 (5000.000-9000.000) x1.00" in shown and "x1.14" in shown
