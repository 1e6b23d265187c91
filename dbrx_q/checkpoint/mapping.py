"""Stored tensors as views of mapped files, so that loading reads nothing and several processes share one copy in the page cache.

A mapping is private and copied on write: pages come from the file when they are first used, and a change of a tensor in place stays in the
process and never reaches the file. A file that becomes shorter while it is mapped ends the process by SIGBUS at the next use of the lost
bytes, which no program can catch as an error; `save_pretrained` and `quantize` therefore never write into a file that exists.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from operator import mul
from pathlib import Path

import torch

from dbrx_q.errors import CheckpointError

from .folder import Checkpoint

__all__ = ["MappedCheckpoint", "is_on_network"]

# File systems whose files another machine may change, and whose server may be gone when a page is read.
_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
# Without it Linux counts a private mapping as memory that all must be available at once, and refuses one larger than the machine's.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedCheckpoint:
    """The stored tensors of an open checkpoint folder as views of its files, which are mapped when the first of their tensors is asked for.

    Args:
        checkpoint: of a folder; the views outlive it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, torch.Tensor | None] = {}

    def stack(self, names: Sequence[str], *, alignment: int = 1) -> torch.Tensor | None:
        """Stored tensors of one dtype and shape as one tensor [len(names), *shape], at the distances that they have in the file.

        Args:
            names: of the stored tensors.
            alignment: of the address of each, in bytes; the size of an element at least.

        Returns:
            None where they must be read instead: they are in several files, at unequal distances or not aligned, or the file cannot be
            mapped or is on a network file system.

        Raises:
            CheckpointError: the size of a file has changed since it was opened.
        """
        infos = [self._checkpoint.infos[name] for name in names]
        first, itemsize = infos[0], infos[0].dtype.itemsize
        alignment = max(alignment, itemsize)
        steps = {after.offset - before.offset for before, after in pairwise(infos)} or {first.nbytes}
        step = min(steps)
        regular = len(steps) == 1 and step >= first.nbytes and all(info.shape == first.shape for info in infos)
        aligned = first.offset % alignment == 0 and (len(infos) == 1 or step % alignment == 0)
        if not regular or not aligned or len({self._checkpoint.path_of(name) for name in names}) > 1:
            return None
        file = self._file(self._checkpoint.path_of(names[0]))
        if file is None:
            return None
        elements = file[: file.numel() // itemsize * itemsize].view(first.dtype)
        within = list(accumulate(reversed(first.shape[1:]), mul, initial=1))[::-1] if first.shape else []
        return elements.as_strided((len(names), *first.shape), (step // itemsize, *within), first.offset // itemsize)

    def _file(self, path: Path) -> torch.Tensor | None:
        """The bytes of a file, one tensor for all that it holds, so that copies of a model copy them once."""
        if path not in self._files:
            self._files[path] = _mapped(path, self._checkpoint.sizes[path.name])
        return self._files[path]


def _mapped(path: Path, size: int) -> torch.Tensor | None:
    """uint8 [size], the file's bytes in a private mapping; None where it cannot be mapped or should not be."""
    with open(path, "rb", buffering=0) as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise CheckpointError(f"{path}: a shard must not change while it is opened; found {size} bytes, then {actual}. Try again")
        if is_on_network(os.fstat(file.fileno()).st_dev):
            return None
        try:
            if sys.platform == "win32":
                mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
            else:
                mapping = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:  # a file system without mappings, or a limit of address space
            return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)  # Linux then reads the file into pages of 2 MB, where the file system has them
    return torch.frombuffer(mapping, dtype=torch.uint8)


def is_on_network(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a file is known to be on a network file system.

    Args:
        device: of the file, as `os.stat` gives it.
        mounts: the file in which Linux lists what is mounted; without it, nothing is known to be.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(_is_network(kind) for kind in _kinds(lines, f"{os.major(device)}:{os.minor(device)}"))


def _kinds(lines: Iterable[str], device: str) -> list[str]:
    """The types of the file systems of a device, written "major:minor"."""
    mounts = [line.partition(" - ") for line in lines]
    return [right.split()[0] for left, _, right in mounts if right and left.split()[2:3] == [device]]


def _is_network(kind: str) -> bool:
    return kind in _NETWORK or kind.startswith("fuse.")
