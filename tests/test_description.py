"""bminf.json: what is written is read; what is not written so is refused.

Whole folders whose descriptions are wrong are in test_loading_errors.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bminf.description import (
    DESCRIPTION_FILE,
    Description,
    PackedLinear,
    is_saved,
    read_description,
    saved_tensors,
)
from bminf.errors import CheckpointError
from bminf.quantization.packed import INT8, Format

LINEARS = {
    "a.up": PackedLinear(INT8, (6, 4), torch.bfloat16),
    "a.down": PackedLinear(Format(4, 16, True), (4, 6), torch.float32),
    "a.side": PackedLinear(Format(4, 16, True, 8), (4, 6), torch.float16),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert not is_saved(tmp_path)
    Description(LINEARS).write(tmp_path)
    assert is_saved(tmp_path)
    found = read_description(tmp_path).packed
    assert {name: (one.form, one.shape, one.dtype) for name, one in found.items()} == {
        name: (one.form, one.shape, one.dtype) for name, one in LINEARS.items()
    }


def test_a_packed_weight_has_a_shape_and_no_values(tmp_path: Path) -> None:
    Description(LINEARS).write(tmp_path)
    linear = read_description(tmp_path).packed["a.up"]
    assert (linear.shape, linear.dtype) == ((6, 4), torch.bfloat16)
    for read in (linear.read, lambda: linear.rows(0, 1), lambda: linear.columns(0, 1)):
        with pytest.raises(CheckpointError, match=r"'a.up' in .* is packed; load it as it was"):
            read()


@pytest.mark.parametrize(
    "field",
    [
        {"bits": 3}, {"group_size": 7}, {"has_minimum": True}, {"dtype": "int8"}, {"dtype": None},
        {"shape": [6]}, {"shape": [6, 0]}, {"shape": [6, True]}, {"shape": [6.0, 4]},
        {"shape": [1, 2, 3, 4]}, {"shape": 6},
    ],
    ids=str,
)  # fmt: skip
def test_a_format_that_is_none_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    Description(LINEARS).write(tmp_path)
    path = tmp_path / DESCRIPTION_FILE
    written = json.loads(path.read_text())
    del written["checksums"]  # as an older version wrote it
    written["packed"]["a.up"] |= field
    path.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"packed\['a.up'\] is .* says no format, shape"):
        read_description(tmp_path)


def test_a_folder_without_weights_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither bminf\.safetensors nor"):
        saved_tensors(tmp_path)
