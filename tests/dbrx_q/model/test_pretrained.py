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
from dbrx_q.errors import CheckpointError, ConfigError, DbrxError, RequestError
from dbrx_q.model.pretrained_arguments import _say_once

NANO = Path(__file__).parent.parent.parent / "data" / "dbrx-nano"


class OwnModel(DbrxForCausalLM):
    """A class of user code."""


def test_the_transformer_loads_without_its_head_and_subclasses_load_themselves() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    whole, body, own = (cls.from_pretrained(NANO) for cls in (DbrxForCausalLM, DbrxModel, OwnModel))
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
    with pytest.warns(UserWarning, match="trust_remote_code has no effect here: no code of a checkpoint is ever run") as caught:
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
