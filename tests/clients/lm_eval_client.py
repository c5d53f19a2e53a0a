"""lm-eval's local-completions against a server, and its log-likelihoods against transformers' own.

python lm_eval_client.py run URL FOLDER       with lm-eval[api]: evaluates, keeps what it is told
python lm_eval_client.py compare GGUF FOLDER  with transformers: computes the same, in this process
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TASK = Path(__file__).with_name("capitals")
TOLERANCE = 1e-4  # of a log-likelihood, a token


def run(url: str, folder: Path) -> None:
    """Its tokenizer is the server's, so it needs no transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder.mkdir(parents=True, exist_ok=True)
    text = (TASK / "capitals.yaml").read_text().replace("DATA", str(TASK / "capitals.jsonl"))
    (folder / "capitals.yaml").write_text(text)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = {"model": "smollm2", "base_url": f"{url}/v1/completions",
                 "tokenizer_backend": "remote", "num_concurrent": 2, "max_length": 256}  # fmt: skip
    found: Any = simple_evaluate(
        "local-completions", model_args=arguments, tasks=["capitals"], task_manager=manager,
        batch_size=2, log_samples=True,
    )  # fmt: skip
    samples = [
        {"context": request[0], "choice": request[1], "logprob": float(answer[0][0])}
        for sample in found["samples"]["capitals"]
        for request, answer in zip(requests_of(sample), sample["resps"], strict=True)
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    print(f"lm-eval: accuracy {found['results']['capitals']['acc,none']}, {len(samples)} choices")


def requests_of(sample: Any) -> list[tuple[str, str]]:
    """(context, choice) of each."""
    arguments = sample["arguments"]
    listed = arguments.values() if isinstance(arguments, dict) else arguments
    return [tuple(one.values() if isinstance(one, dict) else one)[:2] for one in listed]


def compare(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    largest = 0.0
    samples = json.loads((folder / "samples.json").read_text())
    for sample in samples:
        context = tokenizer(sample["context"])["input_ids"]
        ids = tokenizer(sample["context"] + sample["choice"])["input_ids"]
        with torch.inference_mode():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(float(logs[i - 1, ids[i]]) for i in range(len(context), len(ids)))
        largest = max(largest, abs(own - sample["logprob"]) / (len(ids) - len(context)))
    assert largest <= TOLERANCE, largest
    print(f"lm-eval: {len(samples)} log-likelihoods within {largest:.1e} a token of transformers'")


if __name__ == "__main__":
    verb, first, where = sys.argv[1:]
    if verb == "run":
        run(first, Path(where))
    else:
        compare(Path(first), Path(where))
