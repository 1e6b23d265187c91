"""Packed models that transformers saves: read by transformers and by us."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import dbrx_q.transformers
from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import Manifest
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.transformers import DbrxQConfig


@pytest.mark.parametrize("ram", [None, "14MB"], ids=["resident", "experts on disk"])
def test_shards_are_those_that_quantize_wrote(
    quantized_nano: Path, tmp_path: Path, ids: torch.Tensor, cli: Callable[..., Any], ram: str | None
) -> None:
    limit = {} if ram is None else {"quantization_config": DbrxQConfig(ram=ram)}
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, **limit)
    model.save_pretrained(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.safetensors")
    assert shard.read_bytes() == (quantized_nano / shard.name).read_bytes()
    assert cli("verify", tmp_path / "saved").code == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    ours, original = (DbrxForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path / "saved", quantized_nano))
    assert torch.equal(ours, original)


def test_shards_are_closed_at_their_size(quantized_nano: Path, in_transformers: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    in_transformers.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    manifest = Manifest.read(tmp_path / "saved")
    assert manifest is not None
    assert len(manifest.shards) > 3
    assert all(shard["bytes"] < 1_100_000 for shard in manifest.shards.values())
    expected = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)(ids).logits
    assert torch.equal(DbrxForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(ids).logits, expected)


def test_what_is_saved_keeps_other_programs_from_random_weights(quantized_nano: Path, in_transformers: Any, tmp_path: Path) -> None:
    in_transformers.save_pretrained(tmp_path)
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, quantized_nano))
    for key in ("transformers_weights", "auto_map", "quantization_config"):
        assert written[key] == original[key], key
    assert (tmp_path / "modeling_dbrx_q.py").read_bytes() == (quantized_nano / "modeling_dbrx_q.py").read_bytes()
    assert "transformers_weights" not in in_transformers.config.to_dict()


def test_a_format_with_another_form_on_disk(nano: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    formats = TensorFormat("nf4-double", 64)
    quantize_checkpoint(
        nano, tmp_path / "double", QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, formats), method="rtn")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "double")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_a_model_without_its_head(quantized_nano: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    model = AutoModel.from_pretrained(quantized_nano)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_the_transformer_of_a_model_is_saved_alone(quantized_nano: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    transformer = AutoModelForCausalLM.from_pretrained(quantized_nano).transformer
    transformer.save_pretrained(tmp_path)
    assert "transformers_weights" in json.loads((tmp_path / "config.json").read_text())
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids).last_hidden_state, transformer(ids).last_hidden_state)


def test_what_cannot_be_saved_is_refused(quantized_nano: Path, in_transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="found variant"):
        in_transformers.save_pretrained(tmp_path / "saved", variant="fp16")
    with pytest.raises(RequestError, match="must be saved to another folder"):
        in_transformers.save_pretrained(quantized_nano)


def test_a_packed_model_made_in_memory_says_how_to_save_it(in_transformers: Any, tmp_path: Path) -> None:
    model = dbrx_q.transformers.DbrxForCausalLM(in_transformers.config)
    model.lm_head = in_transformers.lm_head
    with pytest.raises(RequestError, match=r"must be loaded from a checkpoint to be saved; found one that was made in memory\."):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_model_made_in_memory_is_saved_as_transformers_saves_it(small_config: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    model = dbrx_q.transformers.DbrxForCausalLM(small_config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids % 64).logits, model(ids % 64).logits)


def test_a_failed_write_leaves_what_was_there(in_transformers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    in_transformers.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as a disk that is full after a megabyte
    try:
        with pytest.raises((RequestError, OSError)):
            in_transformers.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
