"""The KV cache in every format, filled by the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.kv import KV_FORMATS, quantize_kv

QUANTIZED = [name for name in KV_FORMATS if name != "plain"]


@pytest.fixture(scope="module")
def model(nano: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(nano, dtype=torch.float32)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (batch, length), generator=torch.Generator().manual_seed(length))


def cache_of(model: DbrxForCausalLM, batch: int, capacity: int, format: str, *, grows: bool = False) -> KVCache:
    return KVCache(model.config, batch, capacity, dtype=model.dtype, format=format, grows=grows)


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_first_layer_stores_the_quantized_keys_and_values_of_a_plain_cache(model: DbrxForCausalLM, format: str) -> None:
    plain, packed = cache_of(model, 2, 20, "plain"), cache_of(model, 2, 20, format)
    for cache in (plain, packed):
        model(tokens(2, 20), past_key_values=cache)
    codes, scales = quantize_kv(plain.layers[0].keys, format)
    assert torch.equal(packed.layers[0].keys, codes)
    assert packed.layers[0].key_scales is not None
    assert torch.equal(packed.layers[0].key_scales, scales)
    assert torch.equal(packed.layers[0].values, quantize_kv(plain.layers[0].values, format)[0])


@pytest.mark.parametrize("format", QUANTIZED)
def test_token_by_token_equals_one_chunk(model: DbrxForCausalLM, format: str) -> None:
    """Both attend to the quantized keys and values, in every layer."""
    ids = tokens(2, 24)
    cache = cache_of(model, 2, 24, format)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(24)]
    logits = model(ids, past_key_values=cache_of(model, 2, 24, format)).logits
    assert (torch.cat(steps, dim=1) - logits).abs().mean() <= 2e-3 * logits.abs().mean()


def test_more_bits_lose_less(model: DbrxForCausalLM) -> None:
    ids = tokens(2, 60)
    exact = model(ids).logits
    errors = [float((model(ids, past_key_values=cache_of(model, 2, 60, name)).logits - exact).abs().mean()) for name in KV_FORMATS]
    assert errors[0] < 1e-4 < errors[1] < errors[2] / 4


@pytest.mark.parametrize("format", KV_FORMATS)
def test_growing_keeps_the_stored_tokens(model: DbrxForCausalLM, format: str) -> None:
    ids = tokens(2, 30)
    growing, roomy = cache_of(model, 2, 4, format, grows=True), cache_of(model, 2, 30, format)
    for first in range(0, 30, 6):
        chunk = ids[:, first : first + 6]
        assert torch.equal(model(chunk, past_key_values=growing).logits, model(chunk, past_key_values=roomy).logits)
    assert growing.capacity >= 30


@pytest.mark.parametrize("format", KV_FORMATS)
def test_a_view_of_one_sequence_writes_into_the_cache(model: DbrxForCausalLM, format: str) -> None:
    batch, single = cache_of(model, 3, 16, format), cache_of(model, 1, 16, format)
    ids = tokens(1, 9)
    view = batch.sequence(1)
    assert torch.equal(model(ids, past_key_values=view).logits, model(ids, past_key_values=single).logits)
    assert view.lengths == [9]
    assert batch.lengths == [0, 0, 0]
    for written, expected in zip(batch.layers, single.layers, strict=True):
        assert torch.equal(written.keys[1], expected.keys[0])
        assert not written.keys[0].any()
        assert not written.values[2].any()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_a_fork_continues_copies(model: DbrxForCausalLM, format: str) -> None:
    """Its sequences give the logits of a cache that was prefilled for each, and nothing is written into the original cache."""
    ids = tokens(2, 9)
    original = cache_of(model, 2, 12, format, grows=True)
    model(ids, past_key_values=original)
    before = [layer.keys.clone() for layer in original.layers]
    rows, more = [1, 0, 1], tokens(3, 5)
    fork = original.forked(rows, 20)
    forked = model(more, past_key_values=fork).logits
    assert (fork.lengths, original.lengths, fork.capacity) == ([14] * 3, [9] * 2, 20)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(original.layers, before, strict=True))
    for i, row in enumerate(rows):
        alone = cache_of(model, 1, 20, format)
        model(ids[row : row + 1], past_key_values=alone)
        torch.testing.assert_close(forked[i], model(more[i : i + 1], past_key_values=alone).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capacity", [8, 13])
def test_a_fork_has_room_for_its_copies_within_the_limit_of_the_original(model: DbrxForCausalLM, capacity: int) -> None:
    cache = cache_of(model, 1, 12, "plain")
    model(tokens(1, 9), past_key_values=cache)
    with pytest.raises(RequestError, match=f"room for 9 to 12 tokens; found {capacity}"):
        cache.forked([0], capacity)


def test_an_unknown_format_is_refused(model: DbrxForCausalLM) -> None:
    with pytest.raises(RequestError, match="plain, int8, int4; found 'int2'"):
        cache_of(model, 1, 8, "int2")


def padded_batch(model: DbrxForCausalLM, format: str) -> tuple[KVCache, list[list[int]]]:
    """A cache of three sequences of 6, 4 and 5 tokens in six columns, and their tokens."""
    ids = tokens(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    cache = cache_of(model, 3, 12, format)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache, [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def contents(cache: KVCache, row: int) -> list[torch.Tensor]:
    """What the cache holds of a sequence, part by part."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values, layer.key_scales, layer.value_scales)]
    return [part[row, :, : cache.lengths[row]].clone() for part in parts if part is not None]


def same_sequence(cache: KVCache, row: int, expected: list[torch.Tensor]) -> bool:
    held = contents(cache, row)
    return len(held) == len(expected) and all(torch.equal(part, other) for part, other in zip(held, expected, strict=True))


def test_columns_count_padding(model: DbrxForCausalLM) -> None:
    cache, _ = padded_batch(model, "plain")
    assert (cache.lengths, cache.columns, cache.get_seq_length(), len(cache)) == ([6, 4, 5], [6, 6, 6], 6, model.config.n_layers)
    assert (cache.max_cache_len, cache.get_max_cache_shape(), cache.max_batch_size, cache.is_initialized) == (12, 12, 3, True)
    assert cache_of(model, 1, 8, "plain", grows=True).max_cache_len == model.config.max_seq_len


@pytest.mark.parametrize(
    ("kept", "lengths", "columns"),
    [(5, [5, 3, 4], 5), (-1, [5, 3, 4], 5), (3, [3, 1, 2], 3), (-4, [2, 0, 2], 2), (1, [1, 0, 1], 1), (9, [6, 4, 5], 6), (-9, [0] * 3, 0)],
)
def test_a_crop_drops_the_last_columns(model: DbrxForCausalLM, kept: int, lengths: list[int], columns: int) -> None:
    cache, _ = padded_batch(model, "plain")
    cache.crop(kept)
    assert (cache.lengths, cache.columns) == (lengths, [columns] * 3)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_after_a_crop_other_tokens_may_follow(model: DbrxForCausalLM, format: str) -> None:
    ids, other = tokens(1, 9), tokens(1, 4)
    cropped, fresh = cache_of(model, 1, 20, format), cache_of(model, 1, 20, format)
    model(ids[:, :5], past_key_values=fresh)
    model(ids[:, :5], past_key_values=cropped)
    model(ids[:, 5:], past_key_values=cropped)
    cropped.crop(-4)
    assert torch.equal(model(other, past_key_values=cropped).logits, model(other, past_key_values=fresh).logits)


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("rows", [[2, 0, 0], [1, 0, 2], [0, 1, 2]], ids=str)
def test_reordering_takes_sequences_with_their_padding(model: DbrxForCausalLM, format: str, rows: list[int]) -> None:
    cache, _ = padded_batch(model, format)
    before, lengths, padding = [contents(cache, row) for row in range(3)], list(cache.lengths), list(cache.padding)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reorder_cache(torch.tensor(rows))
    assert (cache.lengths, cache.padding) == ([lengths[row] for row in rows], [padding[row] for row in rows])
    assert all(same_sequence(cache, b, before[row]) for b, row in enumerate(rows))
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


@pytest.mark.parametrize("format", KV_FORMATS)
def test_selecting_and_repeating_sequences(model: DbrxForCausalLM, format: str) -> None:
    cache, _ = padded_batch(model, format)
    before = [contents(cache, row) for row in range(3)]
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert (cache.lengths, cache.columns, cache.capacity) == ([5, 4], [6, 6], 12)
    cache.batch_repeat_interleave(2)
    assert cache.lengths == [5, 5, 4, 4]
    assert all(same_sequence(cache, b, before[row]) for b, row in enumerate([2, 2, 1, 1]))
    more = tokens(4, 2)
    logits = model(more, past_key_values=cache).logits  # [4, 2, V]
    single, _ = padded_batch(model, format)
    single.select([2])
    torch.testing.assert_close(logits[1], model(more[1:2], past_key_values=single).logits[0], rtol=1e-4, atol=1e-4)


def test_repeated_sequences_stay_within_the_memory_of_the_budget(model: DbrxForCausalLM) -> None:
    cache = KVCache(model.config, 2, 8, dtype=model.dtype, grows=True, limit=12)
    model(tokens(2, 5), past_key_values=cache)
    cache.repeat(2)
    assert (cache.max_cache_len, cache.capacity) == (6, 6)
    with pytest.raises(RequestError, match="8 sequences of a cache must have room for 5 tokens each; the model's budget has room for 3"):
        cache.repeat(2)
    with pytest.raises(RequestError, match="must fit 6 tokens"):
        cache.reserve(7)


def test_a_reset_cache_is_empty(model: DbrxForCausalLM) -> None:
    cache, _ = padded_batch(model, "plain")
    cache.reset()
    assert (cache.lengths, cache.columns, cache.get_seq_length()) == ([0] * 3, [0] * 3, 0)
    ids = tokens(3, 6)
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, past_key_values=cache_of(model, 3, 12, "plain")).logits)


def test_indices_of_sequences_are_checked(model: DbrxForCausalLM) -> None:
    cache = cache_of(model, 2, 8, "plain")
    for indices, message in (([0, 2], "from 0 to 1; found 2"), ([0], "each of 2 sequences; found 1"), ([-1, 0], "found -1")):
        with pytest.raises(RequestError, match=message):
            cache.reorder(indices)
    with pytest.raises(RequestError, match="at least one sequence"):
        cache.select([])
    with pytest.raises(RequestError, match="at least once; found 0"):
        cache.repeat(0)
