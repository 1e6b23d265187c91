"""Both attention kernels in Triton's interpreter compared with the float32 reference over the dequantized cache.

Dimension letters: `B` sequences, `L` capacity in tokens, `H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch

from dbrx_q.kernels.attention import Sequences, attention_reference, cached_attention
from dbrx_q.kernels.formats.kv import KV_FORMATS, KVLayer, allocate_kv, quantize_kv
from dbrx_q.kernels.triton import attention_decode as triton_attention_decode
from dbrx_q.kernels.triton import attention_prefill as triton_attention_prefill
from dbrx_q.kernels.triton.attention_tiles import DecodeTiles, PrefillTiles

G, C = 2, 32
BLOCK = 16


@dataclass(frozen=True)
class Case:
    """A batch of sequences."""

    counts: tuple[int, ...]
    """New tokens of each sequence."""
    ends: tuple[int, ...]
    """Length of each sequence, new tokens included."""
    splits: int = 3
    """Splits of the cache in decoding."""
    heads: int = 6
    """Query heads."""
    scale: float = 1.0
    """Factor of the values."""
    shift: float = 0.0
    """Mean of keys and values before scaling."""
    rows: tuple[int, ...] | None = None
    """Row of the cache of each sequence, -1 for none; None: in order."""

    def __str__(self) -> str:
        lengths = "+".join(f"{count}of{end}" for count, end in zip(self.counts, self.ends, strict=True))
        extra = f"-rows{self.rows}" if self.rows else ""
        return f"{lengths}-splits{self.splits}-scale{self.scale:g}-shift{self.shift:g}{extra}"


DECODE = [
    Case((1,), (1,)),
    Case((1,), (BLOCK,)),
    Case((1,), (2 * BLOCK,), splits=2),
    Case((1,), (2 * BLOCK + 1,), splits=2),
    Case((1,), (3 * BLOCK - 1,), splits=1),
    Case((1, 1, 1), (36, 0, 5), splits=2),
    Case((1,), (3 * BLOCK,), shift=2.0),
    Case((1, 1), (9, 33), splits=2, rows=(2, -1)),
    Case((1, 1), (7 * BLOCK, 3 * BLOCK), splits=7),
]
PREFILL = [
    Case((17,), (17,), heads=2),
    Case((19,), (40,), heads=2, shift=2.0),
    Case((3, 0, 1), (3, 7, 18)),
    Case((2, 0), (2, 0), heads=2),
    Case((3, 2), (4, 18), heads=2, rows=(1, 0)),
]
FLOAT16 = Case((1,), (20,), scale=1e-5), Case((5,), (18,), heads=2, scale=1e-5), Case((1,), (40,), splits=2), Case((2,), (18,), heads=2)
"""For float16: values so small that float16 steps of the cache would underflow, and ordinary values."""


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences fill them."""
    case = request.node.callspec.params["case"]
    monkeypatch.setattr(triton_attention_decode, "decode_tiles", lambda *_: DecodeTiles(BLOCK, 8, case.splits, 2, 4, 2))
    monkeypatch.setattr(triton_attention_prefill, "prefill_tiles", lambda *_: PrefillTiles(16, BLOCK, 4, 2))


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_agrees_with_the_reference(case: Case, format: str) -> None:
    check(case, format, torch.float32)


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_agrees_with_the_reference(case: Case, format: str) -> None:
    check(case, format, torch.float32)


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("case", FLOAT16, ids=str)
def test_float16_agrees_with_the_reference(case: Case, format: str) -> None:
    check(case, format, torch.float16)


@pytest.mark.parametrize("case", [DECODE[3], DECODE[-1]], ids=str)
def test_counters_are_reset_to_zero(case: Case) -> None:
    q, cache, sequences = problem(case, "int8", torch.float32)
    first, second = (cached_attention(q, cache, sequences, implementation="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", DECODE[-1:], ids=str)
def test_bits_of_a_sequence_do_not_depend_on_the_length_of_another(case: Case) -> None:
    q, cache, sequences = problem(case, "int8", torch.float32)
    first = cached_attention(q, cache, sequences, implementation="triton")[0]
    for end in (0, 1, 2 * BLOCK):
        lengths = torch.tensor([case.ends[0], end], dtype=torch.int32)
        now = replace(sequences, lengths=lengths, ends=(case.ends[0], end))
        assert torch.equal(cached_attention(q, cache, now, implementation="triton")[0], first)


def check(case: Case, format: str, dtype: torch.dtype) -> None:
    q, cache, sequences = problem(case, format, dtype)
    out = cached_attention(q, cache, sequences, implementation="triton")
    assert out.dtype == dtype
    outs = out.split(case.counts)
    for b, (count, end, result, queries) in enumerate(zip(case.counts, case.ends, outs, q.split(case.counts), strict=True)):
        row = b if case.rows is None else case.rows[b]
        if not count:
            continue
        if not end or row < 0:
            assert (result == 0).all()
            continue
        k, v = cache.row(row, end, torch.float32)
        truth = attention_reference(queries, k, v)
        same_dtype = attention_reference(queries, k, v).to(dtype).float() if dtype == torch.float32 else rounded(queries, k, v, dtype)
        floor = float(v.abs().max()) * (2e-6 if dtype == torch.float32 else 1e-3)
        assert (result.float() - truth).abs().max() <= 2 * (same_dtype - truth).abs().max() + floor


def rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference computed with keys, values and results in `dtype`."""
    return attention_reference(q, k.to(dtype), v.to(dtype)).to(dtype).float()


def problem(case: Case, format: str, dtype: torch.dtype) -> tuple[torch.Tensor, KVLayer, Sequences]:
    """The cache beyond a sequence's end and in unused rows is filled with NaN or large codes."""
    generator = torch.Generator().manual_seed(sum(case.ends))
    rows = range(len(case.ends)) if case.rows is None else case.rows
    cache = poisoned(format, max(*rows, 0) + 1, max(*case.ends, BLOCK) + 3, dtype)
    for row, end in zip(rows, case.ends, strict=True):
        if row < 0:
            continue
        for codes, scales, size in ((cache.keys, cache.key_scales, 1.0), (cache.values, cache.value_scales, case.scale)):
            x = (torch.randn(G, end, C, generator=generator) + case.shift) * size
            if scales is None:
                codes[row, :, :end] = x.to(dtype)
            else:
                codes[row, :, :end], scales[row, :, :end] = quantize_kv(x, format)
    q = torch.randn(sum(case.counts), case.heads, C, generator=generator).to(dtype)
    starts = torch.tensor([0, *accumulate(case.counts)], dtype=torch.int32)
    lengths = torch.tensor(case.ends, dtype=torch.int32)
    sequences = Sequences(starts, lengths, case.counts, case.ends)
    return q, cache, sequences if case.rows is None else replace(sequences, rows=torch.tensor(case.rows, dtype=torch.int32))


def poisoned(format: str, rows: int, capacity: int, dtype: torch.dtype) -> KVLayer:
    cache = allocate_kv(format, rows, G, capacity, C, dtype, torch.device("cpu"))
    for part in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if part is not None:
            part.fill_(torch.nan if part.is_floating_point() else 119)
    return cache
