"""How many threads this process should compute with, where its container may use only a share of the machine's cores.

torch counts the cores that it sees. With a quota of two cores out of 64, 64 threads would each be stopped for most of the time, and wait
for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

__all__ = ["bound_threads", "cpu_quota", "usable_threads"]


def cpu_quota(cgroups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the control groups of this process let it use at once; None without a limit.

    Args:
        cgroups: the file in which Linux lists the groups of this process.
        mount: where the groups' files are mounted.
    """
    return min(_quotas(cgroups, mount), default=None)


def usable_threads() -> int:
    """Threads that can run at once: torch's number, and no more than the cores of the quota."""
    quota = cpu_quota()
    return torch.get_num_threads() if quota is None else max(1, min(torch.get_num_threads(), round(quota)))


@cache
def bound_threads() -> None:
    """Let torch, and the kernels, which follow it, use no more threads than the quota has cores; once in this process.

    OMP_NUM_THREADS, which says how many a user wants, is left alone.
    """
    if "OMP_NUM_THREADS" not in os.environ and usable_threads() < torch.get_num_threads():
        torch.set_num_threads(usable_threads())


def _quotas(cgroups: Path, mount: Path) -> Iterator[float]:
    """The quota of every group that has one: a group may use no more than the groups around it."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mount] if not controllers else [mount / controllers, mount / "cpu"]  # version 2, or version 1
        root = next((root for root in roots if root.is_dir()), mount)
        group = root / path.lstrip("/")
        # In a container, the path may be that of the host, while its own group is mounted at the root.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            with suppress(OSError, ValueError):
                if controllers:
                    quota = int((folder / "cpu.cfs_quota_us").read_text())
                    period = int((folder / "cpu.cfs_period_us").read_text())
                else:
                    quota, period = map(int, (folder / "cpu.max").read_text().split())  # "max" in place of a number: no limit
                if quota > 0 and period > 0:
                    yield quota / period
