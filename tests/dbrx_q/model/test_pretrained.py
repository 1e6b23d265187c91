"""`DbrxPreTrainedModel`: loading under the names and with the arguments that transformers has."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxModel
from dbrx_q.errors import CheckpointError, ConfigError, DbrxError, RequestError, UnsupportedError
from dbrx_q.model.pretrained_arguments import _say_once


class OwnModel(DbrxForCausalLM):
    """A class of user code."""


def test_the_transformer_loads_without_its_head_and_subclasses_load_themselves(small: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    whole, body, own = (cls.from_pretrained(small) for cls in (DbrxForCausalLM, DbrxModel, OwnModel))
    assert [type(model) for model in (whole, body, own)] == [DbrxForCausalLM, DbrxModel, OwnModel]
    assert whole.base_model is whole.transformer
    assert body.base_model is body
    assert body.state_dict().keys() == {name.removeprefix("transformer.") for name in whole.state_dict() if "lm_head" not in name}
    hidden = body(ids).last_hidden_state
    assert hidden.equal(whole.transformer(ids).last_hidden_state)
    assert own(ids).logits.equal(whole(ids).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "auto"},
        {"torch_dtype": "auto"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"device_map": {"transformer": "cpu", "lm_head": "cpu"}},
        {"device_map": "auto"},
        {"device_map": "balanced", "max_memory": {"cpu": "100MB"}},
        {"device_map": "sequential"},
        {"low_cpu_mem_usage": True, "use_safetensors": True, "local_files_only": True, "cache_dir": "x", "token": None, "revision": None},
        {"attn_implementation": "sdpa", "trust_remote_code": False, "load_in_4bit": False, "quantization_config": None},
    ],
    ids=str,
)
def test_arguments_of_transformers_load_the_same_model(small: Path, arguments: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = DbrxForCausalLM.from_pretrained(small, **arguments)
    assert (model.dtype, model.device, model.name_or_path) == (torch.bfloat16, torch.device("cpu"), str(small))
    assert model(ids).logits.equal(DbrxForCausalLM.from_pretrained(small)(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device_map": "disk"}, RequestError, r"device_map must be 'auto', a device .*found 'disk'"),
        ({"device_map": {"transformer": "cpu", "lm_head": "cuda:0"}}, RequestError, r"max_memory says how much each device takes"),
        ({"device_map": {"transformer": "cpu", "lm_head": "disk"}}, RequestError, r"must not be 'disk'. device_map='auto' with max_memory"),
        ({"device_map": 99}, RequestError, r"device 'cuda:99' must be a GPU that torch sees"),
        ({"device_map": {"": 99}}, RequestError, r"device 'cuda:99' must be a GPU that torch sees"),
        ({"device_map": -1}, RequestError, r"device_map must be a device.*found -1"),
        ({"device_map": "cpu", "device": "cpu"}, RequestError, r"Leave one of them out"),
        ({"max_memory": {"cpu": "1GB"}}, RequestError, r"max_memory needs device_map='auto'"),
        ({"dtype": "float32", "torch_dtype": "float16"}, RequestError, r"torch_dtype is another name for dtype"),
        ({"dtype": "int8"}, RequestError, r"dtype must be float32, float16 or bfloat16; found 'int8'"),
        ({"load_in_4bit": True}, RequestError, r"quantize the checkpoint with `dbrx-q quantize --format nf4`"),
        ({"quantization_config": {"load_in_8bit": True}}, RequestError, r"quantization_config must be absent.*dbrx-q quantize"),
        ({"use_safetensors": False}, RequestError, r"pickles are never read"),
        ({"variant": "fp16"}, RequestError, r"variant must be absent; found 'fp16'"),
        (
            {"tourch_dtype": "auto"},
            TypeError,
            r"unexpected keyword argument 'tourch_dtype'; did you mean 'torch_dtype'",
        ),
        ({"offload_foldr": "x"}, TypeError, r"did you mean 'offload_folder'"),
        ({"n_layers": 0}, ConfigError, r"n_layers must be a whole number"),
        ({"n_layers": 2}, CheckpointError, r"is missing; config.json calls for it"),
        ({"subfolder": "absent"}, DbrxError, r"absent"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_served_say_what_works(
    small: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DbrxForCausalLM.from_pretrained(small, **arguments)


def test_arguments_without_effect_are_said_once(small: Path) -> None:
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match="trust_remote_code has no effect here: no code of a checkpoint runs") as caught:
        DbrxForCausalLM.from_pretrained(small, trust_remote_code=True)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DbrxForCausalLM.from_pretrained(small, trust_remote_code=True)
    with pytest.warns(UserWarning, match="offload_folder has no effect here: .* the checkpoint's own files"):
        DbrxForCausalLM.from_pretrained(small, offload_folder="offload", device_map="auto")


def test_a_configuration_can_be_given_in_any_form(small: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = DbrxForCausalLM.from_pretrained(small)(ids).logits
    shutil.copyfile(small / "config.json", tmp_path / "another.json")
    own = DbrxConfig.from_pretrained(small)
    theirs = transformers.DbrxConfig.from_pretrained(small)
    for config in (own, own.to_dict(), theirs, small, str(small), tmp_path / "another.json"):
        model = DbrxForCausalLM.from_pretrained(small, config=config)
        assert model(ids).logits.equal(expected), config
    own.rope_theta = 3.0
    changed = DbrxForCausalLM.from_pretrained(small, config=own)
    assert (changed.config.rope_theta, changed.config is own) == (3.0, False)
    assert not changed(ids).logits.equal(expected)
    with pytest.raises(ConfigError, match="model_type must be 'dbrx'"):
        DbrxForCausalLM.from_pretrained(small, config={"model_type": "llama"})


def test_values_of_the_configuration_can_be_given(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(
        quantized_small, use_cache=False, output_router_logits=True, config=DbrxConfig.from_pretrained(quantized_small)
    )
    assert (model.config.use_cache, model.config.output_router_logits) == (False, True)
    assert len(model(torch.tensor([[5, 6]])).router_logits) == model.config.n_layers
    model, info = DbrxForCausalLM.from_pretrained(quantized_small, output_loading_info=True, use_cache=False)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert model.config.use_cache is False
    assert model.config.quantization_config is not None


def test_a_subfolder_of_a_local_folder(small: Path) -> None:
    assert DbrxForCausalLM.from_pretrained(small.parent, subfolder=small.name).config == DbrxConfig.from_pretrained(small)


def test_the_cache_alone_is_used_if_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        DbrxForCausalLM.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)


@pytest.fixture
def plain() -> DbrxForCausalLM:
    torch.manual_seed(0)
    sections: dict[str, Any] = {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    }
    return DbrxForCausalLM(DbrxConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=90, initializer_range=0.2, **sections))


IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_calls_that_change_nothing_are_served_and_others_are_refused(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small)
    expected = model(IDS).logits
    assert (
        model.to("cpu") is model.cpu() is model.to(model.device) is model.eval() is model.to(dtype=model.dtype) is model.bfloat16() is model
    )
    assert model.transformer.to("cpu", torch.bfloat16) is model.transformer
    assert model(IDS).logits.equal(expected)
    for call in (model.half, model.float, lambda: model.to(torch.float32), lambda: model.to("meta"), lambda: model.transformer.to("meta")):
        with pytest.raises(UnsupportedError, match=r"keeps its device and dtype, 'cpu' and bfloat16; .* from_pretrained"):
            call()
    with pytest.raises(UnsupportedError, match="packed weights cannot be trained"):
        model.train()
    with pytest.raises(UnsupportedError, match="only infers"):
        model.gradient_checkpointing_enable()
    assert model(IDS).logits.equal(expected)


def test_a_plain_model_is_converted_and_its_experts_follow(small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(small)
    expected = DbrxForCausalLM.from_pretrained(small, dtype="float32")(IDS).logits
    assert model.to(torch.float32)(IDS).logits.equal(expected)
    assert model.float().dtype is torch.float32
    assert model.bfloat16()(IDS).logits.equal(DbrxForCausalLM.from_pretrained(small)(IDS).logits)


def test_experts_that_a_store_moves_stay(quantized_small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_small, device_map="auto")
    assert model.to("cpu") is model
    with pytest.raises(UnsupportedError, match="keeps its device"):
        model.float()
    model.close()


def test_embeddings_are_read_and_replaced(plain: DbrxForCausalLM) -> None:
    assert plain.get_input_embeddings() is plain.transformer.wte is plain.transformer.get_input_embeddings()
    assert plain.get_output_embeddings() is plain.lm_head
    assert plain.transformer.get_output_embeddings() is None
    twice = torch.nn.Embedding(90, 64)
    twice.weight.data = plain.transformer.wte.weight.data * 2
    before = plain(IDS).logits
    plain.set_input_embeddings(twice)
    assert plain.transformer.wte.weight.equal(twice.weight)
    changed = plain(IDS).logits
    assert not changed.equal(before)
    head = torch.nn.Linear(64, 90, bias=False)
    head.weight.data = plain.lm_head.weight.data * 2
    plain.set_output_embeddings(head)
    torch.testing.assert_close(plain(IDS).logits, 2 * changed)
    plain.tie_weights()
    torch.testing.assert_close(plain(IDS).logits, 2 * changed)
    with pytest.raises(RequestError, match=r"needs a module with a weight \[V, 64\] and no bias; found \[90, 32\]"):
        plain.set_input_embeddings(torch.nn.Embedding(90, 32))
    with pytest.raises(RequestError, match="needs a model with a head"):
        plain.transformer.set_output_embeddings(head)


def test_a_plain_model_gets_more_or_fewer_tokens(plain: DbrxForCausalLM, quantized_small: Path, tmp_path: Path) -> None:
    before = plain(IDS).logits
    assert plain.resize_token_embeddings() is plain.transformer.wte
    assert plain.resize_token_embeddings(97, pad_to_multiple_of=8) is plain.transformer.wte
    assert (plain.config.vocab_size, plain.transformer.wte.weight.shape[0], plain.lm_head.weight.shape[0]) == (104, 104, 104)
    torch.testing.assert_close(plain(IDS).logits[..., :90], before)
    assert plain.lm_head.weight[103].equal(plain.lm_head.weight[:90].mean(0))
    plain(torch.tensor([[103]]))
    plain.save_pretrained(tmp_path)
    assert DbrxForCausalLM.from_pretrained(tmp_path)(IDS).logits.equal(plain(IDS).logits)
    plain.resize_token_embeddings(50)
    torch.testing.assert_close(plain(IDS).logits, before[..., :50])
    with pytest.raises(RequestError, match=r"pad_to_multiple_of must be a whole number of at least 1; found 1\.3"):
        plain.resize_token_embeddings(50, pad_to_multiple_of=1.3)
    with pytest.raises(UnsupportedError, match=r"found packed ones\. Load the original checkpoint, resize it, save it .* quantize"):
        DbrxForCausalLM.from_pretrained(quantized_small).resize_token_embeddings(5000)
    with pytest.raises(ConfigError, match="vocab_size must be a whole number of at least 1; found 0"):
        plain.resize_token_embeddings(0)


def test_parameters_and_bytes_are_counted(plain: DbrxForCausalLM, quantized_small: Path, small: Path) -> None:
    theirs = transformers.DbrxForCausalLM(transformers.DbrxConfig(**plain.config.to_dict()))
    assert plain.num_parameters() == theirs.num_parameters() == sum(weight.numel() for weight in plain.parameters())
    assert plain.num_parameters(exclude_embeddings=True) == theirs.num_parameters() - 90 * 64
    assert plain.num_parameters(only_trainable=True) == 0
    assert plain.transformer.num_parameters() == plain.num_parameters() - 90 * 64
    assert plain.get_memory_footprint() == 4 * plain.num_parameters()
    packed = DbrxForCausalLM.from_pretrained(quantized_small)
    assert packed.num_parameters() == DbrxForCausalLM.from_pretrained(small).num_parameters()
    assert packed.get_memory_footprint() == sum(part.nbytes for part in packed.state_dict().values())
    spread = DbrxForCausalLM.from_pretrained(quantized_small, device_map="auto")
    assert spread.num_parameters() == packed.num_parameters()
    assert spread.get_memory_footprint() >= packed.get_memory_footprint()
