"""Tables that are read by row: which they are, and that a model does not notice where they lie."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from streaming import assert_same_weights, least_limit, make_stack
from tiny_models import LLAMA, greedy, inputs_of, make, output_of

import bminf
from bminf.errors import UnsupportedModelError
from bminf.offload import memory
from bminf.offload.hooks import ATTRIBUTE
from bminf.offload.tables import RowTensor, Table, find_tables
from bminf.quantization.packed import INT8
from bminf.wrapping import plan_for

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than share a scale:UserWarning")

NAMES = {
    "llama": "model.embed_tokens.weight",
    "gemma3_text": "model.embed_tokens.weight",  # whose class scales what it looks up
    "gpt2": "transformer.wte.weight",
    "bloom": "transformer.word_embeddings.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "mamba": "backbone.embeddings.weight",
    "whisper": "model.decoder.embed_tokens.weight",
    "t5": "shared.weight",  # of encoder and decoder
    "bart": "model.shared.weight",
}
GEMMA3N = dict(
    **{**LLAMA, "num_hidden_layers": 4}, head_dim=8, vocab_size_per_layer_input=90,
    hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2,
    sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4,
)  # fmt: skip


def wrap(model: Any, quantization: Any = False, extra_bytes: int = 0, **arguments: Any) -> Any:
    """Wrap `model` on the CPU under the least limit, and `extra_bytes`."""
    limit = plan_for(model, quantization, device="cpu").least_limit + extra_bytes
    return bminf.wrapper(model, quantization, limit, device="cpu", **arguments)


def untied(name: str) -> Any:
    model = make(name, tie_word_embeddings=False)
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))  # T5's is tied all the same
    return model


def rows_of(model: Any) -> torch.Tensor:
    return model.__dict__[ATTRIBUTE].tables[0].rows


# That nobody notices


@pytest.mark.parametrize("name", NAMES)
def test_untied_embeddings_give_the_same_rows(name: str) -> None:
    model, given = untied(name), inputs_of(name)
    expected, ids = output_of(model, given), greedy(model, given)
    assert NAMES[name] in bminf.plan_of(wrap(model)).tables
    for _ in range(2):
        assert torch.equal(output_of(model, given), expected)
    assert torch.equal(greedy(model, given), ids)
    bminf.unwrap(model)
    assert torch.equal(output_of(model, given), expected)
    assert not any(isinstance(parameter, RowTensor) for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_tied_embeddings_beside_a_packed_head_give_the_same_rows(name: str) -> None:
    given = inputs_of(name)
    resident = bminf.wrapper(make(name), "int4", "1GB", device="cpu")
    assert bminf.plan_of(resident).tables == ()
    model = wrap(make(name), "int4")
    plan = bminf.plan_of(model)
    assert NAMES[name] in plan.tables and plan.streamed
    assert isinstance(model.get_output_embeddings(), bminf.QuantizedLinear)
    assert torch.equal(output_of(model, given), output_of(resident, given))
    assert torch.equal(greedy(model, given), greedy(resident, given))


def test_tables_of_each_layer_are_tables_too() -> None:
    config = tf.Gemma3nTextConfig(**GEMMA3N)
    torch.manual_seed(0)
    model = tf.Gemma3nForCausalLM(config).eval()
    given = inputs_of("llama")
    resident = bminf.wrapper(copy.deepcopy(model), "int4", "1GB", device="cpu")
    wrap(model, "int4")
    names = {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"}
    assert names == set(bminf.plan_of(model).tables)
    assert torch.equal(output_of(model, given), output_of(resident, given))


class Grams(torch.nn.Module):
    """A hand-written model with tables for pairs of tokens in a list, and a head of its own."""

    def __init__(self, **of_tokens: Any) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(96, 16, **of_tokens)
        self.pairs = torch.nn.ModuleList(torch.nn.Embedding(192, 16) for _ in range(3))
        self.body = make_stack(width=16)
        self.body.head = torch.nn.Linear(16, 96)
        self.get_input_embeddings = lambda: self.tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for number, table in enumerate(self.pairs):
            x = x + table((ids * 7 + ids.roll(number + 1, -1)) % 192)
        return self.body(x)


def test_tables_in_a_list_are_no_blocks_that_stream() -> None:
    torch.manual_seed(0)
    model, ids = Grams().eval(), torch.randint(96, (2, 9))
    expected = model(ids)
    plan = bminf.plan_of(wrap(model))
    assert plan.tables == ("tokens.weight", *(f"pairs.{n}.weight" for n in range(3)))
    assert plan.table_bytes == 4 * 16 * (96 + 3 * 192)
    assert all(name.startswith("body.layers.") for name in plan.streamed)
    assert torch.equal(model(ids), expected)


def test_a_table_that_was_named_as_a_block_is_none() -> None:
    model, given = make("llama"), inputs_of("llama")
    expected = output_of(model, given)
    names = ["model.embed_tokens", "model.layers"]
    limit = plan_for(model, False, blocks=names, device="cpu").least_limit
    bminf.wrapper(model, False, limit, device="cpu", blocks=names)
    plan = bminf.plan_of(model)
    assert plan.blocks[0].nbytes == 0 and plan.resident == ("model.embed_tokens",)
    assert plan.tables == ("model.embed_tokens.weight",)
    assert torch.equal(output_of(model, given), expected)


def test_other_inputs_and_other_readers() -> None:
    model, ids = make("llama"), inputs_of("llama")["input_ids"]
    rows = model.get_input_embeddings()(ids).detach()
    expected = output_of(model, {"inputs_embeds": rows})
    weight = model.model.embed_tokens.weight.detach().clone()
    wrap(model)
    table = model.get_input_embeddings()
    for of in (ids, ids[0], ids[0, 0], ids[:0], ids.int()):
        assert torch.equal(table(of), torch.nn.functional.embedding(of, weight))
    assert torch.equal(output_of(model, {"inputs_embeds": rows}), expected)
    for wrong in (96, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([[wrong]]))


def test_who_reads_all_of_a_table_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    model = wrap(make("llama"))
    expected = make("llama").model.embed_tokens.weight
    with caplog.at_level(logging.WARNING, "bminf"):
        for _ in range(2):
            assert torch.equal(model.model.embed_tokens.weight * 1, expected)
            assert torch.equal(model.model.embed_tokens.weight[3], expected[3])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("model.embed_tokens.weight, of which rows are kept on the host")


# Where they lie, and what is counted


@pytest.mark.parametrize("quantization", [False, "int8", "int4"])
def test_an_untied_table_lowers_the_least_limit_by_its_bytes(quantization: Any) -> None:
    model = make("llama")
    nbytes = model.model.embed_tokens.weight.nbytes
    whole = plan_for(model, quantization, device="cpu")
    assert whole.table_bytes == nbytes and whole.tables == ()
    largest = max(block.nbytes for block in whole.blocks)
    assert whole.least_limit == whole.outside_bytes - nbytes + 2 * largest
    plan = bminf.plan_of(wrap(model, quantization))
    assert plan.total_bytes == whole.least_limit == plan.least_limit
    assert plan.outside_bytes == whole.outside_bytes - nbytes
    assert plan.host_table_bytes == nbytes == plan.host_bytes - plan.streamed_bytes
    assert "by row" in str(plan) and "model.embed_tokens.weight" in str(plan)


def test_a_tied_table_lowers_it_by_what_the_packed_head_leaves() -> None:
    tied, least = make("gpt2"), {}
    for quantization in ("int8", "int4"):
        whole = plan_for(tied, quantization, device="cpu")
        least[quantization] = whole.fixed_bytes
    embedding = tied.transformer.wte.weight
    head_bytes = embedding.numel() * INT8.bits_per_weight(embedding.shape[1]) / 8
    assert least["int8"] - least["int4"] == embedding.nbytes - head_bytes


def test_what_fits_entirely_lies_where_it_lay() -> None:
    model = make("llama")
    whole = plan_for(model, False, device="cpu")
    bminf.wrapper(model, False, whole.total_bytes, device="cpu")
    assert bminf.plan_of(model).tables == () and bminf.plan_of(model) == whole
    assert not isinstance(model.model.embed_tokens.weight, RowTensor)
    assert "forward" not in model.model.embed_tokens.__dict__


def test_the_tables_leave_before_the_first_block_streams() -> None:
    model, given = make("llama"), inputs_of("llama")
    expected = output_of(model, given)
    whole = plan_for(model, False, device="cpu")
    for lacking in (1, whole.table_bytes):
        bminf.wrapper(model, False, whole.total_bytes - lacking, device="cpu")
        plan = bminf.plan_of(model)
        assert plan.tables and not plan.streamed and plan.slot_bytes == 0
        assert torch.equal(output_of(model, given), expected)
        assert_same_weights(model, make("llama"))
        assert bminf.stats_of(model).copies == 0
        with pytest.raises(UnsupportedModelError, match="cannot be moved or converted"):
            model.half()
        assert model.to("cpu") is model
        bminf.unwrap(model)
    bminf.wrapper(model, False, whole.total_bytes - whole.table_bytes - 1, device="cpu")
    assert bminf.plan_of(model).streamed


def test_a_mapped_table_stays_in_its_file(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    address = model.model.embed_tokens.weight.data_ptr()
    assert memory.mapped_files()(address)
    wrap(model)
    assert rows_of(model).data_ptr() == address
    bminf.unwrap(model)
    assert not memory.mapped_files()(model.model.embed_tokens.weight.data_ptr())
    (tmp_path / "home").mkdir()
    wrap(model, offload_dir=tmp_path / "home")  # from memory to a file, where somebody wants it
    assert memory.mapped_files()(rows_of(model).data_ptr())
    assert list((tmp_path / "home").iterdir()) == []
    assert torch.equal(
        output_of(model, inputs_of("llama")), output_of(make("llama"), inputs_of("llama"))
    )


def test_host_memory_for_tables_is_not_there_for_blocks() -> None:
    model = make("llama")
    whole = plan_for(model, False)
    roomy = plan_for(model, False, whole.least_limit, host_memory="1GB")
    assert roomy.on_disk == () and roomy.host_bytes == roomy.streamed_bytes + roomy.table_bytes
    tight = plan_for(model, False, whole.least_limit, host_memory=roomy.host_bytes - 1)
    assert tight.on_disk and tight.host_bytes <= roomy.host_bytes - 1


# Weights that are read, written, saved


def test_weights_are_read_and_written(tmp_path: Path) -> None:
    model, plain, given = wrap(make("llama")), make("llama"), inputs_of("llama")
    assert_same_weights(model, plain)
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert model.num_parameters() == plain.num_parameters()
    model.save_pretrained(tmp_path)
    saved = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(saved, given), output_of(plain, given))
    other = make("llama", seed=5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output_of(model, given), output_of(other, given))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 3.0
        other.model.embed_tokens.weight[7] = 3.0
    assert_same_weights(model, other)
    assert torch.equal(output_of(model, given), output_of(other, given))
    bminf.unwrap(model)
    assert_same_weights(model, other)


def test_a_shared_table_stays_one() -> None:
    model = wrap(make("t5"), "int4")
    shared = model.shared.weight
    assert shared is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    bminf.unwrap(model)
    shared = model.shared.weight
    assert shared is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resizing_is_refused_by_name(name: str) -> None:
    model, given = wrap(make(name), "int4"), inputs_of(name)
    expected = output_of(model, given)
    with pytest.raises(UnsupportedModelError, match=r"before wrapping|weight of a packed linear"):
        model.resize_token_embeddings(tiny_models.VOCAB + 8)
    assert torch.equal(output_of(model, given), expected)


def test_a_copy_is_refused() -> None:
    model = wrap(make("llama"))
    with pytest.raises(UnsupportedModelError, match="copy it before wrapping"):
        copy.deepcopy(model)


# Training


def test_a_gradient_for_a_table_is_refused() -> None:
    model = make("llama")
    whole = plan_for(model, False, device="cpu")
    bminf.wrapper(model, False, whole.total_bytes - 1, device="cpu")  # nothing else is elsewhere
    with pytest.raises(UnsupportedModelError, match="whose rows are kept on the host"):
        model(**inputs_of("llama")).logits.sum().backward()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model(**inputs_of("llama")).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_an_embedding_that_is_trained_beside_frozen_weights_stays() -> None:
    def frozen() -> Any:
        model = make("llama").requires_grad_(False)
        model.model.embed_tokens.requires_grad_(True)
        return model

    model, plain = wrap(frozen()), frozen()
    assert bminf.plan_of(model).tables == () and bminf.plan_of(model).streamed
    for one in (model, plain):
        one(**inputs_of("llama")).logits.sum().backward()
    given, expected = (one.model.embed_tokens.weight.grad for one in (model, plain))
    assert torch.equal(given, expected)


# Which they are


def names_of(tables: list[Table]) -> list[str]:
    return [name for table in tables for name in table.names]


@pytest.mark.parametrize("name", ["gemma3_text", "bloom", "t5", "mamba"])
def test_a_tied_head_needs_the_table_unless_it_is_exchanged(name: str) -> None:
    model = make(name)
    assert find_tables(model) == []
    found = find_tables(model, [model.get_output_embeddings()])
    assert NAMES[name] in names_of(found)
    assert sum(table.nbytes for table in found) == model.get_input_embeddings().weight.nbytes


def test_what_writes_as_it_reads_is_none() -> None:
    assert "tokens.weight" in names_of(find_tables(Grams(padding_idx=3, sparse=True)))
    assert "tokens.weight" not in names_of(find_tables(Grams(max_norm=1.0)))


def test_a_hand_written_model_needs_a_head_of_its_own() -> None:
    """Without, it may multiply by the table."""
    model = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(96, 16), "body": make_stack()})
    assert find_tables(model) == []
    model["head"] = torch.nn.Linear(16, 96)
    assert names_of(find_tables(model)) == ["tokens.weight"]
    model["head"].weight = model["tokens"].weight
    assert find_tables(model) == []


def test_positions_and_queries_are_none() -> None:
    config = tf.BertConfig(**{**tiny_models.TINY["bert"].arguments, "max_position_embeddings": 40})
    (table,) = find_tables(tf.BertModel(config))
    assert table.names == ("embeddings.word_embeddings.weight",)
    assert find_tables(make("vit")) == []


def test_what_a_view_shares_is_none() -> None:
    model = make("llama")
    model.register_buffer("some", model.model.embed_tokens.weight.detach()[3:5])
    assert find_tables(model) == [] and least_limit(model) > 0
