"""Real networks behind the server: texts, scores and blanks are those of the Python functions.

bminf/server/pretrained.py, bminf/server/zoo.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from running_server import Running, running
from tiny_glm import tiny_model, tokenizer_of
from tiny_llama import TEMPLATE, save_llama, save_tokenizer
from tiny_models import make
from tiny_served import texts_of

import bminf
from bminf.models import BLOOM, CPM1, CPM2, EVA, GLM
from bminf.server.pretrained import PretrainedTexts
from bminf.server.texts import Settings, token_bytes, token_text
from bminf.server.zoo import ZooTexts

PROMPT = "once upon a time"
GREEDY = {"temperature": 0, "max_tokens": 6}


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_llama(tmp_path_factory.mktemp("llama"), TEMPLATE)
    return bminf.load(folder, quantization=None, device="cpu", max_length=64, max_batch_size=2)


@pytest.fixture(scope="module")
def served(llama: Any) -> Iterator[Running]:
    with running(lambda: texts_of(llama)) as server:
        yield server


def test_its_text_is_that_of_generate(llama: Any, served: Running) -> None:
    ids = llama.tokenizer(PROMPT, return_tensors="pt")
    expected = llama.generate(**ids, max_new_tokens=6, do_sample=False)[0, 4:]
    answer = served.complete(PROMPT, max_tokens=6)
    assert answer.text == llama.tokenizer.decode(expected)
    assert served.complete(ids["input_ids"][0].tolist(), max_tokens=6).text == answer.text


@pytest.mark.parametrize("length", [2, 8, 9, 30])
def test_scores_of_a_prompt_are_those_of_the_network(
    llama: Any, served: Running, length: int
) -> None:
    """In slices, the last of which may be of one."""
    ids = torch.randint(0, 100, (1, length))
    with torch.inference_mode():
        logs = llama(ids).logits[0].log_softmax(-1)
    expected = logs[:-1].gather(1, ids[0, 1:, None]).view(-1).tolist()
    body = {"prompt": [ids[0].tolist()], "echo": True, "logprobs": 1, "max_tokens": 1}
    scores = served.complete(**body).json["choices"][0]["logprobs"]
    assert scores["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-5)
    best = logs[:-1].amax(-1).tolist()
    top = [max(one.values()) for one in scores["top_logprobs"][1:-1]]
    assert top == pytest.approx(best, abs=1e-5)
    before = scores["token_logprobs"][-1]
    assert before == pytest.approx(float(logs[-1].amax()), abs=1e-5)


def test_a_dialogue_is_put_into_the_template(llama: Any, served: Running) -> None:
    messages = [{"role": "user", "content": "upon"}]
    answer = served.post("/v1/chat/completions", {"messages": messages, **GREEDY})
    expected = served.complete("user upon", max_tokens=6)
    assert answer.json["choices"][0]["message"]["content"] == expected.text
    assert answer.json["usage"] == expected.json["usage"]


def test_a_dialogue_is_not_read_again(llama: Any) -> None:
    """Of the second prompt, what is new is fed, and the answer is that of a server that is new."""
    messages = [{"role": "user", "content": "upon word3 word4"}]
    fed: list[int] = []
    layer = llama.model.layers[0]

    def answered(server: Running) -> str:
        body = {"messages": messages, "temperature": 0, "max_tokens": 5}
        answer = server.post("/v1/chat/completions", body).json
        return answer["choices"][0]["message"]["content"]

    hook = layer.register_forward_hook(lambda module, given, output: fed.append(given[0].shape[1]))
    try:
        with running(lambda: texts_of(llama)) as server:
            said = answered(server)
            messages[0]["content"] += f" {said} a time"  # as a template that puts both in a line
            assert (fed, len(said.split())) == ([4, 1, 1, 1, 1], 5)
            fed.clear()
            second = answered(server)
        assert fed == [1 + 2, 1, 1, 1, 1]  # the last token of an answer was not fed yet
    finally:
        hook.remove()
    with running(lambda: texts_of(llama)) as server:
        assert answered(server) == second


def test_what_its_authors_say_of_sampling_is_the_default(llama: Any) -> None:
    texts, own = texts_of(llama), llama.generation_config
    asked = texts.prompt(PROMPT)

    def sampling(**given: Any) -> Any:
        return texts.request(asked, Settings(**given), 1).sampling

    assert (sampling().temperature, sampling().top_k) == (1.0, None)
    try:
        own.temperature = 0.6
        assert sampling().temperature == 1.0  # it is for drawing, which it does not say
        own.do_sample, own.temperature, own.top_k, own.top_p = True, 0.6, 30, 0.9
        assert (sampling().temperature, sampling().top_k, sampling().top_p) == (0.6, 30, 0.9)
        given = sampling(temperature=0.3, top_k=7, top_p=0.4)
        assert (given.temperature, given.top_k, given.top_p) == (0.3, 7, 0.4)
        assert sampling(temperature=0).is_greedy and sampling(top_p=0).is_greedy
    finally:
        own.do_sample, own.temperature, own.top_k, own.top_p = False, None, None, None


def test_deterministic_answers_are_the_same_in_any_company(llama: Any) -> None:
    prompts = [f"once word{i} upon word{2 * i}" for i in range(12)]
    with running(lambda: texts_of(llama, deterministic=True)) as server:
        body = {"logprobs": 0, "max_tokens": 5}
        alone = [server.complete(prompt, **body).json["choices"][0] for prompt in prompts]
        together = server.complete(prompts, **body).json["choices"]
    scores = [choice["logprobs"]["token_logprobs"] for choice in together]
    assert scores == [choice["logprobs"]["token_logprobs"] for choice in alone]


def test_the_text_of_a_special_token_is_its_id(llama: Any, tmp_path: Path) -> None:
    """As lm-eval asks for the end of a text."""
    save_tokenizer(tmp_path, eos_token="</s>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = PretrainedTexts(llama, tokenizer, list, list, [], None)
    assert texts.special["eos_token"] == "</s>"
    ids = texts.encode("</s>", add_special_tokens=False)
    assert ids == [tokenizer.eos_token_id] and texts.decode(ids) == "</s>"


def test_an_encoder_decoder_is_served(tmp_path: Path) -> None:
    model = bminf.wrapper(make("t5"), False, device="cpu", max_length=32)
    ids = [5, 6, 7]
    tokenizer = save_tokens(tmp_path, model.config.vocab_size)
    texts = PretrainedTexts(model, tokenizer, list, list, [], None)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, 1:]
    with running(lambda: texts) as server:
        assert server.complete(ids, max_tokens=4).text == tokenizer.decode(expected)
        assert server.complete(ids, echo=True, logprobs=1).error["param"] == "echo"


def save_tokens(folder: Path, size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PIECES = [
    ("<0xE5>", "\N{REPLACEMENT CHARACTER}", b"\xe5", "bytes:\\xe5"),
    ("å", "\N{REPLACEMENT CHARACTER}", b"\xe5", "bytes:\\xe5"),  # as GPT-2 spells it
    ("Ġthe", " the", b" the", " the"),
    ("\u2581the", "the", b" the", " the"),
    ("\u2581the", " the", b" the", " the"),
    ("天", "天", "天".encode(), "天"),
]


@pytest.mark.parametrize(("piece", "text", "nbytes", "shown"), PIECES)
def test_a_token_is_its_bytes(piece: str, text: str, nbytes: bytes, shown: str) -> None:
    assert token_bytes(piece, text) == nbytes
    assert token_text(nbytes) == shown


# ---- the zoo -------------------------------------------------------------------------------------

ZOO = {"cpm1": CPM1, "cpm2": CPM2, "eva": EVA, "glm10b": GLM, "glm130b": GLM, "bloom": BLOOM}
TEXTS = {"cpm1": "今天天气", "cpm2": "今天天气", "eva": "你是谁", "bloom": "now is the time",
         "glm10b": "now is the time",
         "glm130b": "now is the time"}  # fmt: skip
BLANKS = {"cpm2": "今天<span>很好，我们<span>吧。", "glm10b": "now [MASK] is a [MASK]",
          "glm130b": "now [MASK] is a [MASK]"}  # fmt: skip

Loaded = Callable[[str], tuple[Any, Running]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The model and its server; one at a time."""
    from contextlib import ExitStack

    known: dict[str, tuple[Any, Running]] = {}
    with ExitStack() as stack:

        def load(name: str) -> tuple[Any, Running]:
            if name not in known:
                folder = tiny_model(name).write_original(tmp_path_factory.mktemp(name))
                model: Any = ZOO[name](
                    folder, device="cpu", quantization=None, tokenizer=tokenizer_of(name)
                )
                stack.enter_context(model)
                texts = ZooTexts(model, lambda messages: [m["content"] for m in messages])
                known[name] = model, stack.enter_context(running(lambda: texts))
            return known[name]

        yield load


pytestmark = pytest.mark.filterwarnings("ignore:found no sentencepiece model")


@pytest.mark.parametrize("name", ZOO)
def test_a_built_in_model_says_what_generate_says(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    for settings in ({"temperature": 0}, {"seed": 5, "top_k": 20, "temperature": 0.7}):
        expected, stopped = model.generate(TEXTS[name], max_tokens=8, **settings)
        body = {"prompt": TEXTS[name], "max_tokens": 8, **settings}
        choice = server.post("/v1/completions", body).json["choices"][0]
        assert (choice["text"], choice["finish_reason"] == "stop") == (expected, stopped)


@pytest.mark.parametrize("name", ZOO)
def test_ids_are_read_as_the_text_they_are_of(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    body = {"prompt": TEXTS[name], "add_special_tokens": False}
    ids = server.post("/tokenize", body).json["tokens"]
    assert ids == list(model.tokenizer.encode(TEXTS[name]))
    answers = [server.complete(prompt, max_tokens=4) for prompt in (TEXTS[name], ids)]
    texts = [answer.text for answer in answers]
    if (
        name != "eva" and name != "glm10b"
    ):  # which put a mark at the end, or the beginning, of texts
        assert texts[0] == texts[1]
    assert all(answer.status == 200 for answer in answers)
    assert server.post("/detokenize", {"tokens": ids}).status == 200


@pytest.mark.parametrize("name", ZOO)
def test_the_text_of_a_special_token_of_the_zoo_is_its_id(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    end = server.get("/tokenizer_info").json["eos_token"]
    body = {"prompt": end, "add_special_tokens": False}
    assert server.post("/tokenize", body).json["tokens"] == [model.tokenizer.token_id(end)]


@pytest.mark.parametrize("name", BLANKS)
def test_blanks_are_filled_as_by_fill_blank(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    settings = {"max_tokens": 12, "seed": 4, "top_k": 40}
    expected = model.fill_blank(BLANKS[name], **settings)
    body = server.post("/v1/fill", {"text": BLANKS[name], **settings}).json
    assert body["blanks"] == expected
    assert body["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", ["cpm2", "glm10b"])
def test_a_suffix_is_what_stands_behind_a_blank(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    mark = "<span>" if name == "cpm2" else "[MASK]"
    before, behind = ("今天", "很好") if name == "cpm2" else ("now is ", " a time")
    settings = {"max_tokens": 8, "temperature": 0}
    (expected,) = model.fill_blank(f"{before}{mark}{behind}", **settings)
    body = {"prompt": before, "suffix": behind, **settings}
    assert server.post("/v1/completions", body).text == expected["text"]


def test_eva_answers_utterances(zoo: Loaded) -> None:
    model, server = zoo("eva")
    said = ["你好", "你是谁", "今天天气"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    expected, _ = model.dialogue(said, max_tokens=8, temperature=0)
    path, body = "/v1/chat/completions", {"max_tokens": 8, "temperature": 0}
    answer = server.post(path, {"messages": messages, **body})
    assert answer.json["choices"][0]["message"]["content"] == expected
    for wrong in ([*messages, messages[1]], [{"role": "system", "content": "你好"}, *messages]):
        assert server.post(path, {"messages": wrong, **body}).status == 400


@pytest.mark.parametrize("name", ["cpm1", "cpm2", "glm10b"])
def test_base_models_hold_no_dialogue(name: str, zoo: Loaded) -> None:
    _, server = zoo(name)
    messages = [{"role": "user", "content": "a"}]
    answer = server.post("/v1/chat/completions", {"messages": messages})
    assert (answer.status, answer.error["code"]) == (400, "chat_not_supported")
    assert ("/v1/fill" in answer.error["message"]) == (name != "cpm1")


def test_cpm1_scores_its_prompt(zoo: Loaded) -> None:
    model, server = zoo("cpm1")
    ids = model.tokenizer.encode(TEXTS["cpm1"])
    logs = model.logits(ids).log_softmax(-1)[:-1]
    expected = logs.gather(1, torch.tensor(ids[1:])[:, None]).view(-1).tolist()
    answer = server.complete(ids, echo=True, logprobs=0, max_tokens=0)
    scores = answer.json["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[0] is None and scores[1:] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["cpm2", "eva", "glm10b"])
def test_models_that_read_a_prompt_both_ways_do_not_score_it(name: str, zoo: Loaded) -> None:
    _, server = zoo(name)
    answer = server.complete(TEXTS[name], echo=True, logprobs=1)
    assert (answer.status, answer.error["param"]) == (400, "echo")


@pytest.mark.parametrize("name", ZOO)
def test_prompts_at_and_beyond_the_length_of_a_model(name: str, zoo: Loaded) -> None:
    model, server = zoo(name)
    token = model.tokenizer.encode(TEXTS[name])[0]
    num_own = len(server.worker.texts.prompt([token]).prompt.input_ids) - 1  # its marks
    longest = model.max_length - num_own
    statuses = [server.complete([token] * n, max_tokens=2).status for n in (longest + 1, 9999)]
    assert statuses == [400, 400]
    if name in ("cpm1", "cpm2", "eva"):  # a GLM's sop needs one more
        assert server.complete([token] * longest, max_tokens=2).status == 200
