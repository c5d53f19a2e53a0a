"""No pickle makes our reader of torch files do anything but build plain containers.

bminf/checkpoint/pickled.py, bminf/checkpoint/torch_objects.py.
"""

from __future__ import annotations

import argparse
import copyreg
import os
import pickle
import random
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_files import FORMS, attacks, create, text, write_pickle
from tiny_zoo import save
from work import executed_lines

from bminf.checkpoint import pickled
from bminf.checkpoint.pickled import Placeholder
from bminf.checkpoint.torch_file import read_torch_file, weights_of
from bminf.errors import CheckpointError

ATTACKS = list(attacks(Path("none")))


def run_by_python(pickled: bytes) -> None:
    """What the readers of the world do with it."""
    try:
        pickle.loads(pickled)
    except Exception:
        pass  # some attacks act, then fail


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_does_nothing_and_is_a_placeholder(
    attack: str, form: str, tmp_path: Path
) -> None:
    harmed, safe = tmp_path / "harmed", tmp_path / "safe"
    run_by_python(b"\x80\x04" + attacks(harmed)[attack] + b".")
    assert harmed.exists(), "the attack is none"
    beside = b"}" + text("module") + b"}s" + text("rng") + attacks(safe)[attack] + b"s."
    found = read_torch_file(write_pickle(b"\x80\x04" + beside, tmp_path / "a.pt", form))
    assert not safe.exists()
    assert isinstance(found, dict) and found["module"] == {}
    keys = list(found["rng"]) if attack == "hash" else [found["rng"]]
    assert [type(key) for key in keys] == [Placeholder]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_among_the_weights_is_an_error(attack: str, form: str, tmp_path: Path) -> None:
    safe = tmp_path / "safe"
    pickled = b"\x80\x04}" + text("layer.weight") + attacks(safe)[attack] + b"s."
    path = write_pickle(pickled, tmp_path / "a.pt", form)
    with pytest.raises(CheckpointError, match=r"among the weights") as caught:
        weights_of(read_torch_file(path), path)
    assert "'layer.weight'" in str(caught.value) and str(path) in str(caught.value)
    assert not safe.exists()


def test_the_error_names_the_object(tmp_path: Path) -> None:
    path = save({"w": argparse.Namespace(lr=1.0)}, tmp_path / "a.pt", "zip")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace\(\)\) under the name 'w'"):
        weights_of(read_torch_file(path), path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", ["", "_v2"])
def test_what_rebuilds_a_tensor_with_attributes_calls_nothing(
    version: str, form: str, tmp_path: Path
) -> None:
    """torch would call any function, and the __setstate__ of any class."""
    rebuild = getattr(torch._tensor, f"_rebuild_from_type{version}")

    class Attack:
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments

        def __reduce__(self) -> object:
            return rebuild, self.arguments

    created = str(tmp_path / "created")
    nested = (create, torch.Tensor, (created,), {})
    saved = {
        "w": Attack(create, torch.Tensor, (created,), {}),
        "nested": Attack(rebuild, torch.Tensor, nested, {}),
        "kind": Attack(torch._utils._rebuild_tensor_v2, argparse.Namespace, (), {}),
    }
    found = read_torch_file(save(saved, tmp_path / "a.pt", form))
    assert isinstance(found, dict) and all(isinstance(v, Placeholder) for v in found.values())
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("arguments", [(), (1, 2, 3), (torch.ones(1), torch.Tensor, (), {})])
def test_a_tensor_of_wrong_attributes_is_damage(arguments: object, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> object:
            return torch._tensor._rebuild_from_type_v2, arguments

    with pytest.raises(CheckpointError, match="damaged"):
        read_torch_file(save({"w": Attack()}, tmp_path / "a.pt", "zip"))


@pytest.mark.parametrize("form", FORMS)
def test_a_registered_extension_is_not_looked_up(form: str, tmp_path: Path) -> None:
    copyreg.add_extension("saved_files", "create", 240)
    try:
        target = tmp_path / "created"
        pickled = b"\x80\x02}" + text("a") + b"\x82\xf0(" + text(str(target)) + b"tRs."
        path = write_pickle(pickled, tmp_path / "a.pt", form)
        found = read_torch_file(path)
        assert isinstance(found, dict) and isinstance(found["a"], Placeholder)
        assert not target.exists()
        run_by_python(pickled)
        assert target.exists()
    finally:
        copyreg.remove_extension("saved_files", "create", 240)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_imported(form: str, tmp_path: Path) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit")
    sys.path.insert(0, str(tmp_path))
    try:
        path = write_pickle(b"\x80\x02chostile_module\nname\n.", tmp_path / "a.pt", form)
        found = read_torch_file(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert isinstance(found, Placeholder) and found.name == "hostile_module.name"
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize(
    "persistent_id",
    [
        b"cos\nsystem\n(X\x02\x00\x00\x00lstR",
        text("no tuple"),
        b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x04t",
        b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x04t",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J"
        + b"\xff\xff\xff\xfft",
        b"(" + text("file") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04t",
        b")",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_a_persistent_id_is_a_storage_or_an_error(
    persistent_id: bytes, form: str, tmp_path: Path
) -> None:
    path = write_pickle(b"\x80\x02" + persistent_id + b"Q.", tmp_path / "a.pt", form)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_torch_file(path)


def deepspeed_state() -> dict[str, object]:
    """What training leaves beside the weights."""
    weights = OrderedDict(w=torch.randn(3, 5, dtype=torch.float16), b=torch.randn(3))
    linear = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(4)).sum().backward()
    optimizer.step()
    return {
        "module": weights,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, name="cpm"),
        "numpy_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
        "torch_rng_state": torch.get_rng_state(),
        "lr_scheduler": None,
        "counts": defaultdict(int, a=1),
        "csr_tensor_module_names": set(),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "global_steps": 10**30,
        "path": Path("a"),
        "linear": linear,
        "bytes": b"\x00\xff",
        "frozen": frozenset({1, 2}),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_what_training_leaves_beside_the_weights_is_no_obstacle(
    form: str, protocol: int, tmp_path: Path
) -> None:
    state, path = deepspeed_state(), tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    found = read_torch_file(path)
    assert isinstance(found, dict) and list(found) == list(state)
    weights = weights_of(found["module"], path)
    for name, tensor in state["module"].items():  # type: ignore[attr-defined]
        assert torch.equal(weights[name].read(), tensor)
    assert torch.equal(found["torch_rng_state"].read(), state["torch_rng_state"])
    assert found["random_rng_state"] == state["random_rng_state"]
    assert found["numpy_rng_state"][0] == "MT19937"
    assert isinstance(found["numpy_rng_state"][1], Placeholder)
    moments = found["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"].read(), state["optimizer"]["state"][0]["exp_avg"])
    for key in ("args", "counts", "path", "linear"):
        assert isinstance(found[key], Placeholder), key
    for key in ("lr_scheduler", "csr_tensor_module_names", "global_steps", "bytes", "frozen"):
        assert found[key] == state[key] and type(found[key]) is type(state[key]), key
    assert found["dtype"] is torch.float16 and found["device"] == "cpu"
    assert found["size"] == (2, 3)


def bombs(size: int) -> dict[str, bytes]:
    """Each would take hours, or all memory, if it were done with a size of 2**20."""
    items = b"](" + b"K\x00" * size + b"eq\x00"
    return {
        "copies of a long list": items + (b"cbuiltins\nset\n(h\x00tR0" * 2**12),
        "copies of a long text": text("a" * size) + b"q\x000"
        + (b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR0") * 2**12,
        "more steps than any file": b"N0" * 4 * size + b"N",
    }  # fmt: skip


@pytest.mark.parametrize("bomb", bombs(1))
def test_a_bomb_is_refused_in_a_bounded_number_of_steps(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 64th of the size and of the steps, whose work can be counted."""
    monkeypatch.setattr(pickled, "_MAX_STEPS", pickled._MAX_STEPS // 64)
    path = write_pickle(b"\x80\x02" + bombs(2**14)[bomb] + b".", tmp_path / "a.pt", "old")

    def refuse() -> None:
        with pytest.raises(CheckpointError, match="steps"):
            read_torch_file(path)

    assert executed_lines(refuse) < 20 * pickled._MAX_STEPS


def test_a_key_that_takes_forever_to_hash_is_a_placeholder(tmp_path: Path) -> None:
    nested = b"K\x01" + b"2\x86" * 200  # (x, x) 200 times: 2**200 leaves
    path = write_pickle(b"\x80\x02}" + nested + b"K\x01s.", tmp_path / "a.pt", "zip")
    found = read_torch_file(path)
    assert isinstance(found, dict) and [type(key) for key in found] == [Placeholder]


def test_a_deep_nest_is_let_go_of(tmp_path: Path) -> None:
    depth = 10**5
    path = write_pickle(
        b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", tmp_path / "a", "zip"
    )
    found, levels = read_torch_file(path), 0
    with pytest.raises(CheckpointError, match="a list"):
        weights_of(found, path)
    while found:
        assert isinstance(found, list)
        (found,), levels = found, levels + 1
    assert levels == depth - 1


def test_a_value_of_gigabytes_is_not_allocated(tmp_path: Path) -> None:
    path = write_pickle(
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", tmp_path / "a", "old"
    )
    with pytest.raises(CheckpointError, match="bytes"):
        read_torch_file(path)
    path = tmp_path / "sparse"
    head = write_pickle(b"\x80\x04\x8e" + (2**32).to_bytes(8, "little"), tmp_path / "a", "old")
    path.write_bytes(head.read_bytes())
    os.truncate(path, 2**33)
    with pytest.raises(CheckpointError, match="one value of 4294967296 bytes"):
        read_torch_file(path)
