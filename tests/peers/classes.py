"""The classes under test, put into transformers in place of its own: what each variant of `run.py` installs."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers.models.dbrx import modeling_dbrx

import dbrx_q

__all__ = ["install"]


def install(variant: str) -> None:
    """Put the classes of a variant into transformers, where its tests and its auto classes look them up."""
    replacements = {"native": _native_classes, "plugin": _plugin_classes}[variant]()
    for replacement in replacements:
        replacement.__qualname__ = replacement.__name__
        setattr(modeling_dbrx, replacement.__name__, replacement)
        setattr(transformers, replacement.__name__, replacement)


def _plugin_classes() -> tuple[type, type]:
    """transformers' classes whose layers compute with our kernels, on plain weights."""
    from dbrx_q.transformers.layers import DbrxExperts, adopt

    class DbrxModel(modeling_dbrx.DbrxModel):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            adopt(self)
            assert all(isinstance(block.ffn.experts, DbrxExperts) for block in self.blocks)

    class DbrxForCausalLM(modeling_dbrx.DbrxForCausalLM):
        """Its constructor makes a `DbrxModel`, by then the one above."""

    return DbrxModel, DbrxForCausalLM


class _Pretrained(transformers.PreTrainedModel):
    """A transformers model around one of ours, which has the same modules: transformers sees its own methods, `forward` is ours.

    `native` is no submodule. Before it computes it gets the modules that the model has by then, since transformers replaces some, and
    the configuration, since tests change it.
    """

    config_class = transformers.DbrxConfig
    config: transformers.DbrxConfig
    base_model_prefix = "transformer"
    _no_split_modules: ClassVar = ["DbrxBlock"]
    _input_embed_layer = "wte"
    _supports_sdpa = True

    def adopt(self, native: nn.Module) -> None:
        """Take the modules of `native`."""
        self.__dict__["native"] = native
        for name, module in native.named_children():
            setattr(self, name, module)

    def synchronized(self) -> nn.Module:
        """`native` with the modules, the configuration and the attention that this model has now."""
        native = self.__dict__["native"]
        native.config = _native_config(self.config)
        for name, module in self.named_children():
            setattr(native, name, module.synchronized() if isinstance(module, _Pretrained) else module)
        for block in native.base_model.blocks:
            block.norm_attn_norm.attn.implementation = self.config._attn_implementation
        return native

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.ones_(parameter)


def _native_config(config: transformers.DbrxConfig) -> dbrx_q.DbrxConfig:
    """transformers' configuration as ours. Weights are tied by transformers itself, so that the two matrices are one parameter."""
    values = config.to_dict() | {"tie_word_embeddings": False}
    return dbrx_q.DbrxConfig.from_dict(values)


def _native_classes() -> tuple[type, type]:
    """Our models as transformers models."""

    class DbrxModel(_Pretrained):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            self.adopt(dbrx_q.DbrxModel(_native_config(config)))
            self.post_init()

        @wraps(dbrx_q.DbrxModel.forward)
        def forward(self, *inputs: Any, **arguments: Any) -> Any:
            return self.synchronized().forward(*inputs, **arguments)

    class DbrxForCausalLM(_Pretrained, transformers.GenerationMixin):
        _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            self.adopt(dbrx_q.DbrxForCausalLM(_native_config(config)))
            self.transformer = DbrxModel(config)
            self.vocab_size = config.vocab_size
            self.post_init()

        @wraps(dbrx_q.DbrxForCausalLM.forward)
        def forward(self, *inputs: Any, **arguments: Any) -> Any:
            return self.synchronized().forward(*inputs, **arguments)

    return DbrxModel, DbrxForCausalLM
