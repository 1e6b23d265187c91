"""The parts of the configuration of a DBRX model, and what they have in common with the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, ClassVar

from .config_keys import check_arguments, check_refused
from .config_rope import DEFAULT_THETA
from .config_values import MOST_EXPERTS, MOST_HEADS, MOST_WIDTH, any_number, positive_float, positive_int, probability, shortened
from .errors import ConfigError

__all__ = ["DbrxAttentionConfig", "DbrxFFNConfig", "Section"]


class Section:
    """Equality, repr, iteration and the dictionary form, which the three configurations share.

    Any other attribute may be set; it is written to config.json and read back, as in transformers.
    """

    _fields: ClassVar[tuple[str, ...]]
    _checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]]
    _prefix: ClassVar[str] = ""
    _unwritten: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        object.__setattr__(self, name, value if check is None else check(f"{self._prefix}{name}", value))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as the JSON object of config.json, with the attributes that it does not read."""
        return deepcopy(self._read_keys() | self.foreign)

    @property
    def foreign(self) -> dict[str, Any]:
        """Attributes that the model does not read: kept, and written to config.json."""
        hidden = {*self._fields, *self._unwritten}
        return {name: value for name, value in vars(self).items() if name not in hidden and not name.startswith("_")}

    def _read_keys(self) -> dict[str, Any]:
        """The keys that the model reads."""
        return {name: getattr(self, name) for name in self._fields}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Section) and self._read_keys() == other._read_keys()

    __hash__ = None  # type: ignore[assignment] # mutable, like every configuration of this field

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({inner})"

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several attributes."""
        for name, value in values.items():
            setattr(self, name, value)

    def _take_foreign(self, foreign: Mapping[str, Any]) -> None:
        """Keep arguments that every configuration of transformers takes."""
        check_arguments(f"{type(self).__name__}()", foreign, self._fields, section=True)
        check_refused(self._prefix, foreign)
        for name, value in foreign.items():
            setattr(self, name, value)


def _number_or_none(name: str, value: Any) -> float | None:
    return None if value is None else any_number(name, value)


class DbrxAttentionConfig(Section):
    """The attention of every block: `attn_config` in config.json.

    Args:
        attn_pdrop: dropout probability of attention weights in training; inference applies none.
        clip_qkv: queries, keys and values are clamped to [-clip_qkv, clip_qkv] before they are split; None for no clamp.
        kv_n_heads: key/value heads; must divide `n_heads`.
        rope_theta: base of the rotary embedding; 10000.0 unless this or a key of the whole configuration gives another value.
        foreign: arguments of every configuration of transformers, which the attention does not read.

    Raises:
        ConfigError: a value out of range.
        TypeError: an unknown argument.
    """

    _fields = ("attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta")
    _prefix = "attn_config."
    _checks = {  # noqa: RUF012 # annotated in the base
        "attn_pdrop": probability,
        "clip_qkv": lambda name, value: None if value is None else positive_float(name, value),
        "kv_n_heads": lambda name, value: positive_int(name, value, MOST_HEADS),
        "rope_theta": positive_float,
    }

    def __init__(
        self,
        *,
        attn_pdrop: float = 0.0,
        clip_qkv: float | None = None,
        kv_n_heads: int = 1,
        rope_theta: float | None = None,
        **foreign: Any,
    ) -> None:
        self.attn_pdrop = attn_pdrop
        self.clip_qkv = clip_qkv
        self.kv_n_heads = kv_n_heads
        self._rope_theta_given = rope_theta is not None
        self.rope_theta = DEFAULT_THETA if rope_theta is None else rope_theta
        self._take_foreign(foreign)


class DbrxFFNConfig(Section):
    """The mixture of experts of every block: `ffn_config` in config.json.

    Args:
        ffn_act_fn: `{"name": "silu"}`, the only activation that DBRX was trained with, or None, which stands for it.
        ffn_hidden_size: width of one expert.
        moe_num_experts: experts of a layer.
        moe_top_k: experts that each token is routed to.
        moe_jitter_eps: router noise in training; inference applies none.
        moe_loss_weight: weight of the load-balancing loss.
        moe_normalize_expert_weights: the weights of a token's experts are divided by their p-norm, of which this is the order p; None for
            no division.
        foreign: arguments of every configuration of transformers, which the experts do not read.

    Raises:
        ConfigError: a value out of range.
        TypeError: an unknown argument.
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
    _prefix = "ffn_config."
    _checks = {  # noqa: RUF012 # annotated in the base
        "ffn_act_fn": lambda name, value: _silu(name, value),
        "ffn_hidden_size": lambda name, value: positive_int(name, value, MOST_WIDTH),
        "moe_num_experts": lambda name, value: positive_int(name, value, MOST_EXPERTS),
        "moe_top_k": lambda name, value: positive_int(name, value, MOST_EXPERTS),
        "moe_jitter_eps": _number_or_none,
        "moe_loss_weight": any_number,
        "moe_normalize_expert_weights": lambda name, value: None if value is None else positive_float(name, value, _MOST_NORM),
    }

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
        **foreign: Any,
    ) -> None:
        self.ffn_act_fn = ffn_act_fn
        self.ffn_hidden_size = ffn_hidden_size
        self.moe_num_experts = moe_num_experts
        self.moe_top_k = moe_top_k
        self.moe_jitter_eps = moe_jitter_eps
        self.moe_loss_weight = moe_loss_weight
        self.moe_normalize_expert_weights = moe_normalize_expert_weights
        self._take_foreign(foreign)
        self.validate()

    def validate(self) -> None:
        """Check the numbers against each other.

        Raises:
            ConfigError: more experts per token than there are.
        """
        if self.moe_top_k > self.moe_num_experts:
            raise ConfigError(
                f"ffn_config.moe_top_k must not exceed ffn_config.moe_num_experts; found {self.moe_top_k} > {self.moe_num_experts}"
            )


_SILU = {"name": "silu"}
_MOST_NORM = 64.0  # the p-th power of a router weight must not vanish in float32


def _silu(name: str, value: Any) -> dict[str, str]:
    if value is not None and value != _SILU:
        raise ConfigError(f'{name} must be {{"name": "silu"}}, the activation of DBRX; found {shortened(value)}')
    return dict(_SILU)
