"""From a checkpoint to a model in memory: weights are mapped, or read straight into their final place.

`load_model` has three steps: plan what is read and where to (`plan_loading`), map or read the weights that stay in memory
(`_load_resident_weights`), and build the expert store that serves all others (`build_expert_store`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dbrx_q.checkpoint.deferred_checks import DeferredChecks
from dbrx_q.checkpoint.folder import Checkpoint, converted
from dbrx_q.checkpoint.hub import Download, resolve_folder
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors, inner_name, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.experts.build import StoreParts, build_store
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
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.kernels.linear import warm_up
from dbrx_q.kernels.triton.launch import chip_of
from dbrx_q.planning.budget import Budget, plan_within
from dbrx_q.planning.cpu_quota import bound_threads
from dbrx_q.planning.machine import Placement
from dbrx_q.planning.policy_names import MissPolicy

from .devices import check_device
from .generation_config import GenerationConfig
from .implementations import choose_implementation, set_implementation
from .layers import PackedWeight
from .limits import limits_of
from .modeling import DbrxForCausalLM, DbrxModel
from .pretrained import DbrxPreTrainedModel
from .resident_weights import MappedWeights, read_packed, read_plain
from .saving import Origin, model_tensors
from .tuned_tiles import load_tuning

__all__ = [
    "LoadingPlan",
    "build_expert_store",
    "cpu_samples",
    "eos_ids",
    "load_as",
    "load_model",
    "load_pretrained",
    "model_of_weights",
    "plan_loading",
]

Model = TypeVar("Model", bound=DbrxPreTrainedModel)
_CPU = torch.device("cpu")
_CONSTRUCTORS = frozenset({torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros})
_DOWNLOAD = Download()


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    use_mmap: bool = True,
) -> DbrxForCausalLM:
    """`load_as` of the model with its head."""
    return load_as(DbrxForCausalLM, path_or_hub_id, budget=budget, device=device, dtype=dtype, use_mmap=use_mmap)


def load_as(
    model_class: type[Model],
    path_or_hub_id: str | os.PathLike[str],
    *,
    config: Any = None,
    overrides: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    use_mmap: bool = True,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    download: Download = _DOWNLOAD,
) -> Model:
    """`model_class.from_pretrained` once its arguments are checked: fetches what a hub id names, loads it, chooses its attention."""
    if budget is not None and check_device(device).type != "cpu":
        raise RequestError(f"a budget says which devices are used; found device {str(device)!r} beside it. Leave one of them out")
    target = check_device(device) if budget is None or not budget.machine.gpus else budget.gpus[0]
    given = None if config is None else _with_overrides(DbrxConfig.of(config), overrides)
    asked = attn_implementation or (None if given is None else given._attn_implementation)
    choose_implementation(asked, target)  # an error before anything is fetched
    fallback = budget is not None and budget.fallback
    folder = resolve_folder(path_or_hub_id, revision=revision, token=token, fallback=fallback, download=download)
    if given is None and overrides:
        given = _with_overrides(DbrxConfig.from_pretrained(folder), overrides)
    model = _load(model_class, folder, dtype, target, budget, given, use_mmap)
    model.config.name_or_path = os.fspath(path_or_hub_id)
    set_implementation(model.base_model, choose_implementation(asked or model.config._attn_implementation, target))
    return model


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = _CPU,
    budget: Budget | None = None,
    use_mmap: bool = True,
) -> DbrxForCausalLM:
    """The model in `folder`: all of it on `device`, or placed within a budget. Errors as for `DbrxForCausalLM.from_pretrained`."""
    return _load(DbrxForCausalLM, folder, dtype, device, budget, None, use_mmap)


def _with_overrides(config: DbrxConfig, overrides: Mapping[str, Any] | None) -> DbrxConfig:
    """A copy of a configuration with some other values."""
    config = deepcopy(config)
    config.update(overrides or {})
    config.validate()
    return config


@torch.inference_mode(False)  # Tensors created in inference mode cannot be written by the reader threads, which run outside it.
def _load(
    model_class: type[Model],
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    budget: Budget | None,
    config: DbrxConfig | None,
    use_mmap: bool,
) -> Model:
    bound_threads()
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(folder, config, headless=not _has_head(model_class)))
        fallback = opened.enter_context(open_fallback(checkpoint)) if budget is not None and budget.fallback else None
        plan = plan_loading(checkpoint, fallback, dtype, device, budget)
        checks = DeferredChecks()
        model = _load_resident_weights(model_class, checkpoint, plan, checks if use_mmap and plan.may_map else None)
        model.origin = Origin.of(checkpoint)
        experts = ExpertFiles(checkpoint, plan.dtype) if plan.offloads else None
        fallback_experts = ExpertFiles(fallback, plan.dtype) if fallback is not None and plan.needs_fallback else None
    for weight in cpu_samples(checkpoint, fallback if plan.needs_fallback else None, plan):
        warm_up(weight, plan.dtype)
    routers = [block.ffn.router.layer.weight for block in model.base_model.layers()]
    store = None if experts is None else build_expert_store(plan, experts, fallback_experts, routers)
    model = _completed(model, plan.device_of_head, eos_ids(folder), store, checks)
    if isinstance(model, DbrxForCausalLM) and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if plan.placement is not None and budget is not None:
        model.placement = plan.placement
        model.base_model.limits = limits_of(plan.placement, model.config, budget.request(model.config))
    return model


def model_of_weights(
    config: DbrxConfig,
    read: Callable[[DenseTensor], Weight],
    *,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    eos_token_ids: Sequence[int] = (),
    expert_store: ExpertStore | None = None,
    source: str = "the checkpoint",
) -> DbrxForCausalLM:
    """A model of weights from a checkpoint of any program.

    Args:
        config: of the model.
        read: returns a tensor, plain in the shape that a plain checkpoint has, or packed with its reduction axis last; called once for
            each tensor, in the order of the model.
        dtype: of activations and plain weights; bfloat16 or float16 on a GPU.
        device: where the model computes.
        eos_token_ids: token ids that end a generation; if empty, those of the configuration.
        expert_store: serves the experts, whose tensors are then not read; None to keep all experts in memory.
        source: the checkpoint in messages.

    Raises:
        CheckpointError: a value that `dtype` cannot hold.
    """
    bound_threads()
    model = _empty(DbrxForCausalLM, config, dtype, device)
    multiplied: dict[tuple[str, int], QuantizedWeight] = {}
    for tensor in dense_tensors(config):
        if expert_store is not None and tensor.experts:
            continue
        weight = read(tensor)
        if isinstance(weight, QuantizedWeight):
            packed = weight.to(device)
            _put(model, tensor.name, PackedWeight(packed))
            if kind_of(tensor.name) != "embedding":
                multiplied[packed.format, packed.group_size] = (packed[0] if tensor.experts else packed).rows(0, 1)
        else:
            values = converted(weight, dtype, tensor.name, source).to(device)
            _put(model, tensor.name, nn.Parameter(values, requires_grad=False))
    if pick(device) is Backend.CPU:
        for sample in multiplied.values():
            warm_up(sample, dtype)
    set_implementation(model.base_model, choose_implementation(None, device))
    return _completed(model, device, eos_token_ids, expert_store)


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The token ids that end a generation by generation_config.json in `folder`; empty without that file.

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


@dataclass(frozen=True)
class LoadingPlan:
    """Which weights of a checkpoint are read into memory, and onto which device."""

    config: DbrxConfig
    """Of the checkpoint."""
    dtype: torch.dtype
    """Of activations and of plain weights."""
    device: torch.device
    """Of the whole model where the placement names no GPUs."""
    budget: Budget | None
    """What the model may take; None for all weights on `device`."""
    placement: Placement | None
    """What each device holds; None without a budget."""
    profile: np.ndarray | None
    """How often each expert was used in the budget's profile [L, E]; None without one."""

    @property
    def offloads(self) -> bool:
        """Whether some experts are not held by the device that computes them, so that an expert store must bring them."""
        return self.placement is not None and not self.placement.resident

    @property
    def may_map(self) -> bool:
        """Whether weights may be views of mapped files: on a CPU without a budget, which holds what it counts in memory of its own."""
        return self.budget is None and self.device.type == "cpu"

    @property
    def needs_fallback(self) -> bool:
        """Whether host memory holds the fallback copy: only where some experts are left on disk."""
        return self.placement is not None and self.placement.host.fallback > 0

    @property
    def device_of_head(self) -> torch.device:
        """Where the last layer, the last norm and the head compute."""
        return self.device_of(self.config.n_layers)

    def device_of(self, layer: int) -> torch.device:
        """The device of a layer; -1 stands for the embedding, `n_layers` for the last norm and the head."""
        if self.placement is None or self.budget is None or not self.placement.gpus:
            return self.device
        layer = min(max(layer, 0), self.config.n_layers - 1)
        gpus = zip(self.budget.gpus, self.placement.gpus, strict=True)
        return next(device for device, plan in gpus if plan.layers[0] <= layer < plan.layers[1])

    def device_of_tensor(self, tensor: DenseTensor) -> torch.device:
        """The embedding is held with the first layer, the last norm and the head with the last one."""
        outside = -1 if kind_of(tensor.name) == "embedding" else self.config.n_layers
        return self.device_of(tensor.layer if tensor.layer >= 0 else outside)


def plan_loading(
    checkpoint: Checkpoint, fallback: Checkpoint | None, dtype: torch.dtype | None, device: torch.device, budget: Budget | None
) -> LoadingPlan:
    """Decide what is read into memory; refuses a budget that the model exceeds before any weight is read."""
    config, dtype = checkpoint.config, dtype or checkpoint.config.dtype
    if budget is None:
        return LoadingPlan(config, dtype, device, None, None, None)
    fallback_formats = None if fallback is None else fallback.formats
    placement = plan_within(budget, config, checkpoint.formats, str(checkpoint.folder), dtype=dtype, fallback=fallback_formats)
    profile = None if budget.profile is None else Trace.read(budget.profile).check(config).counts()
    return LoadingPlan(config, dtype, device, budget, placement, profile)


def _load_resident_weights(model_class: type[Model], checkpoint: Checkpoint, plan: LoadingPlan, checks: DeferredChecks | None) -> Model:
    """The model with all its weights, or with all but experts where the plan offloads them.

    Args:
        model_class: of the model.
        checkpoint: must be open.
        plan: says which weights are loaded, and onto which device.
        checks: where the weights are mapped, gets the checks of all that are; None to read all weights.
    """
    model = _empty(model_class, plan.config, plan.dtype, plan.device_of_head)
    mapped = None if checks is None else MappedWeights(checkpoint, checks)
    names = {tensor.name for tensor in model_tensors(model)}
    for tensor in checkpoint.tensors.values():
        if (tensor.experts and plan.offloads) or tensor.name not in names:
            continue
        device, fmt = plan.device_of_tensor(tensor), checkpoint.formats.get(tensor.name)
        if fmt is None:
            weight = mapped.plain(tensor, plan.dtype) if mapped is not None else None
            _put(model, tensor.name, read_plain(checkpoint, tensor, plan.dtype, device) if weight is None else weight)
        else:
            packed = mapped.packed(tensor, fmt) if mapped is not None else None
            _put(model, tensor.name, PackedWeight(read_packed(checkpoint, tensor, fmt, device) if packed is None else packed))
    return model


def build_expert_store(
    plan: LoadingPlan, experts: ExpertFiles, fallback: ExpertFiles | None, routers: Sequence[torch.Tensor]
) -> ExpertStore:
    """A store with the slots of the plan, filled with experts.

    Args:
        plan: has a placement.
        experts: where the experts are stored.
        fallback: where those of the fallback copy are stored; None without one.
        routers: [E, D] of every layer, on the devices of the layers.
    """
    budget, placement = plan.budget, plan.placement
    assert budget is not None
    assert placement is not None
    L, E, A = plan.config.n_layers, plan.config.ffn_config.moe_num_experts, plan.config.ffn_config.moe_top_k
    uncached = placement.disk_experts * placement.expert_bytes // placement.experts + placement.host.total
    direct = reads_faster_directly(experts, uncached_bytes=uncached) if budget.direct is None else budget.direct

    def policy(layers: Sequence[int], under: bool) -> CachePolicy:
        return make_policy(budget.cache_policy, L, E, plan.profile)

    next_routers = [NextRouter(router, A) for router in routers]
    miss_policy = MissPolicy(budget.miss_policy)
    with ExitStack() as on_error:
        reader = on_error.enter_context(closing(ExpertReader(experts, direct=direct)))
        copy = None if fallback is None else (fallback, on_error.enter_context(closing(ExpertReader(fallback, direct=direct))))
        parts = StoreParts(experts, reader, budget.gpus, make_link, policy, fallback=copy, upgrade=budget.upgrade)
        store = build_store(parts, placement, budget.machine, prefetch=budget.prefetch, miss_policy=miss_policy, routers=next_routers)
        on_error.enter_context(closing(store))
        store.fill(plan.profile)
        for gpu in store.gpus if isinstance(store, GpuExpertStore) else ():
            gpu.use_rates(measure_rates(gpu, store.tier, plan.dtype))
        on_error.pop_all()
    return store


def cpu_samples(checkpoint: Checkpoint, fallback: Checkpoint | None, plan: LoadingPlan) -> list[QuantizedWeight]:
    """A weight [1, K] of every packed format that the CPU multiplies."""
    samples: dict[TensorFormat, QuantizedWeight] = {}
    for source in [checkpoint] if fallback is None else [checkpoint, fallback]:
        for tensor in source.tensors.values():
            fmt = source.formats.get(tensor.name)
            if fmt is None or kind_of(tensor.name) == "embedding":  # rows of an embedding are looked up, not multiplied
                continue
            missed = tensor.experts > 0 and plan.offloads  # the CPU computes experts that a GPU misses, too
            if missed or (source is checkpoint and pick(plan.device_of_tensor(tensor)) is Backend.CPU):
                parts = fmt.in_memory.parts(1, tensor.matrix[1])
                samples[fmt] = fmt.in_memory.load({part.name: torch.zeros(part.shape, dtype=part.dtype) for part in parts})
    return list(samples.values())


def _empty(model_class: type[Model], config: DbrxConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """The model without memory for its weights."""
    if device.type == "cuda" and dtype == torch.float32:
        raise RequestError("dtype must be bfloat16 or float16 on a GPU; found float32. Name one of them, or leave the device out")
    with _OnMeta():
        return model_class(config)


class _OnMeta(TorchFunctionMode):
    """Makes tensors without memory, as `with torch.device("meta")` does, which would import torch.nested and with it half of torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **{"device": "meta", **(kwargs or {})} if func in _CONSTRUCTORS else kwargs or {})


def _completed(
    model: Model,
    device: torch.device,
    eos_token_ids: Sequence[int],
    store: ExpertStore | None,
    checks: DeferredChecks | None = None,
) -> Model:
    """`model`, whose weights are loaded, with its expert store, its end tokens and the tiles that were measured for its GPUs."""
    for used in {device, *model.base_model.devices}:
        if used.type == "cuda":
            load_tuning(chip_of(used))
    layers = model.base_model.layers()
    model.base_model.expert_store = store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in layers], checks)
    model.base_model.wte.dtype = model.dtype
    model.eos_token_ids = tuple(eos_token_ids) or model.eos_token_ids
    if isinstance(model, DbrxForCausalLM) and eos_token_ids:
        model.generation_config.eos_token_id = list(eos_token_ids)
    return model


def _has_head(model_class: type[DbrxPreTrainedModel]) -> bool:
    """Whether models of the class have a head: `DbrxModel` has none."""
    return not issubclass(model_class, DbrxModel)


def _put(model: DbrxPreTrainedModel, name: str, holder: nn.Parameter | PackedWeight) -> None:
    """Replace the parameter that the checkpoint calls `name`."""
    inner = inner_name(name)
    path, leaf = (inner or name).rsplit(".", 1)
    module = (model if inner is None else model.base_model).get_submodule(path)
    delattr(module, leaf)
    setattr(module, leaf, holder)
