"""`dbrx-q bench` of a model on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.eval.bench.model import bench_model, speed_tests
from dbrx_q.sources.open import open_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]


def test_on_a_gpu_each_device_has_its_peak(quantized_nano: Path) -> None:
    tests = speed_tests([16], [4], [1, 4], [0, 8])
    result = bench_model(open_source(quantized_nano), tests, device=torch.device("cuda", 0), repeats=2)
    assert (len(result.rows), result.complete) == (8, True)
    with Checkpoint(quantized_nano) as checkpoint:
        stored = sum(info.nbytes for info in checkpoint.infos.values())
    assert stored <= result.loaded_memory["cuda:0"] <= result.peak_memory["cuda:0"] < 1 << 30
