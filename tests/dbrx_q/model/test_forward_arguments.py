"""Every argument of a forward pass against transformers in float32."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from small_models import VOCABULARY, Shape, assert_close, ids, make_pair

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxModel, KVCache
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.model.limits import Limits

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]

SHAPES = {
    "grouped": Shape(),
    "clipped": Shape(kv_heads=4, clip=0.5, norm_order=None),
    "one_kv_head": Shape(kv_heads=1, clip=2.0, norm_order=2.0, top_k=1),
    "third_order": Shape(norm_order=3.0, experts=5, top_k=5),
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(Shape(clip=3.0))


@pytest.fixture(scope="module")
def ours(pair: Pair) -> DbrxForCausalLM:
    return pair[0]


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_input_ids_labels_and_all_outputs(shape: Shape, implementation: str) -> None:
    ours, theirs = make_pair(shape, implementation=implementation)
    x = ids(3, 12)
    labels = x.masked_fill(ids(3, 12, seed=1) < 20, -100)
    arguments = {"input_ids": x, "labels": labels, "output_router_logits": True, "output_hidden_states": True}
    out, expected = ours(**arguments), theirs(**arguments)
    assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    for name in ("hidden_states", "router_logits"):
        for value, reference in zip(out[name], expected[name], strict=True):
            assert_close(value, reference)
    assert list(out.keys()) == list(expected.keys())
    inner, expected = ours.transformer(x, output_hidden_states=True), theirs.transformer(x, output_hidden_states=True)
    assert_close(inner.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(inner.hidden_states[-1], inner.last_hidden_state)
    assert list(inner.keys()) == list(expected.keys())


def test_arguments_have_the_order_of_transformers(pair: Pair) -> None:
    ours, theirs = pair
    x, mask, positions = ids(2, 6), torch.ones(2, 6, dtype=torch.int64), torch.arange(1, 7)[None]
    arguments = x, mask, positions, None, None, x[:, -2:], False, True, 2
    out, expected = ours(*arguments), theirs(*arguments)
    assert (out.cache, len(out.router_logits)) == (None, 3)
    assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    inner = ours.transformer(x, mask, positions, None, None, False, True)
    assert (inner.cache, len(inner.router_logits)) == (None, 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_position_ids(pair: Pair, rows: int) -> None:
    ours, theirs = pair
    x = ids(3, 9)
    positions = torch.arange(9) * 5 + 2 + torch.arange(rows)[:, None]
    assert_close(ours(x, position_ids=positions).logits, theirs(x, position_ids=positions).logits)
    assert (ours(x, position_ids=positions).logits - ours(x).logits).abs().max() > 0.1
    cache, reference = ours(x, position_ids=positions).cache, theirs(x, position_ids=positions).cache
    after = torch.tensor([[60, 61]])
    assert_close(ours(x[:, :2], position_ids=after, cache=cache).logits, theirs(x[:, :2], position_ids=after, cache=reference).logits)
    assert cache.lengths == [11] * 3


def test_position_ids_that_begin_again_separate_sequences_without_a_cache(pair: Pair) -> None:
    ours, theirs = pair
    x, positions = ids(2, 12), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 7, 8, 9, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]])
    arguments: dict[str, Any] = {"position_ids": positions, "use_cache": False, "output_attentions": True}
    out, expected = ours(x, **arguments), theirs(x, **arguments)
    assert_close(out.logits, expected.logits)
    for value, reference in zip(out.attentions, expected.attentions, strict=True):
        assert_close(value, reference)
    assert_close(out.logits[0, 4:7], ours(x[:1, 4:7]).logits[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_under_both_names(ours: DbrxForCausalLM, name: str) -> None:
    x = ids(2, 10)
    first = ours(x[:, :6])
    assert first.past_key_values is first.cache is first["past_key_values"]
    out = ours(x[:, 6:], **{name: first.cache})
    assert out.cache is first.cache
    assert_close(out.logits, ours(x).logits[:, 6:])
    assert ours(x, use_cache=False).cache is None
    assert ours(x[:, :1], use_cache=False, **{name: out.cache}).cache is out.cache


def test_inputs_embeds(pair: Pair) -> None:
    ours, theirs = pair
    embeddings = 2 * torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    assert_close(ours(inputs_embeds=embeddings).logits, theirs(inputs_embeds=embeddings).logits)
    x = ids(2, 7)
    assert torch.equal(ours(inputs_embeds=ours.transformer.wte(x)).logits, ours(x).logits)


@pytest.mark.parametrize(
    "keep",
    [1, 4, 99, torch.tensor([0, -1, 3]), torch.tensor([[0, 1], [2, 8], [5, 4]]), ids(3, 9) < 40],
    ids=["one", "four", "more_than_there_are", "indices", "indices_of_each", "booleans"],
)
def test_logits_to_keep(pair: Pair, keep: int | torch.Tensor) -> None:
    ours, theirs = pair
    assert_close(ours(ids(3, 9), logits_to_keep=keep).logits, theirs(ids(3, 9), logits_to_keep=keep).logits)


def test_logits_to_keep_computes_no_other_logits(ours: DbrxForCausalLM) -> None:
    shapes: list[torch.Size] = []
    handle = ours.lm_head.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    ours(ids(2, 30), logits_to_keep=1)
    ours(ids(2, 30), logits_to_keep=torch.tensor([3, 4]))
    handle.remove()
    assert shapes == [(2, 1, VOCABULARY), (2, 2, VOCABULARY)]


def test_num_items_in_batch_shift_labels_and_ignore_index(pair: Pair) -> None:
    ours, theirs = pair
    x = ids(2, 9)
    for extra in (
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": ids(2, 9, seed=2)},
        {"ignore_index": int(x[0, 3])},
    ):
        torch.testing.assert_close(ours(x, labels=x, **extra).loss, theirs(x, labels=x, **extra).loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours(x, labels=x[:, -3:], logits_to_keep=3).loss, theirs(x, labels=x[:, -3:], logits_to_keep=3).loss)
    keep = ids(2, 9, seed=5) < 50
    arguments = {"shift_labels": ids(int(keep.sum()), seed=6), "labels": x, "logits_to_keep": keep}
    torch.testing.assert_close(ours(x, **arguments).loss, theirs(x, **arguments).loss)


def test_the_loss_leaves_out_labels_and_predictions_of_padding(ours: DbrxForCausalLM) -> None:
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4], mask[1, 7:] = 0, 0
    sums = [ours(row[None], labels=row[None]).loss * (len(row) - 1) for row in (x[0, 4:], x[1, :7])]
    # Positions are relative, so that a sequence without its padding on the left has the same logits.
    torch.testing.assert_close(ours(x, attention_mask=mask, labels=x).loss, sum(sums) / (4 + 6), rtol=1e-4, atol=0)


def test_the_load_balancing_loss_leaves_out_padding_and_is_weighted(pair: Pair) -> None:
    ours, theirs = pair
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    labels = x.masked_fill(mask == 0, -100)
    out = ours(x, attention_mask=mask, labels=labels, output_router_logits=True)
    expected = theirs(x, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss, ours(x, attention_mask=mask, labels=labels).loss + 0.03 * out.aux_loss)
    assert not any(logits[mask.flatten() == 0].any() for logits in out.router_logits)


def test_output_attentions_with_padding_and_a_cache(pair: Pair) -> None:
    ours, theirs = pair
    x, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3], mask[1, 4] = 0, 0
    cache = reference = None
    for columns in (slice(0, 5), slice(5, 8)):
        arguments = {"input_ids": x[:, columns], "attention_mask": mask[:, : columns.stop], "output_attentions": True}
        out, expected = ours(**arguments, cache=cache), theirs(**arguments, cache=reference)
        cache, reference = out.cache, expected.cache
        for value, weights in zip(out.attentions, expected.attentions, strict=True):
            assert_close(value.transpose(1, 2), weights.transpose(1, 2), mask[:, columns].bool())


def test_hidden_states_by_index(pair: Pair) -> None:
    ours, theirs = pair
    x = ids(1, 5)
    out, expected = ours(x, output_hidden_states=[0, -1]), theirs(x, output_hidden_states=[0, -1])
    assert (
        [state is None for state in out.hidden_states] == [state is None for state in expected.hidden_states] == [False, True, True, False]
    )
    assert_close(out.hidden_states[0], expected.hidden_states[0])
    assert_close(out.hidden_states[3], expected.hidden_states[3])


def test_return_dict_false_gives_a_tuple(pair: Pair) -> None:
    ours, theirs = pair
    x = ids(1, 5)
    out, expected = ours(x, labels=x, return_dict=False), theirs(x, labels=x, return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == len(expected) == 3
    assert_close(out[1], expected[1])
    assert isinstance(ours.transformer(x, return_dict=False), tuple)


def test_defaults_come_from_the_configuration(ours: DbrxForCausalLM) -> None:
    config = ours.config
    config.output_router_logits, config.use_cache, config.output_hidden_states = True, False, True
    try:
        out = ours(ids(1, 4))
        assert (out.cache, len(out.router_logits), len(out.hidden_states)) == (None, 3, 4)
    finally:
        config.output_router_logits, config.use_cache, config.output_hidden_states = False, True, False


def test_cache_position_must_count_on_from_the_cache(ours: DbrxForCausalLM) -> None:
    x = ids(1, 4)
    cache = ours(x, cache_position=torch.arange(4)).cache
    ours(x, cache=cache, cache_position=torch.arange(4, 8))
    with pytest.raises(RequestError, match=r"cache_position must count on from the 8 columns of the cache: 8 to 11; found \[0, 1, 2, 3\]"):
        ours(x, cache=cache, cache_position=torch.arange(4))


def test_arguments_that_transformers_ignores(ours: DbrxForCausalLM) -> None:
    x = ids(1, 4)
    expected = ours(x).logits
    assert torch.equal(ours(x, token_type_ids=torch.zeros_like(x), is_causal=True, cu_seq_lens_q=None).logits, expected)
    with pytest.warns(UserWarning, match=r"forward\(\) ignores the keyword argument 'index_of_row', as transformers does") as caught:
        assert torch.equal(ours(x, index_of_row=3).logits, expected)
    assert caught[0].filename == __file__, "the line of the caller"
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'attention_masks'. Did you mean 'attention_mask'\?"):
        ours(x, attention_masks=torch.ones_like(x))
    with pytest.raises(UnsupportedError, match="is_causal must be True; found False"):
        ours(x, is_causal=False)
    with pytest.raises(UnsupportedError, match="told apart by position_ids with use_cache=False; found 'cu_seq_lens_q'"):
        ours(x, cu_seq_lens_q=torch.tensor([0, 4]))


def test_outputs_can_be_used_in_autograd_and_changed(ours: DbrxForCausalLM) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    out = ours(ids(1, 5), attention_mask=mask, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    plain = ours(ids(1, 5))
    tensors = [plain.logits, plain.cache.layers[0].keys, out.logits, *out.router_logits, *out.hidden_states, *out.attentions]
    with torch.enable_grad():
        for tensor in tensors:
            assert not tensor.is_inference()
            weight = torch.ones_like(tensor, requires_grad=True)
            (weight * tensor).sum().backward()
            tensor.mul_(2)


def test_the_example_of_the_documentation_runs_without_a_clamp() -> None:
    model = DbrxModel(DbrxConfig(n_layers=2, d_model=256, n_heads=8, vocab_size=128, ffn_config={"ffn_hidden_size": 64}))
    assert model.config.attn_config.clip_qkv is None
    hidden = model(torch.arange(6)[None]).last_hidden_state
    assert hidden.shape == (1, 6, 256)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(1, 6), rtol=1e-2, atol=0)


def test_outputs_must_fit_the_budget(pair: Pair) -> None:
    ours = pair[0]
    x, layers, sizes = (
        ids(2, 10),
        3,
        {"output_hidden_states": 4 * 64 * 4, "output_attentions": 3 * 4 * 10 * 4, "output_router_logits": 3 * 8 * 4},
    )
    try:
        for name, token_bytes in sizes.items():
            ours.transformer.limits = Limits(logit_bytes=20 * token_bytes)
            assert len(ours.transformer(x, **{name: True})[-1]) >= layers
            ours.transformer.limits = Limits(logit_bytes=20 * token_bytes - 1)
            with pytest.raises(
                RequestError, match=rf"must fit {20 * token_bytes - 1:,} bytes, .*; those of 2 x 10 tokens take {20 * token_bytes:,}"
            ):
                ours.transformer(x, **{name: True})
        ours.transformer.limits = Limits(logit_bytes=4 * VOCABULARY * 8)
        assert ours(x, logits_to_keep=2).logits.shape[1] == 2
        with pytest.raises(RequestError, match=r"those of 6 tokens take 4,656. Name logits_to_keep, or pass fewer tokens at a time"):
            ours(x, logits_to_keep=3)
        with pytest.raises(RequestError, match="those of 20 tokens take"):
            ours(inputs_embeds=torch.ones(2, 10, 64))
    finally:
        ours.transformer.limits = Limits()


X = torch.arange(8).view(2, 4)
ONES = torch.ones(2, 4, dtype=torch.int64)
BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"input_ids": X[:, :0]}, "input_ids must have at least one sequence and one token; found [2, 0]"),
    "no_sequence": ({"input_ids": X[:0]}, "input_ids must have at least one sequence and one token; found [0, 4]"),
    "empty_embeddings": ({"inputs_embeds": torch.ones(1, 0, 64)}, "inputs_embeds must have at least one sequence and one token"),
    "neither": ({}, "takes input_ids or inputs_embeds; found neither"),
    "both": ({"input_ids": X, "inputs_embeds": torch.ones(2, 4, 64)}, "takes input_ids or inputs_embeds; found both"),
    "ids_of_one_dimension": ({"input_ids": X[0]}, "input_ids must be whole numbers [batch, tokens]; found torch.int64 [4]"),
    "ids_of_floats": ({"input_ids": X.float()}, "input_ids must be whole numbers [batch, tokens]; found torch.float32 [2, 4]"),
    "ids_of_booleans": ({"input_ids": X > 3}, "input_ids must be whole numbers [batch, tokens]; found torch.bool [2, 4]"),
    "ids_as_a_list": ({"input_ids": [[1, 2]]}, "input_ids must be a tensor; found list"),
    "id_too_large": ({"input_ids": X + 90}, "token ids must be from 0 to 96; found 97"),
    "id_negative": ({"input_ids": X - 1}, "token ids must be from 0 to 96; found -1"),
    "embeddings_of_another_width": ({"inputs_embeds": torch.ones(2, 4, 32)}, "inputs_embeds must be [batch, tokens, 64]; found [2, 4, 32]"),
    "embeddings_of_another_dtype": (
        {"inputs_embeds": torch.ones(2, 4, 64, dtype=torch.bfloat16)},
        "the dtype of the model's activations, torch.float32; found torch.bfloat16",
    ),
    "mask_of_another_shape": ({"input_ids": X, "attention_mask": ONES[:, :3]}, "attention_mask must be [2, 4], or of 4 dimensions"),
    "mask_of_another_batch": ({"input_ids": X, "attention_mask": ONES[:1]}, "attention_mask must be [2, 4], or of 4 dimensions"),
    "mask_of_other_values": (
        {"input_ids": X, "attention_mask": (1.0 - ONES) - 1e9},
        "attention_mask of 2 dimensions must hold 1 for tokens and 0 for padding; found -1000000000.0",
    ),
    "mask_of_three_dimensions": ({"input_ids": X, "attention_mask": ONES[None]}, "found [1, 2, 4]"),
    "mask_as_a_list": ({"input_ids": X, "attention_mask": [[1]]}, "attention_mask must be a tensor; found list"),
    "mask_of_4_dimensions_of_another_shape": (
        {"input_ids": X, "attention_mask": torch.ones(2, 1, 4, 5, dtype=torch.bool)},
        "attention_mask of 4 dimensions must be [2 or 1, 1 or 4, 4, 4]",
    ),
    "mask_of_4_dimensions_of_integers": (
        {"input_ids": X, "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.int64)},
        "attention_mask of 4 dimensions must be boolean, or floating point and added to the scores; found torch.int64",
    ),
    "positions_of_another_shape": (
        {"input_ids": X, "position_ids": torch.arange(4)},
        "position_ids must be whole numbers [2, 4] or [1, 4], one for each new token; found torch.int64 [4]",
    ),
    "positions_of_floats": ({"input_ids": X, "position_ids": torch.arange(4.0)[None]}, "position_ids must be whole numbers"),
    "positions_beyond_the_context": (
        {"input_ids": X, "position_ids": torch.tensor([[0, 1, 2, 128]])},
        "position_ids of tokens must be from 0 to 127, the context; found 128",
    ),
    "positions_that_go_back": (
        {"input_ids": X, "position_ids": torch.tensor([[3, 4, 2, 5]])},
        "position_ids must not go back within a sequence; found 2 after 4 in sequence 0",
    ),
    "positions_that_go_back_with_a_mask": (
        {"input_ids": X, "position_ids": torch.tensor([[3, 4, 2, 5]]), "attention_mask": ONES, "use_cache": False},
        "position_ids must not go back within a sequence; found 2 after 4 in sequence 0",
    ),
    "labels_of_another_length": (
        {"input_ids": X, "labels": X[:, 1:]},
        "labels must be whole numbers [2, 4], one for each column with logits; found torch.int64 [2, 3]",
    ),
    "labels_of_columns_out_of_order": (
        {"input_ids": X, "labels": X, "logits_to_keep": ONES > 0},
        "labels need logits of columns in order; found booleans for logits_to_keep. Pass shift_labels",
    ),
    "labels_out_of_range": ({"input_ids": X, "labels": X + 90}, "labels must be token ids from 0 to 96, or -100 to be ignored; found 97"),
    "logits_to_keep_below_0": ({"input_ids": X, "logits_to_keep": -1}, "logits_to_keep must be 0, a number of columns, or a tensor"),
    "logits_to_keep_of_another_shape": ({"input_ids": X, "logits_to_keep": ONES[:1] > 0}, "booleans [2, 4]; found torch.bool [1, 4]"),
    "logits_to_keep_out_of_range": (
        {"input_ids": X, "logits_to_keep": torch.tensor([0, 4])},
        "logits_to_keep must name columns from -4 to 3; found 0 to 4",
    ),
    "hidden_states_out_of_range": (
        {"input_ids": X, "output_hidden_states": [4]},
        "output_hidden_states must be a boolean, or indices from -4 to 3; found [4]",
    ),
    "cache_of_something_else": ({"input_ids": X, "cache": {}}, "past_key_values must be a KVCache of dbrx_q; found dict"),
}


@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_with_the_rule_and_the_value(ours: DbrxForCausalLM, case: tuple[dict[str, Any], str]) -> None:
    arguments, message = case
    with pytest.raises(RequestError, match=re.escape(message)):
        ours(**arguments)


def test_bad_caches_are_refused(ours: DbrxForCausalLM) -> None:
    cache = ours(X).cache
    with pytest.raises(RequestError, match="past_key_values must hold the 1 sequences of the call; found 2"):
        ours(X[:1], cache=cache)
    with pytest.raises(RequestError, match="cache is another name for past_key_values and must be the same object; found two"):
        ours(X, cache=cache, past_key_values=ours(X).cache)
    with pytest.raises(RequestError, match="position_ids must go on from the 4 tokens that the cache holds of sequence 0; found 3"):
        ours(X, cache=cache, position_ids=torch.arange(3, 7)[None])
    with pytest.raises(RequestError, match="labels must be whole numbers"):
        ours(X, cache=cache, labels=X[0])
    small = ours(X, cache=KVCache(ours.config, 2, 6, dtype=torch.float32)).cache
    with pytest.raises(RequestError, match="must fit 6 tokens, the room of its cache; found 8"):
        ours(X, cache=small)
    assert small.lengths == [4, 4]
    assert cache.lengths == [4, 4]
