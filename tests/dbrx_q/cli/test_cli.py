"""The commands: what they print, what they write, and that both agree with independent readers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dbrx_q import generate
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.staging import MARKER_NAME
from dbrx_q.eval.perplexity import perplexity
from dbrx_q.eval.windows import Protocol
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
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


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the safetensors package reads it."""
    return {name: tensor for shard in shards_of(folder) for name, tensor in safetensors.torch.load_file(shard).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and torch.equal(a.view(torch.uint8), right[name].view(torch.uint8)) for name, a in left.items()
    )


def header_of(shard: Path) -> dict[str, Any]:
    data = shard.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    return header


def assign_formats(checkpoint: Any) -> dict[str, TensorFormat]:
    return default_formats(checkpoint.config, TensorFormat("int4", 64))


# What is printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_runs(
    command: str,
    cli: Callable[..., Any],
    nano: Path,
    quantized_nano: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    shown = cli(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    examples = re.findall(r"^ *dbrx-q (.*\S) *$", shown.out.split("Example:")[1], re.MULTILINE)
    # Under the names that the examples use, relative to here, lie a bundled model and a text.
    (tmp_path / "databricks").mkdir()
    (tmp_path / "databricks" / "dbrx-instruct").symlink_to(nano)
    if command != "quantize":
        (tmp_path / "dbrx-int4").symlink_to(quantized_nano)
    (tmp_path / "wiki.test.txt").write_text(BOOK.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    (tmp_path / "dbrx.Q4_K_M.gguf").symlink_to(nano.parent / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf")
    assert examples
    for example in examples:
        done = cli(*shlex.split(example))
        assert done.code == 0, done.err
        assert done.out.strip()


def test_no_command_shows_the_commands(cli: Callable[..., Any]) -> None:
    shown = cli()
    assert all(command in shown.out + shown.err for command in COMMANDS)


def test_inspect_counts_what_the_shards_hold(either: Path, nano: Path, cli: Callable[..., Any]) -> None:
    plain, stored = load(nano), load(either)
    shown = json.loads(cli("inspect", either, "--json").out)
    assert shown["parameters"] == sum(tensor.numel() for tensor in plain.values())
    assert shown["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert shown["bits_per_weight"] == 8 * shown["bytes"] / shown["parameters"]
    experts = shown["kinds"]["experts"]
    assert experts["parameters"] == sum(tensor.numel() for name, tensor in plain.items() if ".experts." in name)
    assert experts["bytes"] == sum(tensor.nbytes for name, tensor in stored.items() if ".experts." in name)
    assert sum(kind["bytes"] for kind in shown["kinds"].values()) == shown["bytes"]
    assert sum(kind["parameters"] for kind in shown["kinds"].values()) == shown["parameters"]


def test_inspect_shows_bits_per_weight_of_both_formats(nano: Path, quantized_nano: Path, cli: Callable[..., Any]) -> None:
    kinds = json.loads(cli("inspect", quantized_nano, "--json").out)["kinds"]
    # 4 bits, and 16 + 4 bits of scale and zero-point for 64 weights; 8 bits and a scale
    assert kinds["experts"]["bits_per_weight"] == 4 + 20 / 64 == 4.3125
    assert kinds["attention"]["bits_per_weight"] == kinds["embedding"]["bits_per_weight"] == kinds["head"]["bits_per_weight"] == 8.25
    assert kinds["router"]["bits_per_weight"] == kinds["norms"]["bits_per_weight"] == 16
    assert "4.312" in cli("inspect", quantized_nano).out
    assert {kind["bits_per_weight"] for kind in json.loads(cli("inspect", nano, "--json").out)["kinds"].values()} == {16}


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_generate_says_what_the_library_says(either: Path, chat: bool, cli: Callable[..., Any]) -> None:
    prompt = "The old man looked at"
    model, tokenizer = DbrxForCausalLM.from_pretrained(either), DbrxTokenizer.from_pretrained(either)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    [expected] = generate(model, [ids], max_new_tokens=8, tokenizer=tokenizer)
    arguments = ("generate", either, "--prompt", prompt, "--max-new-tokens", 8, *(["--chat"] if chat else []))
    shown = json.loads(cli(*arguments, "--json").out)
    assert shown["text"] == expected.text
    assert (shown["prompt_tokens"], shown["new_tokens"]) == (len(ids), len(expected.token_ids))
    assert shown["prefill_tokens_per_s"] > 0
    assert shown["decode_tokens_per_s"] > 0
    assert shown["peak_memory_bytes"] > sum(tensor.nbytes for tensor in load(either).values())
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
def test_perplexity_says_what_the_library_says(
    stride: int | None, protocol: str, predicted: Callable[[int], int], either: Path, passage: Path, cli: Callable[..., Any]
) -> None:
    ids = DbrxTokenizer.from_pretrained(either).encode(passage.read_text(encoding="utf-8"))
    expected = perplexity(DbrxForCausalLM.from_pretrained(either, dtype="float32"), ids, Protocol.of(64, stride=stride))
    arguments = ("perplexity", either, "--text", passage, "--context", 64, *(["--stride", stride] if stride else []))
    shown = json.loads(cli(*arguments, "--json").out)
    assert shown["perplexity"] == pytest.approx(math.exp(shown["nll"] / shown["tokens"]), rel=1e-12)
    assert (shown["perplexity"], shown["stderr"], shown["nll"]) == (expected.perplexity, expected.stderr, expected.nll)
    assert shown["tokens"] == predicted(len(ids))
    assert (shown["context"], shown["stride"], shown["protocol"]) == (64, stride or 64, protocol)
    assert f"perplexity {expected.perplexity:.4f}" in cli(*arguments).out


def test_quantized_perplexity_is_near_the_plain_one(nano: Path, quantized_nano: Path, cli: Callable[..., Any], passage: Path) -> None:
    plain, quantized = (
        json.loads(cli("perplexity", folder, "--text", passage, "--context", 128, "--json").out)["perplexity"]
        for folder in (nano, quantized_nano)
    )
    assert plain != quantized
    assert quantized / plain < 1.1


# An expert's matrix of the bundled model has 512 scales: two blocks of nested ones, and an offset.
@pytest.mark.parametrize(("fmt", "bits"), [("nf4", 4 + 32 / 64), ("nf4-double", 4 + 8 / 64 + (2 + 1) * 32 / (256 * 128))])
def test_an_nf4_checkpoint_goes_through_every_command(
    fmt: str, bits: float, nano: Path, tmp_path: Path, cli: Callable[..., Any], passage: Path
) -> None:
    folder = tmp_path / f"dbrx-nano-{fmt}"
    done = cli("quantize", nano, folder, "--format", fmt, "--json")
    assert (done.code, done.err.strip()) == (0, "")
    inventory = json.loads(cli("inspect", folder, "--json").out)
    kinds = inventory["kinds"]
    assert (kinds["experts"]["format"], kinds["experts"]["bits_per_weight"]) == (f"{fmt} g64", bits)
    assert (kinds["attention"]["format"], kinds["attention"]["bits_per_weight"]) == ("int8:64", 8.25)
    assert json.loads(done.out)["bytes_out"] == inventory["bytes"] == sum(tensor.nbytes for tensor in load(folder).values())
    assert json.loads((folder / "quantization_report.json").read_text())["bytes_out"] == inventory["bytes"]
    ahead = json.loads(cli("quantize", nano, tmp_path / "ahead", "--format", fmt, "--dry-run", "--json").out)
    assert (ahead["bytes_out"], ahead["bits"]["experts"]) == (inventory["bytes"], bits)
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
def test_nf4_has_groups_of_64_alone(fmt: str, command: str, group_size: int, nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    places = (nano, tmp_path / "out") if command == "quantize" else (nano,)
    done = cli(command, *places, "--format", fmt, "--group-size", group_size)
    assert (done.code, done.out) == (2, "")
    assert f"must be one of 64; found {group_size}" in done.err
    assert "--group-size" in done.err
    assert not any(tmp_path.iterdir())


# What is written


def test_quantize_writes_what_safetensors_reads(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "out"
    shown = json.loads(cli("quantize", nano, folder, "--format", "int8", "--group-size", 32, "--json").out)
    stored = load(folder)
    assert shown["bytes_out"] == sum(tensor.nbytes for tensor in stored.values())
    assert shown["bytes_in"] == sum(tensor.nbytes for tensor in load(nano).values())
    assert shown["bits_per_weight_out"] == 8 * shown["bytes_out"] / shown["parameters"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == shown["bytes_out"]
    assert index["weight_map"].keys() == stored.keys()
    for shard in shards_of(folder):
        data = shard.read_bytes()
        assert len(data) == 8 + int.from_bytes(data[:8], "little") + max(e["data_offsets"][1] for e in header_of(shard).values())
    assert json.loads(cli("inspect", folder, "--json").out)["kinds"]["experts"]["bits_per_weight"] == 8 + 16 / 32
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (nano / name).read_bytes()


def test_quantized_weights_are_near_the_plain_ones(nano: Path, quantized_nano: Path) -> None:
    name = "transformer.blocks.1.ffn.experts.mlp.w2"
    plain, stored = load(nano)[name].float(), load(quantized_nano)
    expert = plain.view(EXPERTS, -1, plain.shape[1])[5].T.reshape(-1, 64)  # stored with the reduction axis last
    packed = stored[f"{name}.5.qweight"]
    digits = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, 64).float()
    steps = stored[f"{name}.5.scales"].float().view(-1, 1)
    zeros = torch.stack((stored[f"{name}.5.zeros"] & 15, stored[f"{name}.5.zeros"] >> 4), dim=-1).view(-1, 1).float()
    assert ((digits - zeros) * steps - expert).abs().le(steps * 0.51).float().mean() > 0.999


def test_manifest_holds_the_sums_of_hashlib(quantized_nano: Path, cli: Callable[..., Any]) -> None:
    manifest = json.loads((quantized_nano / "manifest.json").read_text())
    recorded = manifest["shards"] | manifest["files"]
    told = {"manifest.json", *(path.name for path in quantized_nano.glob("quantization_report*"))}  # of one run, on one machine
    assert recorded.keys() == {path.name for path in quantized_nano.iterdir()} - told
    assert manifest["shards"].keys() == {shard.name for shard in shards_of(quantized_nano)}
    for name, entry in recorded.items():
        data = (quantized_nano / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    shown = json.loads(cli("verify", quantized_nano, "--json").out)
    assert shown["ok"] is True
    assert {file["name"]: file["sha256"] for file in shown["files"]} == {name: entry["sha256"] for name, entry in recorded.items()}


def test_small_shards_hold_the_same_tensors(nano: Path, quantized_nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder, limit = tmp_path / "shards", 1 << 20
    report = quantize_checkpoint(nano, folder, QuantizationRequest(assign_formats, shard_bytes=limit))
    shards = shards_of(folder)
    assert len(shards) == report.shards > 3
    assert all(sum(tensor.nbytes for tensor in safetensors.torch.load_file(shard).values()) <= limit for shard in shards)
    assert same(load(folder), load(quantized_nano))
    assert cli("verify", folder).code == 0
    outs = [cli("generate", path, "--prompt", "The", "--max-new-tokens", 6).out for path in (folder, quantized_nano)]
    assert outs[0] == outs[1]


def test_parts_of_an_expert_lie_back_to_back(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    quantize_checkpoint(nano, folder, QuantizationRequest(assign_formats, shard_bytes=300_000))
    ranges: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for shard in shards_of(folder):
        for name, entry in header_of(shard).items():
            if found := re.fullmatch(r"(.*experts\.mlp)\.(?:w1|v1|w2)\.(\d+)\.\w+", name):
                ranges.setdefault((found[1], found[2]), []).append((shard.name, *entry["data_offsets"]))
    assert len(ranges) == 4 * EXPERTS
    for parts in ranges.values():
        parts.sort()
        assert len(parts) == 9
        assert len({shard for shard, _, _ in parts}) == 1
        assert all(end == start for (_, _, end), (_, start, _) in itertools.pairwise(parts))


def test_a_sharded_source_gives_the_same_tensors(nano: Path, quantized_nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(nano / "config.json", source / "config.json")
    tensors = load(nano)
    names = sorted(tensors, reverse=True)  # neither in the model's order nor a layer to a shard
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        safetensors.torch.save_file({name: tensors[name] for name in names if weight_map[name] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert cli("quantize", source, tmp_path / "out").code == 0
    assert same(load(tmp_path / "out"), load(quantized_nano))


def test_quantize_leaves_a_folder_with_files_alone(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = cli("quantize", nano, folder)
    assert (done.code, done.out) == (2, "")
    assert str(folder) in done.err
    assert "must be empty" in done.err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("notes.txt", "mine")]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("how", ["empty folder", "current folder", "link to an empty folder", "after a run that was killed"])
def test_quantize_writes_into_an_empty_place(
    how: str, small: Path, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    given = folder
    if how == "current folder":
        monkeypatch.chdir(folder)
        given = Path(".")
    elif how == "link to an empty folder":
        given = tmp_path / "link"
        given.symlink_to(folder)
    elif how == "after a run that was killed":
        (tmp_path / "empty.partial").mkdir()
        (tmp_path / "empty.partial" / MARKER_NAME).touch()
        (tmp_path / "empty.partial" / "model-00001-of-00001.safetensors").write_bytes(b"half")
    assert cli("quantize", small, given).code == 0
    assert same(load(folder), load(quantized_small))
    assert not (tmp_path / "empty.partial").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("kind", ["shard", "tokenizer"])
def test_verify_names_the_file_that_differs(damage: str, kind: str, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized_small, folder)
    path = shards_of(folder)[0] if kind == "shard" else folder / "tokenizer.json"
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage != "missing":
        data[-1] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-1])
    done = cli("verify", folder)
    assert done.code == 1
    named = [line for line in done.err.splitlines() if "SHA-256" in line]
    assert len(named) == 1
    assert str(path) in named[0]
    shown = json.loads(cli("verify", folder, "--json").out)
    assert shown["ok"] is False
    assert [file["name"] for file in shown["files"] if file["state"] != "ok"] == [path.name]


def test_verify_names_experts_that_are_not_quantized(quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized_small, folder)
    config = json.loads((folder / "config.json").read_text())
    name = "transformer.blocks.0.ffn.experts.mlp.v1"
    del config["quantization_config"]["tensors"][name]
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", folder)
    assert done.code == 2
    assert f"the experts of every layer must be quantized; {name} and 0 more are not" in done.err


def test_verify_prints_the_sums_of_a_plain_checkpoint(nano: Path, cli: Callable[..., Any]) -> None:
    done = cli("verify", nano)
    assert done.code == 0
    assert f"{hashlib.sha256((nano / 'model.safetensors').read_bytes()).hexdigest()}  model.safetensors" in done.out


# The installed script


def test_script_prints_json_and_nothing_else(small: Path, tmp_path: Path) -> None:
    command = [str(SCRIPT), "quantize", str(small), str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bytes_out"] == sum(tensor.nbytes for tensor in load(tmp_path / "out").values())
    shard = shards_of(tmp_path / "out")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    done = subprocess.run([SCRIPT, "verify", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert shard.name in done.stderr
