"""What a plan must know of how experts are offloaded: buffers, spare slots, and the names of the policies."""

from __future__ import annotations

from collections.abc import Iterable

from .expert_kinds import ExpertKind

__all__ = [
    "PINNED_BYTES",
    "READ_ALIGNMENT",
    "READ_BYTES",
    "READ_THREADS",
    "SCRATCH_SLOTS",
    "first_slots",
    "staging_bytes",
]


SCRATCH_SLOTS = 2
"""Slots of a GPU that are left empty at first: where every expert lies in one memory only, a GPU can give up none but what it copied."""


def first_slots(slots: int, experts: int) -> int:
    """How many of a GPU's slots are filled at first, of those for one kind of which its layers have so many experts."""
    return slots if slots >= experts else max(0, slots - SCRATCH_SLOTS)


LINK_FILLERS = 2  # threads that fill pinned memory: one core's memcpy is slower than 16 lanes of PCIe 4.0


LINK_BUFFERS = 2  # of each: one is filled while the other is sent


# Of one pinned buffer. What stays in the last-level cache is filled faster, and takes no bandwidth of the memory that the CPU reads
# experts from: one core fills 4 of 16 MiB at 8.7 to 9.7 GB/s, of 4 MiB at 9.5 to 14.9, of 2 MiB at 12.5 to 15.9 (EPYC, 32 MiB of cache).
LINK_BUFFER_BYTES = 2 << 20


PINNED_BYTES = LINK_FILLERS * LINK_BUFFERS * LINK_BUFFER_BYTES
"""Host memory that the link of a GPU keeps."""


READ_BYTES = 4 << 20


READ_THREADS = 4


READ_ALIGNMENT = 4096  # what O_DIRECT wants of addresses, offsets and lengths on any disk in use


def staging_bytes(kinds: Iterable[ExpertKind]) -> int:
    """Host memory that reading takes beside the slots, at most: a buffer for each thread, and experts that are decoded on the way in.

    0 without kinds.
    """
    all_kinds = list(kinds)
    if not all_kinds:
        return 0
    decoded = max((kind.stored_nbytes for kind in all_kinds if not kind.as_stored), default=0)
    largest = max(kind.stored_nbytes for kind in all_kinds)
    return READ_THREADS * (min(READ_BYTES, largest) + 2 * READ_ALIGNMENT + decoded)
