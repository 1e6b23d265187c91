"""The model against transformers in float32, and with a KV cache against itself without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxModel, KVCache
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.model.layers import PackedWeight

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="module")
def oracle() -> transformers.DbrxForCausalLM:
    """transformers ignores the nested rope_theta, so it is given again as rope_parameters."""
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32, attn_implementation="eager").eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4092, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 2, 77, 600])
def test_logits_equal_those_of_transformers(oracle: transformers.DbrxForCausalLM, length: int, implementation: str) -> None:
    model = DbrxForCausalLM.from_pretrained(NANO, dtype="float32", attn_implementation=implementation)
    ids = tokens(1, length)
    with torch.no_grad():
        expected = oracle(ids).logits
    assert (model(ids).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_that_of_transformers(model: DbrxForCausalLM, oracle: transformers.DbrxForCausalLM, side: str) -> None:
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    for row, padding in ((0, 25), (2, 1)):
        mask[row, slice(None, padding) if side == "left" else slice(40 - padding, None)] = 0
    with torch.no_grad():
        expected = oracle(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logits = model(ids, attention_mask=mask).logits
    assert (logits - expected)[mask.bool()].abs().max() <= TOLERANCE
    assert not logits[mask == 0].any()


def test_token_by_token_equals_the_whole_sequence(model: DbrxForCausalLM) -> None:
    ids = tokens(2, 50)
    output = model(ids, use_cache=False)
    assert output.past_key_values is None
    cache = KVCache(model.config, 2, 50, dtype=torch.float32)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50)]
    assert (torch.cat(steps, dim=1) - output.logits).abs().max() <= TOLERANCE


def test_chunks_after_a_cache_equal_the_whole_sequence(model: DbrxForCausalLM) -> None:
    ids = tokens(1, 90)
    first = model(ids[:, :31], use_cache=True)
    second = model(ids[:, 31:80], past_key_values=first.past_key_values)
    third = model(ids[:, 80:], past_key_values=second.past_key_values)
    chunks = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert (chunks - model(ids).logits).abs().max() <= TOLERANCE


def test_left_padding_then_decoding_equals_transformers(model: DbrxForCausalLM, oracle: transformers.DbrxForCausalLM) -> None:
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :11] = 0
    cache = model(ids[:, :25], attention_mask=mask[:, :25], use_cache=True).past_key_values
    steps = [model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits for i in range(25, 30)]
    with torch.no_grad():
        expected = oracle(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 25:]
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= TOLERANCE


def test_the_clamp_is_applied_before_the_rotation(oracle: transformers.DbrxForCausalLM) -> None:
    """A tight clamp changes the logits, to those of transformers with the same clamp."""
    config = transformers.DbrxConfig.from_pretrained(NANO)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    config.attn_config.clip_qkv = 0.3
    clamped = transformers.DbrxForCausalLM.from_pretrained(NANO, config=config, dtype=torch.float32).eval()
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    for block in model.transformer.layers():
        block.norm_attn_norm.attn.clip = 0.3
    ids = tokens(1, 40)
    with torch.no_grad():
        expected = clamped(ids).logits
        assert (expected - oracle(ids).logits).abs().max() > 0.1
    assert (model(ids).logits - expected).abs().max() <= TOLERANCE


def test_the_cache_of_a_call_has_room_for_its_tokens_and_grows(model: DbrxForCausalLM) -> None:
    cache = model(tokens(1, 10)).past_key_values
    assert cache is not None
    assert cache.capacity == 10
    steps = [model(tokens(1, 1, seed=i), past_key_values=cache).logits for i in range(30)]
    assert 40 <= cache.capacity < 100
    ids = torch.cat([tokens(1, 10), *(tokens(1, 1, seed=i) for i in range(30))], dim=1)
    assert (torch.cat(steps, dim=1) - model(ids).logits[:, 10:]).abs().max() <= TOLERANCE


def test_router_logits_are_returned_per_layer_in_float32(model: DbrxForCausalLM) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    out = model(ids, attention_mask=mask, output_router_logits=True)
    assert out.router_logits is not None
    assert [tuple(logits.shape) for logits in out.router_logits] == [(18, 16)] * 4
    assert not any(logits[mask.flatten() == 0].any() for logits in out.router_logits)
    assert {logits.dtype for logits in out.router_logits} == {torch.float32}
    router_inputs: list[torch.Tensor] = []
    layers = model.transformer.layers()
    hooks = [layer.norm_attn_norm.norm_2.register_forward_hook(lambda _, __, out: router_inputs.append(out)) for layer in layers]
    again = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    for layer, normed, logits in zip(layers, router_inputs, again, strict=True):
        expected = normed.double() @ layer.ffn.router.layer.weight.double().T
        torch.testing.assert_close(logits[mask.flatten() == 1].double(), expected, rtol=1e-4, atol=1e-4)
    assert model(ids).router_logits is None


def test_the_example_of_the_documentation_runs() -> None:
    model = DbrxModel(DbrxConfig(n_layers=2, d_model=256, n_heads=8, vocab_size=128))
    hidden = model(torch.arange(10)[None]).last_hidden_state
    assert hidden.shape == (1, 10, 256)
    assert hidden.isfinite().all()
    assert hidden.std() > 0.1


def test_state_dict_has_the_names_of_the_checkpoint(model: DbrxForCausalLM) -> None:
    import safetensors

    with safetensors.safe_open(NANO / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        state = model.state_dict()
        assert set(state) == names
        for name in names:
            assert torch.equal(state[name], file.get_tensor(name).float()), name


def test_logits_to_keep(model: DbrxForCausalLM) -> None:
    ids = tokens(2, 12)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_dtype_defaults_to_the_checkpoints() -> None:
    assert DbrxForCausalLM.from_pretrained(NANO).dtype == torch.bfloat16
    assert DbrxForCausalLM.from_pretrained(NANO, dtype="float16").dtype == torch.float16
    with pytest.raises(RequestError, match="dtype must be float32, float16 or bfloat16; found 'int8'"):
        DbrxForCausalLM.from_pretrained(NANO, dtype="int8")


def test_bfloat16_stays_close_to_float32(model: DbrxForCausalLM) -> None:
    ids = tokens(1, 200)
    expected = model(ids).logits.log_softmax(-1)
    rounded = DbrxForCausalLM.from_pretrained(NANO)(ids).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - rounded)).sum(-1).mean()
    assert divergence < 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_implementation": "triton"}, "attn_implementation 'triton' needs a GPU; the device is 'cpu'"),
        ({"attn_implementation": "flash"}, "attn_implementation must be one of sdpa, eager, triton, flash_attention_2; found 'flash'"),
    ],
    ids=["triton", "flash"],
)
def test_unsupported_values_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        DbrxForCausalLM.from_pretrained(NANO, **arguments)  # type: ignore[arg-type] # one case each


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu", "cpu:what"])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    with pytest.raises(RequestError, match=r"must be .*'cuda:N'; found|it sees \d+. Check the driver"):
        DbrxForCausalLM.from_pretrained(NANO, device=device)


def test_bad_calls_are_refused(model: DbrxForCausalLM) -> None:
    for ids, invalid in (([[0, 4096]], "4096"), ([[-1, 3]], "-1")):
        with pytest.raises(RequestError, match=f"token ids must be from 0 to 4095; found {invalid}"):
            model(torch.tensor(ids))
    with pytest.raises(RequestError, match="must fit 2048 tokens, the context; found 2049"):
        model(torch.zeros(1, 2049, dtype=torch.int64))
    with pytest.raises(RequestError, match="whole numbers"):
        model(torch.zeros(1, 3))
    with pytest.raises(RequestError, match="attention_mask must be"):
        model(tokens(2, 5), attention_mask=torch.ones(2, 4))
    with pytest.raises(RequestError, match="must fit 3 tokens, the room of its cache; found 4"):
        model(tokens(1, 4), past_key_values=KVCache(model.config, 1, 3, dtype=torch.float32))
    with pytest.raises(RequestError, match="must hold the 2 sequences of the call; found 1"):
        model(tokens(2, 4), past_key_values=KVCache(model.config, 1, 9, dtype=torch.float32))
    with pytest.raises(RequestError, match="context of 2048 tokens; 4000"):
        KVCache(model.config, 1, 4000, dtype=torch.float32)


def test_moving_a_quantized_model_is_refused(quantized_nano: Path) -> None:
    quantized = DbrxForCausalLM.from_pretrained(quantized_nano)
    with pytest.raises(UnsupportedError, match=r"keeps its device and dtype.*from_pretrained"):
        quantized.to("meta")


def test_a_printed_model_shows_shapes_and_formats(model: DbrxForCausalLM, quantized_nano: Path) -> None:
    assert "(Wqkv): DbrxLinear(weight=[256, 128])" in str(model)
    quantized = str(DbrxForCausalLM.from_pretrained(quantized_nano))
    assert "(weight): PackedWeight(Int8Weight, [256, 128], group_size=64)" in quantized
    assert "(w1): PackedWeight(Int4Weight, [16, 256, 128], group_size=64)" in quantized


def test_a_quantized_model_holds_packed_weights_only(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano)
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 4 * 5 + 2
    plain = {name for name, parameter in model.named_parameters()}
    assert all(".router." in name or "norm" in name for name in plain)
    assert model.transformer.blocks[0].ffn.experts.mlp.w1.qweight.dtype == torch.uint8  # type: ignore[union-attr] # modules by name
    logits = model(tokens(1, 100)).logits
    reference = DbrxForCausalLM.from_pretrained(NANO)(tokens(1, 100)).logits
    assert (logits - reference).abs().max() > 0
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    assert agreement > 0.8
