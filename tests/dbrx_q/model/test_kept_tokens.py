"""The last layer computes what wanted tokens need: the same logits, keys and values, and fewer tokens at the experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import Shape, assert_close, ids, make_pair

from dbrx_q import DbrxForCausalLM, KVCache, generate
from dbrx_q.eval.bench.model import SpeedTest, _prefill_seconds
from dbrx_q.experts import ExpertStore
from dbrx_q.generation.decoding import prefill
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.model.limits import Limits


class CountingStore(ExpertStore):
    """Passes everything on, and counts the tokens that each layer's experts get."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.calls: list[tuple[int, int]] = []

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        return self._store.layer(index, experts)

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        self.calls.append((index, len(x)))
        return self._store.forward(index, x, routing)

    def of_layer(self, index: int) -> list[int]:
        return [tokens for layer, tokens in self.calls if layer == index]


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return make_pair(Shape(clip=3.0))[0]


@contextmanager
def counted(model: DbrxForCausalLM) -> Iterator[CountingStore]:
    before = model.transformer.expert_store
    store = CountingStore(model.transformer.store)
    model.transformer.expert_store = store
    try:
        yield store
    finally:
        model.transformer.expert_store = before


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 0]])

KEPT = {  # keep, mask, tokens that the last layer's experts get
    "last": (1, None, 2),
    "last_three": (3, None, 6),
    "more_than_there_are": (9, None, 16),
    "all": (0, None, 16),
    "left_padding": (2, LEFT, 4),
    "right_padding": (1, RIGHT, 1),
    "holes": (4, HOLES, 3 + 2),
    "columns": (torch.tensor([6, -3]), None, 6),
    "columns_of_each": (torch.tensor([[7], [2]]), None, 1 + 6),
    "mask_of_columns": (torch.arange(8) == torch.tensor([[4], [7]]), RIGHT, 1 + 1),
    "none": (torch.tensor([], dtype=torch.int64), None, None),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("keep", "mask", "tokens"), KEPT.values(), ids=KEPT.keys())
def test_kept_columns_have_the_logits_of_all(
    model: DbrxForCausalLM, keep: int | torch.Tensor, mask: torch.Tensor | None, tokens: int | None, use_cache: bool, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    x, last = ids(2, 8), model.config.n_layers - 1
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": use_cache}
    everything = model.transformer(x, **arguments)
    expected = model(x, logits_to_keep=keep, output_router_logits=True, **arguments).logits
    with counted(model) as store:
        out = model(x, logits_to_keep=keep, **arguments)
    assert store.of_layer(last) == ([] if tokens is None else [tokens])
    assert store.of_layer(0) == [16 if mask is None else int(mask.sum())]
    assert out.logits.shape == expected.shape
    if expected.numel():
        assert_close(out.logits, expected)
    if use_cache:
        for layer, reference in zip(out.cache.layers, everything.cache.layers, strict=True):
            assert torch.equal(layer.keys, reference.keys)
            assert torch.equal(layer.values, reference.values)
        following = ids(2, 1, seed=3)
        assert_close(model(following, past_key_values=out.cache).logits, model(following, past_key_values=everything.cache).logits)


def test_a_mask_of_four_dimensions_keeps_its_rows(model: DbrxForCausalLM) -> None:
    model.set_attn_implementation("sdpa")
    x = ids(2, 8)
    mask = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + torch.full((8, 8), -torch.inf).triu(1)
    expected = model(x, attention_mask=mask, output_router_logits=True).logits
    with counted(model) as store:
        assert_close(model(x, attention_mask=mask, logits_to_keep=2).logits, expected[:, -2:])
    assert store.of_layer(model.config.n_layers - 1) == [4]


def test_sequences_packed_into_a_row_are_computed_whole(model: DbrxForCausalLM) -> None:
    x, positions = ids(1, 8), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    expected = model(x, position_ids=positions, use_cache=False).logits
    with counted(model) as store:
        assert_close(model(x, position_ids=positions, use_cache=False, logits_to_keep=2).logits, expected[:, -2:])
    assert store.of_layer(model.config.n_layers - 1) == [8]


@pytest.mark.parametrize("asks", ["hidden_states", "router_logits", "attentions", "hook"])
def test_what_asks_for_all_tokens_gets_them(model: DbrxForCausalLM, asks: str) -> None:
    """The results have the same bits as without `logits_to_keep`."""
    model.set_attn_implementation("eager")
    x, seen = ids(2, 8), []
    arguments = {} if asks == "hook" else {f"output_{asks}": True}
    hook = model.transformer.layers()[-1].register_forward_hook(lambda _, given, out: seen.append(out)) if asks == "hook" else None
    try:
        with counted(model) as store:
            expected, out = model(x, **arguments), model(x, logits_to_keep=1, **arguments)
    finally:
        if hook is not None:
            hook.remove()
    assert store.of_layer(model.config.n_layers - 1) == [16, 16]
    pairs = [seen] if asks == "hook" else zip(expected[asks], out[asks], strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    assert_close(out.logits, expected.logits[:, -1:])


def test_a_prompt_is_prefilled_with_one_token_in_the_last_layer(model: DbrxForCausalLM) -> None:
    """In steps, of which only the last has a token that needs logits."""
    model.set_attn_implementation("sdpa")
    prompt, last = ids(1, 20)[0].tolist(), model.config.n_layers - 1
    caches = [KVCache(model.config, 1, 20, dtype=model.dtype) for _ in range(3)]
    model.transformer.limits = Limits(step_tokens=8)
    try:
        with counted(model) as store:
            expected = prefill(model, prompt, caches[0], all_states=True)
            assert store.of_layer(last) == [8, 8, 4]
            store.calls.clear()
            logits = prefill(model, prompt, caches[1])
            assert (store.of_layer(0), store.of_layer(last)) == ([8, 8, 4], [1])
            store.calls.clear()
            several = prefill(model, prompt, caches[2], keep=6)
            assert store.of_layer(last) == [2, 4]
            store.calls.clear()
            [result] = generate(model, [prompt], max_new_tokens=1)
            assert store.of_layer(last) == [1]
            store.calls.clear()
            embeddings, mask = model.transformer.wte(ids(2, 8)), RIGHT
            model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=1)
            assert store.of_layer(last) == [2]
    finally:
        model.transformer.limits = Limits()
    assert_close(logits, expected)
    assert_close(several[-1], expected)
    assert_close(several[:-1], model(torch.tensor([prompt])).logits[0, -6:-1])
    assert result.token_ids == [int(expected.argmax())]
    for cache in caches[1:]:
        for layer, reference in zip(cache.layers, caches[0].layers, strict=True):
            assert torch.equal(layer.keys, reference.keys)
            assert torch.equal(layer.values, reference.values)


def test_a_benchmark_of_prefill_computes_all_outputs(model: DbrxForCausalLM) -> None:
    with counted(model) as store:
        _prefill_seconds(model, SpeedTest("pp", 12, batch=2, depth=3), "plain")
    assert store.of_layer(model.config.n_layers - 1) == [1, 1, 12, 12]
