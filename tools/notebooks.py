"""Executes notebooks as their readers do, from an empty folder with an empty home, and keeps what
they said:

    python -m tools.notebooks examples/*.ipynb

Cells tagged "install" are left as they are: what they install is there. Those tagged "timing" say
something else each time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

INSTALL, TIMING = "install", "timing"

_TIMEOUT_S = 300
_STARTUP = "home/ipython/profile_default/startup/read_once.py"
_READ_ONCE = """from bminf.cli.models import gguf_read_once
_reading = gguf_read_once("of any name.gguf")
_reading.__enter__()
del gguf_read_once
"""
_FOLDERS = {"HOME": "home", "IPYTHONDIR": "home/ipython", "TMPDIR": "tmp",
    "JUPYTER_RUNTIME_DIR": "runtime", "XDG_CACHE_HOME": "home/cache"}  # fmt: skip


def read(file: Path) -> Any:
    """The notebook in a file."""
    import nbformat

    return nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]


def executed(notebook: Any, folder: Path, fonts: Path | None = None) -> Any:
    """A copy of `notebook` with what its cells say, run in `folder`, which is empty.

    fonts: a folder where matplotlib finds the list of fonts that another run has made; it takes
    seconds to make.   Raises nbclient's CellExecutionError where a cell does.
    """
    from copy import deepcopy

    from nbclient import NotebookClient

    run = deepcopy(notebook)
    left = {cell.id: cell for cell in run.cells if INSTALL in _tags(cell)}
    run.cells = [cell for cell in run.cells if cell.id not in left]
    for name in {*_FOLDERS.values(), "work"}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    if any("gguf_file=" in cell.source for cell in run.cells):
        # transformers reads such a header again and again, which takes longer than all else.
        (folder / _STARTUP).parent.mkdir(parents=True)
        (folder / _STARTUP).write_text(_READ_ONCE, encoding="utf-8")
    settings = {name: str(folder / place) for name, place in _FOLDERS.items()}
    settings |= {"MPLCONFIGDIR": str(fonts or folder / "home" / "matplotlib")}
    # One thread, as in the tests, and no network; no bars, and no advice to install widgets that
    # draw them, which has a path in it.
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    settings |= {"PYTHONWARNINGS": "ignore:IProgress not found"}
    client = NotebookClient(
        run, timeout=_TIMEOUT_S, record_timing=False,
        resources={"metadata": {"path": str(folder / "work")}},
    )  # fmt: skip
    client.execute(env=os.environ | settings)
    by_id = {cell.id: cell for cell in run.cells}
    run.cells = [by_id.get(cell.id, left.get(cell.id)) for cell in notebook.cells]
    for number, cell in enumerate(code_cells(run), 1):
        cell.execution_count, cell.outputs = number, list(_joined(cell.outputs))
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
    run.metadata = notebook.metadata
    return run


def code_cells(notebook: Any) -> Iterator[Any]:
    """Those that are run."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and INSTALL not in _tags(cell):
            yield cell


def is_timing(cell: Any) -> bool:
    """Whether a cell says something else each time."""
    return TIMING in _tags(cell)


def said(cell: Any) -> str:
    """All that a cell has printed or returned, as text."""
    texts = [
        output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        for output in cell.outputs
    ]
    return "".join(texts)


def shows_picture(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def _joined(outputs: Sequence[Any]) -> Iterator[Any]:
    """Pieces of a text come as they were sent, which differs from run to run."""
    last: Any = None
    for output in outputs:
        is_stream = output["output_type"] == "stream"
        if is_stream and last is not None and last.get("name") == output["name"]:
            last["text"] += output["text"]
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


def _tags(cell: Any) -> Sequence[str]:
    tags: Sequence[str] = cell.metadata.get("tags", ())
    return tags


def main(files: Sequence[str]) -> int:
    """0, after each file was executed and written."""
    import nbformat

    for name in files:
        start_s = os.times()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(read(Path(name)), Path(folder))
        nbformat.write(notebook, name)  # type: ignore[no-untyped-call]
        cpu_s = sum(os.times()[:4]) - sum(start_s[:4])
        print(f"{name}: {cpu_s:.1f} s of CPU, {time.strftime('%H:%M:%S')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
