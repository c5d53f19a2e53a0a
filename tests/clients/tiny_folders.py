"""python tiny_folders.py llama|glm FOLDER: a tiny random model, to be served."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "cli")]

if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "llama":
        from tiny_llama import TEMPLATE, save_llama

        save_llama(folder, TEMPLATE)
    else:
        from tiny_glm import tiny_model

        folder.mkdir(parents=True, exist_ok=True)
        tiny_model("glm10b").write_original(folder)
