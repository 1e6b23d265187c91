"""`dbrx-q tasks`, on tasks of its own with files on disk, against sums over transformers' logits."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import pytest
import torch
import transformers

from dbrx_q import DbrxTokenizer
from dbrx_q.eval.tasks import harness, shared_prefix
from dbrx_q.sources.streamed import DequantizedSource
from dbrx_q.sources.weights_hash import weights_sha256

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


@pytest.fixture(scope="module")
def oracle() -> transformers.DbrxForCausalLM:
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()


def log_p(oracle: transformers.DbrxForCausalLM, ids: list[int], predicted: int) -> float:
    """Of the last tokens of `ids`."""
    with torch.no_grad():
        table = oracle(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(table.gather(1, torch.tensor(ids[1:])[:, None])[-predicted:].sum())


def answer_of(oracle: transformers.DbrxForCausalLM, tokenizer: DbrxTokenizer, prompt: str) -> str:
    ids = tokenizer.encode(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids)[len(prompt) :].split(".")[0]


@pytest.fixture(scope="module")
def expected(oracle: transformers.DbrxForCausalLM) -> dict[str, float]:
    """What each task must give; of the second prompt the right answer is not the model's."""
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


@pytest.fixture(scope="module")
def answers(oracle: transformers.DbrxForCausalLM) -> list[str]:
    tokenizer = DbrxTokenizer.from_pretrained(NANO)
    first, _, last = (answer_of(oracle, tokenizer, prompt) for prompt in PROMPTS)
    return [first, "something else", last]


@pytest.fixture
def own(tmp_path: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
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
        file.write_text("".join(json.dumps(one) + "\n" for one in documents[name]), encoding="utf-8")
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(file))}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{body}metadata: {{version: 1.0}}\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that must not be loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(DequantizedSource, "load", load)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own 14,000 files, which take longer to read than all tests here."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: manager(**{**options, "include_defaults": False}))


def test_tasks_of_all_kinds(own: Path, expected: dict[str, float], cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    shown = cli("tasks", NANO, "--tasks", ",".join(TASKS), "--tasks-path", own, "--batch", 4, "--json", "--out", out)
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert list(tmp_path.glob("*.partial")) == []
    results = found["results"]
    assert 0 < expected["acc"] < 1
    assert results["own_choices"]["acc,none"] == expected["acc"]
    assert results["own_text"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-4)
    assert results["own_answers"]["exact_match,none"] == pytest.approx(expected["exact_match"])
    assert found["checkpoint_sha256"] == weights_sha256(sorted(NANO.glob("*.safetensors")))
    assert found["provenance"]["versions"]["lm_eval"]
    assert (found["dtype"], found["batch"], found["tasks"]) == ("float32", 4, list(TASKS))
    assert 0 < found["prefilled_tokens"] < found["requested_tokens"]
    assert found["truncated_contexts"] == 0
    assert found["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234, "sampling": 1234}
    assert found["provenance"]["versions"]["datasets"] == version("datasets")
    lines = (json.dumps(["loglikelihood_rolling", text]) + "\n" for text in TEXTS)
    assert found["requests_sha256"]["own_text"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert len(set(found["requests_sha256"].values())) == len(TASKS)


def test_the_table_and_what_else_is_said(own: Path, expected: dict[str, float], cli: Callable[..., Any]) -> None:
    shown = cli("tasks", NANO, "--tasks", "own_choices", "--tasks-path", own, "--batch", 8)
    assert shown.code == 0, shown.err
    [row] = re.findall(r"^\|own_choices.*", shown.out, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert "acc" in cells
    assert f"{expected['acc']:g}" in cells
    assert re.search(r"\d+ tokens of prompts were computed for \d+", shown.out)
    assert "bits per weight, sha256 " in shown.out


def test_documents_are_limited_and_examples_come_first(own: Path, cli: Callable[..., Any]) -> None:
    with (own / "own_choices.yaml").open("a", encoding="utf-8") as file:
        file.write("fewshot_split: test\n")
    options = ("--tasks", "own_choices", "--tasks-path", own, "--limit", 2, "--batch", 8, "--json")
    none, two = (json.loads(cli("tasks", NANO, *options, "--num-fewshot", shots).out) for shots in (0, 2))
    assert none["n-samples"]["own_choices"]["effective"] == 2
    tokenizer = DbrxTokenizer.from_pretrained(NANO)
    tokens = [len(tokenizer.encode(f"{one['question']} {choice}")) - 1 for one in CHOICES[:2] for choice in one["choices"]]
    assert none["requested_tokens"] == sum(tokens)
    assert two["n-shot"]["own_choices"] == 2
    assert two["requested_tokens"] > none["requested_tokens"]


def test_chats_go_through_the_template(own: Path, cli: Callable[..., Any]) -> None:
    options = ("--tasks", "own_choices", "--tasks-path", own, "--json", "--kv", "int8")
    plain, chat = (json.loads(cli("tasks", NANO, *options, *more).out) for more in ((), ("--chat",)))
    assert chat["chat"]
    # user, its two marks, two line breaks and the assistant's opening come around every question
    assert chat["requested_tokens"] > plain["requested_tokens"] + 5 * sum(len(one["choices"]) for one in CHOICES)


def test_a_quantized_checkpoint(own: Path, quantized_nano: Path, cli: Callable[..., Any], expected: dict[str, float]) -> None:
    shown = cli("tasks", quantized_nano, "--tasks", "own_text", "--tasks-path", own, "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    bits = found["results"]["own_text"]["bits_per_byte,none"]
    assert bits != pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert bits == pytest.approx(expected["bits_per_byte"], rel=0.05)
    assert found["bits_per_weight"] < 8


@pytest.mark.usefixtures("few_tasks")
def test_unknown_tasks_are_refused_with_near_ones(own: Path, cli: Callable[..., Any]) -> None:
    near = cli("tasks", NANO, "--tasks", "own_text,own_choice", "--tasks-path", own)
    assert (near.code, near.out) == (2, "")
    assert "found 'own_choice'. Did you mean own_choices" in near.err
    far = cli("tasks", NANO, "--tasks", "zzz", "--tasks-path", own)
    assert far.code == 2
    assert "found 'zzz'. `lm-eval ls tasks`" in far.err


def test_a_data_set_that_cannot_be_fetched(own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    task = (own / "own_text.yaml").read_text(encoding="utf-8")
    remote = re.sub(r"dataset_path.*\n.*\n", "dataset_path: nobody/nothing\n", task).replace("task: own_text", "task: own_remote")
    (own / "own_remote.yaml").write_text(remote, encoding="utf-8")
    shown = cli("tasks", NANO, "--tasks", "own_remote", "--tasks-path", own)
    assert (shown.code, shown.out) == (2, "")
    [line] = [line for line in shown.err.splitlines() if line.startswith("dbrx-q: error")]
    assert "the tasks own_remote must load" in line
    assert "Check the network" in line
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", ","), "at least one task must be named"),
        (("--tasks", "own_text", "--tasks-path", "no/such/folder"), "no/such/folder: must be a folder"),
        (("--tasks", "own_text", "--out", "no/such/folder/a.json"), "must be a file in a folder that exists"),
        (("--tasks", "own_text", "--batch", "0"), "batch"),
        (("--tasks", "own_text", "--device", "tpu"), "device must be"),
    ],
)
def test_what_cannot_be_served_is_refused_first(cli: Callable[..., Any], options: tuple[str, ...], message: str) -> None:
    shown = cli("tasks", NANO, *options)
    assert (shown.code, shown.out) == (2, "")
    assert message in shown.err


@pytest.mark.usefixtures("unloaded")
def test_a_task_that_asks_what_the_model_cannot_do(own: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    file = own / "own_answers.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_gen_toks: 6", "max_gen_toks: 5000"), encoding="utf-8")
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", own, "--out", tmp_path / "result.json")
    assert (shown.code, shown.out) == (2, "")
    assert "max_gen_toks must be from 1 to 2047" in shown.err
    assert not (tmp_path / "result.json").exists()


def test_a_missing_harness_is_named(own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", own)
    assert (shown.code, shown.out) == (2, "")
    assert "pip install 'dbrx_q[tasks]'" in shown.err


@pytest.mark.usefixtures("unloaded")
def test_more_examples_than_a_task_has_are_refused_before_the_model_is_loaded(own: Path, cli: Callable[..., Any]) -> None:
    with (own / "own_choices.yaml").open("a", encoding="utf-8") as file:
        file.write("fewshot_split: test\n")
    shown = cli("tasks", NANO, "--tasks", "own_choices", "--tasks-path", own, "--num-fewshot", 9)
    assert (shown.code, shown.out) == (2, "")
    [line] = [line for line in shown.err.splitlines() if line.startswith("dbrx-q: error")]
    assert "the tasks own_choices must run; ValueError: Sample larger than population" in line
    assert "Lower --num-fewshot" in line
    assert "kept" not in line


@pytest.mark.usefixtures("unloaded")
def test_unsafe_tasks_are_refused(own: Path, cli: Callable[..., Any]) -> None:
    with (own / "own_answers.yaml").open("a", encoding="utf-8") as file:
        file.write("unsafe_code: true\n")
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", own)
    assert (shown.code, shown.out) == (2, "")
    assert "own_answers is marked unsafe" in shown.err


def test_answers_outlive_an_error_of_the_harness(own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("tasks", NANO, "--tasks", "own_answers", "--tasks-path", own)
    with monkeypatch.context() as broken:
        broken.setattr(lm_eval.evaluator, "_process_results", lambda *_: 1 / 0)
        shown = cli(*options)
    assert (shown.code, shown.out) == (2, "")
    assert "the tasks own_answers must run; ZeroDivisionError" in shown.err
    assert "with --resume continues" in shown.err
    monkeypatch.setattr(harness, "generate", None)
    assert cli(*options, "--resume").code == 0


def test_errors_of_our_own_stay_what_they_are(own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", own)


@pytest.mark.usefixtures("unloaded")
def test_only_a_former_result_is_replaced(cli: Callable[..., Any], tmp_path: Path) -> None:
    for content in ("my notes", "[]", '{"tasks": []}'):
        out = tmp_path / "notes.json"
        out.write_text(content, encoding="utf-8")
        shown = cli("tasks", NANO, "--tasks", "own_text", "--out", out)
        assert (shown.code, shown.out) == (2, "")
        assert "only a former result of this command is replaced" in shown.err
        assert out.read_text(encoding="utf-8") == content


def test_a_full_disk_costs_no_figures(own: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    options = ("tasks", NANO, "--tasks", "own_text", "--tasks-path", own, "--out", out, "--json")

    def full(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", full)
        shown = cli(*options)
    assert shown.code == 2
    assert "No space left on device" in shown.err
    found = json.loads(shown.out)
    assert list(tmp_path.glob("*partial")) + list(tmp_path.glob(".*partial")) == []
    assert not out.exists()
    monkeypatch.setattr(shared_prefix.PrefixScorer, "_run_model", None)  # nothing is left to run
    assert cli(*options, "--resume").code == 0
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == found["results"]
    assert not list((tmp_path / "user").rglob("*.npz"))


def test_what_is_not_a_number_is_null(own: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.HarnessModel, "loglikelihood_rolling", lambda _, requests: [math.nan] * len(requests))
    out = tmp_path / "result.json"
    for _ in range(2):  # a former result is replaced
        shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", own, "--out", out)
        assert shown.code == 0, shown.err
    found = json.loads(out.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["results"]["own_text"]["bits_per_byte,none"] is None


def test_contexts_that_are_cut_are_counted(own: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own_answers.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": "x"}) + "\n" for prompt in (BOOK[:12000], "It was")), encoding="utf-8"
    )
    shown = cli("tasks", NANO, "--tasks", "own_answers", "--tasks-path", own, "--json")
    assert json.loads(shown.out)["truncated_contexts"] == 1
    assert "1 contexts were truncated at their beginning" in shown.err


@pytest.mark.parametrize("presses", [(2,), (3, 6), (8,)])
def test_an_interrupted_run_goes_on_to_the_same_digits(
    own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, presses: tuple[int, ...]
) -> None:
    options = ("tasks", NANO, "--tasks", ",".join(TASKS), "--tasks-path", own, "--batch", 2, "--json")
    whole = json.loads(cli(*options).out)
    score, write = shared_prefix.PrefixScorer._run_batch, harness.generate
    left = 0

    def pressed(then: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return then(*arguments, **named)

        return call

    monkeypatch.setattr(shared_prefix.PrefixScorer, "_run_batch", pressed(score))
    monkeypatch.setattr(harness, "generate", pressed(write))
    before = 0
    for press in presses:
        left = press
        shown = cli(*options, *(["--resume"] if before else []))
        assert (shown.code, shown.out) == (2, "")
        [(done, total)] = re.findall(r"interrupted after (\d+) of (\d+) requests; the same command with --resume continues", shown.err)
        assert before < int(done) < int(total) == 10 + 2 + 3
        before = int(done)
    left = 0
    shown = cli(*options, "--resume")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    del found["provenance"], whole["provenance"]
    assert found == whole


def test_an_interruption_before_the_first_answer_says_nothing_of_resuming(
    own: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DequantizedSource, "load", press)
    shown = cli("tasks", NANO, "--tasks", "own_text", "--tasks-path", own)
    assert (shown.code, shown.out) == (2, "")
    assert "interrupted; nothing was left half-written" in shown.err
