"""A machine's memories and bandwidths, and a plan of what lies in each of its devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .expert_kinds import ExpertKind

__all__ = ["DevicePlan", "Gpu", "Machine", "Placement"]


# Of a gpu: the driver's context, compiled kernels, and what the allocator cannot use. Of a desktop besides: what its windows take.
_GPU_RESERVE = 600 << 20


_DESKTOP_RESERVE = 1200 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes that may be used, the reserve included. desktop: whether it shows one. bandwidth: of its memory, link: from the
    host, both in bytes/s; of a 24 GB consumer GPU and of PCIe 4.0 x16 unless they are measured."""

    memory: int
    desktop: bool = False
    bandwidth: float = 900e9
    link: float = 25e9

    @property
    def reserve(self) -> int:
        """Bytes that are left to the driver, and to the desktop."""
        return _GPU_RESERVE + (_DESKTOP_RESERVE if self.desktop else 0)


@dataclass(frozen=True)
class Machine:
    """A machine. ram: bytes of host memory that the model may take, None for as many as it needs; what Python and its libraries take comes
    on top. host_bandwidth, disk_bandwidth: bytes/s."""

    ram: int | None = None
    gpus: tuple[Gpu, ...] = ()
    host_bandwidth: float = 60e9
    disk_bandwidth: float = 5e9


@dataclass(frozen=True)
class DevicePlan:
    """One device; bytes where nothing else is said.

    budget: that may be used, None without a limit. layers: (first, end) of those that it computes. dense: all weights but experts, of which
    every token reads `dense_read`. experts: of its slots. slots: how many for experts of each kind, of which `scratch` stay free for what
    is copied while it runs. fallback, fallback_slots: the same of a fallback copy, whole in host memory, passing through on a GPU.
    """

    device: str
    budget: int | None
    layers: tuple[int, int]
    dense: int = 0
    experts: int = 0
    fallback: int = 0
    kv_cache: int = 0
    workspace: int = 0
    reserve: int = 0
    slots: Mapping[ExpertKind, int] = field(default_factory=dict)
    fallback_slots: Mapping[ExpertKind, int] = field(default_factory=dict)
    dense_read: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.dense + self.experts + self.fallback + self.kv_cache + self.workspace + self.reserve

    @property
    def n_slots(self) -> int:
        """Experts that can lie here."""
        return sum(self.slots.values())


@dataclass(frozen=True)
class Placement:
    """Where everything lies.

    gpus: by index. host: its memory. experts: how many the model has. expert_bytes: of all of them in memory. disk_experts: how many lie
    in no memory when all slots are full. shortfall: bytes that the worst device lacks for the least that can work; 0 where it fits.
    short_of: that device.
    """

    gpus: tuple[DevicePlan, ...]
    host: DevicePlan
    experts: int
    expert_bytes: int
    disk_experts: int
    shortfall: int = 0
    short_of: str = ""

    @property
    def devices(self) -> tuple[DevicePlan, ...]:
        """All, the host last."""
        return *self.gpus, self.host

    @property
    def fits(self) -> bool:
        """Whether the model can run so."""
        return self.shortfall == 0

    @property
    def short(self) -> tuple[DevicePlan, ...]:
        """The devices that lack bytes; with what their plans take it would fit."""
        return tuple(plan for plan in self.devices if plan.budget is not None and plan.total > plan.budget)

    @property
    def resident(self) -> bool:
        """Whether every expert lies on the device that computes it."""
        return sum(plan.n_slots for plan in self.gpus or (self.host,)) == self.experts
