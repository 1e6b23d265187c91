"""From a checkpoint to a model in memory, tensor by tensor, packed weights straight into their final place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.hub import resolve_folder
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, kind_of, matrix_parts, pack_parts, parts_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError, UnsupportedError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.experts.build import Parts, build_store
from dbrx_q.experts.fallback import open_fallback
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.link import make_link
from dbrx_q.experts.measured_rates import measure_rates
from dbrx_q.experts.policies import CachePolicy, make_policy
from dbrx_q.experts.reader import ExpertReader, reads_faster_directly
from dbrx_q.experts.tiered_store import NextRouter
from dbrx_q.experts.trace import Trace
from dbrx_q.json_file import read_json_object
from dbrx_q.kernels.attention import IMPLEMENTATIONS
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.cpu.linear import warm_up
from dbrx_q.kernels.formats.weights import PackedFormat
from dbrx_q.kernels.triton.launch import chip_of
from dbrx_q.planning.budget import DEFAULT_CONTEXT, Budget, check_fits, check_free
from dbrx_q.planning.footprint import MemoryRequest, step_tokens
from dbrx_q.planning.host_memory import empty_host
from dbrx_q.planning.machine import Placement
from dbrx_q.planning.placement import place

from .devices import check_device
from .layers import PackedWeight
from .modeling import DbrxForCausalLM
from .tuned_tiles import load_tuning

__all__ = ["eos_ids", "load_model", "load_plain_model", "load_pretrained", "plan_of"]

_CPU = torch.device("cpu")
_SMALL = 64 << 20


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> DbrxForCausalLM:
    """`DbrxForCausalLM.from_pretrained` with all that can be said of memory."""
    if budget is not None and check_device(device).type != "cpu":
        raise RequestError(f"a budget says which devices are used; found device {str(device)!r} beside it. Leave one of them out")
    place = check_device(device) if budget is None or not budget.machine.gpus else budget.gpus[0]
    triton = pick(place) is Backend.TRITON
    implementation = attn_implementation or ("triton" if triton else "sdpa")
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}; found {implementation!r}")
    if implementation == "triton" and not triton:
        raise UnsupportedError(f"attn_implementation 'triton' needs a GPU; the device is {str(place)!r}. Choose 'sdpa' or 'eager'")
    folder = resolve_folder(path_or_hub_id, revision=revision, token=token, fallback=budget is not None and budget.fallback)
    model = load_model(folder, dtype=dtype, device=place, budget=budget)
    for block in model.transformer.layers():
        block.norm_attn_norm.attn.implementation = implementation
    return model


@torch.inference_mode(False)  # whoever loads in it would get tensors that threads, which are not in it, may not write to
def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device = _CPU, budget: Budget | None = None
) -> DbrxForCausalLM:
    """The model in `folder`, whole on `device`, or as a budget's plan has it; errors as for `DbrxForCausalLM.from_pretrained`."""
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(folder))
        config = checkpoint.config
        chosen = dtype or getattr(torch, config.torch_dtype or "bfloat16")
        fallback = opened.enter_context(open_fallback(checkpoint)) if budget is not None and budget.fallback else None
        its = None if fallback is None else fallback.formats
        plan = None if budget is None else plan_of(config, checkpoint.formats, replace(budget, dtype=chosen), str(folder), its)
        profile = None if budget is None or budget.profile is None else Trace.read(budget.profile).check(config).counts()
        gpus = budget.gpus if budget is not None else ()
        tiered = budget is not None and plan is not None and not plan.resident
        device_of = _devices_of(config, plan, gpus, device)
        device = device_of(config.n_layers)
        model = _empty(config, chosen, device)
        products: dict[TensorFormat, PackedFormat] = {}
        for tensor in checkpoint.tensors.values():
            fmt = checkpoint.formats.get(tensor.name)
            if tensor.experts and tiered:
                if fmt is not None:
                    products.setdefault(fmt, _one_row(tensor, fmt))
                continue
            there = device_of(_layer_of(tensor, config))
            if fmt is None:
                _put(model, tensor.name, _dense(checkpoint, tensor, chosen, there))
                continue
            weight = _packed(checkpoint, tensor, fmt, there)
            _put(model, tensor.name, PackedWeight(weight))
            if tensor.name != "transformer.wte.weight":  # whose rows are looked up
                products[fmt] = weight[0] if tensor.experts else weight
        files = ExpertFiles(checkpoint, chosen) if tiered else None
        fallback_files = None
        if fallback is not None and plan is not None and plan.host.fallback:
            fallback_files = ExpertFiles(fallback, chosen)
            products |= {
                fmt: _one_row(fallback.tensors[name], fmt) for name, fmt in fallback.formats.items() if fallback.tensors[name].experts
            }
    if pick(device) is Backend.CPU or tiered:
        for weight in products.values():
            if weight.device.type == "cpu":
                warm_up(weight, chosen)
    store = None
    if files is not None and plan is not None and budget is not None:
        store = _tiered_store(model, files, plan, budget, profile, fallback_files)
    model = _ready(model, device, eos_ids(folder), store)
    if plan is not None and budget is not None:
        model.placement, model.transformer.kv_budget = plan, sum(place.kv_cache for place in plan.devices)
        # The head runs when what the layers needed is free again; a little more is part of what the process takes besides.
        last = next(there for there in reversed(plan.gpus or (plan.host,)) if there.layers[1] > there.layers[0])
        model.logit_room = last.workspace + _SMALL
        model.transformer.step_limit = step_tokens(config, _request_of(config, budget), "cuda" if plan.gpus else "cpu")
    return model


def plan_of(
    config: DbrxConfig,
    formats: Mapping[str, TensorFormat],
    budget: Budget,
    source: str,
    fallback: Mapping[str, TensorFormat] | None = None,
) -> Placement:
    """The plan that `load_model` follows.

    fallback: formats of the copy that the checkpoint carries, where it is to answer.

    Raises:
        RequestError: it does not fit, or not into what is free now, or a context or a batch that the model cannot have.
    """
    request = _request_of(config, budget, fallback)
    context = request.context
    for name, value, most in (("context", context, config.max_seq_len), ("batch", budget.batch, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            limit = "at least 1" if most is None else f"from 1 to the model's {most:,} tokens"
            raise RequestError(f"{source}: {name} must be a whole number {limit}; found {value!r}")
    plan = place(config, formats, budget.machine, request)
    check_fits(plan, source)
    check_free(plan, budget.gpus, source)
    return plan


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


def _request_of(config: DbrxConfig, budget: Budget, fallback: Mapping[str, TensorFormat] | None = None) -> MemoryRequest:
    """What a budget wants memory for."""
    context = min(DEFAULT_CONTEXT, config.max_seq_len) if budget.context is None else budget.context
    return MemoryRequest(context, budget.batch, budget.kv_format, budget.step_tokens, budget.logit_rows, budget.dtype, fallback)


def _empty(config: DbrxConfig, dtype: torch.dtype, device: torch.device) -> DbrxForCausalLM:
    """The model without memory for its weights."""
    if device.type == "cuda" and dtype == torch.float32:
        raise RequestError("dtype must be bfloat16 or float16 on a GPU; found float32. Name one of them, or leave the device out")
    with torch.device("meta"):
        return DbrxForCausalLM(config)


def _ready(model: DbrxForCausalLM, device: torch.device, eos_token_ids: Sequence[int], store: ExpertStore | None) -> DbrxForCausalLM:
    layers = model.transformer.layers()
    for used in {device, *model.transformer.devices}:
        if used.type == "cuda":
            load_tuning(chip_of(used))
    model.transformer.expert_store = store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in layers])
    model.eos_token_ids = tuple(eos_token_ids) or model.eos_token_ids
    return model


def _devices_of(
    config: DbrxConfig, plan: Placement | None, gpus: Sequence[torch.device], device: torch.device
) -> Callable[[int], torch.device]:
    """The device of each layer by its index, -1 being the embedding and `n_layers` the head."""
    if plan is None or not plan.gpus:
        return lambda layer: device
    of = [gpu for gpu, there in zip(gpus, plan.gpus, strict=True) for _ in range(*there.layers)]
    return lambda layer: of[min(max(layer, 0), config.n_layers - 1)]


def _layer_of(tensor: DenseTensor, config: DbrxConfig) -> int:
    """The layer whose device a tensor lies on: the embedding with the first, norm and head with the last."""
    return tensor.layer if tensor.layer >= 0 or kind_of(tensor.name) == "embedding" else config.n_layers


def _tiered_store(
    model: DbrxForCausalLM,
    files: ExpertFiles,
    plan: Placement,
    budget: Budget,
    profile: np.ndarray | None,
    fallback: ExpertFiles | None,
) -> ExpertStore:
    """A store with the plan's slots, full of experts."""
    config = model.config
    L, E, A = config.n_layers, config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k

    on_disk = plan.disk_experts * plan.expert_bytes // plan.experts
    direct = reads_faster_directly(files, uncached_bytes=on_disk + plan.host.total) if budget.direct is None else budget.direct

    def policy(layers: Sequence[int], under: bool) -> CachePolicy:
        return make_policy(budget.policy, L, E, profile)

    routers = [NextRouter(block.ffn.router.layer.weight, A) for block in model.transformer.layers()]
    with ExitStack() as failed:
        reader = failed.enter_context(closing(ExpertReader(files, direct=direct)))
        its = None if fallback is None else (fallback, failed.enter_context(closing(ExpertReader(fallback, direct=direct))))
        parts = Parts(files, reader, budget.gpus, make_link, policy, fallback=its, upgrade=budget.upgrade)
        store = build_store(parts, plan, budget.machine, prefetch=budget.prefetch, miss_policy=budget.miss_policy, routers=routers)
        failed.enter_context(closing(store))
        store.fill(profile)
        for gpu in store.gpus if isinstance(store, GpuExpertStore) else ():
            gpu.calibrated(measure_rates(gpu, store.tier, model.dtype))
        failed.pop_all()
    return store


def _one_row(tensor: DenseTensor, fmt: TensorFormat) -> PackedFormat:
    """A weight [1, K] like those of `tensor`."""
    parts = matrix_parts(tensor, fmt.in_memory)
    return pack_parts({part.name: torch.zeros(1, *part.shape[1:], dtype=part.dtype) for part in parts}, fmt.in_memory)


def _dense(checkpoint: Checkpoint, tensor: DenseTensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    stored = checkpoint.infos[tensor.name].dtype
    values = checkpoint.read(tensor.name, empty_host(tensor.shape, stored))
    return nn.Parameter(values.to(dtype).to(device), requires_grad=False)


def _packed(checkpoint: Checkpoint, tensor: DenseTensor, fmt: TensorFormat, device: torch.device) -> PackedFormat:
    """The parts of all experts are read into one stack each, so that kernels find expert e at a fixed distance.

    For a GPU every part passes through host memory by itself, so that never more than one matrix lies there.
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
