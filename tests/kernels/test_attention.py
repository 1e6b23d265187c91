"""Attention with and without a KV cache, compared with a float64 computation written out in numpy.

Dimension letters: `S` new tokens, `L` tokens in the cache with the new ones, `H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
import torch

from dbrx_q.kernels.attention import Sequences, attention, cached_attention
from dbrx_q.kernels.formats.errors import DbrxError
from dbrx_q.kernels.formats.kv import KV_FORMATS, KVLayer, allocate_kv, quantize_kv
from dbrx_q.kernels.triton.attention_tiles import decode_tiles, prefill_tiles
from dbrx_q.kernels.triton.launch import CHIPS, interpreting

H, G, C = 6, 2, 16


@dataclass(frozen=True)
class Case:
    """A batch of sequences."""

    counts: tuple[int, ...]
    """New tokens of each sequence."""
    ends: tuple[int, ...]
    """Length of each sequence, new tokens included."""
    rows: tuple[int, ...] | None = None
    """Its row of the cache; None: in order."""

    def __str__(self) -> str:
        return "+".join(f"{count}of{end}" for count, end in zip(self.counts, self.ends, strict=True)) + ("-rows" if self.rows else "")


CASES = [
    Case((1,), (1,)),
    Case((5,), (5,)),
    Case((1, 1, 1), (33, 1, 12)),
    Case((1, 1, 1), (33, 33, 33)),
    Case((1, 1), (0, 0)),
    Case((5, 0, 1), (12, 3, 9)),
    Case((2, 3), (2, 8), rows=(1, 0)),
    Case((1, 1), (4, 0)),
]


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    """[S, H, C], computed for one query and one head at a time."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    S, L = len(queries), keys.shape[1]
    out = np.zeros((S, H, C))
    for s in range(S):
        for h in range(H):
            g = h // (H // G)
            visible = L - S + s + 1
            scores = keys[g, :visible] @ queries[s, h] / np.sqrt(C)
            weights = np.exp(scores - scores.max())
            out[s, h] = weights / weights.sum() @ values[g, :visible]
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("S", "L"), [(1, 1), (1, 33), (5, 5), (5, 12), (64, 65), (130, 130)])
def test_attention_of_the_last_tokens(implementation: str, S: int, L: int) -> None:
    generator = torch.Generator().manual_seed(L)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((S, H, C), (G, L, C), (G, L, C)))
    np.testing.assert_allclose(attention(q, k, v, implementation=implementation).numpy(), truth(q, k, v), atol=2e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_a_cache(case: Case, format: str, implementation: str) -> None:
    q, cache, sequences = problem(case, format)
    out = cached_attention(q, cache, sequences, implementation=implementation)
    rows = case.rows or range(len(case.ends))
    for result, queries, row, end in zip(out.split(case.counts), q.split(case.counts), rows, case.ends, strict=True):
        expected = truth(queries, *cache.row(row, end, torch.float32)) if end else torch.zeros_like(queries).numpy()
        np.testing.assert_allclose(result.numpy(), expected, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_one_length_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    q, cache, sequences = problem(Case((1,) * 5, (33,) * 5), "plain")
    q, cache = q.to(dtype), replace(cache, keys=cache.keys.to(dtype), values=cache.values.to(dtype))
    together = cached_attention(q, cache, sequences, implementation="sdpa")
    one = Sequences(sequences.starts[:2], sequences.lengths[:1], (1,), (33,))
    for b in range(5):
        row = KVLayer("plain", cache.keys[b : b + 1], cache.values[b : b + 1])
        assert torch.equal(together[b : b + 1], cached_attention(q[b : b + 1], row, one, implementation="sdpa"))


def problem(case: Case, format: str) -> tuple[torch.Tensor, KVLayer, Sequences]:
    generator = torch.Generator().manual_seed(sum(case.ends))
    cache = allocate_kv(format, len(case.ends), G, 40, C, torch.float32, torch.device("cpu"))
    for codes, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = torch.randn(len(case.ends), G, 40, C, generator=generator)
        if scales is None:
            codes.copy_(x)
        else:
            for part, value in zip((codes, scales), quantize_kv(x, format), strict=True):
                part.copy_(value)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, *accumulate(case.counts)], case.ends))
    sequences = Sequences(starts, lengths, case.counts, case.ends)
    if case.rows is not None:
        sequences = replace(sequences, rows=torch.tensor(case.rows, dtype=torch.int32))
    return torch.randn(sum(case.counts), H, C, generator=generator), cache, sequences


@pytest.mark.skipif(interpreting(), reason="the interpreter runs Triton on the CPU")
def test_triton_needs_a_gpu() -> None:
    q, cache, sequences = problem(CASES[0], "int8")
    with pytest.raises(DbrxError, match="found 'cpu'"):
        cached_attention(q, cache, sequences, implementation="triton")


def test_a_quantized_cache_is_never_dequantized_off_the_cpu() -> None:
    cache = allocate_kv("int8", 1, G, 4, C, torch.float32, torch.device("meta"))
    q, ints = torch.empty(1, H, C, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(DbrxError, match="found 'int8'"):
        cached_attention(q, cache, Sequences(ints, ints[:1], (1,), (1,)), implementation="sdpa")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("format", KV_FORMATS)
def test_tiles_fit_the_chip(format: str, chip: object) -> None:
    assert isinstance(chip, type(CHIPS["sm_80"]))
    for B, L in ((1, 32768), (8, 32768), (1, 1), (64, 100), (4096, 64)):
        tiles = decode_tiles(format, B, 48, 8, L, 128, chip)
        assert 1 <= tiles.splits <= -(-L // tiles.tokens)
        assert tiles.heads >= max(6, chip.smallest_dot)
        if (B, L) == (1, 32768):
            assert tiles.splits * 8 >= chip.multiprocessors
    assert prefill_tiles(format, 128, chip).queries % 16 == 0
