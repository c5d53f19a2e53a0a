"""When norms, appends and attention take a kernel, when torch's operators, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from host_launcher import HostLauncher, NotingLauncher, served_by

from bminf.cuda import launcher as launchers
from bminf.cuda.launcher import fused_by_default, fused_kernels, fused_launcher
from bminf.errors import ArgumentError
from bminf.layers.attention import attention
from bminf.layers.kv_cache import KVCache
from bminf.layers.norm import LayerNorm, RMSNorm
from bminf.layers.packed_cache import PackedCache, Span
from bminf.ops import norm as norm_module
from bminf.ops import rotary_append as append_module
from bminf.ops.norm import MAX_COLUMNS, add_rms_norm, layer_norm, rms_norm
from bminf.ops.rotary_append import rotary_append

CPU = torch.device("cpu")


@pytest.fixture
def noting() -> Iterator[NotingLauncher]:
    launcher = NotingLauncher()
    with served_by(launcher):
        yield launcher


# ---- which way is taken --------------------------------------------------------------------------


def test_a_norm_is_one_launch_and_with_what_is_added_too(noting: NotingLauncher) -> None:
    x = torch.randn(2, 3, 24)
    for norm, name in ((RMSNorm(24, 1e-6), "rms_norm"), (LayerNorm(24, 1e-6), "layer_norm")):
        norm.requires_grad_(False)
        norm(x)
        norm.add(x, x)
        assert noting.names == [name, name]
        assert all(grid == (6, 1, 1) for _, grid in noting.launches)
        noting.launches.clear()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
def test_torchs_operators_are_taken_where_they_have_to_be(noting: NotingLauncher) -> None:
    weight, x = torch.randn(24), torch.randn(2, 24)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    cases = {
        "a gradient": lambda: rms_norm(x, weight.clone().requires_grad_(), 1e-6),
        "another dtype of the weight": lambda: rms_norm(x, weight.double(), 1e-6).float(),
        "a trace": lambda: torch.fx.experimental.proxy_tensor.make_fx(
            lambda x: rms_norm(x, weight, 1e-6)
        )(x)(x),
    }
    cases |= {
        "vmap": lambda: torch.vmap(lambda row: rms_norm(row, weight, 1e-6))(x),
        "jvp": lambda: torch.func.jvp(lambda x: rms_norm(x, weight, 1e-6), (x,), (x,))[0],
    }
    for name, call in cases.items():
        torch.testing.assert_close(call(), expected, msg=name)
        assert not noting.launches, name
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, 1e-6), expected)
    wide = torch.ones(1, MAX_COLUMNS + 1)
    torch.testing.assert_close(rms_norm(wide, wide[0], 0.0), wide)
    assert rms_norm(x.double(), weight.double(), 1e-6).dtype == torch.float64
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 24)
    assert not noting.launches
    with torch.no_grad():
        rms_norm(x, weight.clone().requires_grad_(), 1e-6)
    assert noting.names == ["rms_norm"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_attention_takes_torchs_operators_where_norms_do(noting: NotingLauncher) -> None:
    query, (key, value) = torch.randn(2, 3, 1, 8), torch.randn(2, 2, 3, 5, 8)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, None, 1.0)

    expected = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    calls = {
        "a gradient": lambda: attend(query.clone().requires_grad_()),
        "vmap": lambda: torch.vmap(attend)(query.unsqueeze(0))[0],
        "a class of somebody": lambda: attend(query.as_subclass(Marked)).as_subclass(torch.Tensor),
    }
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected, msg=name)
        assert not noting.launches, name
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query).dtype == torch.bfloat16
    assert not noting.launches
    attend(query)
    assert noting.names == ["attention_decode"]


class Marked(torch.Tensor):
    """Whose operations somebody may follow."""


def test_a_gradient_of_a_norm_is_that_of_torch() -> None:
    x, bias = torch.randn(3, 24, requires_grad=True), torch.randn(24)
    weight = torch.randn(24)
    with served_by(HostLauncher()):
        (given,) = torch.autograd.grad(layer_norm(x, weight, bias, 1e-5).square().sum(), x)
    y = F.layer_norm(x, (24,), weight, bias, 1e-5)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(given, expected)


# ---- the switch ----------------------------------------------------------------------------------


def test_the_switch_takes_torchs_operators_within(noting: NotingLauncher) -> None:
    x, weight = torch.randn(2, 24), torch.randn(24)
    with fused_kernels(False):
        rms_norm(x, weight, 1e-6)
        with fused_kernels(True):
            rms_norm(x, weight, 1e-6)
        assert fused_launcher(CPU) is None
    assert noting.names == ["rms_norm"] and fused_launcher(CPU) is noting


@pytest.mark.parametrize(("value", "is_on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_the_environment_sets_the_default(
    value: str | None, is_on: bool, noting: NotingLauncher, environment: pytest.MonkeyPatch
) -> None:
    if value is not None:
        environment.setenv("BMINF_FUSED_KERNELS", value)
    assert fused_by_default() is is_on
    assert (fused_launcher(CPU) is noting) is is_on


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What it says is asked for once."""
    monkeypatch.delenv("BMINF_FUSED_KERNELS", raising=False)
    fused_by_default.cache_clear()
    yield monkeypatch
    fused_by_default.cache_clear()


def test_another_word_in_the_environment_is_refused(
    noting: NotingLauncher, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("BMINF_FUSED_KERNELS", "no")
    with pytest.raises(ArgumentError, match=r"BMINF_FUSED_KERNELS is 'no'; accepted: 0 .* and 1"):
        rms_norm(torch.randn(2, 24), torch.randn(24), 1e-6)
    with served_by(None):
        assert launchers.fused_launcher(torch.device("meta")) is None


# ---- what is refused -----------------------------------------------------------------------------


def test_norms_refuse_what_does_not_go_together(noting: NotingLauncher) -> None:
    x, weight = torch.randn(2, 24), torch.randn(24)
    rms_norm(x, weight, 1e-6)  # what has been right before is looked at, too
    add_rms_norm(x, x, weight, 1e-6)
    layer_norm(x, weight, weight, 1e-6)
    noting.launches.clear()
    with pytest.raises(
        ArgumentError, match=r"a weight of a norm is \(23,\) on cpu; .* with x, \(2, 24\)"
    ):
        rms_norm(x, weight[1:], 1e-6)
    with pytest.raises(
        ArgumentError, match=r"delta of a norm is \(1, 24\) on cpu; .* with x, \(2, 24\)"
    ):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(
        ArgumentError, match=r"a weight of a norm is .* on meta; it does not go with x"
    ):
        layer_norm(x, weight.to("meta"), weight, 1e-6)
    assert not noting.launches


def test_appends_refuse_what_does_not_go_together(noting: NotingLauncher) -> None:
    key, kept = torch.zeros(1, 2, 3, 8), torch.zeros(2, 9, 8)
    cells, angles = torch.arange(3), (torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))

    def call(angles=angles, cells=cells, keys=kept, value=key, key=key) -> None:
        rotary_append(noting, key, key, value, angles, cells, keys, kept)

    call()
    assert noting.names == ["rotary_append"]
    short = angles[0][:, :, :2], angles[1][:, :, :2]
    odd = torch.zeros(1, 2, 3, 7)
    for message, wrong in (
        ("all have to be of one dtype", {"value": key.half()}),
        ("all have to be of one dtype", {"keys": kept.half()}),
        ("go together", {"cells": cells[1:]}),
        ("go together", {"cells": cells.int()}),
        ("go together", {"keys": torch.zeros(3, 9, 8)}),
        ("go together", {"value": key[:, :, 1:]}),
        ("have to be contiguous", {"cells": torch.arange(6)[::2]}),
        ("have to be contiguous, on cpu", {"cells": cells.to("meta")}),
        ("not \\(1, 1, 3, 4\\) each", {"angles": short}),
        ("float16 or float32", {"angles": (angles[0].double(), angles[1].double())}),
        ("float16 or float32", {"angles": (angles[0], angles[1].half())}),
    ):
        with pytest.raises(ArgumentError, match=message):
            call(**wrong)
    with pytest.raises(ArgumentError, match="heads of 7 columns"):
        rotary_append(
            noting, odd, odd, odd, angles, cells, torch.zeros(2, 9, 7), torch.zeros(2, 9, 7)
        )
    wide = torch.zeros(1, 1, 3, 4098)
    cosines = torch.zeros(1, 1, 3, 2049)
    with pytest.raises(ArgumentError, match="2049 columns of a head at once; at most 1024"):
        rotary_append(
            noting, wide, wide, wide, (cosines, cosines), cells, *torch.zeros(2, 1, 9, 4098)
        )
    assert len(noting.launches) == 1


# ---- caches --------------------------------------------------------------------------------------


def fused_heads(num_rows: int, num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.randn(num_rows, num_tokens, 3, 2, 8).to(dtype)
    return [x[:, :, part].transpose(1, 2) for part in range(3)]


def kept(cache: KVCache) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in cache.tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_cache_is_filled_by_one_launch_a_layer_as_without(
    num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    caches = [KVCache(2, 3, 2, 9, 8, dtype, "cpu") for _ in range(2)]
    for num_tokens in (4, 1, 1):
        for layer in range(2):
            parts = fused_heads(num_rows, num_tokens, dtype)
            angles = torch.randn(2, num_rows, 1, num_tokens, 4).unbind()
            launcher = HostLauncher()
            with served_by(launcher):
                given = caches[0].attend(layer, *parts, None, 0.5, angles)
            assert launcher.names[0] == "rotary_append"
            expected = caches[1].attend(layer, *parts, None, 0.5, angles)
            torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
        for cache in caches:
            cache.advance(num_tokens)
    assert all(map(torch.equal, kept(caches[0]), kept(caches[1])))
    with served_by(HostLauncher()):
        new = fused_heads(num_rows, 2, dtype)[1:]
        keys, values = caches[0].append(1, *new)
        assert keys.shape[2] == 8 and torch.equal(values[:, :, 6:], new[1])
        with pytest.raises(RuntimeError):  # there is room for 9
            caches[0].append(0, *fused_heads(num_rows, 4, dtype)[1:])


@pytest.mark.parametrize("copies", [False, True])
def test_a_packed_pass_is_appended_by_one_launch_a_layer(copies: bool) -> None:
    torch.manual_seed(1)
    caches = [KVCache(2, 1, 2, 30, 8, torch.float32, "cpu") for _ in range(2)]
    spans = [Span(20, 3, 1), Span(0, 0, 4), Span(10, 5, 2)]
    packed = [PackedCache(cache.tokens, spans, copies) for cache in caches]
    for layer in range(2):
        parts = fused_heads(1, 9, torch.float32)  # two tokens are of no row
        angles = torch.randn(2, 1, 1, 9, 4).unbind()
        bias = [None] * 3
        launcher = HostLauncher()
        with served_by(launcher):
            given = packed[0].attend(layer, *parts, bias, 0.5, angles)
        assert launcher.names[0] == "rotary_append"
        expected = packed[1].attend(layer, *parts, bias, 0.5, angles)
        torch.testing.assert_close(given, expected)
    assert all(map(torch.equal, kept(caches[0]), kept(caches[1])))


def test_prompts_of_ever_new_lengths_leave_a_bounded_number_of_plans(
    noting: NotingLauncher,
) -> None:
    """Of a server, which has texts of every length in the end."""
    weight, (keys, values) = torch.ones(8), torch.zeros(2, 1, 3000, 8)
    for num_tokens in range(1, 3000):
        x, cells = torch.zeros(1, 1, num_tokens, 8), torch.zeros(num_tokens, dtype=torch.int64)
        rms_norm(x, weight, 1e-6)
        rotary_append(noting, x, x, x, None, cells, keys, values)  # type: ignore[arg-type]
        noting.launches.clear()
    assert 0 < len(norm_module._plans) <= 1024
    assert 0 < len(append_module._plans) <= 1024
