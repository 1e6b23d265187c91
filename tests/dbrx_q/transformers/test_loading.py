"""Packed checkpoints in transformers: what is loaded, and its outputs against those of our model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

import dbrx_q.transformers
from dbrx_q import DbrxForCausalLM
from dbrx_q.errors import CheckpointError, ConfigError, RequestError, UnsupportedError
from dbrx_q.transformers import DbrxQConfig
from dbrx_q.transformers.layers import DbrxEmbedding, DbrxLinear, adopt
from dbrx_q.transformers.packed import PackedWeight


@pytest.fixture(scope="module")
def native(quantized_nano: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)


def test_the_room_imports_the_library_of_its_name() -> None:
    assert dbrx_q.transformers.modeling.transformers.DbrxConfig is transformers.DbrxConfig


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_our_model(quantized_nano: Path, native: DbrxForCausalLM, ids: torch.Tensor, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32, attn_implementation=attention)
    expected, actual = native(ids).logits, model(ids).logits
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits(quantized_nano: Path, native: DbrxForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> None:
    """As near to float32 as our own model in that dtype, within a factor of two."""
    expected = native(ids).logits
    ours = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=dtype)(ids).logits.float()
    logits = AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=dtype)(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().mean() < 2 * (ours - expected).abs().mean()


def test_without_a_dtype_a_config_gives_bfloat16(quantized_nano: Path, tmp_path: Path) -> None:
    """As our own loader; the first floating-point tensor, from which transformers takes the dtype otherwise, may be a float16 scale."""
    folder = tmp_path / "without"
    shutil.copytree(quantized_nano, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("torch_dtype", "dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert DbrxForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_padding_on_the_left(in_transformers: Any, ids: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(ids[:1], (3, 0))
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone, beside = in_transformers(ids[:1]).logits, in_transformers(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert (beside - alone).abs().max() < 1e-4 * alone.abs().max()


def test_forward_with_gradients_on_and_recorded_outputs(in_transformers: Any, ids: torch.Tensor) -> None:
    assert torch.is_grad_enabled()
    out = in_transformers(ids, labels=ids, output_hidden_states=True, output_router_logits=True)
    layers = in_transformers.config.n_layers
    assert [state.shape for state in out.hidden_states] == [(2, 8, 128)] * (layers + 1)
    assert [(logits.shape, logits.dtype) for logits in out.router_logits] == [((16, 16), torch.float32)] * layers
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.aux_loss)


def test_attentions_of_the_eager_implementation(quantized_nano: Path, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized_nano, attn_implementation="eager")
    assert [weights.shape for weights in model(ids, output_attentions=True).attentions] == [(2, 4, 8, 8)] * 4


def test_without_its_head(quantized_nano: Path, in_transformers: Any, ids: torch.Tensor) -> None:
    model = AutoModel.from_pretrained(quantized_nano, dtype=torch.float32)
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, in_transformers.transformer(ids).last_hidden_state)
    assert len(out.hidden_states) == 5


def test_only_the_router_and_norms_are_plain(in_transformers: Any, native: DbrxForCausalLM) -> None:
    assert {name.rsplit(".", 2)[-2] for name, _ in in_transformers.named_parameters()} == {"norm_1", "norm_2", "norm_f", "layer"}
    packed = [module for module in in_transformers.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 2 + 4 * 5
    assert in_transformers.num_parameters() == native.num_parameters()


def test_a_plain_checkpoint_gets_its_rotary_base(nano: Path, ids: torch.Tensor) -> None:
    """transformers alone computes with 10000."""
    model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    expected = DbrxForCausalLM.from_pretrained(nano, dtype=torch.float32)(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_plain_layers_are_ours_with_the_results_and_gradients_of_torch(small_config: Any, ids: torch.Tensor) -> None:
    model = transformers.DbrxForCausalLM(small_config).eval()
    plain = copy.deepcopy(model)
    adopt(model)
    attention = [block.norm_attn_norm.attn for block in model.transformer.blocks]
    assert isinstance(model.transformer.wte, DbrxEmbedding)
    assert all(isinstance(layer, DbrxLinear) for module in attention for layer in (module.Wqkv, module.out_proj))
    assert isinstance(model.lm_head, DbrxLinear)
    logits, expected = model(ids % 64).logits, plain(ids % 64).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    logits.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)
    assert (model.transformer.wte.weight.grad != 0).any()


def test_two_rotary_bases_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must agree; found 500000\.0 and 10000"):
        transformers.DbrxConfig(attn_config={"rope_theta": 500000}, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def test_hooks_fire_on_router_and_experts(in_transformers: Any, ids: torch.Tensor) -> None:
    seen: list[str] = []
    ffn = in_transformers.transformer.blocks[1].ffn
    handles = [module.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, module in ffn.named_children()]
    in_transformers(ids)
    for handle in handles:
        handle.remove()
    assert seen == ["router", "experts"]


def test_a_copy_and_a_conversion(in_transformers: Any, ids: torch.Tensor) -> None:
    expected = in_transformers(ids).logits
    twin = copy.deepcopy(in_transformers)
    assert torch.equal(twin(ids).logits, expected)
    scales = twin.lm_head.weight.value.parts["scales"]
    assert scales.data_ptr() != in_transformers.lm_head.weight.value.parts["scales"].data_ptr()
    twin.to(torch.bfloat16)
    assert twin.lm_head.weight.value.parts["scales"].dtype == scales.dtype
    assert twin(ids).logits.dtype == torch.bfloat16


def test_state_dict_has_the_names_of_the_checkpoint(quantized_nano: Path, in_transformers: Any) -> None:
    index = json.loads((quantized_nano / "model.safetensors.index.json").read_text())
    state = in_transformers.state_dict()
    assert state.keys() == index["weight_map"].keys()
    assert in_transformers.load_state_dict(state).missing_keys == []
    with pytest.raises(RuntimeError, match=r"unexpected|Unexpected"):
        in_transformers.load_state_dict(state | {"transformer.blocks.0.ffn.experts.mlp.w1.16.qweight": torch.zeros(1)})


def test_resizing_a_packed_embedding_names_the_way(in_transformers: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"found a packed embedding and head\. Load the original checkpoint"):
        in_transformers.resize_token_embeddings(5000)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, transformers.DbrxForCausalLM, transformers.DbrxModel])
def test_packed_weights_without_their_quantization_config_are_refused(quantized_nano: Path, nano: Path, auto: Any) -> None:
    stripped = transformers.DbrxConfig.from_pretrained(quantized_nano)
    del stripped.quantization_config
    for config in (stripped, transformers.DbrxConfig.from_pretrained(nano)):
        with pytest.raises(CheckpointError, match="packed weights must be loaded with the quantization_config"):
            auto.from_pretrained(quantized_nano, config=config)


@pytest.mark.parametrize("kwargs", [{}, {"device_map": "auto"}, {"ignore_mismatched_sizes": True}])
def test_no_quantization_config_does_not_give_random_weights(quantized_nano: Path, kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match="Leave the arguments config and quantization_config out"):
        AutoModelForCausalLM.from_pretrained(quantized_nano, quantization_config=None, **kwargs)
    model = transformers.DbrxForCausalLM.from_pretrained(quantized_nano, quantization_config=None, **kwargs)  # it ignores None
    assert any(isinstance(module, PackedWeight) for module in model.modules())


def test_a_damaged_checkpoint_is_refused(quantized_nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(quantized_nano, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["tensors"]["transformer.blocks.2.ffn.experts.mlp.v1"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.ffn\.experts\.mlp\.v1"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_budget_beside_its_sizes_is_refused() -> None:
    with pytest.raises(RequestError, match="Leave one of them out"):
        DbrxQConfig(ram="1GiB", budget=DbrxQConfig(ram="1GiB").budget)
