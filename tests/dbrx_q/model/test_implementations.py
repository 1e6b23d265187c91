"""The implementations of attention: chosen by name at loading, by the configuration or later; never a silent other one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import Shape, assert_close, ids, make_pair

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxModel
from dbrx_q.errors import UnsupportedError
from dbrx_q.kernels import flash_attention
from dbrx_q.model.implementations import choose_implementation


@pytest.fixture(scope="module")
def model() -> DbrxForCausalLM:
    return make_pair(Shape())[0]


def test_the_implementation_is_set_and_read_as_in_transformers(model: DbrxForCausalLM) -> None:
    x, logits = ids(2, 7), {}
    for name in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == model.transformer.attn_implementation == name
        assert {block.norm_attn_norm.attn.implementation for block in model.transformer.layers()} == {name}
        logits[name] = model(x).logits
    assert_close(logits["sdpa"], logits["eager"])
    model.transformer.set_attn_implementation({"": "eager"})
    assert model.config._attn_implementation == "eager"


def test_the_configuration_chooses_the_implementation(nano: Path) -> None:
    config = DbrxConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=8, ffn_config={"ffn_hidden_size": 8}, attn_implementation="eager")
    assert DbrxModel(config).attn_implementation == "eager"
    plain = DbrxModel(DbrxConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=8, ffn_config={"ffn_hidden_size": 8}))
    assert plain.attn_implementation == plain.config._attn_implementation == "sdpa"
    loaded = DbrxForCausalLM.from_pretrained(nano, attn_implementation="eager")
    assert loaded.config._attn_implementation == loaded.transformer.attn_implementation == "eager"
    assert DbrxForCausalLM.from_pretrained(nano).config._attn_implementation == "sdpa"


def test_an_implementation_that_cannot_run_is_an_error(model: DbrxForCausalLM) -> None:
    for name, message in (
        ("triton", "attn_implementation 'triton' needs a GPU; the device is 'cpu'. Choose 'sdpa' or 'eager'"),
        ("flash_attention_2", "attn_implementation 'flash_attention_2' needs a GPU; the device is 'cpu'. Choose 'sdpa' or 'eager'"),
        ("flex_attention", "attn_implementation must be one of sdpa, eager, triton, flash_attention_2; found 'flex_attention'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            model.set_attn_implementation(name)
        with pytest.raises(UnsupportedError, match=message):
            DbrxModel(DbrxConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=8, attn_implementation=name))


@pytest.mark.skipif(flash_attention.flash_attention_installed(), reason="flash-attn is installed")
def test_flash_attention_says_what_to_install() -> None:
    with pytest.raises(UnsupportedError, match=r"needs the package flash-attn; Python finds none. Run `pip install flash-attn"):
        choose_implementation("flash_attention_2", torch.device("cuda", 0))


def test_attention_weights_come_from_eager_alone(model: DbrxForCausalLM) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match=r"output_attentions needs attn_implementation 'eager', .*; found 'sdpa'."):
        model(ids(1, 3), output_attentions=True)
    model.set_attn_implementation("eager")
    weights = model(ids(1, 3), output_attentions=True).attentions
    assert [layer.shape for layer in weights] == [(1, 4, 3, 3)] * 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 4, 3))
