"""save_pretrained: the bytes of packed models, plain models for both readers, experts on disk, and folders that hold files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dbrx_q import Budget, DbrxConfig, DbrxForCausalLM, DbrxModel, Machine
from dbrx_q.checkpoint.folder import INDEX_NAME
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CONFIG: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "vocab_size": 96,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
    "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 16, "moe_top_k": 2},
    "initializer_range": 0.2,
}


def shards_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def made() -> DbrxForCausalLM:
    torch.manual_seed(0)
    return DbrxForCausalLM(DbrxConfig(**CONFIG))


@pytest.fixture
def plain() -> DbrxForCausalLM:
    return made()


@pytest.fixture(scope="module", params=["int4:64", "nf4-double:64"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in several shards, quantized; embedding, attention and head in int8."""
    name, group = request.param.split(":")
    folder = tmp_path_factory.mktemp("quantized")
    made().to(torch.bfloat16).save_pretrained(folder / "plain")
    wanted = TensorFormat(name, int(group))
    quantize_checkpoint(
        folder / "plain",
        folder / "source",
        QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, wanted), shard_bytes=60_000),
    )
    return folder / "source"


def least_budget(folder: Path) -> Budget:
    """The smallest budget that a model runs in: a slot for one expert."""
    with pytest.raises(RequestError, match="must hold") as caught:
        DbrxForCausalLM.from_pretrained(folder, budget=Budget(Machine(1), context=16, step_tokens=16))
    least = re.search(r"must hold ([\d,]+) bytes", str(caught.value))
    assert least is not None
    return Budget(Machine(int(least[1].replace(",", ""))), context=16, step_tokens=16)


@pytest.mark.parametrize("budget", [False, True], ids=["resident", "budget"])
def test_a_packed_model_gives_the_bytes_that_quantize_wrote(quantized: Path, tmp_path: Path, cli: Callable[..., Any], budget: bool) -> None:
    source = quantized
    model = DbrxForCausalLM.from_pretrained(source, budget=least_budget(source) if budget else None)
    assert bool(model.placement and model.placement.disk_experts) is budget
    model.save_pretrained(tmp_path / "saved")
    assert len(shards_of(source)) > 1
    assert shards_of(tmp_path / "saved") == shards_of(source)
    assert (tmp_path / "saved" / INDEX_NAME).read_bytes() == (source / INDEX_NAME).read_bytes()
    verified = cli("verify", tmp_path / "saved")
    assert (verified.code, "files are as recorded" in verified.out) == (0, True)
    statistics = json.loads((source / "manifest.json").read_text())["tensors"]
    assert json.loads((tmp_path / "saved" / "manifest.json").read_text())["tensors"] == statistics != {}
    expected = model(IDS).logits
    model.close()
    again = DbrxForCausalLM.from_pretrained(tmp_path / "saved")
    assert again(IDS).logits.equal(expected)
    assert again.config == DbrxConfig.from_pretrained(source)


def test_another_size_of_shards(quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "one", max_shard_size=1 << 30)
    assert len(shards_of(tmp_path / "many")) > len(shards_of(quantized_small))
    assert list(shards_of(tmp_path / "one")) == ["model-00001-of-00001.safetensors"]
    assert cli("verify", tmp_path / "many").code == cli("verify", tmp_path / "one").code == 0
    for folder in ("many", "one"):
        assert DbrxForCausalLM.from_pretrained(tmp_path / folder)(IDS).logits.equal(model(IDS).logits)
    with pytest.raises(RequestError, match="a size must be a number with a unit"):
        model.save_pretrained(tmp_path / "no", max_shard_size="many")
    with pytest.raises(RequestError, match="max_shard_size must be a number of bytes above 0; found 0"):
        model.save_pretrained(tmp_path / "no", max_shard_size=0)


@pytest.mark.parametrize("shard", [None, "100KB"])
def test_both_readers_load_a_plain_model(plain: DbrxForCausalLM, tmp_path: Path, shard: str | None) -> None:
    plain.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (tmp_path / "saved" / "model.safetensors").exists() is (shard is None)
    expected = plain(IDS).logits
    assert DbrxForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits.equal(expected)
    theirs = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert theirs.config.rope_parameters["rope_theta"] == 500000.0
    assert theirs.dtype is torch.float32
    with torch.no_grad():
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    assert DbrxForCausalLM.from_pretrained(tmp_path / "theirs")(IDS).logits.equal(expected)


def test_a_plain_model_with_experts_on_disk_is_saved_whole(plain: DbrxForCausalLM, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "plain", max_shard_size="300KB")
    model = DbrxForCausalLM.from_pretrained(tmp_path / "plain", budget=least_budget(tmp_path / "plain"))
    assert model.placement is not None
    assert model.placement.disk_experts > 0
    model.save_pretrained(tmp_path / "saved")
    assert shards_of(tmp_path / "saved") == shards_of(tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")  # over the files that experts are read from
    assert model(IDS).logits.equal(plain(IDS).logits)
    model.save_pretrained(tmp_path / "once more")
    assert shards_of(tmp_path / "once more") == shards_of(tmp_path / "saved")
    shutil.rmtree(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="a model whose experts are partly on disk is saved from the files"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    model.close()


def test_changed_weights_are_written_as_they_are(quantized_small: Path, tmp_path: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype="float32")
    model.transformer.norm_f.weight.data *= 1.5
    model.save_pretrained(tmp_path / "saved")
    again = DbrxForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype is torch.float32
    assert again(IDS).logits.equal(model(IDS).logits)


def test_the_transformer_without_its_head(plain: DbrxForCausalLM, tmp_path: Path) -> None:
    plain.transformer.save_pretrained(tmp_path / "body")
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == ["DbrxModel"]
    hidden = DbrxModel.from_pretrained(tmp_path / "body")(IDS).last_hidden_state
    assert hidden.equal(plain.transformer(IDS).last_hidden_state)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"):
        DbrxForCausalLM.from_pretrained(tmp_path / "body")
    theirs = transformers.DbrxModel.from_pretrained(tmp_path / "body").eval()
    with torch.no_grad():
        assert (theirs(IDS).last_hidden_state - hidden).abs().max() <= 1e-4


def test_other_files_stay_and_old_weights_go(plain: DbrxForCausalLM, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    plain.transformer.norm_f.weight.data *= 2
    plain.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "saved" / "model.safetensors")["transformer.norm_f.weight"].eq(2).all()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_failed_save_leaves_what_was_there(plain: DbrxForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.save_pretrained(tmp_path / "saved")
    before = shards_of(tmp_path / "saved")
    plain.transformer.blocks[1].ffn.experts.mlp.w1 = torch.nn.Parameter(torch.ones(3, 3), requires_grad=False)  # not the announced shape
    for folder in ("saved", "new"):
        with pytest.raises(AssertionError):
            plain.save_pretrained(tmp_path / folder)
    assert shards_of(tmp_path / "saved") == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_the_present_folder_is_a_destination(plain: DbrxForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    plain.save_pretrained(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine.txt", "model.safetensors"]
    assert DbrxForCausalLM.from_pretrained(".")(IDS).logits.equal(plain(IDS).logits)


def test_wrong_arguments(plain: DbrxForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="safe_serialization must be True"):
        plain.save_pretrained(tmp_path / "saved", safe_serialization=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="the destination must be a folder; found a file"):
        plain.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match="max_shard"):
        plain.save_pretrained(tmp_path / "saved", max_shards=1)  # type: ignore[call-arg]
    plain.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
