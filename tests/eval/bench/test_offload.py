"""`bench offload`: decode and prefill with experts on disk, and decode with experts on a GPU and in host memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.offload import bench_gpu, bench_offload
from dbrx_q.eval.bench.offload_report import markdown


def test_the_command_measures_and_writes_a_report(quantized_nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    outcome = cli("bench", "offload", quantized_nano, "--share", "30", "-n", 4, "-p", 20, "--out", out, "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    assert [(row["prefill"], row["prefetch"], row["tokens"]) for row in data["rows"]] == [
        (False, True, 4),
        (True, True, 20),
        (False, False, 4),
        (True, False, 20),
    ]
    for row in data["rows"]:
        assert row["slots"] == 19  # 30 % of 64, whole experts
        assert row["needed_bytes"] > 0
        assert row["bound"] == pytest.approx(row["link"] / row["needed_bytes"])
        assert row["of_bound"] == pytest.approx(row["tokens_per_second"] / row["bound"])
        if not row["prefetch"]:
            assert row["read_bytes"] == pytest.approx(row["needed_bytes"])
    assert {path.name for path in out.iterdir()} == {"offload.json", "offload.md"}
    assert "| 19 (30%) | tg4 | yes |" in (out / "offload.md").read_text()


def test_experts_on_a_gpu_and_in_host_memory(quantized_nano: Path) -> None:
    rows = bench_gpu(quantized_nano, [0.4], torch.device("cpu"), tokens=4, policy="least-stale")
    assert [(row.miss_policy, row.prefetch) for row in rows] == [(p, f) for p in ("hybrid", "cpu", "copy") for f in (True, False)]
    for row in rows:
        assert row.slots == 25
        assert (row.cpu > 0, row.link > 0) == {"cpu": (True, False), "copy": (False, True), "hybrid": (True, True)}[row.miss_policy]
        assert row.bound == pytest.approx((row.cpu + row.link) / row.needed_bytes)
        assert row.on_cpu == {"cpu": 1.0, "copy": 0.0}.get(row.miss_policy, row.on_cpu)
    benchmark = bench_offload(quantized_nano, [0.4], tokens=2, prompt=0, policy="lru", prefetch=[False])
    benchmark.gpus = rows
    assert "| 25 (40%) | hybrid | yes |" in markdown(benchmark)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "0"), "--share must be above 0 and below 100 percent; found 0"),
        (("--share", "100"), "--share must be above 0 and below 100 percent; found 100"),
        (("-n", "0", "-p", "0"), "one of them above 0; found 0 and 0"),
        (("--policy", "static"), "random tokens have no profile"),
    ],
)
def test_bad_options_are_refused(quantized_nano: Path, arguments: tuple[str, ...], message: str, cli: Callable[..., Any]) -> None:
    outcome = cli("bench", "offload", quantized_nano, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_shares_and_tokens_out_of_range_are_refused(quantized_nano: Path) -> None:
    with pytest.raises(RequestError, match=r"between 0 and 1; found 1\.5"):
        bench_gpu(quantized_nano, [1.5], torch.device("cpu"), policy="lru")
    with pytest.raises(RequestError, match="at least 1; found 0"):
        bench_gpu(quantized_nano, [0.5], torch.device("cpu"), tokens=0, policy="lru")


def test_shares_that_hold_no_expert_or_all_are_refused(quantized_nano: Path, cli: Callable[..., Any]) -> None:
    """All of them before the first measurement."""
    for share, message in (("99.9", "must leave experts on disk; that of 99.9%"), ("0.5", "must hold an expert; that of 0.5% is ")):
        outcome = cli("bench", "offload", quantized_nano, "--share", "50", "--share", share, "-n", 2, "-p", 0)
        assert (outcome.code, outcome.out) == (2, ""), share
        assert message in outcome.err


def test_with_a_fallback_copy(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "int8"
    assert cli("quantize", nano, folder, "--format", "int8", "--fallback-format", "int4").code == 0
    benchmark = bench_offload(folder, [0.8], tokens=4, prompt=0, policy="lru", prefetch=[False], fallback=True)
    without, row = benchmark.rows
    assert without.fallback_share == 0
    assert 0 < row.fallback_share <= 1 - row.hit_rate
    assert row.slots < without.slots  # the copy takes the memory of some slots
    assert f"| {row.fallback_share:.1%} |" in markdown(benchmark)
    with pytest.raises(RequestError, match=r"that of 25% is .* bytes too small"):
        bench_offload(folder, [0.8, 0.25], tokens=4, prompt=0, policy="lru", fallback=True, on_row=lambda *_: pytest.fail("measured"))
