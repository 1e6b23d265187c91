"""Attention masks of 2 and 4 dimensions against transformers in float32, over several calls with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_models import Shape, assert_close, ids, make_pair

from dbrx_q import DbrxForCausalLM, KVCache
from dbrx_q.errors import RequestError
from dbrx_q.kernels.attention import attention
from dbrx_q.kernels.formats.errors import DbrxError

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(Shape(clip=4.0), implementation=request.param)


@pytest.fixture(scope="module")
def ours() -> DbrxForCausalLM:
    return make_pair(Shape())[0]


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def positions_of(pair: Pair, mask: torch.Tensor) -> torch.Tensor:
    """Positions that the first block of our model rotates by."""
    seen: list[torch.Tensor] = []
    handle = pair[0].transformer.layers()[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].batch.positions))
    pair[0](ids(*mask.shape), attention_mask=mask)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_keeps_the_positions_of_the_columns(pair: Pair, padding: str) -> None:
    ours, theirs = pair
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, {"left": slice(0, 4), "right": slice(6, 10), "holes": slice(3, 7)}[padding]] = 0
    mask[1, 5 if padding == "holes" else 0 if padding == "left" else 9] = 0
    out = ours(ids(2, 10), attention_mask=mask)
    assert_close(out.logits, theirs(ids(2, 10), attention_mask=mask).logits, mask.bool())
    assert not out.logits[mask == 0].any()
    assert out.cache.columns == [10, 10]
    assert positions_of(pair, mask).tolist() == mask.nonzero()[:, 1].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_over_several_calls(pair: Pair, seed: int) -> None:
    """Padding in every call; each call hides some of the earlier tokens."""
    ours, theirs = pair
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(3, 0, dtype=torch.int64)
    cache = reference = None
    for call, S in enumerate((5, 1, 3, 1)):
        new = (torch.rand(3, S, generator=generator) < 0.6).long()
        new[0, -1] = 1
        hides = (torch.rand(mask.shape, generator=generator) < 0.15).long()
        given = torch.cat((mask * (1 - hides), new), 1)
        x = ids(3, S, seed=10 * seed + call)
        out, expected = ours(x, attention_mask=given, cache=cache), theirs(x, attention_mask=given, cache=reference)
        # A token that sees only itself has the right logits here as well.
        assert_close(out.logits, expected.logits, new.bool())
        cache, reference, mask = out.cache, expected.cache, torch.cat((mask, new), 1)
    assert cache.columns == [10] * 3
    assert cache.lengths == mask.sum(1).tolist()


def test_a_mask_of_the_new_columns_alone_shows_the_whole_cache(ours: DbrxForCausalLM) -> None:
    x, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :2] = 0
    caches = [ours(x[:, :5], attention_mask=mask[:, :5]).cache for _ in range(3)]
    expected = ours(x[:, 5:], attention_mask=mask, cache=caches[0]).logits
    assert torch.equal(ours(x[:, 5:], attention_mask=mask[:, 5:], cache=caches[1]).logits, expected)
    assert torch.equal(ours(x[:, 5:], cache=caches[2]).logits, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_a_mask_of_any_dtype(ours: DbrxForCausalLM, dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    assert torch.equal(ours(ids(1, 5), attention_mask=mask.to(dtype)).logits, ours(ids(1, 5), attention_mask=mask).logits)


def test_a_sequence_of_padding_alone(ours: DbrxForCausalLM) -> None:
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    out = ours(ids(2, 3), attention_mask=mask)
    assert not out.logits[0].any()
    assert_close(out.logits[1], ours(ids(2, 3)[1:]).logits[0])
    assert out.cache.lengths == [0, 3]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_additive_mask_of_4_dimensions(pair: Pair, heads: int, rows: int) -> None:
    ours, theirs = pair
    generator = torch.Generator().manual_seed(heads)
    for mask in (
        torch.randn(rows, heads, 7, 7, generator=generator),
        torch.zeros(rows, heads, 7, 7).masked_fill(torch.rand(rows, heads, 7, 7, generator=generator) < 0.5, LOWEST),
    ):
        assert_close(ours(ids(3, 7), attention_mask=mask).logits, theirs(ids(3, 7), attention_mask=mask).logits)


def test_a_mask_of_4_dimensions_over_a_cache(pair: Pair) -> None:
    ours, theirs = pair
    x, padding = ids(2, 9), torch.ones(2, 6, dtype=torch.int64)
    padding[0, :2], padding[1, 3] = 0, 0
    cache, reference = ours(x[:, :6], attention_mask=padding).cache, theirs(x[:, :6], attention_mask=padding).cache
    visible = torch.rand(2, 4, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    visible[..., :6] &= padding.bool()[:, None, None]  # the cache has no keys and values of padding
    visible[..., 6] = True
    additive = torch.zeros(visible.shape).masked_fill(~visible, LOWEST)
    out, expected = ours(x[:, 6:], attention_mask=additive, cache=cache), theirs(x[:, 6:], attention_mask=additive, cache=reference)
    assert_close(out.logits, expected.logits)
    assert cache.columns == [9, 9]


def test_a_boolean_mask_of_4_dimensions_equals_an_additive_one(pair: Pair) -> None:
    ours = pair[0]
    visible = torch.rand(1, 4, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[0, :, :, 0] = True
    additive = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    assert_close(ours(ids(2, 7), attention_mask=visible).logits, ours(ids(2, 7), attention_mask=additive).logits)
    visible[0, :, 3] = False  # a token that sees nothing
    assert ours(ids(2, 7), attention_mask=visible).logits.isfinite().all()


def test_positions_may_repeat_under_a_mask_of_4_dimensions(pair: Pair) -> None:
    """Two continuations of one prompt in one row, as a speculative decoder verifies them."""
    ours = pair[0]
    x = ids(1, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[5:, 3:5] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    logits = ours(x, attention_mask=mask[None, None], position_ids=positions).logits[0]
    assert_close(logits[:5], ours(x[:, :5]).logits[0])
    assert_close(logits[5:], ours(x[:, [0, 1, 2, 5, 6]]).logits[0, 3:])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_masks_over_a_quantized_cache(ours: DbrxForCausalLM, format: str) -> None:
    x, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    caches = [KVCache(ours.config, 1 + row, 16, dtype=torch.float32, format=format) for row in (1, 0)]
    ours(x[:, :6], attention_mask=mask[:, :6], cache=caches[0])
    ours(x[:1, 3:6], position_ids=torch.arange(3, 6)[None], cache=caches[1])
    mask[0, 4] = 0  # hides a token in the cache
    visible = torch.tensor([[[[True, False, True, True, True]] * 2]]) & torch.ones(2, 5, dtype=torch.bool).tril(3)
    alone = ours(x[:1, 6:], attention_mask=visible, position_ids=torch.tensor([[6, 7]]), cache=caches[1])
    assert_close(ours(x[:, 6:], attention_mask=mask, cache=caches[0]).logits[:1], alone.logits)


def test_masks_that_do_not_fit_the_cache_are_refused(ours: DbrxForCausalLM) -> None:
    x, mask = ids(2, 6), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    cache = ours(x[:, :4], attention_mask=mask).cache
    with pytest.raises(RequestError, match=r"must be 0 for columns that were padding .* found 1 for column 0 of sequence 0"):
        ours(x[:, 4:], attention_mask=torch.ones(2, 6), cache=cache)
    with pytest.raises(RequestError, match=r"must be \[2, 2\] or \[2, 4 \+ 2\] with the columns of the cache, or of 4 .*; found \[2, 5\]"):
        ours(x[:, 4:], attention_mask=torch.ones(2, 5), cache=cache)
    with pytest.raises(RequestError, match=r"must be \[2 or 1, 1 or 4, 2, 6\].*; found \[2, 1, 2, 2\]"):
        ours(x[:, 4:], attention_mask=torch.ones(2, 1, 2, 2), cache=cache)
    assert cache.lengths == [3, 4]


def test_the_fused_kernels_take_no_masks() -> None:
    q, kv = torch.ones(2, 2, 8), torch.ones(1, 2, 8)
    for implementation in ("triton", "flash_attention_2"):
        with pytest.raises(DbrxError, match=f"a mask needs implementation='sdpa' or 'eager'; found '{implementation}'"):
            attention(q, kv, kv, implementation=implementation, mask=torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(DbrxError, match="attention weights need implementation='eager'; found 'sdpa'"):
        attention(q, kv, kv, implementation="sdpa", weights=[])
