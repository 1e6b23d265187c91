"""The classes under test, put into transformers in place of its own: what each variant of `run.py` installs."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from torch import nn
from transformers.models.dbrx import modeling_dbrx

import dbrx_q.model.modeling as native
from dbrx_q.model import pretrained
from dbrx_q.planning.machine import Placement

__all__ = ["install"]


def install(variant: str) -> None:
    """Put the classes of a variant into transformers, where its tests and its auto classes look them up."""
    base, causal = {"native": _native_classes, "plugin": _plugin_classes}[variant]()
    for name, replacement in (("DbrxModel", base), ("DbrxForCausalLM", causal)):
        replacement.__name__ = replacement.__qualname__ = name
        setattr(modeling_dbrx, name, replacement)
        setattr(transformers, name, replacement)


def _plugin_classes() -> tuple[type, type]:
    """transformers' classes whose layers compute with our kernels, on plain weights."""
    from dbrx_q.transformers.layers import adopt

    class DbrxModel(modeling_dbrx.DbrxModel):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            adopt(self)

    class DbrxForCausalLM(modeling_dbrx.DbrxForCausalLM):
        """Its constructor makes a `DbrxModel`, by then the one above."""

    return DbrxModel, DbrxForCausalLM


class _Pretrained(transformers.PreTrainedModel):
    """What transformers asks of a model class beside its modules."""

    config_class = transformers.DbrxConfig
    config: transformers.DbrxConfig
    base_model_prefix = "transformer"
    _no_split_modules: ClassVar = ["DbrxBlock"]
    _input_embed_layer = "wte"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.ones_(parameter)


class _NativeModel(native.DbrxModel):
    """Its constructor may run before it gets its configuration: `PreTrainedModel` calls it as if it were `nn.Module`'s."""

    def __init__(self, config: Any = None) -> None:
        if config is None:
            nn.Module.__init__(self)
        else:
            super().__init__(config)


class _NativeCausal(native.DbrxForCausalLM):
    """As `_NativeModel`."""

    def __init__(self, config: Any = None) -> None:
        if config is None:
            nn.Module.__init__(self)
        else:
            super().__init__(config)


def _native_classes() -> tuple[type, type]:
    pretrained.Placement = Placement  # type: ignore[attr-defined]  # transformers evaluates the annotations of a model's bases

    class DbrxModel(_Pretrained, _NativeModel):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            _Pretrained.__init__(self, config)
            _NativeModel.__init__(self, config)
            self.post_init()

    class DbrxForCausalLM(_Pretrained, transformers.GenerationMixin, _NativeCausal):
        _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}

        def __init__(self, config: transformers.DbrxConfig) -> None:
            _Pretrained.__init__(self, config)
            _NativeCausal.__init__(self, config)
            self.transformer = DbrxModel(config)
            self.vocab_size = config.vocab_size
            self.post_init()

    return DbrxModel, DbrxForCausalLM
