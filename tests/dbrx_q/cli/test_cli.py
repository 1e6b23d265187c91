"""What the commands print, compared with the library and with independent readers."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dbrx_q import generate
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.windows import Protocol
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

SCRIPT = Path(sys.executable).with_name("dbrx-q")
BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
COMMANDS = ("quantize", "inspect", "verify", "generate", "perplexity", "compare", "reference", "sensitivity")
EXPERTS = 16  # of the bundled model


@pytest.fixture(params=["plain", "quantized"])
def either(request: pytest.FixtureRequest, nano: Path, quantized_nano: Path) -> Path:
    return nano if request.param == "plain" else quantized_nano


@pytest.fixture
def passage(tmp_path: Path) -> Path:
    path = tmp_path / "passage.txt"
    path.write_text(BOOK.read_text(encoding="utf-8")[2000:3500], encoding="utf-8")
    return path


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the safetensors package reads it."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in safetensors.torch.load_file(shard).items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_help_run(
    command: str,
    cli: Callable[..., Any],
    nano: Path,
    quantized_nano: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    page = cli(command, "--help")
    assert (page.code, page.err) == (0, "")
    examples = re.findall(r"^ *dbrx-q (.*\S) *$", page.out.split("Example:")[1], re.MULTILINE)
    # The current folder has the bundled model and a text under the names that the examples use.
    (tmp_path / "databricks").mkdir()
    (tmp_path / "databricks" / "dbrx-instruct").symlink_to(nano)
    if command != "quantize":
        (tmp_path / "dbrx-int4").symlink_to(quantized_nano)
    (tmp_path / "wiki.test.txt").write_text(BOOK.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    (tmp_path / "dbrx.Q4_K_M.gguf").symlink_to(nano.parent / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf")
    assert examples
    for example in examples:
        outcome = cli(*shlex.split(example))
        assert outcome.code == 0, outcome.err
        assert outcome.out.strip()


def test_running_without_a_command_lists_the_commands(cli: Callable[..., Any]) -> None:
    outcome = cli()
    assert all(command in outcome.out + outcome.err for command in COMMANDS)


def test_inspect_counts_the_parameters_and_bytes_of_the_shards(either: Path, nano: Path, cli: Callable[..., Any]) -> None:
    plain, stored = load(nano), load(either)
    report = json.loads(cli("inspect", either, "--json").out)
    assert report["parameters"] == sum(tensor.numel() for tensor in plain.values())
    assert report["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert report["bits_per_weight"] == 8 * report["bytes"] / report["parameters"]
    experts = report["kinds"]["experts"]
    assert experts["parameters"] == sum(tensor.numel() for name, tensor in plain.items() if ".experts." in name)
    assert experts["bytes"] == sum(tensor.nbytes for name, tensor in stored.items() if ".experts." in name)
    assert sum(kind["bytes"] for kind in report["kinds"].values()) == report["bytes"]
    assert sum(kind["parameters"] for kind in report["kinds"].values()) == report["parameters"]


def test_inspect_shows_bits_per_weight_of_both_formats(nano: Path, quantized_nano: Path, cli: Callable[..., Any]) -> None:
    kinds = json.loads(cli("inspect", quantized_nano, "--json").out)["kinds"]
    # 4 bits, and 16 + 4 bits of scale and zero-point for 64 weights; 8 bits and a scale
    assert kinds["experts"]["bits_per_weight"] == 4 + 20 / 64 == 4.3125
    assert kinds["attention"]["bits_per_weight"] == kinds["embedding"]["bits_per_weight"] == kinds["head"]["bits_per_weight"] == 8.25
    assert kinds["router"]["bits_per_weight"] == kinds["norms"]["bits_per_weight"] == 16
    assert "4.312" in cli("inspect", quantized_nano).out
    assert {kind["bits_per_weight"] for kind in json.loads(cli("inspect", nano, "--json").out)["kinds"].values()} == {16}


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_generate_prints_the_text_of_the_library(either: Path, chat: bool, cli: Callable[..., Any]) -> None:
    prompt = "The old man looked at"
    model, tokenizer = DbrxForCausalLM.from_pretrained(either), DbrxTokenizer.from_pretrained(either)
    messages = [{"role": "user", "content": prompt}]
    chat_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = chat_ids if chat else tokenizer.encode(prompt)
    [expected] = generate(model, [ids], max_new_tokens=8, tokenizer=tokenizer)
    arguments = ("generate", either, "--prompt", prompt, "--max-new-tokens", 8, *(["--chat"] if chat else []))
    report = json.loads(cli(*arguments, "--json").out)
    assert report["text"] == expected.text
    assert (report["prompt_tokens"], report["new_tokens"]) == (len(ids), len(expected.token_ids))
    assert report["prefill_tokens_per_s"] > 0
    assert report["decode_tokens_per_s"] > 0
    assert report["peak_memory_bytes"] > sum(tensor.nbytes for tensor in load(either).values())
    streamed = cli(*arguments)
    assert streamed.out == expected.text + "\n"
    assert f"{len(ids)} prompt tokens" in streamed.err


def test_generate_samples_repeatably_with_a_seed(nano: Path, cli: Callable[..., Any]) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.001, "--repetition-penalty", 1.1, "--seed", seed)
        return cli("generate", nano, "--prompt", "The", "--max-new-tokens", 16, *options).out

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("stride", "protocol", "predicted"),
    [(None, "non-overlapping", lambda n: n // 64 * 63), (20, "strided", lambda n: n - 1)],
    ids=["windows side by side", "windows that overlap"],
)
def test_perplexity_prints_the_figures_of_the_library(
    stride: int | None, protocol: str, predicted: Callable[[int], int], either: Path, passage: Path, cli: Callable[..., Any]
) -> None:
    ids = DbrxTokenizer.from_pretrained(either).encode(passage.read_text(encoding="utf-8"))
    expected = perplexity(DbrxForCausalLM.from_pretrained(either, dtype="float32"), ids, Protocol.of(64, stride=stride))
    arguments = ("perplexity", either, "--text", passage, "--context", 64, *(["--stride", stride] if stride else []))
    report = json.loads(cli(*arguments, "--json").out)
    assert report["perplexity"] == pytest.approx(math.exp(report["nll"] / report["tokens"]), rel=1e-12)
    assert (report["perplexity"], report["stderr"], report["nll"]) == (expected.perplexity, expected.stderr, expected.nll)
    assert report["tokens"] == predicted(len(ids))
    assert (report["context"], report["stride"], report["protocol"]) == (64, stride or 64, protocol)
    assert f"perplexity {expected.perplexity:.4f}" in cli(*arguments).out


def test_quantized_perplexity_is_close_to_the_plain_one(nano: Path, quantized_nano: Path, cli: Callable[..., Any], passage: Path) -> None:
    plain, quantized = (
        json.loads(cli("perplexity", folder, "--text", passage, "--context", 128, "--json").out)["perplexity"]
        for folder in (nano, quantized_nano)
    )
    assert plain != quantized
    assert quantized / plain < 1.1


# An expert's matrix of the bundled model has 512 scales: two blocks of them, with a nested scale each, and an offset.
@pytest.mark.parametrize(("fmt", "bits"), [("nf4", 4 + 32 / 64), ("nf4-double", 4 + 8 / 64 + (2 + 1) * 32 / (256 * 128))])
def test_every_command_reads_an_nf4_checkpoint(
    fmt: str, bits: float, nano: Path, tmp_path: Path, cli: Callable[..., Any], passage: Path
) -> None:
    folder = tmp_path / f"dbrx-nano-{fmt}"
    outcome = cli("quantize", nano, folder, "--format", fmt, "--json")
    assert (outcome.code, outcome.err.strip()) == (0, "")
    inventory = json.loads(cli("inspect", folder, "--json").out)
    kinds = inventory["kinds"]
    assert (kinds["experts"]["format"], kinds["experts"]["bits_per_weight"]) == (f"{fmt}:64", bits)
    assert (kinds["attention"]["format"], kinds["attention"]["bits_per_weight"]) == ("int8:64", 8.25)
    assert json.loads(outcome.out)["bytes_out"] == inventory["bytes"] == sum(tensor.nbytes for tensor in load(folder).values())
    assert json.loads((folder / "quantization_report.json").read_text())["bytes_out"] == inventory["bytes"]
    dry_run = json.loads(cli("quantize", nano, tmp_path / "dry-run", "--format", fmt, "--dry-run", "--json").out)
    assert (dry_run["bytes_out"], dry_run["bits"]["experts"]) == (inventory["bytes"], bits)
    plans = [json.loads(cli("plan", *arguments, "--json").out) for arguments in ((folder,), (nano, "--format", fmt))]
    assert plans[0] == plans[1]
    assert plans[0]["expert_bytes"] == (4 + 32 / 64) * kinds["experts"]["parameters"] / 8  # in memory
    assert json.loads(cli("verify", folder, "--json").out)["ok"] is True
    prompt = "The old man looked at"
    tokenizer = DbrxTokenizer.from_pretrained(folder)
    [expected] = generate(DbrxForCausalLM.from_pretrained(folder), [tokenizer.encode(prompt)], max_new_tokens=8, tokenizer=tokenizer)
    assert cli("generate", folder, "--prompt", prompt, "--max-new-tokens", 8).out == expected.text + "\n"
    plain, packed = (
        json.loads(cli("perplexity", path, "--text", passage, "--context", 128, "--json").out)["perplexity"] for path in (nano, folder)
    )
    assert plain != packed
    assert packed / plain < 1.1


@pytest.mark.parametrize("fmt", ["nf4", "nf4-double"])
@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_nf4_has_groups_of_64_only(fmt: str, command: str, group_size: int, nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    paths = (nano, tmp_path / "out") if command == "quantize" else (nano,)
    outcome = cli(command, *paths, "--format", fmt, "--group-size", group_size)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"must be one of 64; found {group_size}" in outcome.err
    assert "--group-size" in outcome.err
    assert not any(tmp_path.iterdir())
