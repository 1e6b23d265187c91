"""The quantizer rounds each tensor by itself, along its reduction axis, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.errors import FormatError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

SCRIPT = Path(sys.executable).with_name("dbrx-q")


def small_config(**changes: int) -> DbrxConfig:
    """d_model 128, 3 experts of width 192: groups of 64 divide both axes, groups of 128 only one."""
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 100} | changes
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 3, "moe_top_k": 2}
    return DbrxConfig(**sizes, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0}, ffn_config=ffn, torch_dtype="bfloat16")  # type: ignore[arg-type] # sizes are whole numbers


def quantize(source: Path, destination: Path, fmt: str = "int4", group_size: int = 64, **options: int) -> dict[str, torch.Tensor]:
    """Quantize, and read all tensors of the result with the safetensors package."""
    quantize_checkpoint(
        source, destination, QuantizationRequest(lambda c: default_formats(c.config, TensorFormat(fmt, group_size)), **options)
    )  # type: ignore[arg-type] # one option
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(destination.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(shard)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "plain"
    write_checkpoint(small_config(), folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def plain(source: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    return tensors


@pytest.mark.parametrize(("fmt", "group_size"), [("int4", 64), ("int4", 32), ("int8", 64), ("nf4", 64)])
def test_every_tensor_is_rounded_along_its_reduction_axis(
    source: Path, plain: dict[str, torch.Tensor], tmp_path: Path, fmt: str, group_size: int
) -> None:
    result = quantize(source, tmp_path / "out", fmt, group_size)
    module = {"int4": int4, "int8": int8, "nf4": nf4}[fmt]
    parts = {"int4": ("qweight", "scales", "zeros"), "int8": ("qweight", "scales"), "nf4": ("qweight", "absmax")}[fmt]
    compared = 0
    for name, tensor in plain.items():
        if ".experts.mlp." in name:
            for e, matrix in enumerate(tensor.view(3, 192, 128)):
                expected = module.quantize(matrix.T.contiguous() if name.endswith("w2") else matrix, group_size)  # type: ignore[attr-defined] # all have it
                for part in parts:
                    assert torch.equal(result[f"{name}.{e}.{part}"], getattr(expected, part)), (name, e, part)
                    compared += 1
        elif tensor.ndim == 1 or ".router." in name:
            assert torch.equal(result[name], tensor), name
            compared += 1
        else:
            expected8 = int8.quantize(tensor, group_size)
            assert torch.equal(result[f"{name}.qweight"], expected8.qweight), name
            assert torch.equal(result[f"{name}.scales"], expected8.scales), name
            compared += 2
    assert compared == len(result)


@pytest.mark.parametrize("fmt", ["int4", "nf4"])
def test_the_result_opens_and_names_its_formats(source: Path, tmp_path: Path, fmt: str) -> None:
    quantize(source, tmp_path / "out", fmt)
    with Checkpoint(tmp_path / "out") as checkpoint:
        formats = {name: (fmt.format, fmt.group_size) for name, fmt in checkpoint.formats.items()}
    assert formats["transformer.blocks.1.ffn.experts.mlp.w2"] == (fmt, 64)
    assert formats["lm_head.weight"] == formats["transformer.wte.weight"] == ("int8", 64)
    assert not any(".router." in name or "norm_1" in name or "norm_2" in name or "norm_f" in name for name in formats)


@pytest.mark.parametrize("module", [int4, nf4], ids=["int4", "nf4"])
def test_the_manifest_holds_the_error_of_each_tensor(
    source: Path, plain: dict[str, torch.Tensor], tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbrx_q.quantize.methods.rtn._PIECE_ELEMENTS", 7 * 192)  # several pieces, the last one smaller
    quantize(source, tmp_path / "out", module.__name__.rsplit(".", 1)[1])
    statistics = json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"]
    name = "transformer.blocks.0.ffn.experts.mlp.w2"
    matrix = plain[name].view(3, 192, 128)[1].T.float()
    error = module.dequantize(module.quantize(matrix.contiguous())) - matrix
    expected = float(error.square().sum().sqrt() / matrix.square().sum().sqrt())
    assert statistics[f"{name}.1"]["relative_error"] == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected < 0.15


def test_bytes_do_not_depend_on_block_size_and_threads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantize(source, tmp_path / "a")
    monkeypatch.setattr("dbrx_q.quantize.pipeline.jobs.STEP_BYTES", 7 * 4 * 128)
    second = quantize(source, tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for n in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": n, "NUMBA_NUM_THREADS": n}
        subprocess.run([SCRIPT, "quantize", source, tmp_path / n], env=environment, check=True, capture_output=True)
        assert sha256_of(tmp_path / n / "model-00001-of-00001.safetensors") == sha256_of(
            tmp_path / "a" / "model-00001-of-00001.safetensors"
        )


def test_formats_that_leave_experts_out_are_refused(source: Path, tmp_path: Path) -> None:
    def without(checkpoint: Checkpoint) -> dict[str, TensorFormat]:
        formats = default_formats(checkpoint.config, TensorFormat("int4", 64))
        return {name: fmt for name, fmt in formats.items() if ".1.ffn.experts.mlp.w2" not in name}

    with pytest.raises(
        FormatError, match=r"the experts of every layer must be packed; transformer\.blocks\.1\.ffn\.experts\.mlp\.w2 and 0 more"
    ):
        quantize_checkpoint(source, tmp_path / "out", QuantizationRequest(without))
    assert not list(tmp_path.iterdir())
