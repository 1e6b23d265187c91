"""The classes under test, put into transformers in place of its own: what each variant of `run.py` installs."""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.models.dbrx import modeling_dbrx

import dbrx_q
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, kind_of, oriented
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

__all__ = ["install"]


def install(variant: str) -> None:
    """Put the classes of a variant into transformers, where its tests and its auto classes look them up."""
    replacements = {"plugin": _plugin_classes, "packed": _packed_classes, "native": _native_classes}[variant]()
    for replacement in replacements:
        replacement.__qualname__ = replacement.__name__
        setattr(modeling_dbrx, replacement.__name__, replacement)
        setattr(transformers, replacement.__name__, replacement)


def _plugin_classes() -> tuple[type, type]:
    """transformers' classes with our layers, on plain weights."""
    from dbrx_q.transformers.layers import DbrxEmbedding, DbrxExperts, DbrxLinear, adopt

    class DbrxModel(modeling_dbrx.DbrxModel):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            adopt(self)
            attention = [block.norm_attn_norm.attn for block in self.blocks]
            assert isinstance(self.wte, DbrxEmbedding)
            assert all(isinstance(layer, DbrxLinear) for module in attention for layer in (module.Wqkv, module.out_proj))
            assert all(isinstance(block.ffn.experts, DbrxExperts) for block in self.blocks)

    class DbrxForCausalLM(modeling_dbrx.DbrxForCausalLM):
        """Its constructor makes a `DbrxModel`, by then the one above."""

        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            adopt(self)
            assert isinstance(self.lm_head, DbrxLinear)

    return DbrxModel, DbrxForCausalLM


def _packed_classes() -> tuple[type, type]:
    """The plug-in's classes, quantized once their weights are initialized. A checkpoint has a head, so that only models with one are saved.

    A model that was made from a configuration is saved as a plain checkpoint, which `dbrx-q quantize` makes a packed one: of the same
    weights. Transformers loads that through the plug-in.
    """
    import dbrx_q.transformers as plugin
    from dbrx_q.transformers.layers import adopt

    class DbrxModel(plugin.DbrxModel):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            adopt(self)

    class DbrxForCausalLM(plugin.DbrxForCausalLM):
        def __init__(self, config: transformers.DbrxConfig) -> None:
            super().__init__(config)
            if not self.lm_head.weight.is_meta:
                self.plain = {name: value.clone() for name, value in self.state_dict().items()}
                _quantize(self)

        def save_pretrained(self, save_directory: str, *arguments: Any, **keywords: Any) -> None:
            if getattr(self, "origin", None) is not None:
                super().save_pretrained(save_directory, *arguments, **keywords)
                return
            with tempfile.TemporaryDirectory() as folder:
                plain, packed = Path(folder) / "plain", Path(folder) / "packed"
                plain.mkdir()
                save_file(self.plain, plain / "model.safetensors")
                config = _native_config(self.config)
                config.torch_dtype = self.dtype
                config.save_pretrained(plain)
                self.generation_config.save_pretrained(plain)
                quantize_checkpoint(plain, packed, QuantizationRequest(lambda checkpoint: _formats(checkpoint.config)))
                shutil.copytree(packed, save_directory, dirs_exist_ok=True)

    return DbrxModel, DbrxForCausalLM


FORMAT = TensorFormat("int8", 32)


def _formats(config: dbrx_q.DbrxConfig) -> dict[str, TensorFormat]:
    """All matrices but the routers."""
    return {tensor.name: FORMAT for tensor in dense_tensors(config) if kind_of(tensor.name) not in ("router", "norms")}


def _quantize(model: Any) -> None:
    """Pack the weights of a model that was just made."""
    from dbrx_q.transformers.loading import put_packed_modules
    from dbrx_q.transformers.packed import packed_weights

    config = _native_config(model.config)
    tensors = {tensor.name: tensor for tensor in dense_tensors(config)}
    put_packed_modules(model, SimpleNamespace(tensors=tensors, formats=_formats(config)), model.dtype)
    for name, weight in packed_weights(model).items():
        matrix = oriented(model.plain[name], tensors[name]).contiguous() if tensors[name].experts else model.plain[name]
        weight.put(FORMAT.record.quantize(matrix, FORMAT.group_size))


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

    def resize_token_embeddings(self, *arguments: Any, **keywords: Any) -> nn.Module:
        """Ours. The configuration of transformers follows."""
        native = self.synchronized()
        embedding = native.resize_token_embeddings(*arguments, **keywords)
        self.config.vocab_size = self.vocab_size = native.config.vocab_size
        return embedding

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.ones_(parameter)


def _native_config(config: transformers.DbrxConfig) -> dbrx_q.DbrxConfig:
    """transformers' configuration as ours.

    Weights are tied by transformers itself, so that the two matrices are one parameter. Its tests of scaled rotary embeddings write
    `rope_parameters` into the two parts of a configuration as well, which have none.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    for part in (config.attn_config, config.ffn_config):
        vars(part).pop("rope_parameters", None)
    return dbrx_q.DbrxConfig.of(config)


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
