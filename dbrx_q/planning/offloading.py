"""What a plan must know of how experts are moved between disk, host memory and GPUs: the memory of buffers, and which slots stay free.

These constants are here, below `experts/`, because the planner accounts for the memory. `experts/link.py` (host to GPU) and
`experts/reader.py` (disk to host) allocate it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .expert_kinds import ExpertKind

__all__ = [
    "LINK_BUFFERS",
    "LINK_BUFFER_BYTES",
    "LINK_COPY_RATE",
    "READ_ALIGNMENT",
    "READ_BYTES",
    "READ_THREADS",
    "SCRATCH_SLOTS",
    "copy_threads",
    "initial_slots",
    "pinned_bytes",
    "staging_bytes",
]

# Slots of a GPU.

SCRATCH_SLOTS = 2
"""Slots of a GPU that are not filled at load. Where each expert is held once, on a GPU or in host memory, a GPU may evict only experts
that host memory holds too, which are those that were copied into these slots."""


def initial_slots(slots: int, experts: int) -> int:
    """How many of a GPU's slots for one kind of expert are filled at load.

    Args:
        slots: of this kind on the GPU.
        experts: of this kind in the GPU's layers.
    """
    return slots if slots >= experts else max(0, slots - SCRATCH_SLOTS)


# From host memory to a GPU, through pinned buffers.

LINK_COPY_RATE = 12.5e9
"""Bytes/s at which a core fills a pinned buffer at least. 16 lanes of PCIe 4.0 take two threads, of PCIe 5.0 five."""

_LEAST_COPY_THREADS, _MOST_COPY_THREADS = 2, 8  # more would wait for Python's lock, which each takes for every buffer
_CORES_PER_COPY_THREAD = 4  # the others compute missed experts; both read the same memory

LINK_BUFFERS = 2
"""Pinned buffers of each of these threads: one is filled while the other is sent."""

# A buffer that stays in the last-level cache is filled faster, and does not compete for the bandwidth of the memory that the CPU reads
# experts from: one core fills 4 of 16 MiB at 8.7 to 9.7 GB/s, of 4 MiB at 9.5 to 14.9, of 2 MiB at 12.5 to 15.9 (EPYC, 32 MiB of cache).
LINK_BUFFER_BYTES = 2 << 20
"""Bytes of one pinned buffer."""


def copy_threads(link: float, cores: int) -> int:
    """How many threads copy from host memory into the pinned buffers of a GPU's link: as many as keep it busy, if there are cores enough.

    Args:
        link: from host memory to the GPU, in bytes/s.
        cores: for this GPU.
    """
    return max(_LEAST_COPY_THREADS, min(_most_copy_threads(link), cores // _CORES_PER_COPY_THREAD))


def pinned_bytes(link: float) -> int:
    """Pinned host memory of a GPU's link at most, on any number of cores, so that a plan does not depend on them.

    Args:
        link: from host memory to the GPU, in bytes/s.
    """
    return _most_copy_threads(link) * LINK_BUFFERS * LINK_BUFFER_BYTES


def _most_copy_threads(link: float) -> int:
    return max(_LEAST_COPY_THREADS, min(_MOST_COPY_THREADS, math.ceil(link / LINK_COPY_RATE)))


# From disk to host memory.

READ_THREADS = 4
"""Threads that read experts."""

READ_BYTES = 4 << 20
"""Bytes of one read at most."""

READ_ALIGNMENT = 4096
"""What O_DIRECT requires of addresses, offsets and lengths on any disk in use."""


def staging_bytes(kinds: Iterable[ExpertKind]) -> int:
    """Host memory that reading experts takes at most beside the slots; 0 without kinds.

    Each reader thread has a buffer, and an expert whose format in memory differs from the stored one is held in both at once.
    """
    all_kinds = list(kinds)
    if not all_kinds:
        return 0
    converted = max((kind.stored_nbytes for kind in all_kinds if not kind.as_stored), default=0)
    largest = max(kind.stored_nbytes for kind in all_kinds)
    return READ_THREADS * (min(READ_BYTES, largest) + 2 * READ_ALIGNMENT + converted)
