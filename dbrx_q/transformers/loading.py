"""Reads the packed weights of a checkpoint into a transformers model, and builds the store of experts that stay in the files.

transformers reads the plain weights. The packed ones are read here, expert by expert into the stacks that the kernels take, so that no
expert is ever in memory twice.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import DenseTensor, inner_name
from dbrx_q.errors import RequestError
from dbrx_q.experts import ExpertStore
from dbrx_q.experts.fallback import open_fallback
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.kernels.linear import warm_up
from dbrx_q.kernels.triton.launch import chip_of
from dbrx_q.model.loading import LoadingPlan, build_expert_store, cpu_samples, plan_loading
from dbrx_q.model.resident_weights import read_packed
from dbrx_q.model.tuned_tiles import load_tuning
from dbrx_q.planning.budget import Budget

from .layers import DbrxExperts, SharedStore
from .packed import PackedEmbedding, PackedLinear, PackedWeight, packed_weights

__all__ = ["plan_for", "put_packed_modules", "read_packed_weights"]


def put_packed_modules(model: Any, checkpoint: Checkpoint, dtype: torch.dtype, *, without_experts: bool = False) -> None:
    """Replace what is packed in the checkpoint by empty modules, on a model without memory for its weights; can be repeated.

    Args:
        model: transformers' `DbrxModel` or `DbrxForCausalLM`.
        checkpoint: must be open.
        dtype: of activations.
        without_experts: whether a store will serve all experts, so that none is held by the model.
    """
    model._keys_to_ignore_on_load_unexpected = {_read_here(checkpoint, without_experts)}
    for tensor in checkpoint.tensors.values():
        parent, leaf = _parent_of(model, tensor)
        fmt = checkpoint.formats.get(tensor.name)
        if parent is None:
            continue
        if tensor.experts:
            if (fmt is not None or without_experts) and hasattr(parent, leaf):
                delattr(parent, leaf)
            if fmt is not None and not without_experts:
                setattr(parent, leaf, PackedWeight(tensor, fmt))
        elif fmt is not None and not isinstance(getattr(parent, leaf), (PackedLinear, PackedEmbedding)):
            replaced, weight = getattr(parent, leaf), PackedWeight(tensor, fmt)
            padding = getattr(replaced, "padding_idx", None)
            embedding = isinstance(replaced, nn.Embedding)
            setattr(parent, leaf, PackedEmbedding(weight, dtype, padding) if embedding else PackedLinear(weight))


@torch.inference_mode(False)  # as for `dbrx_q.model.loading`: reader threads write into the store's memory
def read_packed_weights(model: Any, folder: Path, budget: Budget | None) -> None:
    """Read the packed weights of `folder` into the modules of `put_packed_modules`, each onto the device of its layer."""
    weights = packed_weights(model)
    dtype, base = model.dtype, model.base_model
    device = base.norm_f.weight.device
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(folder, headless=model is base))
        fallback = opened.enter_context(open_fallback(checkpoint)) if budget is not None and budget.fallback else None
        plan = plan_loading(checkpoint, fallback, dtype, device, budget)
        for tensor in checkpoint.tensors.values():
            if tensor.name in weights:
                place = _device_of(base, tensor)
                if place.type == "cuda" and dtype == torch.float32:
                    raise RequestError("dtype must be bfloat16 or float16 on a GPU; found float32. Name one of them")
                weights[tensor.name].put(read_packed(checkpoint, tensor, checkpoint.formats[tensor.name], place))
        stored = ExpertFiles(checkpoint, dtype) if plan.offloads else None
        stored_fallback = ExpertFiles(fallback, dtype) if fallback is not None and plan.needs_fallback else None
    for weight in cpu_samples(checkpoint, fallback if plan.needs_fallback else None, plan):
        warm_up(weight, dtype)
    for used in {block.norm_attn_norm.norm_1.weight.device for block in base.blocks}:
        if used.type == "cuda":
            load_tuning(chip_of(used))
    if stored is not None:
        _serve(model, build_expert_store(plan, stored, stored_fallback, [block.ffn.router.layer.weight for block in base.blocks]))


def plan_for(checkpoint: Checkpoint, dtype: torch.dtype, budget: Budget | None) -> LoadingPlan:
    """Whether and how a budget offloads experts; refuses one that the model exceeds."""
    with ExitStack() as opened:
        fallback = opened.enter_context(open_fallback(checkpoint)) if budget is not None and budget.fallback else None
        return plan_loading(checkpoint, fallback, dtype, torch.device("cpu"), budget)


def _serve(model: nn.Module, store: ExpertStore) -> None:
    shared = SharedStore(store)
    for module in model.modules():
        if isinstance(module, DbrxExperts):
            module.served_by = shared


def _read_here(checkpoint: Checkpoint, without_experts: bool) -> str:
    """A pattern of the stored tensors that transformers must leave to `read_packed_weights`."""
    parts = {part.name for fmt in checkpoint.formats.values() for part in fmt.parts(fmt.group_size, fmt.group_size)}
    leaves = parts | {tensor.role for tensor in checkpoint.tensors.values() if tensor.experts and without_experts}
    return rf"\.({'|'.join(sorted(leaves))})$"


def _device_of(base: Any, tensor: DenseTensor) -> torch.device:
    """The device that transformers chose for a tensor's layer; outside the layers that of the first layer or of the last norm."""
    if tensor.layer >= 0:
        return base.blocks[tensor.layer].norm_attn_norm.norm_1.weight.device
    return (base.blocks[0].norm_attn_norm.norm_1 if tensor.role == "embedding" else base.norm_f).weight.device


def _parent_of(model: Any, tensor: DenseTensor) -> tuple[Any, str]:
    """The module and the attribute that hold a tensor; (None, "") where the model has none, such as a head."""
    name = inner_name(tensor.name) if model is model.base_model else tensor.name
    if name is None:
        return None, ""
    parent, _, leaf = (name if tensor.experts else name.removesuffix(".weight")).rpartition(".")
    return model.get_submodule(parent), leaf
