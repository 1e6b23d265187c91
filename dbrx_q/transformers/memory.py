"""What `max_memory` and `device_map` of transformers mean for a packed model: a budget, and the devices of the layers.

transformers moves whole layers between a GPU, host memory and the disk in every forward pass. A packed model moves single experts instead:
where its weights exceed `max_memory`, or where `device_map` names the disk, an expert store serves the experts, and all other weights stay
in memory. `max_memory` limits weights alone, as in transformers; a `Budget` includes KV cache and workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import RequestError
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine, Placement
from dbrx_q.planning.placement import place
from dbrx_q.planning.sizes import format_size

__all__ = ["budget_for_layers", "budget_for_weights", "device_map_of", "layers_below", "main_device"]

_UNLIMITED = 1 << 60


def budget_for_weights(checkpoint: Checkpoint, dtype: torch.dtype, limits: Mapping[Any, float]) -> Budget | None:
    """The budget that leaves `limits` to weights; None if all weights fit.

    Args:
        checkpoint: must be open.
        dtype: of activations and plain weights.
        limits: bytes by index of a GPU and by "cpu", as transformers makes them of `max_memory`.

    Raises:
        RequestError: the weights exceed the memory of several GPUs, or there is less than the model can run with.
    """
    gpus = [int(limits[key]) for key in sorted(key for key in limits if isinstance(key, int))]
    ram = int(limits.get("cpu", 0))
    whole = _placed(checkpoint, dtype, Machine(_UNLIMITED, tuple(Gpu(_UNLIMITED) for _ in gpus[:1])))
    computing = (whole.gpus or (whole.host,))[0]
    needed = computing.dense + computing.experts
    if needed <= sum(gpus or [ram]):
        return None
    if len(gpus) > 1:
        raise RequestError(
            f"{checkpoint.folder}: the weights must fit the {len(gpus)} GPUs of max_memory; they take {needed:,} bytes and the GPUs have "
            f"{sum(gpus):,}. Give quantization_config=DbrxQConfig(gpus=..., ram=...), which leaves experts in host memory and on disk"
        )
    plan = _placed(checkpoint, dtype, Machine(ram, tuple(Gpu(size) for size in gpus)))
    beside = [device.kv_cache + device.workspace + device.reserve for device in plan.devices]
    sizes = [size + more for size, more in zip([*gpus, ram], beside, strict=True)]
    machine = Machine(sizes[-1], tuple(Gpu(size) for size in sizes[:-1]))
    plan = _placed(checkpoint, dtype, machine)
    for device, more in zip(plan.devices, beside, strict=True):
        if device in plan.over_budget:
            raise RequestError(
                f"{checkpoint.folder}: max_memory must leave weights at least {format_size(device.total - more)} of {device.device}, for "
                f"those that every token reads and for an expert; found {format_size((device.budget or 0) - more)}. Give more"
            )
    return Budget(machine)


def layers_below(device_map: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of a device map that are not held by its main device, by where they are: "cpu" or "disk".

    Raises:
        RequestError: experts below several GPUs.
    """
    places = {key: str(place) for key, place in device_map.items()}
    main = str(main_device(device_map))
    below = {place: [key for key, other in places.items() if other == place] for place in ("cpu", "disk") if place != main}
    below = {place: keys for place, keys in below.items() if keys}
    gpus = set(places.values()) - {"cpu", "disk"}
    if below and len(gpus) > 1:
        raise RequestError(
            f"a device_map must name one GPU where it also names {' and '.join(below)}; found {len(gpus)}. "
            "Give quantization_config=DbrxQConfig(gpus=..., ram=...) without a device_map"
        )
    return below


def main_device(device_map: Mapping[str, Any]) -> Any:
    """The first GPU of a device map; "cpu" where it has none."""
    return next((place for place in device_map.values() if str(place) not in ("cpu", "disk")), "cpu")


def budget_for_layers(checkpoint: Checkpoint, dtype: torch.dtype, below: Mapping[str, list[str]], *, gpu: bool) -> Budget:
    """The budget of a device map: of the layers "cpu" and "disk" the experts leave the main device, which keeps all other weights.

    Args:
        checkpoint: must be open.
        dtype: of activations and plain weights.
        below: as `layers_below` gives it.
        gpu: whether the main device is a GPU.
    """
    files, whole = ExpertFiles(checkpoint, dtype), _placed(checkpoint, dtype, Machine(_UNLIMITED, (Gpu(_UNLIMITED),) if gpu else ()))
    sizes = {
        place: sum(kind.nbytes * files.n_experts for layer, kind in enumerate(files.kinds) if _names(keys, layer))
        for place, keys in below.items()
    }
    main = (whole.gpus or (whole.host,))[0]
    held = main.dense + main.experts - sum(sizes.values())
    limits: dict[Any, float] = {0: held, "cpu": sizes.get("cpu", 0)} if gpu else {"cpu": held}
    budget = budget_for_weights(checkpoint, dtype, _at_least(checkpoint, dtype, limits))
    assert budget is not None
    return budget


def device_map_of(checkpoint: Checkpoint, placement: Placement, devices: Mapping[int, torch.device]) -> dict[str, Any]:
    """The device of each part of the model, for the layers of a placement on GPUs."""
    L = checkpoint.config.n_layers
    device_of = {layer: devices[i] for i, plan in enumerate(placement.gpus) for layer in range(*plan.layers)}
    first, last = device_of[0], device_of[L - 1]
    outside = {"transformer.wte": first, "transformer.rotary_emb": first, "transformer.norm_f": last, "lm_head": last}
    return {**outside, **{f"transformer.blocks.{layer}": device for layer, device in device_of.items()}}


def _placed(checkpoint: Checkpoint, dtype: torch.dtype, machine: Machine) -> Placement:
    return place(checkpoint.config, checkpoint.formats, machine, Budget(machine).request(checkpoint.config, dtype))


def _at_least(checkpoint: Checkpoint, dtype: torch.dtype, limits: Mapping[Any, float]) -> dict[Any, float]:
    """Limits that leave room for the experts of one step, where a device map leaves none."""
    kinds = ExpertFiles(checkpoint, dtype).kinds
    spare = (checkpoint.config.ffn_config.moe_top_k + 2) * max(kind.nbytes for kind in kinds) * len(set(kinds))
    whole = _placed(checkpoint, dtype, Machine(_UNLIMITED, (Gpu(_UNLIMITED),) if 0 in limits else ()))
    dense = (whole.gpus or (whole.host,))[0].dense
    least = {key: (dense if key == 0 or 0 not in limits else 0) + spare for key in limits}
    return {key: max(size, least[key]) for key, size in limits.items()}


def _names(keys: list[str], layer: int) -> bool:
    """Whether one of the keys of a device map covers the experts of a layer."""
    experts = f"transformer.blocks.{layer}.ffn.experts.mlp."
    return any(key == "" or experts.startswith((f"{key}.", f"transformer.{key}.")) for key in keys)
