"""Checkpoints in the formats of other tools' files: every tensor that may be packed, embedding included, from `quantize` to `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.quantize.pipeline.format_assignment import default_formats, override
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint


@pytest.fixture(scope="module", params=["affine4:32", "affine8-bf16:64", "q4_0:32", "int4:64", "int3:64", "int2:32"])
def fmt(request: pytest.FixtureRequest) -> TensorFormat:
    return TensorFormat.parse(request.param)


@pytest.fixture(scope="module")
def folder(small: Path, fmt: TensorFormat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("formats") / fmt.format
    rules = [f"{name}={fmt}" for name in ("embedding", "attention", "head")]
    request = QuantizationRequest(lambda checkpoint: override(default_formats(checkpoint.config, fmt), checkpoint.config, rules))
    quantize_checkpoint(small, out, request)
    return out


def test_inspect_counts_the_bits(folder: Path, fmt: TensorFormat, cli: Callable[..., Any]) -> None:
    """Of matrices with K = 64, which int3 and int2 pad to 128."""
    kinds = json.loads(cli("inspect", folder, "--json").out)["kinds"]
    bits = {"affine4": 5, "affine8-bf16": 8.5, "q4_0": 4.625, "int4": 4.375, "int3": 6.375, "int2": 4.625}[fmt.format]
    for kind in ("experts", "attention", "embedding", "head"):
        assert (kinds[kind]["format"], kinds[kind]["bits_per_weight"]) == (str(fmt), bits)


def test_logits_are_those_of_the_dequantized_weights(small: Path, folder: Path, fmt: TensorFormat) -> None:
    checkpoint, ids = Checkpoint(folder), torch.tensor([[3, 14, 15, 9, 2, 6]])
    assert set(checkpoint.formats.values()) == {fmt}
    packed, plain = (DbrxForCausalLM.from_pretrained(str(path), dtype=torch.float32) for path in (folder, small))
    assert packed.transformer.wte.weight.value.format == fmt.in_memory.format
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(checkpoint.read(name))
    # `read` rounds to bfloat16, the dtype of the checkpoint.
    assert torch.allclose(packed(ids).logits, plain(ids).logits, atol=5e-3)


def test_a_saved_model_keeps_the_format(folder: Path, fmt: TensorFormat, tmp_path: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(str(folder))
    model.save_pretrained(tmp_path / "saved")
    one, other = Checkpoint(folder), Checkpoint(tmp_path / "saved")
    assert other.formats == one.formats
    for name in one.infos:
        assert torch.equal(other.read(name), one.read(name)), name
