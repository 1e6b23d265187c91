"""The parts of the guard that need no model: divergence from rows of logits, and when an error is worse than another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.layout import dense_tensors
from dbrx_q.eval.divergence import Distribution, scores
from dbrx_q.quantize.calibration.divergence import Divergence
from dbrx_q.quantize.calibration.forward import ORIGINAL, QUANTIZED
from dbrx_q.quantize.calibration.held_out import (
    CHECKED,
    HELD_OUT,
    LEFT_OUT,
    CheckSequences,
    HeldOutForward,
    HeldOutSequences,
    SourceDivergence,
    is_worse,
)
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.workers import Workers


def test_divergence_by_rows_equals_that_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, rows = 150, 5000
    z = torch.randn(tokens, rows, generator=generator) * 6
    z[:, -1] += torch.arange(tokens) - 20.0  # the largest logit comes last, and the last model shifts all of a token's
    models = {"near": z + 0.1 * torch.randn(z.shape, generator=generator), "same": z, "shifted": z + torch.arange(tokens)[:, None]}
    with Workers() as workers:
        divergence = Divergence(tokens, "original", list(models), workers)
        for start in (0, 70):
            piece = slice(start, start + 70 if not start else tokens)
            for part in Divergence.rows(rows):
                divergence.add(start, {name: values[piece, part] for name, values in (models | {"original": z}).items()})
        targets = torch.zeros(tokens, dtype=torch.int64)
        for name, values in models.items():
            expected = torch.from_numpy(scores(Distribution.of(z, targets), Distribution.of(values, targets)).kl)
            assert torch.allclose(divergence.of(name), expected, rtol=1e-9, atol=2e-6 if name == "shifted" else 1e-12), name


def test_errors_are_judged_by_source_beyond_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    sources = torch.arange(2).repeat_interleave(200)
    nearest = torch.rand(400, generator=generator, dtype=torch.float64) + 1
    noise = 0.5 * torch.randn(400, generator=generator, dtype=torch.float64)
    noise -= noise.mean()
    assert not is_worse(nearest - 0.2, nearest, sources)
    assert not is_worse(nearest + noise, nearest, torch.zeros(400, dtype=torch.int64))
    worse = torch.where(sources == 1, 0.2, -0.4).double()
    assert is_worse(nearest + worse, nearest, sources)  # one source loses, though the mean of all falls
    assert not is_worse(nearest + worse, nearest, torch.zeros_like(sources))
    few = sources[140:240]  # 60 of one source and 40 of the other are judged together
    assert not is_worse((nearest + worse)[140:240], nearest[140:240], few)
    assert is_worse((nearest - worse)[140:240], nearest[140:240], few)
    assert not is_worse((nearest - worse)[170:230], nearest[170:230], sources[170:230])  # too few to judge at all
    assert not is_worse(nearest[:0], nearest[:0], sources[:0])


def test_a_matrix_that_compensates_earlier_errors_is_credited_for_it() -> None:
    """The quantized model's inputs are half the original's: twice the original matrix gives what the original model gives."""
    config = DbrxConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=50, attn_config={"kv_n_heads": 1})
    generator = torch.Generator().manual_seed(0)
    sequences = HeldOutSequences.of(None, [CheckSequences("check", torch.zeros(4, 40, dtype=torch.int64))])
    assert sequences is not None
    tensor = next(tensor for tensor in dense_tensors(config) if tensor.role == "Wqkv")
    weight = torch.randn(tensor.matrix, generator=generator)
    inputs = torch.randn(160, 32, generator=generator)
    for kind, prefers in ((LEFT_OUT, True), (CHECKED, False)):
        with Workers() as workers:
            forward = HeldOutForward(config, replace(sequences, kinds=(kind,)), Products(workers, bfloat16=False))
            for name, values in ((ORIGINAL, inputs), (QUANTIZED, inputs / 2)):
                forward._states[name].inputs.write(0, values)
            assert not forward.prefers_nearest(tensor, -1, weight, [2 * weight, weight])
            assert forward.prefers_nearest(tensor, -1, weight, [weight, 2 * weight]) is prefers
            assert forward.prefers_nearest(tensor, -1, weight, [1.9 * weight, 2.01 * weight]) is prefers


def test_held_out_sequences_come_by_source_and_check_texts_last() -> None:
    held_out = torch.arange(30).view(6, 5)
    sequences = CalibrationSequences(held_out[:4], (2, 2, 0), ("a", "b", "c"), (0.5, 0.5, 0.0), held_out, (2, 0, 4))
    joined = HeldOutSequences.of(sequences, [CheckSequences("d", torch.zeros(3, 5, dtype=torch.int64))])
    assert joined is not None
    assert joined.names == ("a", "c", "d")
    assert joined.kinds == (HELD_OUT, LEFT_OUT, CHECKED)
    assert torch.equal(joined.ids[joined.spans[1]], held_out[2:])
    assert (joined.tokens, joined.checked_tokens) == (45, 15)
    assert HeldOutSequences.of(CalibrationSequences.single(held_out), []) is None
    assert HeldOutSequences.of(None, []) is None


@pytest.mark.parametrize(
    ("mean", "stderr", "hurts"),
    [(0.1, 0.04, True), (0.1, 0.06, False), (-0.1, 0.01, False), (0.0, 0.0, False), (0.1, 0.0, False), (math.nan, math.nan, True)],
)
def test_a_source_hurts_beyond_two_standard_errors(mean: float, stderr: float, hurts: bool) -> None:
    divergence = SourceDivergence.read([1.1, 0.1, 1.0, 0.1, mean, stderr])
    assert divergence.hurts is hurts
    assert divergence.figures == [1.1, 0.1, 1.0, 0.1, mean, stderr]
