"""Methods and arguments of DbrxConfig that users of transformers know."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxModel
from dbrx_q.errors import ConfigError

NANO = Path(__file__).parent.parent / "data" / "dbrx-nano"
SMALL: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 50, "ffn_config": {"ffn_hidden_size": 16}}
# Keys that the sub-configurations of databricks/dbrx-base carry, and other publishers' top levels.
DUMP = {"add_cross_attention": False, "top_k": 50, "torchscript": False, "id2label": {"0": "LABEL_0"}, "bos_token_id": None, "prefix": None}


def test_aliases_can_be_set() -> None:
    config = DbrxConfig()
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings = 96, 6, 5, 70
    config.num_key_value_heads = 3
    assert (config.d_model, config.n_heads, config.n_layers, config.max_seq_len, config.attn_config.kv_n_heads) == (96, 6, 5, 70, 3)
    assert config.attribute_map == transformers.DbrxConfig.attribute_map
    config.update({"n_layers": 7, "hidden_size": 192})
    assert (config.n_layers, config.d_model) == (7, 192)
    config.update_from_string("n_layers=2,use_cache=false")
    assert (config.n_layers, config.use_cache) == (2, False)


def test_arguments_of_every_configuration_are_taken_and_unknown_ones_are_not() -> None:
    config = DbrxConfig(
        architectures=["DbrxModel"],
        id2label={0: "a"},
        problem_type=None,
        output_attentions=True,
        return_dict=False,
        name_or_path="x",
        top_k=3,
    )
    assert (config.architectures, config.id2label, config.output_attentions) == (["DbrxModel"], {0: "a"}, True)
    assert (config.use_return_dict, config.output_hidden_states, config.name_or_path) == (False, False, "x")
    assert config.get_text_config() is config
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'n_layer'; did you mean 'n_layers'"):
        DbrxConfig(n_layer=3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'moe_topk'; did you mean 'moe_top_k'"):
        DbrxConfig(ffn_config={"moe_topk": 3})
    assert DbrxConfig(ffn_config=DUMP, attn_config=DUMP) == DbrxConfig()


def test_dtypes_are_set_and_read_under_both_names() -> None:
    for arguments in ({"dtype": "float16"}, {"torch_dtype": torch.float16}, {"dtype": torch.float16, "torch_dtype": "float16"}):
        config = DbrxConfig(**arguments)
        assert config.dtype is config.torch_dtype is torch.float16
        assert config.to_dict()["torch_dtype"] == "float16"
    config.dtype = torch.bfloat16
    assert config.torch_dtype is torch.bfloat16
    assert DbrxConfig().torch_dtype is None
    assert DbrxConfig.from_dict({"model_type": "dbrx", "dtype": "float32"}).dtype is torch.float32


def test_keys_that_are_not_read_are_kept_and_written_back(tmp_path: Path) -> None:
    raw = json.loads((NANO / "config.json").read_text()) | {"auto_map": {"AutoConfig": "x.Y"}, "own_key": [1, {"a": 2}]}
    raw["attn_config"] = raw["attn_config"] | DUMP
    config = DbrxConfig.from_dict(raw)
    assert (config.own_key, config.attn_config.top_k) == ([1, {"a": 2}], 50)
    config.another = 5
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["own_key"] == [1, {"a": 2}]
    assert written["another"] == 5
    assert written["auto_map"] == raw["auto_map"]
    assert written["transformers_version"] == "4.40.0"
    assert DUMP.items() <= written["attn_config"].items()
    assert DbrxConfig.from_pretrained(tmp_path).to_dict() == written
    theirs = transformers.DbrxConfig.from_pretrained(tmp_path)
    assert (theirs.rope_parameters["rope_theta"], theirs.attn_config.clip_qkv, theirs.own_key) == (500000.0, 8.0, [1, {"a": 2}])


def test_json_files_and_dictionaries(tmp_path: Path) -> None:
    config = DbrxConfig.from_pretrained(NANO, n_layers=3, attn_config={"clip_qkv": 4})
    assert (config.n_layers, config.attn_config.clip_qkv, config.rope_theta) == (3, 4.0, 500000.0)
    assert config.name_or_path == str(NANO)
    config.to_json_file(tmp_path / "mine.json")
    assert DbrxConfig.from_json_file(tmp_path / "mine.json") == config
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert "use_cache" not in config.to_diff_dict()
    assert config.to_diff_dict()["n_layers"] == 3
    same, unused = DbrxConfig.from_dict(config.to_dict(), return_unused_kwargs=True, vocab_size=77, foo=1)
    assert (same.vocab_size, unused) == (77, {"foo": 1})
    same, unused = DbrxConfig.from_pretrained(NANO, return_unused_kwargs=True, foo=1)
    assert unused == {"foo": 1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_layer'; did you mean 'n_layers'"):
        DbrxConfig.from_pretrained(NANO, n_layer=1)
    assert DbrxConfig.get_config_dict(NANO)[0]["d_model"] == 128


def test_copies_and_pickles_are_equal_and_independent() -> None:
    config = DbrxConfig.from_pretrained(NANO)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        twin.attn_config.clip_qkv = 1.0
        twin.rope_theta = 5.0
        assert (config.attn_config.clip_qkv, config.rope_theta) == (8.0, 500000.0)
        assert twin != config


@pytest.mark.parametrize("theta", [None, 500000.0])
@pytest.mark.usefixtures("transformers_alone")
def test_a_configuration_of_transformers_makes_a_model(theta: float | None) -> None:
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0} | ({} if theta is None else {"rope_theta": theta})
    theirs = transformers.DbrxConfig(**SMALL, attn_config=attention)
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}  # what transformers makes of every attn_config
    for model in (DbrxModel(theirs), DbrxForCausalLM(theirs)):
        assert isinstance(model.config, DbrxConfig)
        assert model.config.rope_theta == (theta or 10000.0)
        assert (model.config.attn_config.kv_n_heads, model.config.ffn_config.ffn_hidden_size) == (2, 16)
        assert {"output_attentions", "id2label", "architectures"}.isdisjoint(model.config.to_dict()["attn_config"])
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 700.0}
    if theta is None:
        assert DbrxModel(theirs).config.rope_theta == 700.0
    else:
        with pytest.raises(ConfigError, match=r"must agree; found 500000\.0 and 700\.0"):
            DbrxModel(theirs)


def test_the_keys_of_a_configuration_of_transformers_are_arguments() -> None:
    theirs = transformers.DbrxConfig(**SMALL, rope_theta=500000.0, attn_config={"kv_n_heads": 2})
    ours = DbrxConfig(**theirs.to_dict())
    assert (ours.rope_theta, ours.attn_config.kv_n_heads, ours.model_type) == (500000.0, 2, "dbrx")
    assert ours == DbrxConfig(**SMALL, rope_theta=500000.0, attn_config={"kv_n_heads": 2})
    with pytest.raises(ConfigError, match="model_type must be 'dbrx'"):
        DbrxConfig(model_type="mixtral")


def test_a_dictionary_or_a_wrong_object_as_configuration() -> None:
    assert DbrxModel(DbrxConfig(**SMALL).to_dict()).config == DbrxConfig(**SMALL)
    with pytest.raises(ConfigError, match=r"config must be a DbrxConfig.*found MixtralConfig"):
        DbrxModel(transformers.MixtralConfig())
    config = DbrxConfig(**SMALL)
    config.d_model = 30
    with pytest.raises(ConfigError, match="n_heads must divide d_model"):
        DbrxModel(config)
