"""The whole model on a GPU: the answers of the CPU, also from a CUDA graph, and no dequantized copy of a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dbrx_q.errors import DbrxError, RequestError
from dbrx_q.generation.decode_graph import DecodeStep
from dbrx_q.generation.decoding import decode_one_token, prefill
from dbrx_q.generation.generate import generate
from dbrx_q.generation.layer_graphs import capture_on
from dbrx_q.kernels.triton import launch
from dbrx_q.kernels.triton.codes import CODES
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

PROMPTS = [list(range(5, 45)), [7], list(range(300, 317))]


def ids(n: int) -> torch.Tensor:
    return torch.randint(0, 4096, (2, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", ["triton", "sdpa", "eager"])
@pytest.mark.parametrize("n", [3, 40])
def test_logits_agree_with_the_cpu(quantized_nano: Path, implementation: str, n: int) -> None:
    exact = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)(ids(n)).logits
    in_bfloat16 = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.bfloat16, attn_implementation="eager")(ids(n)).logits
    on_gpu = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda", dtype=torch.bfloat16, attn_implementation=implementation)
    logits = on_gpu(ids(n)).logits.cpu()
    assert (logits - exact).abs().mean() <= 2 * (in_bfloat16 - exact).abs().mean() + 1e-3


def test_heads_too_narrow_for_a_format_are_refused(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    with pytest.raises(DbrxError, match="at least 64 for a KV cache of the format 'int4'; found 32"):
        generate(model, PROMPTS, max_new_tokens=2, kv_format="int4")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_generates_the_same(quantized_nano: Path, implementation: str) -> None:
    triton = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    other = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda", attn_implementation=implementation)
    for a, b in zip(generate(triton, PROMPTS, max_new_tokens=4), generate(other, PROMPTS, max_new_tokens=4), strict=True):
        assert sum(x == y for x, y in zip(a.token_ids, b.token_ids, strict=False)) >= 3  # a tie in bfloat16 may fall either way


@pytest.mark.parametrize("kv_format", ["plain", "int8"])
def test_a_captured_step_equals_the_same_step_uncaptured(quantized_nano: Path, kv_format: str) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    options = {"dtype": model.dtype, "device": model.device, "format": kv_format}
    caches = [KVCache(model.config, 4, 64, **options) for _ in range(2)]
    for cache in caches:
        for row, prompt in enumerate(PROMPTS):
            prefill(model, prompt, cache.sequence(row))
    replayed = DecodeStep(model, caches[0], 4)
    assert replayed.captured
    plain = DecodeStep(model, caches[1], 4)
    plain._graph = None
    lengths = [len(prompt) for prompt in PROMPTS]
    for step in range(5):
        new = [n + 1 + step for n in lengths]
        arguments = ([11, 12, 13, 11], [*new, new[0]], [0, 1, 2, 0])
        torch.testing.assert_close(replayed(*arguments), plain(*arguments), rtol=0, atol=0)


def test_steps_that_follow_each_other_at_once_equal_steps_that_wait_for_each_kernel(
    quantized_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels may begin before the one before them ends, nothing may be read too early: the bits are those without it."""
    results = []
    for switch in ("0", "1"):
        monkeypatch.setenv("DBRX_Q_PDL", switch)
        launch._dependent_launch_known.cache_clear()
        model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
        for replayed in (True, False):
            step = DecodeStep(model, KVCache(model.config, 1, 64, dtype=model.dtype, device=model.device, format="int8"), 1)
            step._graph = step._graph if replayed else None
            results.append(torch.stack([step([7 + n % 50], [1 + n], [0]).clone() for n in range(60)]))
    launch._dependent_launch_known.cache_clear()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_a_step_replayed_layer_by_layer_equals_the_same_step_uncaptured(quantized_nano: Path) -> None:
    """With all experts on the GPU, so that their sums have one order."""
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    steps = []
    for _ in range(2):
        cache = KVCache(model.config, 4, 64, dtype=model.dtype, device=model.device, format="int8")
        for row, prompt in enumerate(PROMPTS):
            prefill(model, prompt, cache.sequence(row))
        steps.append(DecodeStep(model, cache, 4))
        steps[-1]._graph = None
    steps[0]._capture_layers(capture_on(model.device))
    lengths = [len(prompt) for prompt in PROMPTS]
    for number in range(5):
        new = [n + 1 + number for n in lengths]
        arguments = ([11, 12, 13, 11], [*new, new[0]], [0, 1, 2, 0])
        torch.testing.assert_close(steps[0](*arguments), steps[1](*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_step_of_a_format_without_triton_code_is_not_captured(quantized_nano: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 is the format of the experts, int8 of the other weights."""
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    caches = [KVCache(model.config, 1, 64, dtype=model.dtype, device=model.device) for _ in range(2)]
    for cache in caches:
        prefill(model, PROMPTS[0], cache.sequence(0))
    arguments = ([11], [len(PROMPTS[0]) + 1], [0])
    captured = DecodeStep(model, caches[0], 1)
    expected = captured(*arguments).clone()
    monkeypatch.delitem(CODES, format)
    step = DecodeStep(model, caches[1], 1)
    assert captured.captured
    assert not step.captured
    torch.testing.assert_close(step(*arguments), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_generation_in_a_batch_agrees_with_one_by_one(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    together = generate(model, PROMPTS, max_new_tokens=12)
    alone = [generate(model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    for a, b in zip(together, alone, strict=True):
        same = sum(x == y for x, y in zip(a.token_ids, b.token_ids, strict=False))
        assert same >= 8  # a tie in bfloat16 may fall either way


def test_a_decode_step_agrees_with_prefill(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    prefilled = prefill(model, PROMPTS[0], KVCache(model.config, 1, 64, dtype=model.dtype, device=model.device))
    cache = KVCache(model.config, 1, 64, dtype=model.dtype, device=model.device)
    for token in PROMPTS[0]:
        last = decode_one_token(model, token, cache)
    assert (last - prefilled).abs().mean() < 0.05 * prefilled.abs().mean()


def test_loading_and_decoding_take_little_more_than_the_packed_bytes(quantized_nano: Path) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda")
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before <= 1.05 * stored + (1 << 20)
    loaded = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(ids(4))
    experts = model.transformer.layers()[0].ffn.experts.mlp.weights().w1
    assert torch.cuda.max_memory_allocated() - loaded < experts.shape.numel() * 2  # a dequantized stack of matrices would not fit


def test_float32_is_refused(quantized_nano: Path) -> None:
    with pytest.raises(RequestError, match="bfloat16 or float16"):
        DbrxForCausalLM.from_pretrained(quantized_nano, device="cuda", dtype=torch.float32)
