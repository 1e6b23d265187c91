"""Which keys of a configuration give the rotary embedding, which must agree, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dbrx_q import DbrxConfig
from dbrx_q.errors import ConfigError

NANO = json.loads((Path(__file__).parent.parent / "data" / "dbrx-nano" / "config.json").read_text())
BARE = {key: value for key, value in NANO["attn_config"].items() if key != "rope_theta"}


def of_file(**keys: Any) -> DbrxConfig:
    return DbrxConfig.from_dict(NANO | {"attn_config": BARE} | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_config": BARE | {"rope_theta": 500000}},
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_theta": 500000}},
        {"rope_scaling": {"rope_theta": 500000}},
        {
            "rope_theta": 500000,
            "attn_config": BARE | {"rope_theta": 500000},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ],
    ids=lambda keys: "+".join(keys),
)
def test_theta_is_read_from_every_place(keys: dict[str, Any]) -> None:
    config = of_file(**keys)
    assert (config.rope_theta, config.attn_config.rope_theta, config.rope_parameters) == (
        500000.0,
        500000.0,
        {"rope_type": "default", "rope_theta": 500000.0},
    )
    written = json.loads(json.dumps(config.to_dict()))
    assert "rope_theta" not in written
    assert DbrxConfig.from_dict(written) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_theta": 10000, "attn_config": BARE | {"rope_theta": 500000}},
            r"attn_config.rope_theta and rope_theta .*500000\.0 and 10000\.0",
        ),
        (
            {"rope_theta": 10000, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta and rope_parameters.rope_theta.*10000\.0 and 500000\.0",
        ),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_theta": 8.0}}, r"trained with 500000"),
        ({"rope_theta": "500000"}, r"rope_theta must be a finite number above 0; found '500000'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, r"rope_scaling.rope_type must be one of .*found 'llama3'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters.rope_type must be one of .*found 'longrope'"),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            r"rope_scaling.rope_type and rope_scaling.type must agree",
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"must not have the key 'factor'; it belongs to rope_type linear or dynamic or yarn"),
        ({"rope_scaling": {"type": "linear"}}, r"must have a factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, r"rope_scaling.factor must be a finite number above 0; found -1\.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}},
            r"must not have the key 'beta_fast'; it belongs to rope_type yarn",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            r"rope_parameters and rope_scaling must scale alike",
        ),
        ({"rope_scaling": "linear"}, r"rope_scaling must be an object; found 'linear'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be absent, because DBRX rotates all channels.*0\.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor must be 1.*0\.5"),
        ({"head_dim": 64}, r"head_dim is another name for d_model / n_heads and must equal it; found 64 and 32"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads is another name for attn_config.kv_n_heads.*found 4 and 2"),
        ({"attn_config": BARE | {"rope_scaling": {"type": "linear", "factor": 2}}}, r"attn_config.rope_scaling must be absent.*top level"),
        ({"ffn_config": NANO["ffn_config"] | {"uniform_expert_assignment": True}}, r"ffn_config.uniform_expert_assignment must be absent"),
        ({"moe_top_k": 2}, r"moe_top_k must be in ffn_config; found 2 at the top level"),
        ({"is_causal": False}, r"is_causal must be absent, because DBRX is causal; found False"),
        ({"dtype": "float16"}, r"dtype is another name for torch_dtype.*float16 and bfloat16"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_key_that_would_change_results_is_never_dropped(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_file(**keys)


def test_absent_and_default_scalings_are_no_scaling() -> None:
    for keys in (
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"head_dim": 32},
    ):
        assert of_file(rope_theta=500000.0, **keys) == DbrxConfig.from_dict(NANO)


def test_scalings_are_kept_as_transformers_keeps_them() -> None:
    for keys in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 512},
    ):
        ours = of_file(**keys)
        theirs = transformers.DbrxConfig.from_dict(NANO | {"attn_config": BARE} | keys)
        theirs.standardize_rope_params()
        assert ours.rope_parameters == {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
        assert DbrxConfig.from_dict(ours.to_dict()) == ours


def test_the_rotary_embedding_can_be_set() -> None:
    config = DbrxConfig.from_dict(NANO)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    assert (config.rope_theta, config.rope_type, config.rope_scaling["factor"]) == (500000.0, "linear", 2.0)
    config.rope_theta = 300
    assert (config.rope_parameters["rope_theta"], config.attn_config.rope_theta) == (300.0, 300.0)
    config.rope_parameters["rope_theta"] = 400.0  # in place: noticed when a model is made
    config.validate()
    assert config.rope_theta == 400.0
    config.attn_config.rope_theta = 500.0
    with pytest.raises(ConfigError, match=r"must agree; found 500\.0 and 400\.0"):
        config.validate()
