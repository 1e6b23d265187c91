"""DbrxConfig: defaults, aliases, and the values that are refused or ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dbrx_q import DbrxAttentionConfig, DbrxConfig, DbrxFFNConfig
from dbrx_q.errors import CheckpointError, ConfigError

DATA = Path(__file__).parent.parent / "data"


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = DbrxConfig(), transformers.DbrxConfig(attn_config={"rope_theta": 10000.0})
    names = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "resid_pdrop", "emb_pdrop", "use_cache", "initializer_range")
    names += ("output_router_logits", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    for name in ("attn_pdrop", "clip_qkv", "kv_n_heads"):
        assert getattr(ours.attn_config, name) == getattr(theirs.attn_config, name), name
    for name in DbrxFFNConfig._fields:
        assert getattr(ours.ffn_config, name) == getattr(theirs.ffn_config, name), name


def test_aliases_work_in_the_constructor_and_as_attributes() -> None:
    config = DbrxConfig(hidden_size=256, num_attention_heads=8, num_hidden_layers=3, max_position_embeddings=77)
    assert (config.d_model, config.n_heads, config.n_layers, config.max_seq_len) == (256, 8, 3, 77)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings) == (256, 8, 3, 77)
    assert DbrxConfig(d_model=256, hidden_size=256, n_heads=8).d_model == 256
    with pytest.raises(ConfigError, match=r"hidden_size is another name for d_model.*512 and 256"):
        DbrxConfig(d_model=256, hidden_size=512)


def test_rope_theta_is_read_from_either_place() -> None:
    assert DbrxConfig().rope_theta == 10000.0
    assert DbrxConfig(attn_config={"rope_theta": 500000}).rope_theta == 500000.0
    assert DbrxConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000}).rope_theta == 500000.0
    assert DbrxConfig(attn_config=DbrxAttentionConfig(), rope_parameters={"rope_theta": 500000}).attn_config.rope_theta == 500000.0
    agreed = DbrxConfig(attn_config={"rope_theta": 500000}, rope_parameters={"rope_theta": 500000.0})
    assert agreed.rope_theta == 500000.0
    with pytest.raises(ConfigError, match=r"must agree; found 500000\.0 and 10000\.0"):
        DbrxConfig(attn_config={"rope_theta": 500000}, rope_parameters={"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match=r"rope_type must be one of default, linear, dynamic, yarn.*'llama3'"):
        DbrxConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 100, "n_heads": 16}, "n_heads must divide d_model; found d_model 100 and n_heads 16"),
        ({"d_model": 48, "n_heads": 16}, "must be even.*48 / 16 = 3"),
        ({"n_heads": 16, "attn_config": {"kv_n_heads": 3}}, "kv_n_heads must divide n_heads; found kv_n_heads 3 and n_heads 16"),
        ({"ffn_config": {"moe_num_experts": 4, "moe_top_k": 5}}, "must not exceed.*found 5 > 4"),
        ({"ffn_config": {"ffn_act_fn": {"name": "mish"}}}, "ffn_act_fn.*mish"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1; found 0"),
        ({"vocab_size": 2.5}, "vocab_size must be a whole number.*2.5"),
        ({"d_model": True}, "d_model must be a whole number.*True"),
        ({"resid_pdrop": 1.5}, "resid_pdrop must be a probability.*1.5"),
        ({"attn_config": {"clip_qkv": -8}}, "clip_qkv must be a finite number above 0; found -8"),
        ({"attn_config": {"rope_theta": float("nan")}}, "rope_theta must be a finite number.*nan"),
        ({"attn_config": 3}, "attn_config must be an object; found 3"),
        ({"ffn_config": {"moe_normalize_expert_weights": 0}}, "moe_normalize_expert_weights must be a finite number above 0; found 0"),
        ({"ffn_config": {"ffn_act_fn": 5}}, "ffn_act_fn.*found 5"),
        ({"eos_token_id": ["a"]}, "must be token ids; found.*'a'"),
        ({"quantization_config": 3}, "quantization_config must be an object; found 3"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of.*int8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DbrxConfig(**arguments)


@pytest.mark.parametrize("cls", [DbrxConfig, DbrxAttentionConfig, DbrxFFNConfig])
def test_unknown_arguments_are_a_type_error(cls: type) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        cls(no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        DbrxConfig(attn_config={"no_such_option": 1})


def test_unknown_keys_of_published_files_are_ignored() -> None:
    data = json.loads((DATA / "dbrx-nano" / "config.json").read_text())
    plain = DbrxConfig.from_dict(data)
    data["attn_config"] |= {"return_dict": True, "torchscript": False, "max_length": 20}
    data["ffn_config"] |= {"return_dict": True, "hidden_size": 6144}
    data["auto_map"] = {"AutoConfig": "configuration_dbrx.DbrxConfig"}
    assert DbrxConfig.from_dict(data) == plain


def test_absent_norm_order_is_one_and_null_is_none() -> None:
    data = json.loads((DATA / "dbrx-nano" / "config.json").read_text())
    assert DbrxConfig.from_dict(data).ffn_config.moe_normalize_expert_weights == 1.0
    data["ffn_config"]["moe_normalize_expert_weights"] = None
    assert DbrxConfig.from_dict(data).ffn_config.moe_normalize_expert_weights is None


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    config = DbrxConfig.from_pretrained(DATA / "dbrx-nano")
    assert config.rope_theta == 500000.0
    config.save_pretrained(tmp_path / "new")
    reloaded = DbrxConfig.from_pretrained(tmp_path / "new")
    assert reloaded == config
    assert reloaded.to_dict() == config.to_dict()
    assert reloaded.to_dict()["attn_config"]["rope_theta"] == 500000.0


def test_another_model_type_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match=r"config\.json: model_type must be 'dbrx'; found 'mixtral'"):
        DbrxConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: must hold a JSON object"):
        DbrxConfig.from_pretrained(tmp_path)


def test_a_section_that_is_used_twice_is_not_changed() -> None:
    attention = DbrxAttentionConfig()
    assert DbrxConfig(attn_config=attention, rope_parameters={"rope_theta": 500000.0}).rope_theta == 500000.0
    assert DbrxConfig(attn_config=attention).rope_theta == 10000.0
