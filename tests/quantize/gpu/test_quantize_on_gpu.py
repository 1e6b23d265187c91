"""Quantization on a GPU: errors as on the CPU, the same bytes on every run, and within the GPU's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.kernels.cpu import search as cpu_search
from dbrx_q.kernels.formats import int4, int8
from dbrx_q.kernels.formats.format import GridLevels
from dbrx_q.kernels.grid_search import half_quadratic, least_squares
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.quantize.pipeline.accelerator import open_accelerator
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

SHARES, BETAS = torch.tensor([1.0, 0.9, 0.8, 0.7]), torch.tensor([10 * 1.01**n for n in range(20)])


def quantize(source: Path, out: Path, method: str, memory: int | None, device: str = "cuda") -> RunRecord:
    ids = CalibrationSequences.single(torch.arange(64 * 60).view(64, 60) % 500) if METHODS[method].calibrated else None
    accelerator = open_accelerator(device, memory)
    request = QuantizationRequest(
        lambda c: default_formats(c.config, TensorFormat("int4", 64)), method=method, sequences=ids, accelerator=accelerator
    )
    return quantize_checkpoint(source, out, request)


@pytest.mark.parametrize("method", ["clip", "hqq", "awq", "gptq", "best"])
def test_errors_equal_those_of_the_cpu_and_bytes_repeat(nano: Path, tmp_path: Path, method: str) -> None:
    plain = quantize(nano, tmp_path / "cpu", method, None, "cpu")
    once, again = (quantize(nano, tmp_path / name, method, None) for name in ("once", "again"))
    assert once.relative_error == pytest.approx(plain.relative_error, rel=0.02)
    assert {record.device for record in once.records if record.relative_error is not None} == {"cuda:0"}
    assert len(again.records) == len(once.records)
    for path in (tmp_path / "once").glob("*.safetensors"):
        assert sha256_of(path) == sha256_of(tmp_path / "again" / path.name)


def test_a_tensor_that_runs_out_of_gpu_memory_is_rounded_by_the_cpu(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbrx_q.quantize.pipeline.accelerator._TEMPORARIES", 0.001)  # so that the plan promises more than the GPU has
    run = quantize(nano, tmp_path / "out", "best", 4 << 20)
    assert any(record.device == "cpu: cuda:0 ran out of memory" for record in run.records)
    assert run.peak_device_bytes <= 4 << 20
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(("G", "levels"), [(64, int4.LEVELS), (32, int8.LEVELS)], ids=["int4", "int8"])
def test_grid_searches_give_the_results_of_the_cpu(G: int, levels: GridLevels) -> None:
    weight = torch.randn(96, 768, generator=torch.Generator().manual_seed(3)) * 0.02
    importance = torch.rand(768, generator=torch.Generator().manual_seed(4))
    for grid, expected in (
        (
            least_squares(weight.cuda(), G, levels, SHARES, importance.cuda()),
            cpu_search.least_squares(weight, G, levels, SHARES, importance),
        ),
        (half_quadratic(weight.cuda(), G, levels, BETAS), cpu_search.half_quadratic(weight, G, levels, BETAS)),
    ):
        assert all((a.cpu() == b).float().mean() > 0.97 for a, b in zip(grid, expected, strict=True))
