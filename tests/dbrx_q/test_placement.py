"""The memory plan: weights to the byte, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dbrx_q import KVCache
from dbrx_q.checkpoint import Checkpoint
from dbrx_q.cli import run
from dbrx_q.kernels.kv import KV_FORMATS
from dbrx_q.placement import plan_memory


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int4"])
def test_planned_weights_and_cache_are_the_real_ones(nano: Path, quantized_nano: Path, quantized: bool, kv_format: str) -> None:
    with Checkpoint(quantized_nano if quantized else nano) as checkpoint:
        plan = plan_memory(checkpoint.config, checkpoint.formats, context=300, batch=2, kv_format=kv_format)
        assert plan.dense + plan.experts == sum(info.nbytes for info in checkpoint.infos.values())
        assert plan.kv_cache == KVCache(checkpoint.config, 2, 300, dtype=torch.bfloat16, format=kv_format).nbytes


def test_a_plan_for_what_quantize_would_write(nano: Path, quantized_nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(nano), "--format", "int4", "--context", "2048", "--json"]) == 0
    ahead = json.loads(capsys.readouterr().out)
    assert run(["plan", str(quantized_nano), "--json", "--ram", "1GiB", "--context", "2048"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (ahead["dense"], ahead["experts"]) == (found["dense"], found["experts"])
    assert found["fits"]
    assert run(["plan", str(quantized_nano), "--ram", "100MB", "--context", "2048"]) == 0
    short = found["total"] - 100_000_000
    assert f"does not fit: {short:,} bytes more are needed" in capsys.readouterr().out
