"""`store_qkv` and `cached_attention` on a GPU: every KV format, contexts from 1 to DBRX's longest, batches of unequal lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dbrx_q.kernels.attention import Sequences, attention, cached_attention
from dbrx_q.kernels.formats.kv import KV_FORMATS, KVLayer, allocate_kv, quantize_kv
from dbrx_q.kernels.qkv import store_qkv, store_qkv_reference

Check = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Replayed = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def empty_cache(kv_format: str, B: int, L: int, place: Any) -> KVLayer:
    return allocate_kv(kv_format, B, place.shapes.kv_heads, L, place.shapes.channels, place.dtype, place.device)


def filled_cache(kv_format: str, B: int, L: int, place: Any) -> KVLayer:
    cache = empty_cache(kv_format, B, L, place)
    for codes, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        for row in range(B):
            x = place.randn(place.shapes.kv_heads, L, place.shapes.channels)
            if scales is None:
                codes[row] = x
            else:
                codes[row], scales[row] = quantize_kv(x, kv_format)
    return cache


def sequences_of(counts: list[int], ends: list[int], place: Any, rows: list[int] | None = None) -> Sequences:
    starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
    on_device = None if rows is None else place.ints(rows)
    return Sequences(place.ints(starts), place.ints(ends), tuple(counts), tuple(ends), on_device)


def in_the_same_dtype(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> torch.Tensor:
    """torch's attention over a dequantized copy of each sequence's cache."""
    rows = range(len(sequences.counts)) if sequences.rows is None else sequences.rows.tolist()
    outs = []
    for row, part, end in zip(rows, q.split(sequences.counts), sequences.ends, strict=True):
        if len(part):
            outs.append(attention(part, *cache.row(row, end, q.dtype), implementation="sdpa"))
    return torch.cat(outs)


def truth_of(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> torch.Tensor:
    return cached_attention(q.float(), cache, sequences, implementation="eager")


def check(cache: KVLayer, sequences: Sequences, place: Any, assert_as_good_as_torch: Check) -> None:
    q = place.randn(sum(sequences.counts), place.shapes.heads, place.shapes.channels)
    result = cached_attention(q, cache, sequences, implementation="triton")
    assert_as_good_as_torch(result, truth_of(q, cache, sequences), in_the_same_dtype(q, cache, sequences))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_decode_with_unequal_lengths(kv_format: str, place: Any, assert_as_good_as_torch: Check) -> None:
    longest = place.shapes.context
    ends = [1, 2, 63, 64, 65, 1000, longest - 1, longest] if place.real else [1, 33, longest]
    cache = filled_cache(kv_format, len(ends), longest, place)
    check(cache, sequences_of([1] * len(ends), ends, place), place, assert_as_good_as_torch)
    rows = list(reversed(range(len(ends))))
    check(cache, sequences_of([1] * len(ends), ends, place, rows), place, assert_as_good_as_torch)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("end", [1, 17, 4096, 32768])
def test_decode_of_one_sequence(kv_format: str, end: int, place: Any, assert_as_good_as_torch: Check) -> None:
    end = min(end, place.shapes.context)
    check(filled_cache(kv_format, 1, place.shapes.context, place), sequences_of([1], [end], place), place, assert_as_good_as_torch)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_prefill_after_cached_tokens(kv_format: str, place: Any, assert_as_good_as_torch: Check) -> None:
    counts, ends = ([1, 0, 17, 300, 512], [40, 9, 17, 1000, 32768]) if place.real else ([1, 0, 5, 20], [40, 9, 5, 60])
    cache = filled_cache(kv_format, len(counts), max(ends), place)
    check(cache, sequences_of(counts, ends, place), place, assert_as_good_as_torch)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_first_chunk_of_one_sequence(kv_format: str, place: Any, assert_as_good_as_torch: Check) -> None:
    T = 1000 if place.real else 40
    check(filled_cache(kv_format, 1, T, place), sequences_of([T], [T], place), place, assert_as_good_as_torch)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_stored_cache_equals_that_of_the_reference(kv_format: str, place: Any) -> None:
    T, L = 9, 64
    qkv = place.randn(T, place.shapes.qkv) * 4
    qkv[3] = 0
    angles = torch.rand(T, place.shapes.channels // 2, device=place.device) * 100
    rows = place.ints([0, 0, 1, 2, 2, 2, -1, 3, 3])
    positions = place.ints([5, 6, 0, 61, 62, 63, 7, 0, 1])
    cache, expected_cache = (empty_cache(kv_format, 4, L, place) for _ in range(2))
    arguments = rows, positions, angles.cos(), angles.sin()
    q = store_qkv(qkv, cache, *arguments, heads=place.shapes.heads, clip=8.0)
    expected_q = store_qkv_reference(qkv, expected_cache, *arguments, heads=place.shapes.heads, clip=8.0)
    assert_nearly_equal_bits(q, expected_q)
    for name in ("keys", "values", "key_scales", "value_scales"):
        stored, expected_part = getattr(cache, name), getattr(expected_cache, name)
        assert (stored is None) == (expected_part is None)
        if stored is not None:
            assert_nearly_equal_bits(stored, expected_part)


def assert_nearly_equal_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, except for values near a rounding boundary, which a fused multiply-add may round the other way."""
    different = values != expected
    assert different.sum() <= values.numel() // 1000
    assert values.dtype == expected.dtype
    torch.testing.assert_close(values.float(), expected.float(), rtol=2**-7, atol=17.0 if values.dtype == torch.uint8 else 1.0)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("B", [1, 4])
def test_a_captured_step_replays_with_other_lengths(kv_format: str, B: int, place: Any, replayed: Replayed) -> None:
    L = place.shapes.context
    cache, q = filled_cache(kv_format, B, L, place), place.randn(B, place.shapes.heads, place.shapes.channels)
    sequences = sequences_of([1] * B, [1] * B, place, list(range(B)))
    replay = replayed(lambda: cached_attention(q, cache, sequences, implementation="triton"))
    for ends in ([L] * B, [1 + L // 5 * number for number in range(B)], [L // 2] * B):
        q.copy_(place.randn(*q.shape))
        sequences.lengths.copy_(place.ints(ends))
        out = replay().clone()
        now = replace(sequences, ends=tuple(ends))
        assert torch.equal(out, cached_attention(q, cache, now, implementation="triton"))
        assert (out.float() - truth_of(q, cache, now)).abs().max() < 0.05


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_captured_store_replays_with_other_places(kv_format: str, place: Any, replayed: Replayed) -> None:
    T, C = 4, place.shapes.channels
    qkv, cache, again = place.randn(T, place.shapes.qkv), empty_cache(kv_format, T, 64, place), empty_cache(kv_format, T, 64, place)
    rows, positions = place.ints([0, 1, 2, 3]), place.ints([0, 0, 0, 0])
    cos, sin = (torch.rand(T, C // 2, device=place.device) for _ in range(2))

    def call(into: KVLayer) -> torch.Tensor:
        return store_qkv(qkv, into, rows, positions, cos, sin, heads=place.shapes.heads, clip=8.0)

    replay = replayed(lambda: call(cache))
    for turn in range(3):
        qkv.copy_(place.randn(*qkv.shape))
        rows.copy_(place.ints([3, -1, turn, 0] if turn != 0 else [3, -1, 1, 0]))
        positions.copy_(place.ints([turn, 1, 2, 63]))
        for part in (cache.keys, again.keys, cache.values, again.values):
            part.zero_()
        assert torch.equal(replay(), call(again))
        assert torch.equal(cache.keys, again.keys)
        assert torch.equal(cache.values, again.values)


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
@pytest.mark.parametrize("T", [1, 64])
def test_no_dequantized_copy_of_the_cache_is_made(kv_format: str, T: int, place: Any) -> None:
    if not place.real:
        return
    B, L = 2, place.shapes.context
    cache = filled_cache(kv_format, B, L, place)
    q = place.randn(B * T, place.shapes.heads, place.shapes.channels)
    sequences = sequences_of([T] * B, [L] * B, place)
    cached_attention(q, cache, sequences, implementation="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cached_attention(q, cache, sequences, implementation="triton")
    torch.cuda.synchronize()
    copy_bytes = 2 * 2 * B * place.shapes.kv_heads * L * place.shapes.channels
    assert torch.cuda.max_memory_allocated() - before < copy_bytes / 8
