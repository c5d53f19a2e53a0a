"""What tools.decoding runs in a process of its own: a model in one format. The first line it reads
is answered with what there is to know of the model, each further one with a Sample."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

import bminf

_LIMIT = "64GB"  # more than any of these takes: all of it stays
_HIGHEST_ID = 90


def main() -> None:
    folder, packing, what = sys.argv[1:4]
    prompt_tokens, tokens, threads = map(int, sys.argv[4:])
    torch.set_num_threads(threads)
    model = opened(folder, None if packing == "none" else json.loads(packing), what == "head")
    torch.manual_seed(0)
    prompt = torch.randint(1, _HIGHEST_ID, (1, prompt_tokens))
    sys.stdin.readline()
    print(json.dumps({"weight_bytes": weight_bytes(model)}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(sample(model, prompt, tokens)), flush=True)


def opened(folder: str, packing: dict[str, Any] | None, packs_head: bool) -> Any:
    """The model in float32, or under the wrapper with its linears packed."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all write as many tokens
    model.generation_config.pad_token_id = 0
    if packing is None:
        return model
    head = model.get_output_embeddings()
    return bminf.wrapper(
        model, bminf.Format(**packing), memory_limit=_LIMIT, device="cpu",
        quantize=lambda _, linear: packs_head or linear is not head,
    )  # fmt: skip


def weight_bytes(model: Any) -> int:
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


def sample(model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, float]:
    """CPU seconds of the prompt with the first token, and of each token behind it."""
    marks_s = [time.process_time()]

    def mark(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        marks_s.append(time.process_time())
        return torch.zeros(len(ids), dtype=torch.bool)

    criteria = transformers.StoppingCriteriaList([mark])
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, stopping_criteria=criteria)
    assert len(marks_s) == 1 + tokens
    return {
        "prefill_s": marks_s[1] - marks_s[0],
        "token_s": (marks_s[-1] - marks_s[1]) / (tokens - 1),
    }


if __name__ == "__main__":
    main()
