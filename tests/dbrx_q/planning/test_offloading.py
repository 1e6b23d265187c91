"""How many threads fill the pinned buffers of a link, and the memory that a plan sets aside for them."""

from __future__ import annotations

import pytest

from dbrx_q.planning.machine import Gpu
from dbrx_q.planning.offloading import LINK_BUFFER_BYTES, LINK_BUFFERS, copy_threads, pinned_bytes

PCIE_3, PCIE_4, PCIE_5, NVLINK_C2C = 12e9, 25e9, 55e9, 400e9  # bytes/s of 16 lanes


@pytest.mark.parametrize(
    ("link", "cores", "threads"),
    [
        (PCIE_3, 64, 2),
        (PCIE_4, 64, 2),
        (PCIE_5, 64, 5),
        (NVLINK_C2C, 64, 8),
        (PCIE_5, 16, 4),
        (PCIE_5, 8, 2),
        (PCIE_5, 1, 2),
        (PCIE_5, 0, 2),
    ],
)
def test_threads_keep_the_link_busy_and_leave_cores_to_the_experts(link: float, cores: int, threads: int) -> None:
    assert copy_threads(link, cores) == threads
    assert threads * LINK_BUFFERS * LINK_BUFFER_BYTES <= pinned_bytes(link)


def test_a_plan_for_the_assumed_link_sets_8_mib_aside() -> None:
    assert pinned_bytes(Gpu.link) == 8 << 20
    assert pinned_bytes(PCIE_5) == 20 << 20
