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
