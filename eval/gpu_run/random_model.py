"""A model of random weights, made on the device that computes: packed as `dbrx-q quantize` packs them by default."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.device_timing import random_weight
from dbrx_q.eval.bench.kernel_shapes import Shapes
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.model.implementations import set_implementation
from dbrx_q.model.loading import model_of_weights
from dbrx_q.model.modeling import DbrxForCausalLM

__all__ = ["config_of", "formats_of", "layers_that_fit", "nbytes_of", "random_model"]

_SPREAD = 0.02  # standard deviation of plain weights, as in trained ones
_EXPERTS, _OTHERS = TensorFormat("int4", 64), TensorFormat("int8", 64)


def config_of(shapes: Shapes, layers: int, *, vocabulary: int | None = None) -> DbrxConfig:
    """The configuration of a model of these sizes.

    Args:
        shapes: of the model.
        layers: of it.
        vocabulary: tokens, where they are not those of `shapes`.
    """
    config = DbrxConfig(
        d_model=shapes.width,
        n_heads=shapes.heads,
        n_layers=layers,
        max_seq_len=shapes.context,
        vocab_size=vocabulary or shapes.vocabulary,
        attn_config={"kv_n_heads": shapes.kv_heads, "clip_qkv": shapes.clip},
        ffn_config={"ffn_hidden_size": shapes.hidden, "moe_num_experts": shapes.experts, "moe_top_k": shapes.active},
        torch_dtype="bfloat16",
    )
    entries = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in formats_of(config).items()}
    config.quantization_config = {"quant_method": "dbrx_q", "format_version": 1, "tensors": entries}  # which `save_model` writes
    return config


def formats_of(config: DbrxConfig) -> dict[str, TensorFormat]:
    """int4 experts, int8 embedding, attention and head, the rest plain: what `dbrx-q quantize` writes by default."""
    return {
        tensor.name: _EXPERTS if kind == "experts" else _OTHERS
        for tensor in dense_tensors(config)
        if (kind := kind_of(tensor.name)) in ("experts", "embedding", "attention", "head")
    }


def nbytes_of(config: DbrxConfig) -> int:
    """Bytes of the weights of `random_model`."""
    formats = formats_of(config)
    return sum(_random(tensor, formats, torch.device("meta")).nbytes for tensor in dense_tensors(config))


def layers_that_fit(shapes: Shapes, layers: int, nbytes: int) -> int:
    """How many layers of a model, at most `layers` and at least one, take no more than `nbytes` with embedding and head."""
    one, two = (nbytes_of(config_of(shapes, count)) for count in (1, 2))
    return max(1, min(layers, 1 + (nbytes - one) // (two - one)))


def random_model(config: DbrxConfig, device: torch.device) -> DbrxForCausalLM:
    """A model with random weights, whose attention is Triton's on a GPU; on "meta" one without memory, within `recording`."""
    torch.manual_seed(0)
    formats = formats_of(config)
    model = model_of_weights(config, lambda tensor: _random(tensor, formats, device), dtype=torch.bfloat16, device=device)
    if device.type != "cpu":
        set_implementation(model.base_model, "triton")
    return model


def _random(tensor: DenseTensor, formats: Mapping[str, TensorFormat], device: torch.device) -> Weight:
    if tensor.name in formats:
        stack = (tensor.experts,) if tensor.experts else ()
        return random_weight(formats[tensor.name], *stack, *tensor.matrix, device=device)
    plain = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
    return plain.fill_(1) if len(tensor.shape) == 1 else plain.normal_(std=_SPREAD)  # one dimension: a norm
