"""The parts of the configuration of a DBRX model, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

__all__ = ["DbrxAttentionConfig", "DbrxFFNConfig", "Section", "positive_float", "positive_int", "probability"]

_DEFAULT_ROPE_THETA = 10000.0


class Section:
    """Equality, repr and the dictionary form, which the three configurations share."""

    _fields: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as the JSON object of config.json."""
        return {name: getattr(self, name) for name in self._fields}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment] # mutable, like every configuration of this field

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({inner})"


class DbrxAttentionConfig(Section):
    """The attention of every block: `attn_config` in config.json.

    Args:
        attn_pdrop: dropout probability of attention weights in training; inference applies none.
        clip_qkv: queries, keys and values are clamped to [-clip_qkv, clip_qkv] before they are split; None for no clamp.
        kv_n_heads: key/value heads; must divide `n_heads`.
        rope_theta: base of the rotary embedding; 10000.0 unless this or `rope_parameters` gives another value.

    Raises:
        ConfigError: a value out of range.
    """

    _fields = ("attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta")

    def __init__(
        self,
        *,
        attn_pdrop: float = 0.0,
        clip_qkv: float | None = None,
        kv_n_heads: int = 1,
        rope_theta: float | None = None,
    ) -> None:
        self.attn_pdrop = probability("attn_config.attn_pdrop", attn_pdrop)
        self.clip_qkv = None if clip_qkv is None else positive_float("attn_config.clip_qkv", clip_qkv)
        self.kv_n_heads = positive_int("attn_config.kv_n_heads", kv_n_heads)
        self.rope_theta_given = rope_theta is not None
        self.rope_theta = _DEFAULT_ROPE_THETA if rope_theta is None else positive_float("attn_config.rope_theta", rope_theta)


class DbrxFFNConfig(Section):
    """The mixture of experts of every block: `ffn_config` in config.json.

    Args:
        ffn_act_fn: `{"name": "silu"}`, the only activation that DBRX was trained with, or None, which stands for it.
        ffn_hidden_size: width of one expert.
        moe_num_experts: experts of a layer.
        moe_top_k: experts that each token is routed to.
        moe_jitter_eps: router noise in training; inference applies none.
        moe_loss_weight: weight of the load-balancing loss in training.
        moe_normalize_expert_weights: the weights of a token's experts are divided by their p-norm, of which this is the order p; None for
            no division.

    Raises:
        ConfigError: a value out of range.
    """

    _fields = (
        "ffn_act_fn",
        "ffn_hidden_size",
        "moe_num_experts",
        "moe_top_k",
        "moe_jitter_eps",
        "moe_loss_weight",
        "moe_normalize_expert_weights",
    )

    def __init__(
        self,
        *,
        ffn_act_fn: Mapping[str, Any] | None = None,
        ffn_hidden_size: int = 3584,
        moe_num_experts: int = 4,
        moe_top_k: int = 1,
        moe_jitter_eps: float | None = None,
        moe_loss_weight: float = 0.01,
        moe_normalize_expert_weights: float | None = 1.0,
    ) -> None:
        self.ffn_act_fn = {"name": "silu"}
        if ffn_act_fn is not None and ffn_act_fn != self.ffn_act_fn:
            raise ConfigError(f'ffn_config.ffn_act_fn must be {{"name": "silu"}}, the activation of DBRX; found {ffn_act_fn!r}')
        self.ffn_hidden_size = positive_int("ffn_config.ffn_hidden_size", ffn_hidden_size)
        self.moe_num_experts = positive_int("ffn_config.moe_num_experts", moe_num_experts)
        self.moe_top_k = positive_int("ffn_config.moe_top_k", moe_top_k)
        if self.moe_top_k > self.moe_num_experts:
            raise ConfigError(
                f"ffn_config.moe_top_k must not exceed ffn_config.moe_num_experts; found {self.moe_top_k} > {self.moe_num_experts}"
            )
        self.moe_jitter_eps = moe_jitter_eps
        self.moe_loss_weight = moe_loss_weight
        self.moe_normalize_expert_weights = (
            None
            if moe_normalize_expert_weights is None
            else positive_float("ffn_config.moe_normalize_expert_weights", moe_normalize_expert_weights)
        )


def positive_int(name: str, value: Any) -> int:
    """The value of a key, a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; found {value!r}")
    return value


def positive_float(name: str, value: Any) -> float:
    """The value of a key, a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0; found {value!r}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """The value of a key, a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a probability between 0 and 1; found {value!r}")
    return float(value)
