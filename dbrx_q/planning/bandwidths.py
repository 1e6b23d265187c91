"""The bandwidths of this machine: of its memory, a disk, its GPUs and their links. Measured on request and kept in the user's cache.

A home folder may be shared by several machines. The file is therefore named by what tells them apart: host name, processor, memory and
GPUs. A plan for this machine and the loader's split of missed experts use what it holds in place of assumed figures.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache

from .cpu_quota import usable_threads
from .host_memory import available_bytes

__all__ = ["Bandwidths", "known_bandwidths", "measure_bandwidths"]

_MOST_BYTES = 1 << 30  # of memory that is read in one round: far more than any cache
_DISK_BYTES = 1 << 30
_BLOCK_BYTES = 8 << 20  # of one read from disk, as large as parts of an expert
_READERS = 4
_ROUNDS = 5


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second."""

    host: float
    """Of host memory, read by all threads that this process may use."""
    disk: float | None
    """Of the disk that holds the checkpoint that was read, past the system's cache; None where none was."""
    gpus: tuple[tuple[float, float], ...]
    """(of its memory, of the link from host memory) for each GPU that torch sees."""
    date: str
    """When they were measured, in ISO 8601."""


def known_bandwidths() -> Bandwidths | None:
    """What was measured on this machine; None if nothing was, or the file cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        data = json.loads(_cache_file(note=False).read_text(encoding="utf-8"))
        gpus = tuple((float(memory), float(link)) for memory, link in data["gpus"])
        disk = None if data["disk"] is None else float(data["disk"])
        known = Bandwidths(float(data["host"]), disk, gpus, str(data["date"]))
        if all(rate > 0 for rate in (known.host, *(rate for pair in gpus for rate in pair), *([] if disk is None else [disk]))):
            return known
    return None


def measure_bandwidths(folder: Path | None) -> Bandwidths:
    """Measure this machine for a few seconds, and keep the result for later runs.

    Args:
        folder: a checkpoint, whose largest shard is read; None for none, which keeps an earlier figure of the disk.
    """
    shards = [] if folder is None else sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    disk = _disk_bandwidth(shards[-1]) if shards else None
    earlier = known_bandwidths()
    if disk is None and earlier is not None:
        disk = earlier.disk
    gpus = tuple(_gpu_bandwidths(torch.device("cuda", i)) for i in range(_gpu_count()))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured = Bandwidths(_host_bandwidth(), disk, gpus, date)
    write_to_cache(_cache_file(), json.dumps(asdict(measured)).encode())
    return measured


def _cache_file(*, note: bool = True) -> Path:
    names = [torch.cuda.get_device_name(i) for i in range(_gpu_count())]
    key = [platform.node(), platform.machine(), _processor(), os.sysconf("SC_PHYS_PAGES"), usable_threads(), *names]
    return user_cache(note=note) / "machines" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    return platform.processor()


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _best_rate(nbytes: int, work: Callable[[], object]) -> float:
    """Bytes/s of the fastest of several rounds: the others had to share the machine."""
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return nbytes / min(seconds)


def _host_bandwidth() -> float:
    values = torch.ones(min(_MOST_BYTES, available_bytes() // 4) // 4)
    return _best_rate(values.nbytes, values.sum)


def _gpu_bandwidths(device: torch.device) -> tuple[float, float]:
    nbytes = min(_MOST_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    on_gpu = torch.empty(nbytes, dtype=torch.uint8, device=device)
    on_host = torch.empty(min(nbytes, 256 << 20), dtype=torch.uint8, pin_memory=True)

    def copied(to: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        def work() -> None:
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        return work

    half = nbytes // 2
    memory = _best_rate(2 * half, copied(on_gpu[:half], on_gpu[half : 2 * half]))  # read and written
    return memory, _best_rate(on_host.nbytes, copied(on_gpu[: on_host.nbytes], on_host))


def _disk_bandwidth(path: Path) -> float | None:
    """Bytes/s of reads past the system's cache; None for a file system without them, or a file of less than a block."""
    blocks = min(path.stat().st_size, _DISK_BYTES) // _BLOCK_BYTES
    if not hasattr(os, "O_DIRECT") or not blocks:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None

    def read(reader: int) -> int:
        with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # aligned to a page, as such reads must be
            return sum(os.preadv(fd, [buffer], block * _BLOCK_BYTES) for block in range(reader, blocks, _READERS))

    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(_READERS) as pool:
            nbytes = sum(pool.map(read, range(_READERS)))
        return nbytes / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        os.close(fd)
