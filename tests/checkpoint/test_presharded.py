"""bminf/checkpoint/presharded.py: all ranks and parts are one model, in halves or in 8 bits, and an
index says what must be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import check
from tiny_zoo import save

from bminf.checkpoint.folder import Checkpoint, open_checkpoint
from bminf.checkpoint.model_parallel import COLUMNS, REPLICATED, ROWS, SplitTable
from bminf.checkpoint.quantized import Quantized
from bminf.errors import CheckpointError
from bminf.quantization.packed import Format, codes_of, dequantize

WIDTH, NUM_PARTS, NUM_GROUPS = 8, 3, 4
UP, OUT = "h.0.up_w", "h.0.out_w"
TABLE = SplitTable(
    "a toy's kind",
    {r".*up_[wb]": ROWS, r".*out_w": COLUMNS, r".*(out_b|norm_w)": REPLICATED},
    lambda names: "embeddings.weight" in names,
    {"out_w": "up_w"},
)
SHARED = {"embeddings.weight": torch.randn(6, WIDTH).half(), "norm.weight": torch.ones(WIDTH)}
SPLIT = {
    "h.0.norm_w": torch.randn(WIDTH).half(),
    UP: torch.randn(32, WIDTH).half(),
    "h.0.up_b": torch.randn(32).half(),
    OUT: torch.randn(WIDTH, WIDTH).half(),
    "h.0.out_b": torch.randn(WIDTH).half(),
}
INDEX = "ds_inference_config.json"


def part(name: str, num_ranks: int, rank: int) -> torch.Tensor:
    axis = TABLE.split(name).axis
    return SPLIT[name] if axis is None else SPLIT[name].chunk(num_ranks, axis)[rank].contiguous()


def codes_and_scales(num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_rows, num_columns) int8, and (4, 3), the first four of which count."""
    codes = torch.randint(-128, 128, (num_rows, num_columns), dtype=torch.int8)
    return codes, torch.rand(NUM_GROUPS, 3) + 0.01


def as_saved(tensor: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """A parameter that carries its scale, and the scale beside it."""
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    parameter.scale = scale  # type: ignore[attr-defined]
    return [parameter, scale]


def write_files(folder: Path, ranks: list[dict[str, Any]], dtype: str, form: str = "zip") -> Path:
    """Two names a part; the last part is empty."""
    folder.mkdir(exist_ok=True)
    save(SHARED, folder / "non-tp.pt", form)
    for rank, values in enumerate(ranks):
        for number in range(NUM_PARTS + 1):
            names = list(values)[number * 2 : number * 2 + 2]
            save({name: values[name] for name in names}, file_of(folder, rank, number), form)
    tp = [f"tp_{r:02d}_{n:02d}.pt" for n in range(NUM_PARTS + 1) for r in range(len(ranks))]
    index = {
        "type": "toy", "base_dir": "/not/here", "version": 1.0, "parallelization": "tp",
        "checkpoints": {"non_tp": ["non-tp.pt"], "tp": tp}, "tp_size": len(ranks), "dtype": dtype,
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def file_of(folder: Path, rank: int, number: int) -> Path:
    return folder / f"tp_{rank:02d}_{number:02d}.pt"


def write_halves(folder: Path, num_ranks: int, form: str = "zip") -> Path:
    def saved(name: str, rank: int) -> Any:
        tensor = part(name, num_ranks, rank)
        return as_saved(tensor.t(), torch.tensor(1)) if name in (UP, OUT) else tensor

    ranks = [{name: saved(name, rank) for name in SPLIT} for rank in range(num_ranks)]
    return write_files(folder, ranks, "float16", form)


def write_codes(folder: Path, num_ranks: int) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each rank has: codes and scales where SPLIT has a matrix."""
    shapes = {UP: (32 // num_ranks, WIDTH), OUT: (WIDTH, WIDTH // num_ranks)}
    ranks: list[dict[str, Any]] = [
        {
            name: codes_and_scales(*shapes[name]) if name in shapes else part(name, num_ranks, rank)
            for name in SPLIT
        }
        for rank in range(num_ranks)
    ]
    saved = [{n: as_saved(*v) if n in shapes else v for n, v in rank.items()} for rank in ranks]
    return write_files(folder, saved, "int8"), ranks


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, [TABLE])


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_and_parts_are_the_whole_model(num_ranks: int, form: str, tmp_path: Path) -> None:
    write_halves(tmp_path, num_ranks, form)
    for path in (tmp_path, tmp_path / INDEX):
        found = opened(path)
        assert (found.kind, found.path) == ("presharded", tmp_path)
        assert list(found.tensors) == [*SHARED, *SPLIT]
        for name, tensor in {**SHARED, **SPLIT}.items():
            check(found.tensors[name], tensor)
    check(found.tensors[UP].rows(3, 9).columns(1, 5), SPLIT[UP][3:9, 1:5])
    check(found.tensors[OUT].rows(3, 7).columns(1, 5), SPLIT[OUT][3:7, 1:5])


def test_the_index_has_two_spellings(tmp_path: Path) -> None:
    path = write_halves(tmp_path, 1) / INDEX
    path = path.rename(tmp_path / "ds-inference_config.json")
    for given in (tmp_path, path):
        assert list(opened(given).tensors) == [*SHARED, *SPLIT]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_codes_stay_codes_with_the_scales_of_their_rows(num_ranks: int, tmp_path: Path) -> None:
    folder, ranks = write_codes(tmp_path, num_ranks)
    tensors = opened(folder).tensors
    for name, axis in ((UP, 0), (OUT, 1)):
        stored = tensors[name]
        assert isinstance(stored, Quantized) and stored.shape == tuple(SPLIT[name].shape)
        values = []
        for rank in ranks:
            codes, scale = rank[name]
            runs = codes.float().chunk(NUM_GROUPS)
            of_runs = scale.flatten().tolist()[:NUM_GROUPS]
            values.append(torch.cat([run * s for run, s in zip(runs, of_runs, strict=True)]))
        whole = torch.cat(values, axis)
        check(stored, whole)
        check(stored.rows(3, 6), whole[3:6])
        packed = stored.packed()
        assert torch.equal(codes_of(packed), torch.cat([rank[name][0] for rank in ranks], axis))
        assert torch.equal(dequantize(packed, torch.float32), whole)
    group_size = WIDTH // num_ranks if num_ranks > 1 else None
    up, out = tensors[UP], tensors[OUT]
    assert isinstance(up, Quantized) and isinstance(out, Quantized)
    assert (up.form, out.form) == (Format(8), Format(8, group_size))
    check(out.columns(0, WIDTH // num_ranks), out.read()[:, : WIDTH // num_ranks])
    check(tensors["h.0.up_b"], SPLIT["h.0.up_b"])


def change_index(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / INDEX).read_text())
    for key, value in changes.items():
        (told["checkpoints"] if key in ("non_tp", "tp") else told)[key] = value
    (folder / INDEX).write_text(json.dumps(told))


def change(path: Path, changes: dict[str, Any]) -> None:
    given = {**torch.load(path, weights_only=False), **changes}
    torch.save({name: value for name, value in given.items() if value is not None}, path)


def named(folder: Path) -> list[str]:
    names: list[str] = json.loads((folder / INDEX).read_text())["checkpoints"]["tp"]
    return names


def without(name: str) -> Callable[[Path], None]:
    return lambda f: change_index(f, tp=[other for other in named(f) if other != name])


def rename(path: Path, name: str) -> None:
    """In the index, too, where it comes last."""
    others = [other for other in named(path.parent) if other != path.name]
    path.rename(path.with_name(name))
    change_index(path.parent, tp=[*others, name])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda f: file_of(f, 1, 1).unlink(), r"tp_01_01\.pt is missing, which ds_inf"),
    "the shared file": (lambda f: (f / "non-tp.pt").unlink(), r"non-tp\.pt is missing"),
    "a name": (without("tp_01_01.pt"), r"does not name tp_01_01\.pt, and is of 2 ranks"),
    "a part": (
        lambda f: change_index(f, tp=[n for n in named(f) if "_01.pt" not in n]), "tp_00_01",
    ),
    "a rank": (lambda f: change_index(f, tp=[n for n in named(f) if "tp_01" not in n]), "tp_01_00"),
    "all names": (lambda f: change_index(f, tp=[]), r"does not name tp_00_00\.pt"),
    "a larger degree": (lambda f: change_index(f, tp_size=10**12), r"does not name tp_02_00\.pt"),
    "a smaller degree": (lambda f: change_index(f, tp_size=1), r"names tp_01_00\.pt; .* 1 ranks"),
    "no degree": (lambda f: change_index(f, tp_size=0), 'a number "tp_size"'),
    "a degree in words": (lambda f: change_index(f, tp_size="2"), 'a number "tp_size"'),
    "a far part": (
        lambda f: rename(file_of(f, 1, 1), "tp_01_999999.pt"), r"does not name tp_00_04\.pt",
    ),
    "another name": (
        lambda f: change_index(f, tp=[*named(f), "non-tp.pt"]), r"names non-tp\.pt; it should name"
    ),
    "a part twice": (
        lambda f: rename(file_of(f, 1, 1), "tp_1_2.pt"), r"names tp_1_2\.pt; .*2 ranks RR .*once",
    ),
    "a name twice": (lambda f: change_index(f, tp=[*named(f), named(f)[3]]), "names tp_.* twice"),
    "a path": (lambda f: change_index(f, tp=["../tp_00_00.pt"]), "should be one beside it"),
    "an absolute path": (lambda f: change_index(f, non_tp=["/etc/passwd"]), "should be one beside"),
    "a number as a name": (lambda f: change_index(f, tp=[[3]]), "should be one beside it"),
    "a text as a list": (lambda f: change_index(f, non_tp="non-tp.pt"), 'the lists "non_tp" and'),
    "a list of all": (lambda f: change_index(f, checkpoints=["non-tp.pt"]), "should have a"),
    "no lists": (lambda f: change_index(f, checkpoints=None), 'the lists "non_tp" and "tp"'),
    "another split": (lambda f: change_index(f, parallelization="pp"), '"parallelization" "tp"'),
    "another dtype": (lambda f: change_index(f, dtype="int4"), "float32, int8"),
    "no type": (lambda f: change_index(f, type=None), 'should have a "type"'),
    "no index": (lambda f: (f / INDEX).write_text("[]"), "a JSON object is needed"),
    "a name in one rank": (
        lambda f: change(file_of(f, 1, 1), {"h.0.up_b": None}),
        r"tp_00_\*\.pt and .*tp_01_\*\.pt do not hold the same tensors: 'h\.0\.up_b' in one",
    ),
    "an unknown name": (
        lambda f: [change(file_of(f, r, 1), {"h.0.mystery": torch.ones(1)}) for r in (0, 1)],
        r"no model of a toy's kind has a tensor 'h\.0\.mystery'",
    ),
    "degrees mixed": (
        lambda f: change(file_of(f, 1, 1), {"h.0.up_b": torch.ones(8).half()}),
        r"'h\.0\.up_b' in .*tp_00_01.*tp_01_01.*different degrees",
    ),
    "a name in two parts": (
        lambda f: change(file_of(f, 1, 2), {"h.0.up_b": torch.ones(16).half()}),
        r"tp_01_01.* and .*tp_01_02\.pt are the same tensor",
    ),
    "a name in the shared file": (
        lambda f: change(f / "non-tp.pt", {"h.0.up_b": torch.ones(16).half()}),
        r"non-tp\.pt and .*tp_00_01.* are the same tensor",
    ),
    "no tensor": (lambda f: change(file_of(f, 1, 1), {"h.0.up_b": [1, 2]}), "holds a int under"),
    "a longer list": (
        lambda f: change(file_of(f, 1, 1), {"h.0.up_b": [torch.ones(1)] * 3}), "holds a list under",
    ),
    "no matrix": (
        lambda f: change(file_of(f, 1, 0), {UP: [torch.ones(4).half(), 1]}), "should be a matrix",
    ),
    "no scale in one rank": (
        lambda f: change(file_of(f, 1, 0), {UP: torch.ones(16, WIDTH).half()}),
        r"'h\.0\.up_w' in .*tp_00_00.*tp_01_00.* one has a scale beside it, and the other none",
    ),
    "codes without int8": (
        lambda f: change_index(f, dtype="int8"), r"'h\.0\.up_w' .* is torch\.float16, and the index"
    ),
    "a list as a file": (lambda f: torch.save([1], file_of(f, 1, 1)), "holds a list where"),
    "an empty file": (lambda f: file_of(f, 1, 1).write_bytes(b""), r"tp_01_01\.pt.*it is empty"),
    "half a file": (
        lambda f: file_of(f, 1, 1).write_bytes(file_of(f, 0, 1).read_bytes()[:999]), "is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_go_together_is_an_error(damage: str, tmp_path: Path) -> None:
    do, message = DAMAGES[damage]
    do(write_halves(tmp_path, 2))
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value) or "toy" in message


def test_ranks_of_a_larger_degree_are_not_taken_for_all(tmp_path: Path) -> None:
    folder = write_halves(tmp_path, 4)
    change_index(folder, tp_size=2, tp=[n for n in named(folder) if n < "tp_02"])
    with pytest.raises(CheckpointError, match="has 4 columns in all, and should have 8"):
        opened(folder)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(4), r"should be a list of codes and scales, float32 \(G, 3\)"),
        (torch.ones(4, 2), r"float32 \(G, 3\)"),
        (torch.ones(4, 3).half(), r"float32 \(G, 3\)"),
        (1.0, r"float32 \(G, 3\)"),
        (torch.ones(5, 3), r"shape \(16, 8\), whose rows are not 5 equal runs with a scale each"),
        (torch.ones(0, 3), "not 0 equal runs"),
    ],
)
def test_scales_that_are_not_those_of_rows_are_errors(
    scale: Any, message: str, tmp_path: Path
) -> None:
    folder, _ = write_codes(tmp_path, 2)
    change(file_of(folder, 1, 0), {UP: [torch.ones(16, 8, dtype=torch.int8), scale]})
    with pytest.raises(CheckpointError, match=rf"'h\.0\.up_w' in .*tp_01_00\.pt .*{message}"):
        opened(folder)


def test_codes_that_are_no_matrix_or_of_halves_are_errors(tmp_path: Path) -> None:
    folder, _ = write_codes(tmp_path, 1)
    change(file_of(folder, 0, 0), {UP: [torch.ones(4, dtype=torch.int8), torch.ones(4, 3)]})
    with pytest.raises(CheckpointError, match=r"they should be int8 \(N, columns\)"):
        opened(folder)
    change(file_of(folder, 0, 0), {UP: [torch.ones(4, 4).half(), torch.ones(4, 3)]})
    with pytest.raises(CheckpointError, match=r"is torch\.float16, and the index says another"):
        opened(folder)


def test_codes_of_one_rank_alone_are_an_error(tmp_path: Path) -> None:
    folder, _ = write_codes(tmp_path, 2)
    change(file_of(folder, 1, 0), {UP: torch.ones(16, WIDTH)})
    with pytest.raises(CheckpointError, match=r"tp_00_00.*tp_01_00.* and the other none"):
        opened(folder)
