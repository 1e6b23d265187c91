"""Hooks that a user registers fire on every module, see what transformers' modules see, and may change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import Shape, assert_close, ids, make_pair

from dbrx_q import DbrxForCausalLM
from dbrx_q.generation.decoding import decode_one_token
from dbrx_q.model.layers import hooked

Pair = tuple[DbrxForCausalLM, transformers.DbrxForCausalLM]

MODULES = (
    "transformer",
    "transformer.wte",
    "transformer.blocks.1",
    "transformer.blocks.1.norm_attn_norm",
    "transformer.blocks.1.norm_attn_norm.norm_1",
    "transformer.blocks.1.norm_attn_norm.attn",
    "transformer.blocks.1.norm_attn_norm.attn.Wqkv",
    "transformer.blocks.1.norm_attn_norm.attn.out_proj",
    "transformer.blocks.1.norm_attn_norm.norm_2",
    "transformer.blocks.1.ffn",
    "transformer.blocks.1.ffn.router",
    "transformer.blocks.1.ffn.router.layer",
    "transformer.blocks.1.ffn.experts",
    "transformer.norm_f",
    "lm_head",
)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(Shape(clip=0.5))


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def seen_by_hooks(model: torch.nn.Module, name: str, run: Callable[[], object]) -> tuple[list[Any], list[Any]]:
    """(first inputs, outputs) that a pre-hook and a hook of the module see."""
    inputs, outputs = [], []
    module = model.get_submodule(name)
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True),
        module.register_forward_hook(lambda _, __, output: outputs.append(output)),
    ]
    run()
    for handle in handles:
        handle.remove()
    return inputs, outputs


def tensor_of(value: Any) -> torch.Tensor:
    """The first tensor of an output, its first two axes joined as our modules have them."""
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value


@pytest.mark.parametrize("name", MODULES)
def test_hooks_see_what_those_of_transformers_see(pair: Pair, name: str) -> None:
    ours, theirs = pair
    x = ids(2, 6)
    (our_input,), (our_output,) = seen_by_hooks(ours, name, lambda: ours(x))
    (their_input,), (their_output,) = seen_by_hooks(theirs, name, lambda: theirs(x))
    assert isinstance(our_output, tuple) == isinstance(their_output, tuple)
    for mine, reference in ((our_input, their_input), (our_output, their_output)):
        mine, reference = tensor_of(mine), tensor_of(reference)
        assert_close(mine.reshape(reference.shape), reference)
        assert not mine.is_inference()


def test_watching_every_module_changes_no_bit(pair: Pair) -> None:
    ours, x = pair[0], ids(2, 6)
    expected = ours(x).logits
    calls: list[torch.nn.Module] = []
    handles = [ours.get_submodule(name).register_forward_hook(lambda module, _, __: calls.append(module)) for name in MODULES]
    assert ours.transformer.watched
    assert torch.equal(ours(x).logits, expected)
    assert calls[-1] is ours.lm_head
    assert len(calls) == len(MODULES)
    for handle in handles:
        handle.remove()
    assert not ours.transformer.watched
    assert torch.equal(ours(x).logits, expected)


def test_hooks_change_what_they_return(pair: Pair) -> None:
    ours, theirs = pair
    x = ids(1, 6)
    favoured = torch.zeros(8)
    favoured[3] = 100.0
    for name, change in (
        ("transformer.blocks.0.ffn.router", lambda _, __, logits: logits + favoured),
        ("transformer.blocks.1.ffn.experts", lambda _, __, output: output * 0),
        ("transformer.blocks.1", lambda _, __, stream: stream * torch.linspace(0.5, 1.5, 64)),
        ("transformer.blocks.2.norm_attn_norm.attn", lambda _, __, output: (output[0] * 2, *output[1:])),
    ):
        before = ours(x).logits
        handles = [model.get_submodule(name).register_forward_hook(change) for model in pair]
        logits, expected = ours(x).logits, theirs(x).logits
        for handle in handles:
            handle.remove()
        assert_close(logits, expected)
        assert (logits - before).abs().max() > 1e-2


def test_hooks_fire_in_a_decode_step_of_a_quantized_model(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano)
    cache = model(torch.arange(5)[None]).cache
    expected = decode_one_token(model, 7, model(torch.arange(5)[None]).cache)
    shapes = []
    ffn = model.transformer.blocks[2].ffn
    for module in (ffn.router, ffn.experts):
        module.register_forward_hook(lambda _, __, output: shapes.append((*output.shape, output.dtype)))
    assert torch.equal(decode_one_token(model, 7, cache), expected)
    assert shapes == [(1, 16, torch.float32), (1, 128, torch.bfloat16)]


def test_a_wrapped_forward_runs(pair: Pair) -> None:
    """accelerate wraps `forward` of modules in place of registering hooks."""
    experts, calls = pair[0].transformer.blocks[0].ffn.experts, []
    forward = experts.forward
    experts.forward = lambda *args, **kwargs: calls.append(args[0].shape) or forward(*args, **kwargs)
    try:
        assert hooked(experts)
        pair[0](ids(1, 4))
    finally:
        del experts.forward
    assert calls == [(4, 64)]
