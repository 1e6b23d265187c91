"""The CPU's attention over a KV cache as it is stored, compared with float64 attention over the dequantized cache.

Dimension letters: `S` new tokens of a sequence, `L` its tokens with the new ones, `H` query heads, `G` key/value heads, `C` channels of a
head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch

from dbrx_q.kernels import attention as launcher
from dbrx_q.kernels.attention import Sequences, attention, cached_attention
from dbrx_q.kernels.cpu.attention import attend
from dbrx_q.kernels.cpu.attention_chunks import CHUNK
from dbrx_q.kernels.formats.kv import KVLayer, allocate_kv, quantize_kv

STORED = [("plain", torch.float32), ("plain", torch.bfloat16), ("plain", torch.float16)]
STORED += [(kv_format, dtype) for kv_format in ("int8", "int4") for dtype in (torch.float32, torch.bfloat16)]
NAMES = [f"{kv_format}-{str(dtype).removeprefix('torch.')}" for kv_format, dtype in STORED]
DBRX, SMALL = (12, 2, 128), (5, 1, 32)  # (H, G, C): six query heads on a key/value head, as DBRX has, and five

threads = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(threads)


def problem(format: str, dtype: torch.dtype, heads: tuple[int, int, int], counts: tuple[int, ...], L: int) -> tuple[torch.Tensor, KVLayer]:
    """Queries, and a filled cache with room for L tokens in each sequence and one row more than there are sequences."""
    H, G, C = heads
    generator = torch.Generator().manual_seed(L)
    cache = allocate_kv(format, len(counts) + 1, G, L, C, dtype, torch.device("cpu"))
    for codes, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = torch.randn(len(codes), G, L, C, generator=generator)
        if scales is None:
            codes.copy_(x)
        else:
            for part, value in zip((codes, scales), quantize_kv(x, format), strict=True):
                part.copy_(value)
    return (2 * torch.randn(sum(counts), H, C, generator=generator)).to(dtype), cache


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float64 [S, H, C]."""
    (S, H, C), (G, L, _) = q.shape, k.shape
    scores = torch.einsum("sghc,glc->ghsl", q.double().view(S, G, H // G, C), k.double()) / C**0.5
    future = torch.ones(S, L, dtype=torch.bool).triu(L - S + 1)
    return torch.einsum("ghsl,glc->sghc", scores.masked_fill(future, -torch.inf).softmax(-1), v.double()).reshape(S, H, C)


def by_torch(q: torch.Tensor, cache: KVLayer, row: int, L: int) -> torch.Tensor:
    """Torch's attention over a copy of the cache in the dtype of the queries."""
    return attention(q, *cache.row(row, L, q.dtype))


@pytest.mark.parametrize("heads", [DBRX, SMALL], ids=["DBRX", "small"])
@pytest.mark.parametrize(("format", "dtype"), STORED, ids=NAMES)
def test_sequences_of_any_lengths(format: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    counts, ends, rows = (1, 3, 0, 2, 1), (2 * CHUNK + 19, CHUNK + 1, 4, 2, CHUNK), [4, 0, 3, 1, 5]
    q, cache = problem(format, dtype, heads, counts, ends[0])
    parts = zip(attend(q, cache, counts, ends, rows).split(counts), q.split(counts), rows, ends, strict=True)
    for result, queries, row, end in parts:
        expected = truth(queries, *cache.row(row, end, torch.float32))
        assert result.dtype == dtype
        if len(queries):
            error, of_torch = ((y.double() - expected).abs().max() for y in (result, by_torch(queries, cache, row, end)))
            assert error <= (2e-6 if dtype == torch.float32 else of_torch)


@pytest.mark.parametrize(("format", "dtype"), [("plain", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)])
def test_a_long_sequence(format: str, dtype: torch.dtype) -> None:
    L = 20_000
    q, cache = problem(format, dtype, (6, 1, 64), (1,), L)
    result, expected = attend(q, cache, (1,), (L,), [0]), truth(q, *cache.row(0, L, torch.float32))
    error, of_torch = (((y.double() - expected) ** 2).mean() ** 0.5 for y in (result, by_torch(q, cache, 0, L)))
    assert error <= (1e-7 if dtype == torch.float32 else of_torch)


@pytest.mark.parametrize(("format", "dtype"), STORED, ids=NAMES)
def test_bits_depend_neither_on_threads_nor_on_the_batch_nor_on_tokens_of_the_same_call(format: str, dtype: torch.dtype) -> None:
    counts, ends, rows = (1, 2, 1), (3 * CHUNK + 5, 2 * CHUNK, 37), [2, 0, 1]
    q, cache = problem(format, dtype, DBRX, counts, ends[0])
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(attend(q, cache, counts, ends, rows))
        assert torch.equal(results[0], results[-1])
    one_by_one = [(0, 0), (1, -1), (1, 0), (2, 0)]  # (sequence, tokens that are missing)
    for i, (b, missing) in enumerate(one_by_one):
        alone = attend(q[i : i + 1], cache, (1,), (ends[b] + missing,), [rows[b]])
        assert torch.equal(alone, results[0][i : i + 1])


def test_a_token_of_a_chunk_of_any_length() -> None:
    """With equal keys the result is the mean of the values: every token counts once, and none after the last."""
    cache = allocate_kv("plain", 1, 1, 3 * CHUNK, 16, torch.float32, torch.device("cpu"))
    cache.values[0, 0, :, 0] = torch.arange(3 * CHUNK)
    q = torch.ones(1, 1, 16)
    for L in (*range(1, 34), CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17):
        cache.keys[:, :, L:], cache.values[:, :, L:] = torch.nan, torch.nan
        result = attend(q, cache, (1,), (L,), [0])[0, 0, 0]
        cache.keys.fill_(0), cache.values[0, 0, :, 0].copy_(torch.arange(3 * CHUNK)), cache.values[0, 0, :, 1:].fill_(0)
        torch.testing.assert_close(result, torch.tensor((L - 1) / 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["keys", "values", "queries"])
def test_numbers_that_are_not_finite_go_where_torch_lets_them_go(part: str, special: float) -> None:
    L = 2 * CHUNK + 3
    q, cache = problem("plain", torch.float32, DBRX, (1,), L)
    target = {"keys": cache.keys[0, 0, 5], "values": cache.values[0, 0, 5], "queries": q[0, 3]}[part]
    target[7] = special
    result, expected = attend(q, cache, (1,), (L,), [0]), by_torch(q, cache, 0, L)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(result[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_a_chunk_without_weight() -> None:
    """Scores of -inf in a whole chunk weigh nothing beside finite ones."""
    L = 2 * CHUNK
    q, cache = problem("plain", torch.float32, (1, 1, 16), (1,), L)
    q.abs_()
    cache.keys[0, 0, :CHUNK, 0] = -torch.inf
    torch.testing.assert_close(attend(q, cache, (1,), (L,), [0]), by_torch(q, cache, 0, L), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("counts", "ends"), [((1,), (300,)), ((1, 20, 0, 1, 2), (300, 20, 0, 9, 299)), ((1, 1), (0, 256))])
@pytest.mark.parametrize("format", ["plain", "int8"])
def test_the_launcher_gives_each_sequence_its_result(format: str, counts: tuple[int, ...], ends: tuple[int, ...]) -> None:
    q, cache = problem(format, torch.float32, SMALL, counts, 300)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    rows = torch.arange(len(counts)).flip(0)
    sequences = Sequences(starts, torch.tensor(ends), counts, ends, rows=rows)
    out = cached_attention(q, cache, sequences, implementation="sdpa")
    for result, queries, row, end in zip(out.split(counts), q.split(counts), rows.tolist(), ends, strict=True):
        expected = truth(queries, *cache.row(row, end, torch.float32)) if end else torch.zeros_like(queries)
        torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=4e-6)


def test_which_sequences_the_kernel_computes() -> None:
    def served(format: str, counts: tuple[int, ...], ends: tuple[int, ...], C: int = 32, **changes: object) -> list[bool]:
        q, cache = problem(format, torch.bfloat16, (2, 1, C), counts, 300)
        sequences = Sequences(torch.zeros(0), torch.zeros(0), counts, ends, **changes)  # type: ignore[arg-type]
        return launcher._served_by_kernel(q, cache, sequences)

    assert served("plain", (1, 1, 1), (255, 256, 300)) == [False, True, True]
    assert served("int8", (1, 16, 17, 0), (1, 16, 17, 5)) == [True, True, False, False]
    assert served("int4", (1, 1), (0, 1)) == [False, True]
    assert not any(served("int8", (1,), (300,), masks=(torch.ones(1, 1, 300, dtype=torch.bool),)))
    assert not any(served("int8", (1,), (300,), C=24))
    assert not any(served("int4", (1,), (300,), C=16))
