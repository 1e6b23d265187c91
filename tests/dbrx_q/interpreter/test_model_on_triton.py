"""The whole model on the Triton kernels against the cpu backend, which runs in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.generation.decode_graph import DecodeStep, capturable
from dbrx_q.generation.decoding import prefill
from dbrx_q.generation.generate import generate
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.formats.kv import KV_FORMATS
from dbrx_q.kernels.triton.codes import CODES
from dbrx_q.kernels.triton.launch import CHIPS, recording
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM

# The first has one token in its cache when decoding begins; together they cover prefill and decode of unequal lengths.
PROMPTS = [[7], list(range(5, 22)), [300, 301, 302]]
STEPS = [[11, 12, 13], [400, 5, 9]]

# In float32 the two backends differ only in the order of sums and in the CPU's 16-bit activations.
ON_THE_CPU = """
import sys, torch
from dbrx_q.generation.decoding import decode_one_token, prefill
from dbrx_q.kernels.formats.kv import KV_FORMATS
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
folder, out, prompts, steps = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
model = DbrxForCausalLM.from_pretrained(folder, dtype=torch.float32)
by_format = {}
for kv in KV_FORMATS:
    caches = [KVCache(model.config, 1, 32, dtype=model.dtype, format=kv) for _ in prompts]
    logits = [torch.stack([prefill(model, p, c) for p, c in zip(prompts, caches)])]
    for tokens in steps:
        logits.append(torch.stack([decode_one_token(model, t, c) for t, c in zip(tokens, caches)]))
    by_format[kv] = torch.stack(logits)
torch.save(by_format, out)
"""


@pytest.fixture(scope="module")
def on_the_cpu(quantized_small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """For each KV format, float32 logits [1 + steps, prompts, V] of the cpu backend."""
    folder = tmp_path_factory.mktemp("cpu")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = folder / "logits.pt"
    arguments = [str(quantized_small), str(out), repr(PROMPTS), repr(STEPS)]
    subprocess.run([sys.executable, "-c", ON_THE_CPU, *arguments], env=environment, check=True, cwd=folder)
    logits: dict[str, torch.Tensor] = torch.load(out)
    return logits


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_prefill_and_batched_steps_agree_with_the_cpu(quantized_small: Path, kv_format: str, on_the_cpu: dict[str, torch.Tensor]) -> None:
    assert pick(torch.device("cpu")) is Backend.TRITON
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    assert model.transformer.layers()[0].norm_attn_norm.attn.implementation == "triton"
    cache = KVCache(model.config, 3, 32, dtype=model.dtype, format=kv_format)
    logits = [torch.stack([prefill(model, prompt, cache.sequence(row)) for row, prompt in enumerate(PROMPTS)])]
    step = DecodeStep(model, cache, 4)
    for n, tokens in enumerate(STEPS, 1):
        lengths = [len(prompt) + n for prompt in PROMPTS]
        # A bucket of four, in which the first sequence is repeated.
        bucket = step([*tokens, tokens[0]], [*lengths, lengths[0]], [0, 1, 2, 0])
        assert torch.equal(bucket[3], bucket[0])
        logits.append(bucket[:3].clone())
    expected = on_the_cpu[kv_format]
    torch.testing.assert_close(torch.stack(logits), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_step_without_triton_code_is_not_capturable_and_agrees_with_the_cpu(
    quantized_small: Path, format: str, on_the_cpu: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """int4 is the format of the experts, int8 of the other weights."""
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    assert capturable(model)
    monkeypatch.delitem(CODES, format)
    assert not capturable(model)
    cache = KVCache(model.config, 3, 32, dtype=model.dtype)
    logits = [torch.stack([prefill(model, prompt, cache.sequence(row)) for row, prompt in enumerate(PROMPTS)])]
    step = DecodeStep(model, cache, 4)
    for n, tokens in enumerate(STEPS, 1):
        lengths = [len(prompt) + n for prompt in PROMPTS]
        logits.append(step([*tokens, tokens[0]], [*lengths, lengths[0]], [0, 1, 2, 0])[:3].clone())
    expected = on_the_cpu["plain"]
    torch.testing.assert_close(torch.stack(logits), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_a_left_padded_batch_agrees_with_its_sequences(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    together = model(ids, mask, use_cache=True, logits_to_keep=1).logits[:, -1]
    for row, prompt in enumerate(PROMPTS):
        alone = prefill(model, prompt, KVCache(model.config, 1, 32, dtype=model.dtype))
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_holes_in_a_mask_keep_positions_over_several_calls(quantized_small: Path) -> None:
    """Tokens are stored one after the other, whatever their positions are."""
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    ids = torch.arange(20).view(2, 10) * 3
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 0, 1]])
    logits = {}
    for implementation in ("triton", "eager"):
        model.set_attn_implementation(implementation)
        first = model(ids[:, :7], attention_mask=mask[:, :7])
        logits[implementation] = torch.cat((first.logits, model(ids[:, 7:], attention_mask=mask, cache=first.cache).logits), 1)
        assert (first.cache.lengths, first.cache.columns) == ([6, 8], [10, 10])
    torch.testing.assert_close(logits["triton"], logits["eager"], rtol=1e-3, atol=1e-3)


def test_masks_that_the_kernels_cannot_apply_are_refused(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(UnsupportedError, match=r"of 4 dimensions needs attn_implementation 'sdpa' or 'eager'; found 'triton'"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    cache = model(ids).cache
    with pytest.raises(UnsupportedError, match="that hides tokens in the cache needs attn_implementation 'sdpa' or 'eager'"):
        model(ids[:, :1], attention_mask=torch.tensor([[1, 0, 1, 1]]), cache=cache)
    assert cache.lengths == [3]


def test_hooks_fire_where_one_kernel_routes(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    ids, seen = torch.tensor([[5, 6, 7]]), []
    expected = model(ids, output_router_logits=True)
    ffn = model.transformer.blocks[0].ffn
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in (ffn.router, ffn.experts)]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[0], expected.router_logits[0])
    assert seen[1].shape == (3, model.config.d_model)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("watched", ["", "norm_attn_norm", "norm_attn_norm.norm_2", "ffn", "ffn.router", "ffn.router.layer"])
def test_one_kernel_computes_norm_2_and_the_router_of_a_step_unless_a_hook_watches_between(quantized_small: Path, watched: str) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    step = DecodeStep(model, KVCache(model.config, 1, 32, dtype=model.dtype, format="int8"), 1)
    seen: list[object] = []
    if watched:
        for block in model.transformer.blocks:
            block.get_submodule(watched).register_forward_hook(lambda *_: seen.append(None))
    with recording(CHIPS["sm_90"]) as launches:
        step([5], [1], [0])
    route = ["norm_route_kernel"] if not watched else ["add_norm_kernel", "route_kernel"]
    if watched in ("ffn.router", "ffn.router.layer"):
        route = ["add_norm_kernel"]  # the module's own product is torch's
    layer = ["add_norm_kernel", "linear_kernel", "qkv_kernel", "decode_kernel", "linear_kernel", *route]
    layer += ["gate_up_decode_kernel", "down_decode_kernel"]
    names = [launch.kernel.__name__ for launch in launches]
    assert names == layer * model.config.n_layers + ["add_norm_kernel", "linear_kernel"]
    assert all(launch.pdl for launch in launches)
    assert len(seen) == (model.config.n_layers if watched else 0)


def test_a_step_has_the_same_bits_where_a_hook_separates_norm_2_from_the_router(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    logits = []
    for _ in range(2):
        step = DecodeStep(model, KVCache(model.config, 2, 32, dtype=model.dtype, format="int8"), 2)
        logits.append(step([5, 7], [1, 1], [0, 1]).clone())
        model.transformer.blocks[0].ffn.register_forward_hook(lambda *_: None)
    assert torch.equal(*logits)


def test_attention_that_reads_lengths_on_the_host_advances_sequences_one_by_one(quantized_small: Path) -> None:
    prompts = [[7, 8], [300]]
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    expected = generate(model, prompts, max_new_tokens=2, eos_token_ids=[])
    for block in model.transformer.layers():
        block.norm_attn_norm.attn.implementation = "sdpa"
    results = generate(model, prompts, max_new_tokens=2, eos_token_ids=[])
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]


def test_a_step_beyond_the_capacity_of_the_cache_is_refused(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    step = DecodeStep(model, KVCache(model.config, 1, 4, dtype=model.dtype), 1)
    with pytest.raises(RequestError, match="must fit 4 tokens, the room of its cache; found 5"):
        step([1], [5], [0])


def test_generate_advances_a_batch_together_and_keeps_its_decoder(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, dtype=torch.float32)
    together = generate(model, PROMPTS, max_new_tokens=3, eos_token_ids=[])
    kept = model.decoder
    assert kept is not None
    assert [result.decode_steps for result in together] == [2, 2, 2]
    [alone] = generate(model, PROMPTS[1:2], max_new_tokens=3, eos_token_ids=[])
    assert model.decoder is kept  # large enough for one prompt as well
    assert together[1].token_ids == alone.token_ids
