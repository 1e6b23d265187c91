"""`dbrx-q tasks`: results on the tasks of conftest.py are compared with sums over transformers' logits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dbrx_q import DbrxTokenizer
from dbrx_q.checkpoint.weights_hash import weights_sha256
from dbrx_q.eval.tasks import harness

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
BOOK = (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8")
ALL_TASKS = "own_choices,own_text,own_answers"  # of conftest.py


def documents(tasks_folder: Path, task: str) -> list[dict[str, Any]]:
    """The documents that the fixture `tasks_folder` wrote for a task."""
    return [json.loads(line) for line in (tasks_folder.parent / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tasks_of_all_kinds_equal_sums_over_logits(
    tasks_folder: Path, expected: dict[str, float], cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    shown = cli("tasks", NANO, "--tasks", ALL_TASKS, "--tasks-path", tasks_folder, "--batch", 4, "--json", "--out", out)
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert report == json.loads(out.read_text(encoding="utf-8"))
    assert list(tmp_path.glob("*.partial")) == []
    results = report["results"]
    assert 0 < expected["acc"] < 1
    assert results["own_choices"]["acc,none"] == expected["acc"]
    assert results["own_text"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-4)
    assert results["own_answers"]["exact_match,none"] == pytest.approx(expected["exact_match"])
    assert report["checkpoint_sha256"] == weights_sha256(sorted(NANO.glob("*.safetensors")))
    assert report["provenance"]["versions"]["lm_eval"]
    assert (report["dtype"], report["batch"], report["tasks"]) == ("float32", 4, ALL_TASKS.split(","))
    assert 0 < report["prefilled_tokens"] < report["requested_tokens"]
    assert report["truncated_contexts"] == 0
    assert report["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234, "sampling": 1234}
    assert report["provenance"]["versions"]["datasets"] == version("datasets")
    texts = [document["text"] for document in documents(tasks_folder, "own_text")]
    lines = (json.dumps(["loglikelihood_rolling", text]) + "\n" for text in texts)
    assert report["requests_sha256"]["own_text"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert len(set(report["requests_sha256"].values())) == len(ALL_TASKS.split(","))


def test_the_table_and_the_summary(tasks_folder: Path, expected: dict[str, float], cli: Callable[..., Any]) -> None:
    shown = cli("tasks", NANO, "--tasks", "own_choices", "--tasks-path", tasks_folder, "--batch", 8)
    assert shown.code == 0, shown.err
    [row] = re.findall(r"^\|own_choices.*", shown.out, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert "acc" in cells
    assert f"{expected['acc']:g}" in cells
    assert re.search(r"\d+ tokens of prompts were computed for \d+", shown.out)
    assert "bits per weight, sha256 " in shown.out


def test_limit_and_few_shot_examples(tasks_folder: Path, cli: Callable[..., Any]) -> None:
    with (tasks_folder / "own_choices.yaml").open("a", encoding="utf-8") as file:
        file.write("fewshot_split: test\n")
    options = ("--tasks", "own_choices", "--tasks-path", tasks_folder, "--limit", 2, "--batch", 8, "--json")
    none, two = (json.loads(cli("tasks", NANO, *options, "--num-fewshot", shots).out) for shots in (0, 2))
    assert none["n-samples"]["own_choices"]["effective"] == 2
    tokenizer = DbrxTokenizer.from_pretrained(NANO)
    questions = documents(tasks_folder, "own_choices")[:2]
    tokens = [len(tokenizer.encode(f"{document['question']} {choice}")) - 1 for document in questions for choice in document["choices"]]
    assert none["requested_tokens"] == sum(tokens)
    assert two["n-shot"]["own_choices"] == 2
    assert two["requested_tokens"] > none["requested_tokens"]


def test_chat_applies_the_template(tasks_folder: Path, cli: Callable[..., Any]) -> None:
    options = ("--tasks", "own_choices", "--tasks-path", tasks_folder, "--json", "--kv", "int8")
    plain, chat = (json.loads(cli("tasks", NANO, *options, *chat_options).out) for chat_options in ((), ("--chat",)))
    assert chat["chat"]
    # The template adds at least five tokens to a question: "user", its two marks, two line breaks and the assistant's opening.
    choices = sum(len(document["choices"]) for document in documents(tasks_folder, "own_choices"))
    assert chat["requested_tokens"] > plain["requested_tokens"] + 5 * choices


def test_a_quantized_checkpoint(tasks_folder: Path, quantized_nano: Path, cli: Callable[..., Any], expected: dict[str, float]) -> None:
    shown = cli("tasks", quantized_nano, "--tasks", "own_text", "--tasks-path", tasks_folder, "--json")
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    bits = report["results"]["own_text"]["bits_per_byte,none"]
    assert bits != pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert bits == pytest.approx(expected["bits_per_byte"], rel=0.05)
    assert report["bits_per_weight"] < 8


def test_nan_is_written_as_null(tasks_folder: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.HarnessModel, "loglikelihood_rolling", lambda _, requests: [math.nan] * len(requests))
    out = tmp_path / "result.json"
    for _ in range(2):  # a former result is replaced
        shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", tasks_folder, "--out", out)
        assert shown.code == 0, shown.err
    report = json.loads(out.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert report["results"]["own_text"]["bits_per_byte,none"] is None


def test_truncated_contexts_are_counted(tasks_folder: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own_answers.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": "x"}) + "\n" for prompt in (BOOK[:12000], "It was")), encoding="utf-8"
    )
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", tasks_folder, "--json")
    assert json.loads(shown.out)["truncated_contexts"] == 1
    assert "1 contexts were truncated at their beginning" in shown.err
