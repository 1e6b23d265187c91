"""A machine's memories and bandwidths, and a plan of what each of its devices holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dbrx_q.errors import RequestError

from .bandwidths import known_bandwidths
from .expert_kinds import ExpertKind
from .host_memory import available_bytes
from .sizes import parse_size

__all__ = ["DevicePlan", "Gpu", "Machine", "Placement", "check_visible"]

_GPU_RESERVE = 600 << 20  # the driver's context, compiled kernels, and fragmentation of the allocator
_DESKTOP_RESERVE = 1200 << 20  # the windows of a desktop, on top

# Share of the free host memory that stays with other programs and with the process itself.
_HOST_MARGIN = 0.1


@dataclass(frozen=True)
class Gpu:
    """A GPU; its default bandwidths are those of a 24 GB consumer GPU on PCIe 4.0 x16.

    Raises:
        RequestError: `memory` is no whole number of at least 0.
    """

    memory: int
    """Bytes that may be used, the reserve included."""
    desktop: bool = False
    """Whether it shows a desktop."""
    bandwidth: float = 900e9
    """Of its memory, in bytes/s."""
    link: float = 25e9
    """From host memory to the GPU, in bytes/s."""

    def __post_init__(self) -> None:
        if not _is_size(self.memory):
            raise RequestError(f"memory of a GPU must be a whole number of bytes; found {self.memory!r}")

    @property
    def reserve(self) -> int:
        """Bytes that are left to the driver, and to the desktop."""
        return _GPU_RESERVE + (_DESKTOP_RESERVE if self.desktop else 0)


@dataclass(frozen=True)
class Machine:
    """A machine, as far as a plan needs it.

    Raises:
        RequestError: `ram` is neither None nor a whole number of at least 0.
    """

    ram: int | None = None
    """Bytes of host memory that the model may take, None for as many as it needs. Python and its libraries take more on top."""
    gpus: tuple[Gpu, ...] = ()
    """In the order of their indices."""
    host_bandwidth: float = 60e9
    """Of host memory, in bytes/s."""
    disk_bandwidth: float = 5e9
    """In bytes/s."""
    measured: str = field(default="", compare=False)
    """When its bandwidths were measured, in ISO 8601; empty where they are assumed."""

    def __post_init__(self) -> None:
        if self.ram is not None and not _is_size(self.ram):
            raise RequestError(f"ram of a machine must be a whole number of bytes or None; found {self.ram!r}")

    @classmethod
    def detect(cls, max_memory: Mapping[int | str, int | str] | None = None) -> Machine:
        """This machine, with the memory that is free now or as much of it as `max_memory` allows.

        Its bandwidths are those that `plan --measure` has measured here, or assumed ones.

        Args:
            max_memory: bytes, or a size such as "22GiB", by index of a GPU and by "cpu". GPUs that are not named are not used; without
                "cpu" the free host memory is taken, less a tenth. None for all GPUs that torch sees and all of their free memory.

        Raises:
            RequestError: another key, a GPU that torch does not see, or an invalid size.
        """
        if max_memory is None:
            return cls(_free_host_memory(), tuple(Gpu(torch.cuda.mem_get_info(i)[0]) for i in range(_visible_gpus()))).as_measured()
        sizes: dict[int, int] = {}
        ram = None
        for key, value in max_memory.items():
            size = parse_size(value) if isinstance(value, str) else value
            if not _is_size(size):
                raise RequestError(f"max_memory[{key!r}] must be a number of bytes or a size such as '22GiB'; found {value!r}")
            if key == "cpu":
                ram = size
            elif isinstance(key, int) and not isinstance(key, bool) and key >= 0:
                sizes[key] = size
            else:
                raise RequestError(f"a key of max_memory must be the index of a GPU or 'cpu'; found {key!r}. The disk has no limit")
        check_visible(sorted(sizes))
        return cls(_free_host_memory() if ram is None else ram, tuple(Gpu(sizes[index]) for index in sorted(sizes))).as_measured()

    def as_measured(self) -> Machine:
        """The machine with the bandwidths that were measured on this one, where it can be this one and they were.

        A machine with more memory or GPUs than this one is another, and so is one whose GPUs have bandwidths of their own.
        """
        known = known_bandwidths()
        if known is None or len(self.gpus) > len(known.gpus) or (self.ram or 0) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            return self
        if any((gpu.bandwidth, gpu.link) != (Gpu.bandwidth, Gpu.link) for gpu in self.gpus):
            return self
        gpus = tuple(replace(gpu, bandwidth=rates[0], link=rates[1]) for gpu, rates in zip(self.gpus, known.gpus, strict=False))
        disk = self.disk_bandwidth if known.disk is None else known.disk
        return replace(self, gpus=gpus, host_bandwidth=known.host, disk_bandwidth=disk, measured=known.date)


def _free_host_memory() -> int:
    """Bytes of host memory that a model may take without a limit by its user."""
    return int(available_bytes() * (1 - _HOST_MARGIN))


def _is_size(value: object) -> bool:
    """Whether a value is a number of bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _visible_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_visible(indices: Sequence[int]) -> None:
    """Refuse the indices of GPUs that torch does not see, and indices that leave one out.

    Raises:
        RequestError: names the index.
    """
    visible = _visible_gpus()
    for index in indices:
        if index >= visible:
            raise RequestError(
                f"GPU {index} must be one that torch sees; it sees {visible}. Check the driver, and that torch is a GPU build, or leave it "
                "out"
            )
    if list(indices) != list(range(len(indices))):
        raise RequestError(f"GPUs must be named from 0 on; found {list(indices)}. Choose others with CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class DevicePlan:
    """What one device holds, in bytes unless a field says otherwise.

    A fallback copy is held whole by the host; a GPU has a few slots for experts of it.
    """

    device: str
    """Its name: the host is "cpu", GPUs are "cuda:0", "cuda:1" ..."""
    budget: int | None
    """What may be used; None without a limit."""
    layers: tuple[int, int]
    """(first, end) of the layers that the device computes; (0, 0) for a host under GPUs."""
    dense: int = 0
    """All weights except experts."""
    experts: int = 0
    """All slots for experts."""
    fallback: int = 0
    """All slots for experts of the fallback copy."""
    kv_cache: int = 0
    """Keys and values of the device's layers."""
    workspace: int = 0
    """Activations, logits, and buffers that experts pass through."""
    reserve: int = 0
    """Memory that is left to the driver and the desktop."""
    slots: Mapping[ExpertKind, int] = field(default_factory=dict)
    """How many slots there are for experts of each kind."""
    fallback_slots: Mapping[ExpertKind, int] = field(default_factory=dict)
    """How many slots there are for experts of each kind of the fallback copy."""
    dense_read: int = 0
    """The part of `dense` that every token reads."""
    scratch: int = 0
    """How many of `slots` are empty after loading, for experts that are copied during inference."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.dense + self.experts + self.fallback + self.kv_cache + self.workspace + self.reserve

    @property
    def n_slots(self) -> int:
        """How many experts the device can hold."""
        return sum(self.slots.values())


@dataclass(frozen=True)
class Placement:
    """Which device holds what. It may not fit: then `shortfall` says by how much."""

    gpus: tuple[DevicePlan, ...]
    """By index; empty without GPUs."""
    host: DevicePlan
    """Host memory."""
    experts: int
    """Experts of the whole model."""
    expert_bytes: int
    """Bytes of all experts in memory."""
    disk_experts: int
    """Experts that are only on disk when all slots are filled."""
    shortfall: int = 0
    """Bytes that the worst device lacks for the smallest configuration that works; 0 if the plan fits."""
    short_device: str = ""
    """The device that lacks them."""

    @property
    def devices(self) -> tuple[DevicePlan, ...]:
        """All devices, the host last."""
        return *self.gpus, self.host

    @property
    def fits(self) -> bool:
        """Whether the model can run with this plan."""
        return self.shortfall == 0

    @property
    def over_budget(self) -> tuple[DevicePlan, ...]:
        """The devices whose plan exceeds their budget. With budgets of their `total` the model would run."""
        return tuple(plan for plan in self.devices if plan.budget is not None and plan.total > plan.budget)

    @property
    def resident(self) -> bool:
        """Whether every expert is in the memory of the device that computes it."""
        return sum(plan.n_slots for plan in self.gpus or (self.host,)) == self.experts
