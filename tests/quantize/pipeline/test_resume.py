"""A run that is killed at any moment can be resumed and then writes the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.staging import MARKER_NAME
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, already_there, quantize_checkpoint

KILLED_RUNS = Path(__file__).with_name("killed_runs.py")


def request(method: str = "rtn", **changes: Any) -> QuantizationRequest:
    sequences = CalibrationSequences.single(torch.arange(4 * 40).view(4, 40) % 90) if method in ("awq", "gptq", "best") else None
    assign_formats = changes.pop("assign_formats", lambda c: default_formats(c.config, TensorFormat("int4", 64)))
    return QuantizationRequest(assign_formats, method=method, **{"sequences": sequences, "shard_bytes": 100_000} | changes)


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(REPORT_NAME)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "plain"
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": 3, "vocab_size": 100}
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 3, "moe_top_k": 2}
    write_checkpoint(DbrxConfig(**sizes, attn_config={"kv_n_heads": 2}, ffn_config=ffn, torch_dtype="bfloat16"), folder)  # type: ignore[arg-type] # sizes are whole numbers
    return folder


class StoppedError(Exception):
    """Stops a run before its end."""


def stop_after(tensors: int) -> Callable[[int, int], None]:
    """A hook that stops a run after a number of rounded tensors."""
    remaining = tensors

    def on_bytes(finished: int, total: int) -> None:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            raise StoppedError

    return on_bytes


def begin(source: Path, out: Path, stopped_request: QuantizationRequest, tensors: int) -> Path:
    """Run until a number of tensors is finished; returns the folder of the unfinished result."""
    with pytest.raises(StoppedError):
        quantize_checkpoint(source, out, stopped_request, on_bytes=stop_after(tensors))
    assert not out.exists()
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize(("method", "kills"), [("rtn", 6), pytest.param("best", 12, marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_end_with_the_same_bytes(source: Path, tmp_path: Path, method: str, kills: int) -> None:
    command = [sys.executable, KILLED_RUNS, source, tmp_path, method, str(kills), "7"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    outcome = json.loads(process.stdout)
    assert (outcome["kills"], outcome["differ"]) == (kills, [])
    assert outcome["begun"] > kills / 2  # the others were killed before the first tensor or after the last


@pytest.fixture(scope="module")
def at_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunRecord, Path]]:
    """The result of an uninterrupted run by a method, computed once."""
    results: dict[str, tuple[RunRecord, Path]] = {}

    def make(method: str) -> tuple[RunRecord, Path]:
        if method not in results:
            folder = tmp_path_factory.mktemp("at-once") / method
            results[method] = quantize_checkpoint(source, folder, request(method)), folder
        return results[method]

    return make


@pytest.mark.parametrize(
    ("method", "tensors"),
    [(method, tensors) for method in ("awq", "gptq") for tensors in (1, 11, 26, 45)]
    + [("best", n) for n in (1, 2, 5, 11, 17, 26, 40, 44, 45)],
)
def test_resumes_from_the_last_finished_tensor(
    source: Path, at_once: Callable[[str], tuple[RunRecord, Path]], tmp_path: Path, method: str, tensors: int
) -> None:
    run, expected = at_once(method)
    assert len(run.records) == 45
    partial = begin(source, tmp_path / "out", request(method), tensors)
    finished = len((partial / MARKER_NAME).read_text().splitlines()) - 1
    assert finished >= tensors - 1  # the last one may not have been written yet
    calls: list[tuple[int, ...]] = []
    resumed = quantize_checkpoint(source, tmp_path / "out", request(method), resume=True, on_bytes=lambda *sizes: calls.append(sizes))
    assert len(calls) == 45 - finished
    assert sums(tmp_path / "out") == sums(expected)
    for name in ("stream_errors", "expert_tokens", "relative_error"):
        assert getattr(resumed, name) == getattr(run, name), name
    assert len(run.stream_errors) == (3 if method == "best" else 0)
    assert resumed.resumed_seconds == sum(record.seconds for record in resumed.records[:finished])


@pytest.mark.parametrize("method", ["rtn", "best"])
def test_tensors_lost_in_a_power_failure_are_quantized_again(source: Path, tmp_path: Path, method: str) -> None:
    """All or part of the journal may reach the disk before the tensors that it names."""
    quantize_checkpoint(source, tmp_path / "whole", request(method))
    for number, damage in enumerate(("short", "zeros", "gone", "torn journal", "early")):
        out = tmp_path / f"out{number}"
        partial = begin(source, out, request(method), 30)
        shards = sorted(partial.glob("*.safetensors"))
        assert len(shards) > 2
        if damage == "short":
            os.truncate(shards[-1], shards[-1].stat().st_size - 1)
        elif damage == "zeros":
            data = bytearray(shards[-1].read_bytes())
            data[-500:] = bytes(500)
            shards[-1].write_bytes(data)
        elif damage == "gone":
            shards[-1].unlink()
        elif damage == "early":
            data = bytearray(shards[0].read_bytes())
            data[-1] ^= 1
            shards[0].write_bytes(data)
        else:
            journal = (partial / MARKER_NAME).read_bytes()
            (partial / MARKER_NAME).write_bytes(journal[:-20])
        quantize_checkpoint(source, out, request(method), resume=True)
        assert sums(out) == sums(tmp_path / "whole"), damage


def test_resuming_with_other_options_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = begin(source, out, request("gptq"), 12)
    before = sums(partial)
    for changed, message in (
        (request("best"), "rounding was 'gptq', found 'best'"),
        (request("gptq", shard_bytes=90_000), "shard_bytes was 100000, found 90000"),
        (request("gptq", sequences=CalibrationSequences.single(torch.zeros(2, 30, dtype=torch.int64))), "sequences was '"),
        (request("gptq", assign_formats=lambda c: default_formats(c.config, TensorFormat("int4", 32))), "group_size was 64, found 32"),
    ):
        with pytest.raises(RequestError, match=message):
            quantize_checkpoint(source, out, changed, resume=True)
        assert sums(partial) == before
    with pytest.raises(RequestError, match=r"out\.partial: this folder holds an unfinished run\. Continue it with --resume, or remove it"):
        quantize_checkpoint(source, out, request("gptq"))
    assert sums(partial) == before


def test_a_full_disk_stops_cleanly(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(source, tmp_path / "whole", request())
    original_write = SafetensorsWriter.write
    left = 9

    def write(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original_write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", write)
        with pytest.raises(RequestError, match=r"No space left on device\. What is finished is kept in .*out\.partial: .* --resume"):
            quantize_checkpoint(source, tmp_path / "out", request())
    quantize_checkpoint(source, tmp_path / "out", request(), resume=True)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_a_run_resumes_after_its_source_is_repaired(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "whole", request())
    damaged = shutil.copytree(source, tmp_path / "damaged" / source.name)  # the model card names it
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xff\x7f"  # NaN
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"w2 must be finite.*The finished tensors are kept in .*--resume continues"):
        quantize_checkpoint(damaged, tmp_path / "out", request())
    shutil.copyfile(source / shard.name, shard)
    quantize_checkpoint(damaged, tmp_path / "out", request(), resume=True)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_the_command_resumes_and_reports_a_complete_result(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    int4_request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)))
    partial = begin(nano, out, int4_request, 20)
    outcome = cli("quantize", nano, out)
    assert (outcome.code, outcome.out) == (2, "")
    assert "this folder holds an unfinished run. Continue it with --resume" in outcome.err
    outcome = cli("quantize", nano, out, "--resume")
    assert outcome.code == 0, outcome.err
    assert "of earlier runs" in outcome.out
    assert not partial.exists()
    assert cli("verify", out).code == 0
    (out / MARKER_NAME).write_text("{}\n")  # killed before its last step
    outcome = cli("quantize", nano, out, "--resume")
    assert (outcome.code, outcome.out) == (0, "")
    assert "is complete already" in outcome.err
    assert not (out / MARKER_NAME).exists()
    assert not already_there(nano, out, QuantizationRequest(int4_request.assign_formats, method="clip"))
    outcome = cli("quantize", nano, out, "--resume", "--method", "clip")
    assert outcome.code == 2
    assert "must be empty or not exist" in outcome.err
