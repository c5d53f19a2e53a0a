"""Models whose weights accelerate has offloaded to its own store."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from streaming import assert_same_weights, least_limit, make_stack, streamed
from tiny_models import LLAMA, inputs_of, make, output_of

import bminf
from bminf.errors import UnsupportedModelError
from bminf.wrapping import plan_for


def offload(model: torch.nn.Module, how: str, folder: Path) -> torch.nn.Module:
    on_cpu = {"execution_device": torch.device("cpu"), "offload_buffers": how != "cpu"}
    if how.startswith("cpu"):
        return accelerate.cpu_offload(model, **on_cpu)
    if how == "disk":
        return accelerate.disk_offload(model, folder, **on_cpu)
    device_map = {name: "disk" for name, _ in model.named_children()}
    *_, last = device_map
    device_map[last] = "cpu"
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("how", ["cpu", "cpu with buffers", "disk", "dispatched"])
@pytest.mark.parametrize("name", ["stack", "llama", "gpt2"])
def test_what_was_offloaded_is_fetched(how: str, name: str, tmp_path: Path) -> None:
    def made() -> torch.nn.Module:
        return make_stack().bfloat16() if name == "stack" else make(name)

    x = torch.randn(3, 16).bfloat16()

    def output(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(x) if name == "stack" else output_of(model, inputs_of(name))

    plain = made()
    expected = output(plain)
    model = offload(made(), how, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    whole = plan_for(plain, False)
    assert plan_for(model, False).total_bytes >= whole.total_bytes  # of the offloaded one, too
    bminf.wrapper(model, False, least_limit(plain), device="cpu")
    assert bminf.plan_of(model).streamed
    assert bminf.plan_of(model).outside_bytes == whole.outside_bytes - whole.table_bytes
    shutil.rmtree(tmp_path)
    for _ in range(2):
        assert torch.equal(output(model), expected)
    assert_same_weights(model, plain)
    assert not any("_hf_hook" in module.__dict__ for module in model.modules())
    assert not hasattr(model, "hf_device_map")
    if name != "stack":
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == plain.config.tie_word_embeddings
    bminf.unwrap(model)
    assert torch.equal(output(model), expected)


def test_tied_weights_are_fetched_once(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    for how in ("cpu", "disk"):
        model = offload(transformers.LlamaForCausalLM(config).eval(), how, tmp_path / how)
        bminf.wrapper(model, False, "1GB", device="cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_store_that_lacks_weights_is_told_by_name() -> None:
    model = accelerate.cpu_offload(make_stack(), execution_device=torch.device("cpu"))
    del model.layers[2].up._hf_hook.weights_map.dataset["layers.2.up.weight"]
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.up\.weight.*remove_hook"):
        bminf.wrapper(model, False, "1GB", device="cpu")
    assert next(model.head.parameters()).is_meta and hasattr(model.head, "_hf_hook")


def test_offloading_a_model_that_streams_keeps_it_right() -> None:
    model, x, expected = streamed()
    try:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    except UnsupportedModelError as error:
        assert "unwrap" in str(error)
    assert torch.equal(model(x), expected)


def test_group_offloading_is_refused() -> None:
    model = make_stack()
    model.layers[2]._diffusers_hook = SimpleNamespace(hooks={"group_offloading": None})
    with pytest.raises(UnsupportedModelError, match=r"layers\.2.*enable_group_offload"):
        bminf.wrapper(model, False, "1GB", device="cpu")
