"""What the authors' own tokenizers gave, and the vocabularies they gave it with.

BMINF_GOLDEN and BMINF_VOCAB say where the sets lie; beside the repository, unless told.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("BMINF_GOLDEN", ROOT.parent / "shared" / "golden")) / "tokenizers"
VOCAB = Path(os.environ.get("BMINF_VOCAB", ROOT.parent / "shared" / "vocab"))

VOCAB_FILES = {
    "cpm1_original": "cpm1/chinese_vocab.model",
    "cpm1_bminf1": "cpm1/chinese_vocab.model",  # its pieces, one a line
    "cpm2_original": "cpm2/vocab.txt",
    "cpm2_bminf1": "cpm2/vocab.txt",
    "cpm2_encn_original": "cpm2_encn/vocab.txt",
    "eva_original": "eva/vocab.txt",
    "eva_bminf1_with_repo_vocab": "eva/vocab.txt",
}
WRONG = "eva_bminf1_with_repo_vocab"  # recorded with the bug that empty lines are skipped


def golden_set() -> dict[str, Any]:
    """name -> {"vocab_size", "cases": [{"text", "ids", "decoded"}], and maybe "vocab"}."""
    path = GOLDEN / "tokenizer_golden.json"
    return json.loads(path.read_text(encoding="utf-8")) if GOLDEN.is_dir() else {}


def vocab_file(name: str) -> Path:
    return VOCAB / VOCAB_FILES[name]


def sha256_recorded(name: str, record: dict[str, Any]) -> str | None:
    """The digest of the file that the set was made with; None where the set does not tell."""
    digests = [
        file["sha256"]
        for file in record.get("vocab", [])
        if Path(file["file"]).name == vocab_file(name).name
    ]
    return digests[0] if digests else None


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
