from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bminf.layout import Layout, TensorSpec, specs_of, tensors_of
from bminf.offload.memory import allocate


def awkward() -> dict[str, torch.Tensor]:
    """Tensors of many kinds: views of one storage, expanded, scalar, empty, odd dtypes."""
    big = torch.randn(200)
    return {
        "odd": torch.randn(5, 7),
        "transposed": big[11:51].view(8, 5).t(),
        "overlapping": big[30:60],
        "gaps": big[100:160].view(6, 10)[:, ::3],
        "expanded": torch.randn(4, 1).expand(4, 3),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(-3, 4, dtype=torch.int8),
        "half": torch.randn(3).half(),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
    }


def views_of(layout: Layout, blob: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: layout.view(blob, name) for name in layout.specs}


def filled(tensors: dict[str, torch.Tensor], keep_addresses: bool) -> tuple[Layout, torch.Tensor]:
    layout = Layout.of({k: TensorSpec.of(t) for k, t in tensors.items()}, keep_addresses)
    blob = allocate(layout.extent).fill_(0xA5)
    layout.fill(blob, reversed(tensors.items()))
    return layout, blob


def test_values_and_strides_come_back() -> None:
    for keep_addresses in (True, False):
        tensors = awkward()
        layout, blob = filled(tensors, keep_addresses)
        for name, view in views_of(layout, blob).items():
            assert torch.equal(view, tensors[name]), name
            assert view.stride() == tensors[name].stride() and view.dtype == tensors[name].dtype


def test_addresses_are_kept_modulo_64_or_made_fresh() -> None:
    tensors = awkward()
    layout, blob = filled(tensors, keep_addresses=True)
    for name, view in views_of(layout, blob).items():
        if view.numel():
            assert view.data_ptr() % 64 == tensors[name].data_ptr() % 64, name
    alone = {k: t for k, t in tensors.items() if k not in ("overlapping", "gaps")}
    layout, blob = filled(alone, keep_addresses=False)
    assert all(
        view.data_ptr() % 256 == 0 for view in views_of(layout, blob).values() if view.numel()
    )


def test_tensors_that_overlap_still_do() -> None:
    layout, blob = filled(awkward(), keep_addresses=True)
    views = views_of(layout, blob)
    views["overlapping"].zero_()
    assert views["transposed"].t().flatten()[19:].abs().max() == 0
    assert views["transposed"].t().flatten()[:19].abs().min() > 0


def test_tensors_of_other_strides_are_copied_by_value() -> None:
    layout, blob = filled({"w": torch.zeros(4, 6)}, keep_addresses=True)
    given_tensor = torch.randn(6, 4).t()
    layout.fill(blob, [("w", given_tensor)])
    assert torch.equal(layout.view(blob, "w"), given_tensor)


@settings(max_examples=200, deadline=None)
@given(
    starts=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    sizes=st.lists(st.integers(0, 90), min_size=8, max_size=8),
)
def test_distinct_bytes_stay_distinct(starts: list[int], sizes: list[int]) -> None:
    """Over random byte ranges: relative positions in a run are kept, and runs do not touch."""
    specs = {
        f"{number}": TensorSpec((size,), (1,), torch.uint8, 4096 + start)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }
    layout = Layout.of(specs)
    for name, spec in specs.items():
        assert 0 <= layout.offsets[name] <= layout.extent - spec.nbytes
        assert spec.nbytes == 0 or (layout.offsets[name] - spec.start) % 64 == 0
        for other, spec2 in specs.items():
            apart = (
                spec.start + spec.nbytes <= spec2.start or spec2.start + spec2.nbytes <= spec.start
            )
            if spec.nbytes and spec2.nbytes and not apart:
                shift = layout.offsets[name] - layout.offsets[other]
                assert shift == spec.start - spec2.start
            elif spec.nbytes and spec2.nbytes:
                assert (
                    layout.offsets[name] + spec.nbytes <= layout.offsets[other]
                    or layout.offsets[other] + spec2.nbytes <= layout.offsets[name]
                )


def test_a_tensor_of_two_names_stays_one_when_it_is_bound() -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False) for _ in range(3)])
    module[2].weight = module[0].weight.requires_grad_(False)
    layout = Layout.of(specs_of({n: t for n, _, t in tensors_of(module)}), keep_addresses=False)
    buffer = allocate(layout.extent).fill_(1)
    layout.bind(module, buffer)
    assert module[2].weight is module[0].weight and module[1].weight is not module[0].weight
    assert [linear.weight.requires_grad for linear in module] == [False, True, False]
    assert module[2].weight.data_ptr() == buffer.data_ptr()
