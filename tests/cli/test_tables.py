"""`bminf bench --table`: cells of tiny models, and what is predicted of whole ones.

bminf/cli/tables/asked.py, bminf/cli/tables/binds.py, bminf/cli/tables/bloom.py,
bminf/cli/tables/command.py, bminf/cli/tables/passes.py, bminf/cli/tables/peers.py,
bminf/cli/tables/predicted.py, bminf/cli/tables/text.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch

from bminf.arch.bloom import BLOOM, BloomConfig
from bminf.arch.glm import GLM130B, GLMConfig
from bminf.arch.t5 import CPM2, T5Config
from bminf.cli import main
from bminf.cli.gpus import Card, Speeds, card_of
from bminf.cli.tables import asked, binds, bloom, peers
from bminf.cli.tables.cells import DOES_NOT_FIT, KINDS, MEASURED, NOT_RUN, PREDICTED, PUBLISHED
from bminf.cli.tables.predicted import OnCard, assembled_for_a_card, weights_of
from bminf.cli.tables.published import published
from bminf.cli.tables.tasks import ANEW, ENCODER, Run, Task
from bminf.cli.tables.text import markdown_of
from bminf.models.source import find_sizes

TINY = {
    "bloom": (BLOOM, "tiny-bloom", BloomConfig(512, 64, 4, 4)),
    "glm130b": (GLM130B, "tiny-glm", GLMConfig("glm-130b", 128, 64, 3, 4, 96, 1024)),
    "cpm2": (CPM2, "tiny-cpm2", T5Config(128, 64, 96, 4, 16, 3, 3)),
}
CARD = Card("a card", 2**30, Speeds(10**9, 10**11), 1e13)
QUICK = ("--device", "cpu", "--json")

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """A table of a tiny model in place of the published one, on one thread."""
    for table, (architecture, name, config) in TINY.items():
        monkeypatch.setitem(architecture.published, name, config)
        monkeypatch.setitem(asked._MODELS, table, name)

    def made(table: str, *options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["bench", "--table", table, *QUICK, *options]) == 0
        out, err = capsys.readouterr()
        content: dict[str, Any] = json.loads(out)
        check(content)
        measures = any(cell["kind"] == MEASURED for cell in content["results"])
        assert ("--predict-only measures nothing" in err) is measures  # said before it begins
        return content

    return made


def check(content: dict[str, Any]) -> None:
    """Each table is whole, and each cell says what it is."""
    assert content["case"] == "table" and content["versions"]["torch"]
    by_quantity: dict[str, list[dict[str, Any]]] = {}
    for cell in content["results"]:
        by_quantity.setdefault(cell["quantity"], []).append(cell)
        assert cell["kind"] in KINDS
        assert (cell["kind"] == NOT_RUN) == bool(cell["reason"])
        if cell["kind"] in (MEASURED, PREDICTED):
            assert cell["value"] > 0
        assert cell["kind"] != NOT_RUN or cell["value"] is None
    for cells in by_quantity.values():
        rows, columns = ({cell[name] for cell in cells} for name in ("row", "column"))
        places = {(cell["row"], cell["column"]) for cell in cells}
        assert len(cells) == len(places) == len(rows) * len(columns)
    shown = markdown_of(content)
    assert all(f"| {cell['row']} |" in shown for cell in content["results"])


def cells_of(content: dict[str, Any], row: str, quantity: str | None = None) -> dict[str, Any]:
    """Of a row, by column."""
    found = [cell for cell in content["results"] if cell["row"] == row]
    return {cell["column"]: cell for cell in found if quantity in (None, cell["quantity"])}


# ---- BLOOM ---------------------------------------------------------------------------------------


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: False)


@pytest.mark.usefixtures("no_peers")
def test_texts_of_a_batch_share_the_weights_that_stream(report: Report) -> None:
    """A token of a batch of 16 costs a sixteenth of the passes and the bytes: at most an eighth."""
    sizes = ("--batch-sizes", "1", "16", "--max-new-tokens", "4", "--layers", "3")
    content = report("bloom", *sizes, "--stream-all", "--runs", "2")
    own = cells_of(content, "bminf int8", "ms_per_token")
    one, many = own["1"]["details"], own["16"]["details"]
    assert (one["tokens"], many["tokens"]) == (4, 64)
    for details in (one, many):
        assert details["resident"] == 0 and details["planned_bytes"] <= details["memory_limit"]
        assert details["passes"] == 4 and len(details["seconds"]) == 2
    # Two blocks may have been copied ahead before the first pass, or after the last.
    assert one["copied_bytes_per_token"] == pytest.approx(one["streamed_bytes"], rel=0.1)
    assert many["copied_bytes_per_token"] <= one["copied_bytes_per_token"] / 8
    assert own["8"]["kind"] == NOT_RUN and own["8"]["reason"] == "not among --batch-sizes"
    cell = own["16"]
    assert cell["value"] * 16 == pytest.approx(cell["details"]["step_ms"])
    mean_ms = sum(cell["details"]["seconds"]) / 2 * 1e3
    assert cell["value"] == pytest.approx(mean_ms / 16 / 4)  # the seed's: over all tokens


@pytest.mark.usefixtures("no_peers")
def test_a_scaled_number_is_said_to_be_no_measurement(report: Report) -> None:
    sizes = ("--batch-sizes", "2", "--max-new-tokens", "2")
    content = report("bloom", "--layers", "2", *sizes)
    scale = content["parameters"]["scale"]
    assert 1 < scale < 2 and content["parameters"]["num_layers_of_all"] == 4
    scaled = cells_of(content, "bminf int8, scaled to 4 layers")["2"]
    measured = cells_of(content, "bminf int8", "ms_per_token")["2"]
    assert scaled["kind"] == PREDICTED and measured["kind"] == MEASURED
    assert scaled["value"] == pytest.approx(measured["value"] * scale)
    ready = cells_of(content, "bminf int8", "start_to_ready_s")["2"]
    assert ready["kind"] == MEASURED and ready["details"]["weights"] == "read from a folder"
    assert "2 layers of 4" in markdown_of(content)
    whole = report("bloom", *sizes)  # all of them have room
    assert whole["parameters"]["scale"] == 1 and whole["parameters"]["num_layers"] == 4
    assert not any("scaled" in cell["row"] for cell in whole["results"])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_as_many_layers_as_memory_holds(
    number: int, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    def room(layers: int) -> int:
        config = replace(TINY["bloom"][2], num_hidden_layers=layers)
        run = Run(find_sizes(config), torch.float32, "int8", "int8", ())
        return run.assembled().blobs.nbytes

    for beside, expected in ((0, number), (-1, max(1, number - 1)), (10**4, number)):
        monkeypatch.setattr(asked, "free_budget", lambda device: room(number) + beside)  # noqa: B023
        parameters = report("bloom", "--predict-only")["parameters"]
        assert parameters["num_layers"] == expected


@pytest.mark.usefixtures("no_peers")
def test_a_batch_that_has_no_room_says_so(report: Report) -> None:
    sizes = ("--batch-sizes", "1", "512", "--max-new-tokens", "2")
    content = report("bloom", *sizes, "--memory-limit", "12MB")
    own = cells_of(content, "bminf int8", "ms_per_token")
    assert own["1"]["kind"] == MEASURED and own["512"]["kind"] == NOT_RUN
    assert own["512"]["reason"].startswith(f"{DOES_NOT_FIT}: the limit of 12 MB")


def test_what_is_published_is_shown_and_a_stream_apart(report: Report) -> None:
    content = report("bloom", "--predict-only")
    assert {cell["kind"] for cell in content["results"]} == {PREDICTED, PUBLISHED, NOT_RUN}
    name = "BLOOM-176B, 8 x A100 80 GB: DeepSpeed ZeRO, bf16"
    together = cells_of(content, f"{name}, 8 streams together", "ms_per_token")
    one = cells_of(content, f"{name}, one of these streams")
    assert together["1"]["value"] == 283 and one["1"]["value"] == 283 * 8  # 2.26 s a token
    assert together["16"]["kind"] == PUBLISHED and together["16"]["value"] is None
    shown = markdown_of(content)
    assert "out of memory" in shown and "(1) not run: --predict-only" in shown


def test_accelerate_runs_the_same_model(report: Report) -> None:
    content = report("bloom", "--batch-sizes", "1", "3", "--max-new-tokens", "2", "--layers", "2")
    found = cells_of(content, "accelerate, disk offload")
    assert {name: cell["kind"] for name, cell in found.items() if cell["kind"] != NOT_RUN} == {
        "1": MEASURED, "3": MEASURED,
    }  # fmt: skip
    assert found["3"]["details"]["dtype"] == "float32"
    host = cells_of(content, "accelerate, cpu offload")["1"]
    assert host["kind"] == NOT_RUN and "host memory is the device" in host["reason"]
    zero = cells_of(content, "ZeRO-Inference")["1"]
    assert zero["reason"] in ("deepspeed not installed", "it needs a GPU")


@pytest.mark.parametrize("limit", [10**9, 10**5])
def test_accelerate_offloads_what_the_limit_does_not_hold(
    limit: int, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    """With little room, all of it."""
    called, offload = [], accelerate.disk_offload

    def counted(*given: Any, **keywords: Any) -> Any:
        called.append(given)
        return offload(*given, **keywords)

    monkeypatch.setattr(accelerate, "disk_offload", counted)
    monkeypatch.setattr(bloom, "_with_one_limit", lambda own: replace(own, limit=limit))
    content = report("bloom", "--batch-sizes", "1", "--max-new-tokens", "2", "--layers", "2")
    assert cells_of(content, "accelerate, disk offload")["1"]["kind"] == MEASURED
    assert bool(called) == (limit == 10**5)


def test_an_error_of_another_library_costs_its_row_alone(
    monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(peers, "_save_random", broken)
    content = report("bloom", "--batch-sizes", "1", "--max-new-tokens", "2", "--layers", "1")
    assert cells_of(content, "accelerate, disk offload")["1"]["reason"] == "OSError: no space"
    assert cells_of(content, "bminf int8", "ms_per_token")["1"]["kind"] == MEASURED


def test_prompts_are_the_first_openings_again_and_again() -> None:
    rows = bloom.prompts(19, 512)
    assert rows[:8] == rows[8:16] and rows[16:] == rows[:3]
    assert [len(row) for row in rows[:8]] == [len(one.split()) for one in bloom.OPENINGS]
    assert all(3 <= len(row) <= 8 and 0 <= min(row) and max(row) < 512 for row in rows)


# ---- GLM-130B and CPM-2 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row", "quantity"),
    [("glm130b", "bminf int4-row", "seconds"), ("cpm2", "bminf int8", "tokens_per_s")],
)
def test_the_tables_of_whole_passes(table: str, row: str, quantity: str, report: Report) -> None:
    content = report(table, "--lengths", "6", "--layers", "2", "--stream-all")
    own = cells_of(content, row, quantity)
    measured = {name for name, cell in own.items() if cell["kind"] == MEASURED}
    glm = {"encode 6", "decode 6"}
    cpm2 = {"encoder 6", "decoder, projections anew 5", "decoder, projections once 5"}
    assert measured == (glm if table == "glm130b" else cpm2)
    assert {cell["reason"] for cell in own.values()} == {"", "not among --lengths"}
    for name in measured:
        cell = own[name]
        (seconds,) = cell["details"]["seconds"]
        tokens = int(name.rpartition(" ")[2])
        assert cell["value"] == pytest.approx(seconds if table == "glm130b" else tokens / seconds)
        assert cell["details"]["streamed"] > 0
        scaled = cells_of(content, f"{row}, scaled to 3 layers")[name]
        factor = cell["value"] / scaled["value"]
        scale = content["parameters"]["scale"]
        assert factor == pytest.approx(1 / scale if table == "glm130b" else scale)
    assert content["parameters"]["scale"] == pytest.approx(1.5, rel=0.3)


def test_what_is_published_of_both(report: Report) -> None:
    glm = cells_of(report("glm130b", "--predict-only"), "8 x A100, fp16, FT")
    assert glm["decode 512"]["value"] == 18.77 and glm["encode 2048"]["value"] is None
    cpm2 = cells_of(report("cpm2", "--predict-only"), "BMInf 2.0, int8, GTX 1060")
    assert cpm2["encoder 256"]["value"] == 718
    assert cpm2["decoder, projections anew 255"]["value"] == 4.4
    assert cpm2["decoder, projections once 255"]["reason"] == "not published"
    figures = published()["tokens_per_s"]["CPM-2 (Chinese), CPM-2.1"]
    assert figures["encoder"]["BMInf 1.0 to 2.0"] == 718


@pytest.mark.gpu
@pytest.mark.parametrize("table", TINY)
def test_a_table_on_a_gpu(table: str, report: Report) -> None:
    own = ("--lengths", "6") if table != "bloom" else ("--batch-sizes", "1", "16")
    content = report(table, *own, "--layers", "2", "--stream-all", "--device", "cuda")
    measured = [cell for cell in content["results"] if cell["kind"] == MEASURED]
    assert content["parameters"]["device"] == "cuda" and content["hardware"]["gpu"]
    peers_rows = {f"accelerate, {place} offload" for place in peers.PLACES}
    others = {cell["row"] for cell in measured if not cell["row"].startswith("bminf")}
    assert others == (peers_rows if table == "bloom" else set())
    assert len(measured) > len(others)


# ---- predictions ---------------------------------------------------------------------------------


def test_a_model_on_a_card_has_its_weights_and_its_keys_and_values() -> None:
    config = BloomConfig(512, 64, 4, 4)
    task = Task("decode", 32, 2)
    run = Run(find_sizes(config), torch.float32, "int8", "int8", (task,))
    card = OnCard(assembled_for_a_card(run), CARD)
    plan = card.plan(32, 2)
    weights = weights_of(card.assembly.network, plan)
    assert sum(weights.values()) == 4 * 12 * 64 * 64 + 512 * 64
    assert card.cache_bytes(32, 2) == 2 * 32 * 4 * 2 * 64 * 2  # texts, tokens, layers, k and v
    found = card.task(plan, task)
    assert found.arithmetic_s == pytest.approx(2 * sum(weights.values()) * 2 / 1e13)
    read = plan.resident_bytes + card.cache_bytes(16, 2)  # halfway
    assert found.memory_s == pytest.approx(read / 1e11)
    assert card.task(plan, Task("encode", 32, 2)).arithmetic_s == 32 * found.arithmetic_s


def test_projections_of_a_prompt_are_multiplied_for_all_of_it() -> None:
    run = Run(find_sizes(TINY["cpm2"][2]), torch.float32, "int8", "none", (Task(ENCODER, 8),))
    card = OnCard(assembled_for_a_card(run), CARD)
    plan = card.plan(512, 1)
    short, long = (card.task(plan, Task(ANEW, 4, prompt=n)).arithmetic_s for n in (10, 20))
    cross = 3 * 2 * 64 * 64  # keys and values of three layers
    assert long - short == pytest.approx(2 * 10 * cross / 1e13)


@pytest.fixture(scope="module")
def bound() -> dict[str, Any]:
    """A part of the table, as JSON has it."""
    cells = [vars(cell) for cell in binds.cells((1, 128), ("RTX 3090", "A100 80GB"), ("int4",))]
    return {"case": "table", "versions": {"torch": 1}, "results": cells,
            "parameters": {"table": "binds", "length": 128}}  # fmt: skip


def test_what_binds_the_large_models(bound: dict[str, Any]) -> None:
    check(bound)
    small = cells_of(bound, "BLOOM-176B, int4, RTX 3090", "pass_s")
    assert small["1"]["details"]["binds"] == "link"
    assert small["128"]["reason"].startswith(DOES_NOT_FIT)
    details = cells_of(bound, "GLM-130B, int4, A100 80GB", "pass_s")["128"]["details"]
    link = card_of("A100 80GB").speeds.link
    assert details["pass"]["copy_s"] == pytest.approx(details["streamed_bytes"] / link)
    assert details["pass"]["pass_s"] >= details["pass"]["copy_s"] * 0.999
    until = cells_of(bound, "GLM-130B, int4, RTX 3090", "rows_until_arithmetic")
    assert 100 < until["arithmetic from"]["value"] < 2000
    shown = markdown_of(bound)
    assert "**link**" in shown and "| does not fit |" in shown


# ---- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a MODEL or --table"),
        (["somewhere", "--table", "bloom"], "give a MODEL or --table"),
        (["--table", "bloom", "--prompt-tokens", "8"], "--prompt-tokens is not for --table bloom"),
        (["--table", "bloom", "--model", "bloom"], "--model is not for --table bloom"),
        (["--table", "cpm2", "--batch-sizes", "8"], "--batch-sizes is not for --table cpm2"),
        (["--table", "binds", "--layers", "8"], "--layers is not for --table binds"),
        (["--table", "bloom", "--size", "glm-130b"], "accepted: bigscience/bloom-560m"),
        (["--table", "bloom", "--device", "cuda:1"], "--device cuda:1"),
        (["--table", "bloom", "--layers", "71"], "--layers 71 is more than"),
        (["--table", "bloom", "--gpu", "Voodoo 2"], "'Voodoo 2'"),
        (["--table", "bloom", "--quantization", "int4-row"], "int4-row"),
        (["--table", "bloom", "--stream-all", "--memory-limit", "1GB"], "--stream-all"),
        (["somewhere", "--layers", "2"], "--layers is for --table"),
    ],
)
def test_wrong_use_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and len(err.splitlines()) == 1
