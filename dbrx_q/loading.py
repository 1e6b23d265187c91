"""From a checkpoint to a model in memory, tensor by tensor, packed weights straight into their final place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint
from .config import DbrxConfig
from .errors import CheckpointError, RequestError
from .experts import ExpertStore, ResidentExpertStore
from .host_memory import empty_host
from .jsonfile import read_json_object
from .kernels.backend import Backend, pick
from .kernels.cpu import warm_up
from .kernels.launch import chip_of
from .kernels.linear import PackedFormat
from .layers import PackedWeight
from .layout import DenseTensor, TensorFormat, dense_tensors, pack_parts, parts_of
from .model import DbrxForCausalLM
from .tuning import load_tuning

__all__ = ["eos_ids", "load_model", "load_plain_model"]

_CPU = torch.device("cpu")


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device = _CPU) -> DbrxForCausalLM:
    """The model in `folder`, whole on `device`; errors as for `DbrxForCausalLM.from_pretrained`."""
    with Checkpoint(folder) as checkpoint:
        chosen = dtype or getattr(torch, checkpoint.config.torch_dtype or "bfloat16")
        model = _empty(checkpoint.config, chosen, device)
        products: dict[TensorFormat, PackedFormat] = {}
        for tensor in checkpoint.tensors.values():
            fmt = checkpoint.formats.get(tensor.name)
            if fmt is None:
                _put(model, tensor.name, _dense(checkpoint, tensor, chosen, device))
                continue
            weight = _packed(checkpoint, tensor, fmt, device)
            _put(model, tensor.name, PackedWeight(weight))
            if tensor.name != "transformer.wte.weight":  # whose rows are looked up
                products[fmt] = weight[0] if tensor.experts else weight
    if pick(device) is Backend.CPU:
        for weight in products.values():
            warm_up(weight, chosen)
    return _ready(model, device, eos_ids(folder), None)


def load_plain_model(
    config: DbrxConfig,
    read: Callable[[DenseTensor], torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    eos_token_ids: Sequence[int] = (),
    expert_store: ExpertStore | None = None,
) -> DbrxForCausalLM:
    """A model of plain weights, whatever they were stored as.

    Args:
        config: its configuration.
        read: gives a tensor in the shape of a plain checkpoint; called once for each, one after the other.
        dtype: of activations and weights; bfloat16 or float16 on a GPU.
        device: where the model computes.
        eos_token_ids: that end a generation; the configuration's where there are none.
        expert_store: serves the experts, whose tensors are then not read; None for all of them in memory.
    """
    model = _empty(config, dtype, device)
    for tensor in dense_tensors(config):
        if expert_store is None or not tensor.experts:
            _put(model, tensor.name, nn.Parameter(read(tensor).to(dtype).to(device), requires_grad=False))
    for block in model.transformer.layers():
        block.norm_attn_norm.attn.implementation = "triton" if pick(device) is Backend.TRITON else "sdpa"
    return _ready(model, device, eos_token_ids, expert_store)


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a generation by `folder`'s generation_config.json; none without it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    value = read_json_object(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them; found {value!r}")
    return tuple(ids)


def _empty(config: DbrxConfig, dtype: torch.dtype, device: torch.device) -> DbrxForCausalLM:
    """The model without memory for its weights."""
    if device.type == "cuda" and dtype == torch.float32:
        raise RequestError("dtype must be bfloat16 or float16 on a GPU; found float32. Name one of them, or leave the device out")
    with torch.device("meta"):
        return DbrxForCausalLM(config)


def _ready(model: DbrxForCausalLM, device: torch.device, eos_token_ids: Sequence[int], store: ExpertStore | None) -> DbrxForCausalLM:
    if device.type == "cuda":
        load_tuning(chip_of(device))
    layers = model.transformer.layers()
    model.transformer.expert_store = store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in layers])
    model.eos_token_ids = tuple(eos_token_ids) or model.eos_token_ids
    return model


def _dense(checkpoint: Checkpoint, tensor: DenseTensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    stored = checkpoint.infos[tensor.name].dtype
    values = checkpoint.read(tensor.name, empty_host(tensor.shape, stored))
    return nn.Parameter(values.to(dtype).to(device), requires_grad=False)


def _packed(checkpoint: Checkpoint, tensor: DenseTensor, fmt: TensorFormat, device: torch.device) -> PackedFormat:
    """The parts of all experts are read into one stack each, so that kernels find expert e at a fixed distance.

    For a GPU every part passes through host memory by itself, so that never more than one expert's matrix lies there.
    """
    stacks: dict[str, torch.Tensor] = {}
    for part in parts_of(tensor, fmt):
        prefix, last = part.name.rsplit(".", 1)
        expert = int(prefix.rsplit(".", 1)[1]) if tensor.experts else 0
        shape = tensor.experts or 1, *part.shape
        if last not in stacks:
            on_host = device.type == "cpu"
            stacks[last] = empty_host(shape, part.dtype) if on_host else torch.empty(shape, dtype=part.dtype, device=device)
        if device.type == "cpu":
            checkpoint.read(part.name, stacks[last][expert])
        else:
            stacks[last][expert].copy_(checkpoint.read(part.name))
    if not tensor.experts:
        stacks = {last: stack[0] for last, stack in stacks.items()}
    return pack_parts(stacks, fmt)


def _put(model: nn.Module, name: str, holder: nn.Parameter | PackedWeight) -> None:
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    delattr(module, leaf)
    setattr(module, leaf, holder)
