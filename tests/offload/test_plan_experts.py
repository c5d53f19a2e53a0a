"""What is planned for experts by need: dense parts first, and the rest is their pool."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make

from bminf.errors import ArgumentError, BudgetError
from bminf.offload.hit_rates import PUBLISHED
from bminf.offload.plan import Experts, Plan
from bminf.offload.plan_experts import experts_per_token
from bminf.offload.predict import Rows, predict
from bminf.wrapping import plan_for

LAYERS, EXPERTS = 7, 4
EXPERT_BYTES = 3 * 32 * 48 * 4


def planned(limit: int, **more: object) -> Plan:
    return plan_for(make("mixtral"), False, limit, device="cpu", **more)  # type: ignore[arg-type]


WHOLE = plan_for(make("mixtral"), False, device="cpu")


def test_more_memory_is_more_slots_once_all_that_is_dense_stays() -> None:
    slots, streamed = [], []
    for limit in range(WHOLE.least_limit, WHOLE.total_bytes, 30_000):
        plan = planned(limit)
        assert plan.experts is not None and plan.total_bytes <= limit
        assert plan.least_limit == WHOLE.least_limit
        slots.append(plan.experts.num_slots)
        streamed.append(len(plan.streamed))
        # Beside streamed blocks there is no room for one of them, but for experts.
        left = limit - plan.total_bytes
        assert left < plan.experts.slot_bytes
    assert streamed == sorted(streamed, reverse=True) and streamed[0] and not streamed[-1]
    whole = [number for number, some in zip(slots, streamed, strict=True) if not some]
    assert whole == sorted(whole) and 2 <= whole[0] < whole[-1] < LAYERS * EXPERTS
    assert planned(WHOLE.total_bytes).experts is None
    with pytest.raises(BudgetError, match="of slots for experts"):
        planned(WHOLE.least_limit - 1)


def test_host_memory_that_has_no_room_for_all_leaves_the_last_experts_on_disk() -> None:
    limit = WHOLE.total_bytes // 2
    roomy = planned(limit, host_memory="1GB").experts
    assert roomy is not None and not roomy.on_disk and not planned(limit).disk_places
    plan = planned(limit, host_memory=12 * EXPERT_BYTES + WHOLE.table_bytes)
    assert plan.experts is not None and not plan.streamed
    # Two staging buffers take as much as two experts.
    assert plan.experts.on_disk == plan.disk_places == tuple(range(10, LAYERS * EXPERTS))
    assert f"{LAYERS * EXPERTS - 10} from disk" in str(plan)


def test_what_is_expected_to_be_missed() -> None:
    experts = Experts(
        number=100, nbytes=10**8, slot_bytes=10**6, num_slots=25, bytes_per_token=10**7
    )
    assert experts.wanted_bytes(1) == pytest.approx(10**7)
    assert experts.wanted_bytes(2) == pytest.approx(10**8 * (1 - 0.9**2))
    assert experts.missed_bytes(2) == pytest.approx(0.75 * experts.wanted_bytes(2))
    assert experts.missed_bytes(50) == experts.wanted_bytes(50) < 10**8
    assert experts.hit_rate(50, PUBLISHED) == 0  # it would not have room
    assert experts.missed_bytes(2, PUBLISHED) == pytest.approx(0.19 * experts.wanted_bytes(2))


def test_a_token_of_a_model_that_fits_reads_the_experts_that_it_takes() -> None:
    """Two of four a layer; dense parts are read whole."""
    assert WHOLE.idle_bytes == 2 * LAYERS * EXPERT_BYTES
    found = predict(WHOLE, 1e12, 1e9)
    read = WHOLE.fixed_bytes + sum(block.nbytes for block in WHOLE.blocks) - WHOLE.idle_bytes
    assert found.pass_s == found.compute_s == found.memory_s == pytest.approx(read / 1e9)
    every = predict(WHOLE, 1e12, 1e9, rows=Rows(3, {}, 1e30))
    assert every.pass_s == pytest.approx((read + WHOLE.idle_bytes) / 1e9)


def test_a_prediction_counts_what_is_missed_behind_the_router() -> None:
    plan = planned(WHOLE.total_bytes * 8 // 10)
    assert plan.experts is not None and not plan.streamed
    dense = predict(replace(plan, experts=None), 1e9, 1e10)
    found = predict(plan, 1e9, 1e10)
    missed, wanted = plan.experts.missed_bytes(), plan.experts.wanted_bytes()
    assert found.copy_s == pytest.approx(missed / 1e9) and found.bound == "link"
    assert found.pass_s == pytest.approx(dense.pass_s + missed / 1e9 + wanted / 1e10)
    assert found.link_busy == pytest.approx(found.copy_s / found.pass_s)
    best = predict(plan, 1e9, 1e10, hit_rates=PUBLISHED)
    fewer = plan.experts.missed_bytes(1, PUBLISHED)
    assert fewer < missed and best.compute_s == found.compute_s
    assert found.pass_s - best.pass_s == pytest.approx((missed - fewer) / 1e9)
    on_disk = replace(plan, experts=replace(plan.experts, on_disk=tuple(range(14))))
    with pytest.raises(ArgumentError, match="14 blocks of the plan wait on disk"):
        predict(on_disk, 1e9, 1e10)
    slow = predict(on_disk, 1e9, 1e10, disk_bytes_per_s=1e8)
    assert slow.disk_s == pytest.approx(missed / 2 / 1e8) and slow.bound == "disk"


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"num_experts_per_tok": 2}, 2), ({"moe_topk": [2, 6]}, 6), ({"top_k_experts": 3}, 3),
        ({}, None), ({"moe_topk": [2, None]}, 2), ({"moe_k": "all"}, None), ({"moe_k": []}, None),
        ({"num_experts_per_tok": -1}, None), ({"num_experts_per_tok": 0}, None),
    ],
)  # fmt: skip
def test_the_configuration_says_how_many_a_token_takes(
    fields: dict[str, object], number: int | None
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model.config = SimpleNamespace(**fields)  # type: ignore[assignment]
    assert experts_per_token(model, "0") == number
