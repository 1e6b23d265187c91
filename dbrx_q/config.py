"""The configuration of a DBRX model: every key of config.json that inference needs, checked when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_sections import DbrxAttentionConfig, DbrxFFNConfig, Section, positive_float, positive_int, probability
from .errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "NORM_EPS", "DbrxAttentionConfig", "DbrxConfig", "DbrxFFNConfig"]

NORM_EPS = 1e-5
"""Added to the variance by every LayerNorm of DBRX; config.json has no key for it."""

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of a checkpoint's plain weights and of activations."""


class DbrxConfig(Section):
    """The configuration of a model. Names and defaults are those of transformers.

        config = DbrxConfig.from_pretrained("dbrx-int4")
        config.n_layers, config.ffn_config.moe_num_experts  # 40, 16

    `hidden_size`, `num_attention_heads`, `num_hidden_layers` and `max_position_embeddings` are other names for `d_model`,
    `n_heads`, `n_layers` and `max_seq_len`. Different values under both names are an error.

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
        rope_parameters: `{"rope_type": "default", "rope_theta": float}`; must agree with `attn_config.rope_theta` if both are given.
        pad_token_id, bos_token_id, eos_token_id: ids of special tokens; `eos_token_id` may be a list.
        tie_word_embeddings: must be False; the head of DBRX has its own weights.
        torch_dtype: name of the dtype that the weights are published in.
        quantization_config: the format of every packed tensor, as the quantizer wrote it; None for a plain checkpoint.

    Raises:
        ConfigError: a value that no DBRX model can have.
        TypeError: an unknown argument.
    """

    model_type = "dbrx"
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
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        torch_dtype: str | None = None,
        quantization_config: Mapping[str, Any] | None = None,
        hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        num_hidden_layers: int | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        self.d_model = _aliased("d_model", d_model, "hidden_size", hidden_size, 2048)
        self.n_heads = _aliased("n_heads", n_heads, "num_attention_heads", num_attention_heads, 16)
        self.n_layers = _aliased("n_layers", n_layers, "num_hidden_layers", num_hidden_layers, 24)
        self.max_seq_len = _aliased("max_seq_len", max_seq_len, "max_position_embeddings", max_position_embeddings, 2048)
        self.vocab_size = positive_int("vocab_size", vocab_size)
        self.resid_pdrop = probability("resid_pdrop", resid_pdrop)
        self.emb_pdrop = probability("emb_pdrop", emb_pdrop)
        self.attn_config = _section("attn_config", attn_config, DbrxAttentionConfig)
        self.ffn_config = _section("ffn_config", ffn_config, DbrxFFNConfig)
        self.use_cache = bool(use_cache)
        self.initializer_range = initializer_range
        self.output_router_logits = bool(output_router_logits)
        self.router_aux_loss_coef = router_aux_loss_coef
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        ids = [pad_token_id, bos_token_id, *(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id])]
        if not all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in ids):
            raise ConfigError(f"pad_token_id, bos_token_id and eos_token_id must be token ids; found {ids}")
        self.tie_word_embeddings = tie_word_embeddings
        self.torch_dtype = torch_dtype
        if quantization_config is not None and not isinstance(quantization_config, Mapping):
            raise ConfigError(f"quantization_config must be an object; found {quantization_config!r}")
        self.quantization_config = None if quantization_config is None else dict(quantization_config)
        self.rope_theta = _resolve_rope_theta(self.attn_config, rope_parameters)
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        self._validate()

    def _validate(self) -> None:
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
        if self.torch_dtype is not None and self.torch_dtype not in DTYPES:
            raise ConfigError(f"torch_dtype must be one of {', '.join(DTYPES)}; found {self.torch_dtype!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are published in; bfloat16 where config.json names none."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_dtype or "bfloat16")
        return dtype

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def hidden_size(self) -> int:
        """Another name for `d_model`."""
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        """Another name for `n_heads`."""
        return self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Another name for `attn_config.kv_n_heads`."""
        return self.attn_config.kv_n_heads

    @property
    def num_hidden_layers(self) -> int:
        """Another name for `n_layers`."""
        return self.n_layers

    @property
    def max_position_embeddings(self) -> int:
        """Another name for `max_seq_len`."""
        return self.max_seq_len

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "config.json") -> DbrxConfig:
        """The configuration in the JSON object of a config.json. Keys that inference does not need are ignored, also in its parts.

        Args:
            data: the parsed JSON object.
            source: its name in errors.

        Raises:
            ConfigError: another model type, or a value that no DBRX model can have.
        """
        model_type = data.get("model_type")
        if model_type != cls.model_type:
            raise ConfigError(f"{source}: model_type must be 'dbrx'; found {model_type!r}. Point to a DBRX checkpoint")
        known = {k: v for k, v in data.items() if k in cls._fields or k in _ALIASES}
        if known.get("torch_dtype") is None:
            known["torch_dtype"] = data.get("dtype")
        for key, section in (("attn_config", DbrxAttentionConfig), ("ffn_config", DbrxFFNConfig)):
            value = known.get(key)
            if isinstance(value, Mapping):
                known[key] = {k: v for k, v in value.items() if k in section._fields}
        try:
            return cls(**known)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> DbrxConfig:
        """Read config.json of a folder, or of a repository on the Hugging Face hub.

        Args:
            path_or_hub_id: a folder, or an `owner/name` of the hub.
            revision: branch, tag or commit on the hub.
            token: access token for a gated repository.

        Raises:
            CheckpointError: no such folder or repository, or a file that is not JSON.
            ConfigError: a value that no DBRX model can have.
        """
        # Imported here, since `checkpoint` imports this module: a configuration loads itself, as in transformers.
        from dbrx_q.checkpoint.hub import resolve_file

        from .json_file import read_json_object

        path = resolve_file(path_or_hub_id, "config.json", revision=revision, token=token)
        return cls.from_dict(read_json_object(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as the JSON object of config.json."""
        data: dict[str, Any] = {"architectures": ["DbrxForCausalLM"], "model_type": self.model_type}
        data |= super().to_dict()
        data["attn_config"] = self.attn_config.to_dict() | {"rope_theta": self.rope_theta}
        data["ffn_config"] = self.ffn_config.to_dict()
        if self.quantization_config is None:
            del data["quantization_config"]
        return data

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into `folder`, which is created if it does not exist."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


_ALIASES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")


def _aliased(name: str, value: int | None, alias: str, other: int | None, default: int) -> int:
    if value is not None and other is not None and value != other:
        raise ConfigError(f"{alias} is another name for {name} and must equal it; found {other} and {value}")
    chosen = value if value is not None else other
    return default if chosen is None else positive_int(name, chosen)


def _section(name: str, value: Any, cls: Any) -> Any:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return copy(value)  # `_resolve_rope_theta` may write into it
    if isinstance(value, Mapping):
        return cls(**value)
    raise ConfigError(f"{name} must be an object; found {value!r}")


def _resolve_rope_theta(attn: DbrxAttentionConfig, rope_parameters: Mapping[str, Any] | None) -> float:
    if rope_parameters is None:
        return attn.rope_theta
    if not isinstance(rope_parameters, Mapping):
        raise ConfigError(f"rope_parameters must be an object; found {rope_parameters!r}")
    kind = rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"rope_parameters.rope_type must be 'default', the only rotary embedding of DBRX; found {kind!r}")
    if rope_parameters.get("rope_theta") is None:
        return attn.rope_theta
    theta = positive_float("rope_parameters.rope_theta", rope_parameters["rope_theta"])
    if attn.rope_theta_given and attn.rope_theta != theta:
        raise ConfigError(
            f"attn_config.rope_theta and rope_parameters.rope_theta must agree; found {attn.rope_theta} and {theta}. "
            "DBRX was trained with 500000; transformers 5 writes 10000 into rope_parameters by mistake: remove the wrong one"
        )
    attn.rope_theta = theta
    attn.rope_theta_given = True
    return theta
