"""The GPU path of quantization, run on the CPU: tensors are moved, whole matrices are rounded, and the CPU rounds those that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods import choose as methods
from dbrx_q.quantize.methods.choose import METHODS, Rounded
from dbrx_q.quantize.methods.moments import Moments
from dbrx_q.quantize.pipeline import accelerator as accelerator_module
from dbrx_q.quantize.pipeline.accelerator import Accelerator, open_accelerator
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

DEVICE = torch.device("cpu")
MEMORY = 1 << 30


def quantize(source: Path, out: Path, method: str, memory: int | None) -> RunRecord:
    ids = CalibrationSequences.single(torch.arange(64 * 60).view(64, 60) % 500) if METHODS[method].calibrated else None
    accelerator = None if memory is None else Accelerator(DEVICE, memory, "a GPU")
    request = QuantizationRequest(
        lambda c: default_formats(c.config, TensorFormat("int4", 64)), method=method, sequences=ids, accelerator=accelerator
    )
    return quantize_checkpoint(source, out, request)


@pytest.mark.parametrize("method", ["clip", "awq", "best"])
def test_an_accelerator_rounds_like_the_cpu(small: Path, tmp_path: Path, method: str) -> None:
    plain, accelerated = quantize(small, tmp_path / "cpu", method, None), quantize(small, tmp_path / "accelerated", method, MEMORY)
    assert {record.device for record in plain.records} == {"cpu"}
    assert {record.device for record in accelerated.records if record.relative_error is not None} == {str(DEVICE)}
    assert accelerated.relative_error == pytest.approx(plain.relative_error, rel=0.02)
    assert accelerated.device == "a GPU"


def test_tensors_that_do_not_fit_are_rounded_by_the_cpu(small: Path, tmp_path: Path) -> None:
    run = quantize(small, tmp_path / "out", "gptq", 1 << 12)
    devices = {record.device for record in run.records if record.relative_error is not None}
    assert devices == {f"cpu: {DEVICE} has too little memory"}
    assert "has too little memory" in (tmp_path / "out" / "quantization_report.md").read_text()


def test_a_tensor_that_runs_out_of_memory_is_rounded_by_the_cpu(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = quantize(small, tmp_path / "whole", "gptq", MEMORY)
    gptq, calls = METHODS["gptq"].run, []

    def scarce(weight: torch.Tensor, fmt: TensorFormat, moments: Moments | None) -> Rounded:
        calls.append(weight.shape)
        if len(calls) in (2, 9):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return gptq(weight, fmt, moments)

    monkeypatch.setitem(methods.METHODS, "gptq", replace(METHODS["gptq"], run=scarce))
    run = quantize(small, tmp_path / "out", "gptq", MEMORY)
    moved = [record for record in run.records if record.device.startswith("cpu:")]
    assert [record.device for record in moved] == [f"cpu: {DEVICE} ran out of memory"] * 2
    assert [record.label for record in run.records] == [record.label for record in undisturbed.records]
    assert run.relative_error == pytest.approx(undisturbed.relative_error, rel=0.02)
    assert "2 matrices were rounded on the CPU" in (tmp_path / "out" / "quantization_report.md").read_text()


def test_an_unfinished_run_on_another_device_is_not_resumed(small: Path, tmp_path: Path) -> None:
    class EndedError(Exception):
        pass

    def end(finished: int, total: int) -> None:
        raise EndedError

    request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)), method="clip")
    with pytest.raises(EndedError):
        quantize_checkpoint(small, tmp_path / "out", request, on_bytes=end)
    other = replace(request, accelerator=Accelerator(DEVICE, MEMORY, "a GPU"))
    with pytest.raises(RequestError, match="accelerator"):
        quantize_checkpoint(small, tmp_path / "out", other, resume=True)


def test_devices_are_checked() -> None:
    assert open_accelerator("cpu", None) is None
    with pytest.raises(RequestError, match=r"--device-memory limits a GPU's memory; found it with --device cpu"):
        open_accelerator("cpu", 1 << 30)
    with pytest.raises(RequestError, match=r"device must be 'cpu', 'cuda' or 'cuda:N'; found 'tpu'"):
        open_accelerator("tpu", None)


def test_the_plan_knows_the_memory_of_the_trellis_search() -> None:
    viterbi = pytest.importorskip("dbrx_q.kernels.triton.viterbi", exc_type=ImportError)
    needed = [viterbi.search_bytes(code, 10752) / 10752 for code in CODES.values()]
    assert accelerator_module._SEARCH / 2 < max(needed) <= accelerator_module._SEARCH
