"""What the launches of experts in decode are given."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.eval.bench.kernel_shapes import empty_weight
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton.launch import CHIPS, recording
from dbrx_q.kernels.triton.moe_decode import decode


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_activations_are_aligned_to_the_words_that_a_kernel_reads(offset: int) -> None:
    D, F, fmt = 256, 512, TensorFormat("int4", 64)
    weights = (empty_weight(fmt, 4, *shape, device="cpu") for shape in ((F, D), (F, D), (D, F)))
    x = torch.arange(offset + D, dtype=torch.bfloat16)[offset:][None]
    with recording(CHIPS["sm_90"]) as launches:
        decode(x, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), ExpertWeights(*weights), None)
    given = launches[0].arguments[0]
    assert launches[0].constants["GROUPED"]
    assert given.data_ptr() % 8 == 0
    assert torch.equal(given, x)
