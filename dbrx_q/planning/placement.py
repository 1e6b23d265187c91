"""Which device holds what: a plan from a model's configuration alone. No weight is read, and none needs to be downloaded.

Every GPU holds the attention of a contiguous range of layers, their keys and values, and a cache of their experts. Host memory holds as
many of the other experts as its budget (`--ram`) allows; the rest is only on disk. Without GPUs, the host computes.

How a budget becomes slots: what else must be in memory is subtracted from it (`footprint.py`), and `_allocate` divides the rest into
slots of the size of one expert. The loader makes exactly these slots (`experts/build.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig

from .expert_kinds import ExpertKind
from .footprint import Footprint, MemoryRequest
from .machine import DevicePlan, Gpu, Machine, Placement
from .offloading import SCRATCH_SLOTS, initial_slots, pinned_bytes, staging_bytes
from .speed import expected_seconds

__all__ = ["place"]

# The relative time that it costs if one GPU holds all of its experts and another one none.
_SPREAD_WEIGHT = 0.3


def place(config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, request: MemoryRequest) -> Placement:
    """The fastest plan for a model whose tensors are packed in `formats`.

    It never fails: if nothing fits, the plan says how many bytes are missing.
    """
    model = Footprint.of(config, formats, request)
    if not machine.gpus:
        return _on_host(model, machine)
    layers, count = config.n_layers, len(machine.gpus)
    if layers < count:  # the last GPUs stay empty
        return _on_gpus(model, machine, [min(c + 1, layers) for c in range(count)])
    plans: dict[tuple[int, ...], Placement] = {}

    def cost(ends: tuple[int, ...]) -> tuple[float, ...]:
        if ends not in plans:
            plans[ends] = _on_gpus(model, machine, ends)
        return _cost(model, machine, plans[ends])

    return plans[_best_split(layers, machine.gpus, cost)]


def _on_host(model: Footprint, machine: Machine) -> Placement:
    layers = len(model.kinds)
    dense = sum(model.dense) + model.embedding + model.head
    kv = layers * model.kv
    wanted = _expert_counts(model.kinds, model)
    workspace = model.host_workspace
    fallback: Counter[ExpertKind] = Counter()
    available = None if machine.ram is None else machine.ram - dense - kv - workspace
    slots, shortfall = _allocate(wanted, available)
    if slots != wanted and available is not None:
        fallback = _expert_counts(model.fallback, model)
        staging = staging_bytes(wanted) + staging_bytes(fallback)  # each copy is read by threads of its own
        slots, shortfall = _allocate(wanted, available - staging - _bytes(fallback))
        workspace += staging
    host = DevicePlan(
        "cpu",
        machine.ram,
        (0, layers),
        dense=dense,
        experts=_bytes(slots),
        fallback=_bytes(fallback),
        kv_cache=kv,
        workspace=workspace,
        slots=slots,
        fallback_slots=fallback,
        dense_read=dense - model.embedding,
    )
    return _placement((), host, wanted, Counter(slots), [("cpu", shortfall)])


def _on_gpus(model: Footprint, machine: Machine, ends: Sequence[int]) -> Placement:
    """The plan with layers ends[c - 1] .. ends[c] - 1 on GPU c, and with a fallback copy if experts are left on disk."""
    plan = _with_layers(model, machine, ends, fallback=False)
    return _with_layers(model, machine, ends, fallback=True) if plan.disk_experts and model.fallback else plan


def _with_layers(model: Footprint, machine: Machine, ends: Sequence[int], *, fallback: bool) -> Placement:
    """The plan with layers ends[c - 1] .. ends[c] - 1 on GPU c, and with or without a fallback copy."""
    wanted = _expert_counts(model.kinds, model)
    gpus, shortfalls = [], []
    on_gpus: Counter[ExpertKind] = Counter()
    for c, (gpu, first, end) in enumerate(zip(machine.gpus, (0, *ends), ends, strict=False)):
        plan, filled, shortfall = _gpu_plan(model, gpu, f"cuda:{c}", first, end, first_gpu=c == 0, fallback=fallback)
        gpus.append(plan)
        shortfalls.append((plan.device, shortfall))
        on_gpus += filled
    host, shortfall = _host_under_gpus(model, machine, wanted, wanted - on_gpus, fallback=fallback)
    shortfalls.append((host.device, shortfall))
    return _placement(tuple(gpus), host, wanted, on_gpus + Counter(host.slots), shortfalls)


def _gpu_plan(
    model: Footprint, gpu: Gpu, device: str, first: int, end: int, *, first_gpu: bool, fallback: bool
) -> tuple[DevicePlan, Counter[ExpertKind], int]:
    """(the plan of a GPU with layers first .. end - 1, how many of its slots are filled at load, bytes that it lacks)."""
    dense = sum(model.dense[first:end])
    dense += model.embedding if first_gpu else 0
    dense += model.head if first < end == len(model.kinds) else 0  # on the GPU of the last layer, also where later GPUs stay empty
    kv = (end - first) * model.kv
    experts = _expert_counts(model.kinds[first:end], model)
    fallback_slots = dict.fromkeys(model.fallback[first:end] if fallback else (), SCRATCH_SLOTS)
    available = gpu.memory - gpu.reserve - dense - kv - model.gpu_workspace - _bytes(fallback_slots)
    slots, shortfall = _allocate(experts, available)
    filled = Counter({kind: initial_slots(count, experts[kind]) for kind, count in slots.items()})
    plan = DevicePlan(
        device,
        gpu.memory,
        (first, end),
        dense=dense,
        experts=_bytes(slots),
        fallback=_bytes(fallback_slots),
        kv_cache=kv,
        workspace=model.gpu_workspace,
        reserve=gpu.reserve,
        slots=slots,
        fallback_slots=fallback_slots,
        dense_read=dense - (model.embedding if first_gpu else 0),
        scratch=sum(slots.values()) - sum(filled.values()),
    )
    return plan, filled, shortfall


def _host_under_gpus(
    model: Footprint, machine: Machine, wanted: Counter[ExpertKind], off_gpus: Counter[ExpertKind], *, fallback: bool
) -> tuple[DevicePlan, int]:
    """(the plan of host memory under GPUs, bytes that it lacks).

    Args:
        model: what it takes.
        machine: with GPUs.
        wanted: how many experts of each kind the model has.
        off_gpus: how many of them no GPU holds.
        fallback: whether host memory holds a fallback copy.
    """
    fallback_slots = _expert_counts(model.fallback if fallback else (), model)
    workspace = model.offload_workspace if off_gpus else 0
    pinned = sum(pinned_bytes(gpu.link) for gpu in machine.gpus)
    staging = pinned + staging_bytes(wanted) + staging_bytes(fallback_slots) if workspace else 0
    slots: dict[ExpertKind, int] = {}
    shortfall = 0
    if off_gpus:
        # Experts of every kind pass through at least one slot. If memory is left, host memory holds experts that GPUs hold as well, which
        # lets the GPUs evict them.
        needed = {kind: max(1, off_gpus[kind]) for kind in wanted}
        available = _bytes(needed) if machine.ram is None else machine.ram - workspace - staging - _bytes(fallback_slots)
        slots, shortfall = _allocate(wanted, available, needed)
    plan = DevicePlan(
        "cpu",
        machine.ram,
        (0, 0),
        experts=_bytes(slots),
        fallback=_bytes(fallback_slots),
        workspace=workspace + staging,
        slots=slots,
        fallback_slots=fallback_slots,
    )
    return plan, shortfall


def _expert_counts(kinds: Sequence[ExpertKind], model: Footprint) -> Counter[ExpertKind]:
    """How many experts of each kind there are in layers of these kinds."""
    return Counter({kind: count * model.n_experts for kind, count in Counter(kinds).items()})


def _placement(
    gpus: tuple[DevicePlan, ...],
    host: DevicePlan,
    wanted: Counter[ExpertKind],
    held: Counter[ExpertKind],
    shortfalls: Sequence[tuple[str, int]],
) -> Placement:
    on_disk = (wanted - held).total()  # by kind: a second copy of one expert does not replace another expert
    device, shortfall = max(shortfalls, key=lambda entry: entry[1])
    return Placement(gpus, host, wanted.total(), _bytes(wanted), on_disk, shortfall, device if shortfall else "")


def _allocate(
    wanted: Mapping[ExpertKind, int], available: int | None, needed: Mapping[ExpertKind, int] | None = None
) -> tuple[dict[ExpertKind, int], int]:
    """Divide memory into slots: (slots of each kind, bytes that are missing for one slot of each kind).

    If not all wanted experts fit, each kind gets the same share of its experts.

    Args:
        wanted: how many slots of each kind are useful.
        available: bytes; None without a limit.
        needed: how many slots of each kind come first. If they do not fit, each kind gets the same share of them.
    """
    if available is None or _bytes(wanted) <= available:
        return dict(wanted), 0
    if needed is not None and _bytes(needed) > available:
        return _allocate(needed, available)
    least = dict.fromkeys(wanted, 1) if needed is None else dict(needed)
    if _bytes(least) > available:
        return least, _bytes(least) - available
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        slots = {kind: max(least[kind], int(share * count)) for kind, count in wanted.items()}
        low, high = (share, high) if _bytes(slots) <= available else (low, share)
    slots = {kind: max(least[kind], int(low * count)) for kind, count in wanted.items()}
    for kind in sorted(wanted, key=lambda kind: -kind.nbytes):  # the bytes that rounding left
        slots[kind] = min(wanted[kind], slots[kind] + (available - _bytes(slots)) // kind.nbytes)
    return slots, 0


def _bytes(slots: Mapping[ExpertKind, int]) -> int:
    return sum(kind.nbytes * count for kind, count in slots.items())


def _best_split(layers: int, gpus: Sequence[Gpu], cost: Callable[[tuple[int, ...]], tuple[float, ...]]) -> tuple[int, ...]:
    """Where the layers of every GPU end: local search from a split in proportion to the GPUs' memory."""
    count = len(gpus)
    sizes = [max(1, gpu.memory - gpu.reserve) for gpu in gpus]
    ends = [round(layers * sum(sizes[: c + 1]) / sum(sizes)) for c in range(count)]
    start: list[int] = []
    for c, end in enumerate(ends):  # every GPU has a layer, and leaves one to each that follows
        start.append(min(max(end, c + 1, start[-1] + 1 if start else 1), layers - count + c + 1))
    best = tuple(start)
    while True:
        neighbors = [best]
        for low, high in combinations(range(count), 2):  # GPUs low .. high - 1 end one or more layers later or earlier
            for step in (1, -1, 2, -2, 4, -4):
                moved = tuple(end + step if low <= c < high else end for c, end in enumerate(best))
                if all(before < after for before, after in pairwise((0, *moved))):
                    neighbors.append(moved)
        better = min(neighbors, key=cost)
        if cost(better) >= cost(best):
            return best
        best = better


def _cost(model: Footprint, machine: Machine, plan: Placement) -> tuple[float, float]:
    """Plans that fit come first, then faster ones; among almost equally fast ones, those whose GPUs hold equal shares of their experts.

    If experts were chosen at random, each slot would add the same number of hits on whichever GPU it is. On text, the first slots of a
    layer hit more often than its last ones.
    """
    shares = [gpu.n_slots / ((gpu.layers[1] - gpu.layers[0]) * model.n_experts) for gpu in plan.gpus]
    seconds = expected_seconds(plan, machine, n_experts=model.n_experts, top_k=model.top_k)
    return plan.shortfall, seconds * (1 + _SPREAD_WEIGHT * (max(shares) - min(shares)))
