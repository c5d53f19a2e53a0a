"""The attention of each architecture through the kernel for decoding, compiled for the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from host_launcher import HostLauncher, served_by
from quantized_models import relative_error

from bminf.arch.bloom import Bloom, BloomConfig
from bminf.arch.glm import GLM, GLMConfig
from bminf.arch.gpt import GPT, GPTConfig
from bminf.arch.t5 import T5, PackedT5Cache, T5Config
from bminf.cuda.launcher import fused_kernels
from bminf.layers import alibi, attention, position_bias
from bminf.layers.embedding import HostEmbedding
from bminf.layers.kv_cache import KVCache
from bminf.layers.packed_cache import PackedCache, Span

NUM_LAYERS, VOCABULARY, LONGEST = 2, 50, 64
PROMPT = 20  # more than the kernel for decoding takes at once
CONFIGS: dict[str, Any] = {
    "gpt": GPTConfig(VOCABULARY, 48, NUM_LAYERS, 3, LONGEST, 64),
    "bloom": BloomConfig(VOCABULARY, 48, NUM_LAYERS, 3),
    "glm": GLMConfig("glm-130b", VOCABULARY, 48, NUM_LAYERS, 3, 64, LONGEST),
    "t5": T5Config(VOCABULARY, 48, 64, 3, 24, NUM_LAYERS, NUM_LAYERS),
}
KINDS = {"gpt": GPT, "bloom": Bloom, "glm": GLM, "t5": T5}
ROUNDING = 1e-5  # of float32, in sums of another order


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(name: str) -> Iterator[Any]:
    torch.manual_seed(0)
    made = KINDS[name](CONFIGS[name])
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(made.embed_tokens, HostEmbedding):
        made.embed_tokens.keep([torch.randn(VOCABULARY, 48)], torch.float32)
    with torch.inference_mode():
        yield made


@pytest.fixture
def launcher() -> Iterator[HostLauncher]:
    found = HostLauncher(capability=61)
    with served_by(found):
        yield found


def ids_of(num_rows: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(VOCABULARY, (num_rows, num_tokens), generator=generator)


def called(network: Any, ids: torch.Tensor, cache: Any, positions: Any, **more: Any) -> Any:
    """The network, whose GLM wants to be told where tokens stand."""
    if isinstance(network, GLM):
        position_ids = torch.tensor(positions).expand(len(ids), -1)
        return network(ids, position_ids, cache, **more)
    return network(ids, cache, **more)


def new_cache(network: Any, num_rows: int) -> Any:
    if not isinstance(network, T5):
        return network.new_cache(num_rows, LONGEST)
    cache = network.new_cache(num_rows, PROMPT, LONGEST)
    network.encode(ids_of(num_rows, PROMPT), cache, torch.tensor([PROMPT, 7, 1][:num_rows]))
    return cache


def read_and_written(network: Any, num_rows: int = 2, **more: Any) -> list[torch.Tensor]:
    """Of a prompt, single tokens, and some at once."""
    cache, found, length = new_cache(network, num_rows), [], 0
    for num_tokens in (PROMPT, 1, 1, 5):
        ids = ids_of(num_rows, num_tokens)
        positions = range(length, length + num_tokens)
        found.append(called(network, ids, cache, positions, **more))
        length += num_tokens
    return found


def attentions(launcher: HostLauncher) -> list[str]:
    """Of the launches."""
    return [name for name in launcher.names if name.startswith("attention")]


def per_step(name: str) -> int:
    """Launches of attention."""
    return NUM_LAYERS * (2 if name == "t5" else 1)


def test_decoding_takes_the_kernel_and_computes_the_same(
    name: str, network: Any, launcher: HostLauncher
) -> None:
    computed = read_and_written(network)
    assert attentions(launcher) == ["attention_decode"] * 3 * per_step(name)
    with fused_kernels(False):
        expected = read_and_written(network)
    assert len(attentions(launcher)) == 3 * per_step(name)
    for given, right in zip(computed, expected, strict=True):
        assert relative_error(given, right) < ROUNDING


@pytest.mark.parametrize("name", ["gpt", "bloom"], indirect=True)
def test_padding_at_the_beginning_of_rows_is_not_seen(network: Any, launcher: HostLauncher) -> None:
    padding = torch.tensor([0, 2])
    computed = read_and_written(network, num_padding=padding)
    assert attentions(launcher) == ["attention_decode"] * 3 * NUM_LAYERS
    with fused_kernels(False):
        expected = read_and_written(network, num_padding=padding)
    for given, right in zip(computed[1:], expected[1:], strict=True):
        assert relative_error(given, right) < ROUNDING
    assert relative_error(computed[0][:, 2:], expected[0][:, 2:]) < ROUNDING


def refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("a bias is made")


def test_a_step_makes_no_bias(
    name: str, network: Any, launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache(network, 2)
    called(network, ids_of(2, PROMPT), cache, range(PROMPT))
    monkeypatch.setattr(alibi.Alibi, "bias", refuse)
    monkeypatch.setattr(position_bias, "position_bias", refuse)
    monkeypatch.setattr(attention, "mask_to_bias", refuse)
    for length in (PROMPT, PROMPT + 1):
        called(network, ids_of(2, 1), cache, [length])
    if name != "glm":  # whose masks come from outside
        called(network, ids_of(2, 5), cache, range(PROMPT + 2, PROMPT + 7))
    assert "attention_decode" in launcher.names


# ---- rows of different lengths -------------------------------------------------------------------

STARTS, LENGTHS = (40, 0, 21), (17, 20, 3)
PROMPTS = (5, 1, 20)


def pass_over(network: Any, pools: Any, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    """ids: (1, T), those of all rows."""
    packed: Any = PackedCache(pools[0].tokens, spans)
    if isinstance(network, T5):
        prompts = [
            Span(start, length - span.num_tokens, span.num_tokens)
            for start, length, span in zip((30, 0, 4), PROMPTS, spans, strict=False)
        ]
        packed = PackedT5Cache(packed, PackedCache(pools[1].tokens, prompts), len(spans))
    # Of a GLM, which has masks from outside, each token sees all keys of its row.
    more = {"attention_mask": [None] * len(spans)} if isinstance(network, GLM) else {}
    states: torch.Tensor = called(network, ids, packed, positions_of(spans), **more)
    return states


def positions_of(spans: Sequence[Span]) -> list[int]:
    return [position for span in spans for position in range(span.length, span.num_keys)]


def pools_of(network: Any) -> list[KVCache]:
    config = network.config
    torch.manual_seed(1)
    pools = []
    for _ in range(2):
        heads = config.num_attention_heads
        pools.append(KVCache(NUM_LAYERS, 1, heads, 80, config.head_dim, torch.float32, "cpu"))
        for tensor in pools[-1].tokens:
            tensor.normal_()
    return pools


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_rows_of_as_many_tokens_are_one_launch(
    name: str, network: Any, launcher: HostLauncher, num_tokens: int
) -> None:
    spans = [Span(*place, num_tokens) for place in zip(STARTS, LENGTHS, strict=True)]
    ids = ids_of(1, 3 * num_tokens)
    together = pass_over(network, pools_of(network), spans, ids)
    assert attentions(launcher) == ["attention_decode"] * per_step(name)
    with fused_kernels(False):
        expected = pass_over(network, pools_of(network), spans, ids)
    assert relative_error(together, expected) < ROUNDING


def test_rows_of_other_numbers_of_tokens_are_a_launch_each(
    name: str, network: Any, launcher: HostLauncher
) -> None:
    numbers = (1, 2, 1)
    spans = [Span(*place) for place in zip(STARTS, LENGTHS, numbers, strict=True)]
    together = pass_over(network, pools_of(network), spans, ids_of(1, sum(numbers)))
    assert attentions(launcher) == ["attention_decode"] * 3 * per_step(name)
    with fused_kernels(False):
        expected = pass_over(network, pools_of(network), spans, ids_of(1, sum(numbers)))
    assert relative_error(together, expected) < ROUNDING


def test_deterministic_passes_keep_their_own_way(launcher: HostLauncher) -> None:
    pool = KVCache(1, 1, 2, 40, 16, torch.float32, "cpu")
    packed = PackedCache(pool.tokens, [Span(0, 3, 1), Span(20, 5, 1)], copies=True)
    query = torch.randn(1, 2, 2, 16)
    assert packed.attend(0, query, query, query, [None, None], 0.25).shape == query.shape
    assert not attentions(launcher)
