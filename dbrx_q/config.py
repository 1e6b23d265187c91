"""The configuration of a DBRX model: every key of config.json that inference needs, checked when it is read or set."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar

from .config_keys import ALIASES, check_arguments, check_refused
from .config_methods import ConfigMethods, must_equal
from .config_rope import merged_rope, one_theta, rope_settings
from .config_sections import DbrxAttentionConfig, DbrxFFNConfig, Section
from .config_values import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_TOKENS,
    MOST_WIDTH,
    any_number,
    positive_int,
    probability,
    shortened,
    token_ids,
)
from .errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "NORM_EPS", "DbrxAttentionConfig", "DbrxConfig", "DbrxFFNConfig"]

NORM_EPS = 1e-5
"""Added to the variance by every LayerNorm of DBRX; config.json has no key for it."""

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of a checkpoint's plain weights and of activations."""

_OUTPUT_DEFAULTS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


class _Alias:
    """Another name for an attribute, to read and to set."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.__doc__ = f"Another name for `{name}`."

    def __get__(self, config: DbrxConfig | None, owner: type) -> Any:
        return self if config is None else getattr(config, self._name)

    def __set__(self, config: DbrxConfig, value: Any) -> None:
        setattr(config, self._name, value)


class DbrxConfig(ConfigMethods):
    """The configuration of a model. Names, defaults and methods are those of transformers.

        config = DbrxConfig.from_pretrained("dbrx-int4")
        config.n_layers, config.ffn_config.moe_num_experts  # 40, 16

    `hidden_size`, `num_attention_heads`, `num_hidden_layers` and `max_position_embeddings` are other names for `d_model`,
    `n_heads`, `n_layers` and `max_seq_len`, `num_key_value_heads` for `attn_config.kv_n_heads`. Different values under both names are an
    error. Values are checked when they are set, and against each other by `validate`, which every model calls.

    Args:
        d_model: width of the residual stream; a multiple of `n_heads`.
        n_heads: query heads.
        n_layers: transformer blocks.
        max_seq_len: longest context in tokens.
        vocab_size: rows of the embedding and of the head.
        resid_pdrop: dropout of the residual stream in training; inference applies none.
        emb_pdrop: dropout of the embeddings in training; inference applies none.
        attn_config: a `DbrxAttentionConfig`, or a dictionary of its arguments.
        ffn_config: a `DbrxFFNConfig`, or a dictionary of its arguments.
        use_cache: whether `forward` returns a KV cache by default.
        initializer_range: standard deviation of randomly initialised weights.
        output_router_logits: whether `forward` returns the logits of every router by default.
        router_aux_loss_coef: weight of the load-balancing loss in training.
        rope_parameters: `rope_type` ("default", "linear", "dynamic" or "yarn"), `rope_theta` and the settings of this type.
        rope_scaling: the older name of `rope_parameters`, with `type` for `rope_type`; must agree with it.
        rope_theta: base of the rotary embedding; must agree with `attn_config.rope_theta` and `rope_parameters` where they give it, too.
        pad_token_id, bos_token_id, eos_token_id: ids of special tokens; `eos_token_id` may be a list.
        tie_word_embeddings: must be False; the head of DBRX has its own weights.
        torch_dtype: the dtype that the weights are published in, or its name.
        dtype: another name for `torch_dtype`.
        quantization_config: the format of every packed tensor, as the quantizer wrote it; None for a plain checkpoint.
        architectures: classes that load the checkpoint.
        output_attentions, output_hidden_states, return_dict: defaults of the arguments of `forward` by these names.
        name_or_path: where the configuration was loaded from.
        attn_implementation: the implementation of attention of models that are made from this configuration.
        foreign: arguments of every configuration of transformers, kept and not read; `config_keys.FOREIGN_KEYS` lists them.

    Raises:
        ConfigError: a value that no DBRX model can have.
        TypeError: an unknown argument.
    """

    model_type = "dbrx"
    attribute_map = ALIASES
    sub_configs: ClassVar[dict[str, type[Section]]] = {"attn_config": DbrxAttentionConfig, "ffn_config": DbrxFFNConfig}
    keys_to_ignore_at_inference = ("past_key_values",)
    is_composition = False
    _fields = (
        "d_model",
        "n_heads",
        "n_layers",
        "max_seq_len",
        "vocab_size",
        "resid_pdrop",
        "emb_pdrop",
        "attn_config",
        "ffn_config",
        "use_cache",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "rope_parameters",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "quantization_config",
    )
    _unwritten = ("name_or_path", "rope_theta", "rope_type", "architectures", *_OUTPUT_DEFAULTS)
    _checks = {  # noqa: RUF012 # annotated in the base
        "d_model": lambda name, value: positive_int(name, value, MOST_WIDTH),
        "n_heads": lambda name, value: positive_int(name, value, MOST_HEADS),
        "n_layers": lambda name, value: positive_int(name, value, MOST_LAYERS),
        "max_seq_len": lambda name, value: positive_int(name, value, MOST_POSITIONS),
        "vocab_size": lambda name, value: positive_int(name, value, MOST_TOKENS),
        "resid_pdrop": probability,
        "emb_pdrop": probability,
        "attn_config": lambda name, value: _section(name, value, DbrxAttentionConfig),
        "ffn_config": lambda name, value: _section(name, value, DbrxFFNConfig),
        "use_cache": lambda name, value: bool(value),
        "initializer_range": any_number,
        "output_router_logits": lambda name, value: bool(value),
        "router_aux_loss_coef": any_number,
        "pad_token_id": lambda name, value: token_ids(value),
        "bos_token_id": lambda name, value: token_ids(value),
        "eos_token_id": lambda name, value: token_ids(value),
        "quantization_config": lambda name, value: _object_or_none(name, value),
        **dict.fromkeys(_OUTPUT_DEFAULTS, lambda name, value: bool(value)),
    }

    attn_config: DbrxAttentionConfig
    ffn_config: DbrxFFNConfig
    rope_theta: float
    rope_type: str
    rope_parameters: dict[str, Any]
    hidden_size = _Alias("d_model")
    num_attention_heads = _Alias("n_heads")
    num_hidden_layers = _Alias("n_layers")
    max_position_embeddings = _Alias("max_seq_len")

    def __init__(
        self,
        *,
        d_model: int | None = None,
        n_heads: int | None = None,
        n_layers: int | None = None,
        max_seq_len: int | None = None,
        vocab_size: int = 32000,
        resid_pdrop: float = 0.0,
        emb_pdrop: float = 0.0,
        attn_config: DbrxAttentionConfig | Mapping[str, Any] | None = None,
        ffn_config: DbrxFFNConfig | Mapping[str, Any] | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.05,
        rope_parameters: Mapping[str, Any] | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_theta: float | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization_config: Mapping[str, Any] | None = None,
        architectures: list[str] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        name_or_path: str = "",
        attn_implementation: str | None = None,
        hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        num_hidden_layers: int | None = None,
        max_position_embeddings: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        **foreign: Any,
    ) -> None:
        check_arguments("DbrxConfig()", foreign, [*self._fields, *ALIASES, "rope_theta", "rope_scaling", "dtype", "head_dim"])
        check_refused("", foreign)
        if foreign.pop("model_type", self.model_type) != self.model_type:
            raise ConfigError("model_type must be 'dbrx': this is the configuration of a DBRX. Leave it out")
        self.d_model = _aliased("d_model", d_model, "hidden_size", hidden_size, 2048)
        self.n_heads = _aliased("n_heads", n_heads, "num_attention_heads", num_attention_heads, 16)
        self.n_layers = _aliased("n_layers", n_layers, "num_hidden_layers", num_hidden_layers, 24)
        self.max_seq_len = _aliased("max_seq_len", max_seq_len, "max_position_embeddings", max_position_embeddings, 2048)
        self.vocab_size = vocab_size
        self.resid_pdrop, self.emb_pdrop = resid_pdrop, emb_pdrop
        self.attn_config = attn_config  # type: ignore[assignment] # __setattr__ makes a section of it
        self.ffn_config = ffn_config  # type: ignore[assignment] # the same
        self.use_cache, self.output_router_logits = use_cache, output_router_logits
        self.initializer_range, self.router_aux_loss_coef = initializer_range, router_aux_loss_coef
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.torch_dtype = _aliased_dtype(torch_dtype, dtype)
        self.quantization_config = quantization_config
        self.architectures = architectures
        self.output_attentions, self.output_hidden_states, self.return_dict = output_attentions, output_hidden_states, return_dict
        self.name_or_path = str(name_or_path)
        self._attn_implementation = attn_implementation
        self._resolve_rope(rope_parameters, rope_scaling, rope_theta)
        self.update(foreign)
        self.validate()
        must_equal("attn_config.kv_n_heads", self.num_key_value_heads, "num_key_value_heads", num_key_value_heads)
        must_equal("d_model / n_heads", self.head_dim, "head_dim", head_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("rope_parameters", "rope_scaling"):
            given = rope_settings(name, value or {}, self.max_seq_len)
            self._set_rope(merged_rope({name: given}), given.get("rope_theta", self.rope_theta))
        elif name == "rope_theta":
            self._set_rope(self.rope_parameters, one_theta({name: value})[0])
        else:
            super().__setattr__(name, value)
            if name == "attn_config" and "rope_theta" in vars(self):  # replaced in a configuration that is made already
                self.rope_theta = self.attn_config.rope_theta if self.attn_config._rope_theta_given else self.rope_theta

    def validate(self) -> None:
        """Check the values against each other; a model calls it when it is made.

        Raises:
            ConfigError: values that no DBRX model has together.
        """
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads must divide d_model; found d_model {self.d_model} and n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"d_model / n_heads must be even for rotary embeddings; found {self.d_model} / {self.n_heads} = {self.head_dim}"
            )
        if self.n_heads % self.attn_config.kv_n_heads:
            raise ConfigError(
                f"attn_config.kv_n_heads must divide n_heads; found kv_n_heads {self.attn_config.kv_n_heads} and n_heads {self.n_heads}"
            )
        if self.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings must be false: DBRX's lm_head has weights of its own; found true")
        self.ffn_config.validate()
        if self.attn_config.rope_theta != self.rope_theta:
            one_theta({"attn_config.rope_theta": self.attn_config.rope_theta, "rope_parameters.rope_theta": self.rope_theta})
        self.rope_parameters = self.rope_parameters  # the dictionary may have been changed in place

    def _resolve_rope(self, rope_parameters: Any, rope_scaling: Any, rope_theta: Any) -> None:
        """Gather the rotary embedding from all keys that may give it."""
        keys = {"rope_parameters": rope_parameters, "rope_scaling": rope_scaling}
        places = {name: rope_settings(name, value, self.max_seq_len) for name, value in keys.items() if value is not None}
        thetas = {"attn_config.rope_theta": self.attn_config.rope_theta if self.attn_config._rope_theta_given else None}
        thetas |= {"rope_theta": rope_theta} | {f"{name}.rope_theta": settings.get("rope_theta") for name, settings in places.items()}
        theta, given = one_theta(thetas)
        self._set_rope(merged_rope(places), theta)
        self.attn_config._rope_theta_given = given

    def _set_rope(self, settings: Mapping[str, Any], theta: float) -> None:
        values = {"rope_type": settings["rope_type"], "rope_theta": theta}
        vars(self).update(values, rope_parameters={**settings, **values})
        self.attn_config.rope_theta = theta

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """Another name for `rope_parameters`, to read and to set."""
        return self.rope_parameters

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that the weights are published in; None where config.json names none. May be set to a dtype or its name."""
        if self._dtype_name is None:
            return None
        import torch

        named: torch.dtype = getattr(torch, self._dtype_name)
        return named

    @torch_dtype.setter
    def torch_dtype(self, value: torch.dtype | str | None) -> None:
        name = value if value is None or isinstance(value, str) else str(value)
        name = None if name is None else name.removeprefix("torch.")
        if name is not None and name not in DTYPES:
            raise ConfigError(f"torch_dtype must be one of {', '.join(DTYPES)}; found {shortened(value)}")
        self._dtype_name = name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are published in; bfloat16 where config.json names none. May be set to a dtype or its name."""
        import torch

        return self.torch_dtype or torch.bfloat16

    @dtype.setter
    def dtype(self, value: torch.dtype | str | None) -> None:
        self.torch_dtype = value

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Another name for `attn_config.kv_n_heads`, to read and to set."""
        return self.attn_config.kv_n_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        self.attn_config.kv_n_heads = value

    @property
    def use_return_dict(self) -> bool:
        """Another name for `return_dict`."""
        return self.return_dict

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens: `max_seq_len`, which a dynamic scaling of the rotary embedding multiplies by its factor."""
        factor = self.rope_parameters["factor"] if self.rope_type == "dynamic" else 1.0
        return min(int(self.max_seq_len * max(1.0, factor)), MOST_POSITIONS)

    def _read_keys(self) -> dict[str, Any]:
        return super()._read_keys() | {"torch_dtype": self._dtype_name}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as the JSON object of config.json, with the attributes that it does not read."""
        data: dict[str, Any] = {"architectures": self.architectures or ["DbrxForCausalLM"], "model_type": self.model_type}
        data |= super().to_dict()
        data |= {key: getattr(self, key).to_dict() for key in self.sub_configs}
        data |= {name: value for name, default in _OUTPUT_DEFAULTS.items() if (value := getattr(self, name)) != default}
        if self.quantization_config is None:
            del data["quantization_config"]
        return data


def _aliased(name: str, value: int | None, alias: str, other: int | None, default: int) -> int:
    if value is not None and other is not None:
        must_equal(name, value, alias, other)
    chosen = value if value is not None else other
    return default if chosen is None else chosen


def _aliased_dtype(torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    names = [str(value).removeprefix("torch.") for value in (torch_dtype, dtype) if value is not None]
    if len(set(names)) > 1:
        raise ConfigError(f"dtype is another name for torch_dtype and must equal it; found {names[1]} and {names[0]}")
    return dtype if torch_dtype is None else torch_dtype


def _section(name: str, value: Any, cls: Any) -> Any:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return copy(value)  # the base of the rotary embedding may be written into it
    if isinstance(value, Mapping):
        return cls(**value)
    if callable(getattr(value, "to_dict", None)):  # a section of a transformers configuration
        return cls(**{key: item for key, item in value.to_dict().items() if key != "transformers_version"})
    raise ConfigError(f"{name} must be an object; found {shortened(value)}")


def _object_or_none(name: str, value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object; found {shortened(value)}")
    return None if value is None else dict(value)
