"""Tasks with files on disk, and the figures that they must give, computed from transformers' logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
import torch
import transformers

from dbrx_q import DbrxTokenizer
from dbrx_q.sources.streamed import ConvertedSource

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
BOOK = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")

CHOICES: list[dict[str, Any]] = [
    {
        "question": "No one would have believed in the last years of the nineteenth",
        "choices": ["century", "river bank", "hour"],
        "answer": 0,
    },
    {"question": "The man walked to the", "choices": ["house on the hill", "sky"], "answer": 1},
    {"question": "It was a cold", "choices": ["night", "sun", "planet of the sun"], "answer": 2},
    {"question": "The Martians came from", "choices": ["the house", "the planet Mars"], "answer": 1},
]
TEXTS = [BOOK[i : i + 400] for i in (1000, 3000)]
PROMPTS = ["It was", "The Martians", "No one would"]

TASKS = {
    "own_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "own_answers": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="session")
def oracle() -> transformers.DbrxForCausalLM:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()


def log_p(oracle: transformers.DbrxForCausalLM, ids: list[int], predicted: int) -> float:
    """Log-likelihood of the last `predicted` tokens of `ids`."""
    with torch.no_grad():
        table = oracle(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(table.gather(1, torch.tensor(ids[1:])[:, None])[-predicted:].sum())


def answer_of(oracle: transformers.DbrxForCausalLM, tokenizer: DbrxTokenizer, prompt: str) -> str:
    ids = tokenizer.encode(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids)[len(prompt) :].split(".")[0]


@pytest.fixture(scope="session")
def expected(oracle: transformers.DbrxForCausalLM) -> dict[str, float]:
    """The figure of each task. For the second prompt of own_answers, the right answer differs from the model's."""
    tokenizer = DbrxTokenizer.from_pretrained(NANO)
    right = 0
    for document in CHOICES:
        context = tokenizer.encode(str(document["question"]))
        sums = []
        for choice in document["choices"]:
            ids = tokenizer.encode(f"{document['question']} {choice}")
            sums.append(log_p(oracle, ids, len(ids) - len(context)))
        right += sums.index(max(sums)) == document["answer"]
    bits = sum(-log_p(oracle, [4092, *tokenizer.encode(text)], len(tokenizer.encode(text))) for text in TEXTS) / math.log(2)
    return {"acc": right / len(CHOICES), "bits_per_byte": bits / sum(len(text.encode()) for text in TEXTS), "exact_match": 2 / 3}


@pytest.fixture(scope="session")
def answers(oracle: transformers.DbrxForCausalLM) -> list[str]:
    tokenizer = DbrxTokenizer.from_pretrained(NANO)
    first, _, last = (answer_of(oracle, tokenizer, prompt) for prompt in PROMPTS)
    return [first, "something else", last]


@pytest.fixture
def tasks_folder(tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks and their documents; nothing is read from or written to the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = {
        "own_choices": CHOICES,
        "own_text": [{"text": text} for text in TEXTS],
        "own_answers": [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, body in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents[name]), encoding="utf-8")
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(file))}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{body}metadata: {{version: 1.0}}\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a checkpoint is loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was loaded")

    monkeypatch.setattr(ConvertedSource, "load", load)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own 14,000 files, which take longer to read than these tests take to run."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: manager(**{**options, "include_defaults": False}))
