"""Checkpoints in trellis formats: by every method, with any number of threads, resumed, beside a guard, and with --fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.kernels.cpu.viterbi import search_bytes
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.calibration.held_out import CheckSequences, HeldOutForward
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.workers import Workers
from dbrx_q.quantize.pipeline.format_assignment import default_formats, override
from dbrx_q.quantize.pipeline.guard import Guard, dequantized, loaded
from dbrx_q.quantize.pipeline.jobs import read_blocks, shards_of
from dbrx_q.quantize.pipeline.plan import seconds_of
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, plan_checkpoint, quantize_checkpoint

RULES = ["w1=trellis2-fast:64", "v1=trellis3-fast:64", "w2=trellis2-fast:64", "blocks.1.w2=int4:64", "blocks.1.Wqkv=trellis4-fast:64"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that fill no tile, and one tile and a half."""
    folder = tmp_path_factory.mktemp("trellis") / "plain"
    sizes = {"d_model": 64, "n_heads": 2, "n_layers": 2, "vocab_size": 100}
    ffn = {"ffn_hidden_size": 192, "moe_num_experts": 3, "moe_top_k": 2}
    write_checkpoint(DbrxConfig(**sizes, attn_config={"kv_n_heads": 1}, ffn_config=ffn, torch_dtype="bfloat16"), folder)  # type: ignore[arg-type] # sizes are whole numbers
    return folder


def formats_of(checkpoint: Any, *rules: str) -> dict[str, TensorFormat]:
    return override(default_formats(checkpoint.config, TensorFormat("trellis2-fast", 64)), checkpoint.config, rules or RULES)


def request(method: str, *rules: str, sequences: int = 8, **changes: Any) -> QuantizationRequest:
    ids = torch.arange(sequences * 40).view(sequences, 40) % 90
    tokens = CalibrationSequences.single(ids) if method in ("gptq", "best") else None
    return QuantizationRequest(lambda c: formats_of(c, *rules), method=method, **{"sequences": tokens, "shard_bytes": 30_000} | changes)


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if not path.name.startswith(REPORT_NAME)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunRecord, Path]]:
    """The result of a method, computed once."""
    by_method: dict[str, tuple[RunRecord, Path]] = {}

    def make(method: str) -> tuple[RunRecord, Path]:
        if method not in by_method:
            folder = tmp_path_factory.mktemp("results") / method
            by_method[method] = quantize_checkpoint(source, folder, request(method)), folder
        return by_method[method]

    return make


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
def test_the_stored_weights_have_the_recorded_errors(source: Path, results: Callable[[str], tuple[RunRecord, Path]], method: str) -> None:
    """What is stored, tiles placed and read again, is near the original in its own basis: nothing of the rotation shows."""
    run, folder = results(method)
    with Checkpoint(source) as plain, Checkpoint(folder) as packed:
        jobs = [job for shard in shards_of(packed, packed.formats, 1 << 30) for job in shard if job.fmt is not None]
        records = {record.label: record for record in run.records}
        trellis = 0
        for job in jobs:
            assert job.fmt is not None
            if job.fmt.record.trellis is None:
                continue
            original = torch.cat(read_blocks(plain, job)).float()
            stored = packed.packed(job.tensor.name, job.expert)
            value = dequantize(stored)
            with Workers() as workers:
                assert torch.equal(dequantized(stored, workers), value)
            error = float((value - original).norm() / original.norm())
            assert error == pytest.approx(records[job.label].relative_error, rel=1e-3)
            assert error < (0.4 if method == "rtn" else 0.9)
            trellis += 1
        assert trellis == 2 * 3 * 2 + 3 + 1


@pytest.mark.parametrize("method", ["rtn", "best"])
def test_any_number_of_threads_gives_the_same_bytes(
    source: Path, results: Callable[[str], tuple[RunRecord, Path]], tmp_path: Path, method: str
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in {1, 2, 3} - {before}:
            torch.set_num_threads(threads)
            quantize_checkpoint(source, tmp_path / str(threads), request(method))
            assert sums(tmp_path / str(threads)) == sums(results(method)[1])
    finally:
        torch.set_num_threads(before)


class StoppedError(Exception):
    """Stops a run before its end."""


@pytest.mark.parametrize(("method", "tensors"), [("gptq", 9), ("best", 5), ("best", 22)])
def test_a_resumed_run_gives_the_same_bytes(
    source: Path, results: Callable[[str], tuple[RunRecord, Path]], tmp_path: Path, method: str, tensors: int
) -> None:
    """With v1 the first tensor of an expert after the interruption, its moments are rotated without w1's."""
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == tensors:
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_checkpoint(source, tmp_path / "out", request(method), on_bytes=stop)
    quantize_checkpoint(source, tmp_path / "out", request(method), resume=True)
    assert sums(tmp_path / "out") == sums(results(method)[1])


def test_a_calibration_that_is_too_short_leaves_experts_without_feedback(
    source: Path, results: Callable[[str], tuple[RunRecord, Path]], tmp_path: Path
) -> None:
    run = quantize_checkpoint(source, tmp_path / "short", request("best", sequences=2))  # 80 tokens
    experts = [record for record in run.records if record.kind == "experts"]
    assert {record.calibrated_by for record in experts} == {"none"}
    short, nearest = tensors_of(tmp_path / "short"), tensors_of(results("rtn")[1])
    compared = [name for name in nearest if ".experts." in name and "blocks.1" not in name]
    assert compared
    assert all(torch.equal(short[name], nearest[name]) for name in compared)


def test_the_guard_compares_with_the_fast_search_and_stores_the_format_itself(source: Path) -> None:
    with Checkpoint(source) as plain, Workers() as workers:
        guard = Guard(cast(HeldOutForward, None), workers, nearest=True, falls_back=True)  # these methods use no tokens
        formats = formats_of(plain, "experts=trellis2:64", "attention=trellis2:64")
        jobs = [job for shard in shards_of(plain, formats, 1 << 30) for job in shard if job.fmt is not None]
        expert = next(job for job in jobs if job.expert == 1)
        attention = next(job for job in jobs if job.kind == "attention")
        assert str(guard.nearest_format(expert)) == "trellis2-fast:64"
        assert str(guard.nearest_format(attention)) == "trellis2:64"
        blocks = read_blocks(plain, expert)
        weight = torch.cat(blocks).float()
        nearest = guard.nearest(expert, blocks)
        assert nearest is not None
        stored = guard.to_store(expert, blocks, nearest)

        def error(parts: list[torch.Tensor], fmt: TensorFormat | None = None) -> float:
            return float((dequantized(loaded(expert, parts, fmt), workers) - weight).square().sum())

        compared, own = error(nearest[0], guard.nearest_format(expert)), error(stored[0])
        assert own < 0.98 * compared
        assert own == pytest.approx(stored[1][0], rel=1e-3)
        assert compared == pytest.approx(nearest[1][0], rel=1e-3)
        assert error(nearest[0]) > 1.5 * float(weight.square().sum())  # the streams of one code are noise in another


def test_the_plan_counts_the_rotated_hessian(source: Path) -> None:
    """Of a matrix of 192 inputs: Hessian and cross term once more, beside the search's own memory."""
    plain, trellis = (
        plan_checkpoint(source, request("best", f"w2={fmt}:64", "w1=int4:64", "v1=int4:64")).working for fmt in ("int4", "trellis2")
    )
    threads = torch.get_num_threads()
    rows = threads * (512 - 128) * 192 * 4 * 16  # a tile at a time, where other formats take 512 rows
    assert (trellis - plain) / 1.1 == pytest.approx(8 * 192**2 + threads * (4 << 20) - rows, rel=0.02)
    assert max(search_bytes(code, 128) for code in CODES.values()) < 4 << 20


def test_the_plan_counts_the_time_of_the_search(source: Path) -> None:
    """Of all rows of all tiles; where a guard compares, of the fast format as well."""
    rules = ["w1=trellis3:64", "v1=int4:64", "w2=int4:64", "Wqkv=trellis4-fast:64"]
    plan = plan_checkpoint(source, request("rtn", *rules))
    guarded = plan_checkpoint(source, request("best", *rules, checks=(CheckSequences("check", torch.arange(80).view(2, 40)),)))
    w1, Wqkv = 2 * 3 * 256 * 64, 2 * 128 * 64
    assert plan.searched == {"trellis3": w1, "trellis4-fast": Wqkv}
    assert guarded.searched == {"trellis3": w1, "trellis3-fast": w1, "trellis4-fast": 2 * Wqkv}
    searching = replace(plan, searched={"trellis4-fast": 10**12}, threads=4)
    assert seconds_of(searching) > seconds_of(replace(plan, searched={})) + 1e12 * 5e-9 / 4


def test_fast_searches_the_fast_formats(source: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    arguments = ["--format", "trellis2", "--group-size", "64", "--tensor", "v1=trellis3-fast:64", "--tensor", "w2=int4:64", "--fast"]
    assert cli("quantize", source, tmp_path / "out", *arguments).code == 0
    tensors = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["tensors"]
    assert {name.rsplit(".", 1)[-1]: entry["format"] for name, entry in tensors.items() if ".experts." in name} == {
        "w1": "trellis2-fast",
        "v1": "trellis3-fast",
        "w2": "int4",
    }
    outcome = cli("quantize", source, tmp_path / "other", "--fast")
    assert outcome.code == 2
    assert "--fast is for trellis formats; found int4:64, int8:64. Choose --format trellis2" in outcome.err


def test_fast_searches_the_fallback_copy_fast_too(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    arguments = ["--format", "trellis4", "--fast", "--fallback-format", "trellis2", "--dry-run", "--json"]
    plan = json.loads(cli("quantize", nano, tmp_path / "out", *arguments).out)
    assert list(plan["searched"]) == ["trellis4-fast"]
    assert list(plan["fallback"]["searched"]) == ["trellis2-fast"]


def test_a_fallback_copy_has_the_group_size_that_fits_and_is_searched_fast(source: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """128, the default, divides neither dimension; no option names the group size of the copy."""
    assert cli("quantize", source, tmp_path / "out", "--format", "int4", "--fallback-format", "trellis2", "--fast").code == 0
    for folder, fmt in (("", "int4"), ("fallback", "trellis2-fast")):
        tensors = json.loads((tmp_path / "out" / folder / "config.json").read_text())["quantization_config"]["tensors"]
        experts = [entry for name, entry in tensors.items() if ".experts." in name]
        assert experts == [{"format": fmt, "group_size": 64}] * 6
    assert cli("plan", source, "--format", "int4", "--fallback", "--fallback-format", "trellis2", "--ram", "1GB").code == 0


def test_inspect_names_formats_whole_in_80_columns(
    results: Callable[[str], tuple[RunRecord, Path]], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = cli("inspect", results("rtn")[1]).out
    assert {rule.partition("=")[2] for rule in RULES} <= set(table.split())
