"""What `quantize` writes, and that `verify` sees every change of it; files are read by the safetensors package and hashlib."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.staging import MARKER_NAME
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

SCRIPT = Path(sys.executable).with_name("dbrx-q")
EXPERTS = 16  # of the bundled model


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the safetensors package reads it."""
    return {name: tensor for shard in shards_of(folder) for name, tensor in safetensors.torch.load_file(shard).items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
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


def test_the_safetensors_package_reads_what_quantize_writes(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "out"
    report = json.loads(cli("quantize", nano, folder, "--format", "int8", "--group-size", 32, "--json").out)
    stored = load(folder)
    assert report["bytes_out"] == sum(tensor.nbytes for tensor in stored.values())
    assert report["bytes_in"] == sum(tensor.nbytes for tensor in load(nano).values())
    assert report["bits_per_weight_out"] == 8 * report["bytes_out"] / report["parameters"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["bytes_out"]
    assert index["weight_map"].keys() == stored.keys()
    for shard in shards_of(folder):
        data = shard.read_bytes()
        assert len(data) == 8 + int.from_bytes(data[:8], "little") + max(e["data_offsets"][1] for e in header_of(shard).values())
    assert json.loads(cli("inspect", folder, "--json").out)["kinds"]["experts"]["bits_per_weight"] == 8 + 16 / 32
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (nano / name).read_bytes()
    written, original = (json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, nano))
    assert written == original | {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers reads GPT-2's pattern by the original's


def test_quantized_weights_are_close_to_the_plain_ones(nano: Path, quantized_nano: Path) -> None:
    name = "transformer.blocks.1.ffn.experts.mlp.w2"
    plain, stored = load(nano)[name].float(), load(quantized_nano)
    expert = plain.view(EXPERTS, -1, plain.shape[1])[5].T.reshape(-1, 64)  # stored with the reduction axis last
    packed = stored[f"{name}.5.qweight"]
    digits = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, 64).float()
    steps = stored[f"{name}.5.scales"].float().view(-1, 1)
    zeros = torch.stack((stored[f"{name}.5.zeros"] & 15, stored[f"{name}.5.zeros"] >> 4), dim=-1).view(-1, 1).float()
    assert ((digits - zeros) * steps - expert).abs().le(steps * 0.51).float().mean() > 0.999


def test_the_manifest_holds_the_sha256_of_every_file(quantized_nano: Path, cli: Callable[..., Any]) -> None:
    manifest = json.loads((quantized_nano / "manifest.json").read_text())
    recorded = manifest["shards"] | manifest["files"]
    unlisted = {
        "manifest.json",
        *(path.name for path in quantized_nano.glob("quantization_report*")),
    }  # of one run
    assert recorded.keys() == {path.name for path in quantized_nano.iterdir()} - unlisted
    assert manifest["shards"].keys() == {shard.name for shard in shards_of(quantized_nano)}
    for name, entry in recorded.items():
        data = (quantized_nano / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    report = json.loads(cli("verify", quantized_nano, "--json").out)
    assert report["ok"] is True
    assert {file["name"]: file["sha256"] for file in report["files"]} == {name: entry["sha256"] for name, entry in recorded.items()}


def test_small_shards_hold_the_same_tensors(nano: Path, quantized_nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder, limit = tmp_path / "shards", 1 << 20
    report = quantize_checkpoint(nano, folder, QuantizationRequest(assign_formats, shard_bytes=limit))
    shards = shards_of(folder)
    assert len(shards) == report.shards > 3
    assert all(sum(tensor.nbytes for tensor in safetensors.torch.load_file(shard).values()) <= limit for shard in shards)
    assert same_tensors(load(folder), load(quantized_nano))
    assert cli("verify", folder).code == 0
    outs = [cli("generate", path, "--prompt", "The", "--max-new-tokens", 6).out for path in (folder, quantized_nano)]
    assert outs[0] == outs[1]


def test_the_parts_of_an_expert_are_stored_contiguously(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    quantize_checkpoint(nano, folder, QuantizationRequest(assign_formats, shard_bytes=300_000))
    ranges: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for shard in shards_of(folder):
        for name, entry in header_of(shard).items():
            if match := re.fullmatch(r"(.*experts\.mlp)\.(?:w1|v1|w2)\.(\d+)\.\w+", name):
                ranges.setdefault((match[1], match[2]), []).append((shard.name, *entry["data_offsets"]))
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
    assert same_tensors(load(tmp_path / "out"), load(quantized_nano))


def test_quantize_refuses_a_folder_with_files(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    outcome = cli("quantize", nano, folder)
    assert (outcome.code, outcome.out) == (2, "")
    assert str(folder) in outcome.err
    assert "must be empty" in outcome.err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("notes.txt", "mine")]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("situation", ["empty folder", "current folder", "link to an empty folder", "after a run that was killed"])
def test_quantize_writes_into_an_empty_folder(
    situation: str, small: Path, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    destination = folder
    if situation == "current folder":
        monkeypatch.chdir(folder)
        destination = Path(".")
    elif situation == "link to an empty folder":
        destination = tmp_path / "link"
        destination.symlink_to(folder)
    elif situation == "after a run that was killed":
        (tmp_path / "empty.partial").mkdir()
        (tmp_path / "empty.partial" / MARKER_NAME).touch()
        (tmp_path / "empty.partial" / "model-00001-of-00001.safetensors").write_bytes(b"half")
    assert cli("quantize", small, destination).code == 0
    assert same_tensors(load(folder), load(quantized_small))
    assert not (tmp_path / "empty.partial").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("kind", ["shard", "tokenizer"])
def test_verify_names_a_file_that_differs(damage: str, kind: str, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized_small, folder)
    path = shards_of(folder)[0] if kind == "shard" else folder / "tokenizer.json"
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage != "missing":
        data[-1] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-1])
    outcome = cli("verify", folder)
    assert outcome.code == 1
    named = [line for line in outcome.err.splitlines() if "SHA-256" in line]
    assert len(named) == 1
    assert str(path) in named[0]
    report = json.loads(cli("verify", folder, "--json").out)
    assert report["ok"] is False
    assert [file["name"] for file in report["files"] if file["state"] != "ok"] == [path.name]


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
    outcome = cli("verify", folder)
    assert outcome.code == 2
    assert f"the experts of every layer must be quantized; {name} and 0 more are not" in outcome.err


def test_verify_prints_the_sums_of_a_plain_checkpoint(nano: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("verify", nano)
    assert outcome.code == 0
    assert f"{hashlib.sha256((nano / 'model.safetensors').read_bytes()).hexdigest()}  model.safetensors" in outcome.out


# The installed script


def test_the_script_prints_json_only(small: Path, tmp_path: Path) -> None:
    command = [str(SCRIPT), "quantize", str(small), str(tmp_path / "out"), "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["bytes_out"] == sum(tensor.nbytes for tensor in load(tmp_path / "out").values())
    shard = shards_of(tmp_path / "out")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    process = subprocess.run([SCRIPT, "verify", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert shard.name in process.stderr
