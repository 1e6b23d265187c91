"""Reading and writing safetensors files piece by piece.

The safetensors package maps whole files into memory, which counts against a memory budget, and writes whole dictionaries of tensors. A
checkpoint of 264 GB wants neither: here tensors and slices of them are read into memory that the caller owns, and a file is written
tensor by tensor. Layout: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes back to back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbrx_q.errors import CheckpointError

__all__ = ["SafetensorsFile", "SafetensorsWriter", "TensorInfo", "parse_header", "read_tensor", "safetensors_header"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_MAX_READ_BYTES = 1 << 30  # Linux moves at most 2 GiB a call
_HASH_STEP_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: its dtype, its shape, and its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """An open safetensors file; use it as a context manager.

    Attributes:
        path: the file.
        size: its bytes.
        tensors: name to `TensorInfo`, in the order of the file.
        metadata: what the header says of the file itself.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not a safetensors header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must be refused, not waited for
        except FileNotFoundError:
            raise CheckpointError(f"{path}: shard not found; every shard of a checkpoint must be in its folder: fetch it") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise CheckpointError(f"{path}: shard must be readable; {error}") from None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: a shard must be a regular file; found a folder, a pipe or a device")
            self.size = status.st_size
            self.tensors, self.metadata = parse_header(path, self.size, lambda at, length: os.pread(self._fd, length, at))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor `name`, read into `into` (contiguous, same shape and dtype) where it is given."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype) if into is None else into
        assert (tuple(out.shape), out.dtype, out.is_contiguous()) == (info.shape, info.dtype, True)
        self._read_at(info.offset, out)
        return out

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of the tensor `name`."""
        info = self.tensors[name]
        row = info.nbytes // info.shape[0]
        out = torch.empty((count, *info.shape[1:]), dtype=info.dtype)
        self._read_at(info.offset + first * row, out)
        return out

    def _read_at(self, offset: int, out: torch.Tensor) -> None:
        view = _bytes_of(out)
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done : done + _MAX_READ_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: read failed at byte {offset + done}; {error.strerror}") from None
            if n == 0:
                raise CheckpointError(
                    f"{self.path}: the file became shorter while it was read; byte {offset + done} is gone. Fetch it again"
                )
            done += n


def parse_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(the tensors in the order of the file, what the header says of the file itself), as `SafetensorsFile` has them.

    Args:
        path: the file's name in messages.
        size: bytes of the file.
        read: gives the bytes at (first byte, how many), fewer where the file ends.

    Raises:
        CheckpointError: the file is truncated, or its header is not a safetensors header.
    """
    prefix = read(0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: a safetensors header must fit in its file; found a header of {length} bytes in a file of {size}. "
            "The file is truncated or of another kind: fetch it again"
        )
    try:
        header = json.loads(read(8, length).decode("utf-8"))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
        metadata = {str(name): str(value) for name, value in header.get("__metadata__", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors header; {error}. Fetch the file again") from None
    _check_bytes(path, size, found, 8 + length)
    return dict(sorted(found.items(), key=lambda item: item[1].offset)), metadata


def _entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise CheckpointError(f"{path}: {name}: dtype must be one of {', '.join(_DTYPES)}; found {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: {name}: shape and data_offsets must be lists of sizes; found {shape!r} and {offsets!r}")
    info = TensorInfo(dtype, tuple(shape), data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: {name}: {shape} {entry['dtype']} takes {info.nbytes} bytes; the header gives {offsets[1] - offsets[0]}"
        )
    return info


def _check_bytes(path: Path, size: int, found: dict[str, TensorInfo], data_start: int) -> None:
    end = data_start
    for name, info in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise CheckpointError(f"{path}: {name}: tensors must lie back to back; found byte {info.offset} where {end} ends the last")
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: the header describes {end} bytes and the file has {size}; it is truncated or damaged: fetch it again"
        )


def safetensors_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file with these tensors (name, dtype, shape) in this order, and where each of them lies."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 64)  # tensors begin on a cache line
    infos, at = {}, 8 + len(text)
    for name, dtype, shape in tensors:
        infos[name] = TensorInfo(dtype, tuple(shape), at)
        at += infos[name].nbytes
    return len(text).to_bytes(8, "little") + text, infos


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor and hashes it on the way.

    Args:
        path: the file; must not exist, unless it is `reopened`.
        tensors: (name, dtype, shape) of all tensors, in the order in which `write` will bring them.
        reopened: go on with what an earlier writer left at `path`: `keep` takes its tensors, the first `write` cuts off the others.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], *, reopened: bool = False) -> None:
        self.path = path
        self._waiting = list(reversed(tensors))
        self._hash = hashlib.sha256()
        self.nbytes = 0
        header, self._infos = safetensors_header(tensors)
        reopened = reopened and path.exists()
        self._file = open(path, "r+b" if reopened else "x+b", buffering=0)  # noqa: SIM115 # closed by close()
        if not reopened or not self._take(len(header), hashlib.sha256(header).hexdigest()):
            self._put(header)

    @property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of what has been written so far."""
        return self._hash.hexdigest()

    def keep(self, names: Sequence[str], digest: str) -> bool:
        """Take the next tensors as an earlier writer left them, if with them the file so far is what had this `digest`; else nothing."""
        assert [name for name, _, _ in self._waiting[-len(names) :]] == list(reversed(names)), f"{names[0]} is not due"
        if not self._take(sum(self._infos[name].nbytes for name in names), digest):
            return False
        del self._waiting[-len(names) :]
        return True

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which must be the one that was announced."""
        expected, dtype, shape = self._waiting.pop()
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape), f"{name} came where {expected} {dtype} {shape} is due"
        self._put(_bytes_of(tensor.contiguous()))

    def close(self) -> str:
        """Flush to the disk; the SHA-256 of the file, in hexadecimal."""
        assert not self._waiting, f"{self._waiting[-1][0]} was never written"
        self._file.truncate(self.nbytes)
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close without the checks of `close`: the file will be removed, or reopened."""
        self._file.close()

    def _take(self, length: int, digest: str) -> bool:
        hashed, left = self._hash.copy(), length
        self._file.seek(self.nbytes)
        while left:
            piece = self._file.read(min(left, _HASH_STEP_BYTES))
            if not piece:
                return False
            hashed.update(piece)
            left -= len(piece)
        if hashed.hexdigest() != digest:
            return False
        self._hash, self.nbytes = hashed, self.nbytes + length
        return True

    def _put(self, data: bytes | memoryview) -> None:
        if self._file.seek(0, os.SEEK_CUR) != self.nbytes:
            self._file.seek(self.nbytes)
            self._file.truncate()
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + _MAX_READ_BYTES])
        self._hash.update(data)
        self.nbytes += len(view)


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a file that may not be complete yet.

    Raises:
        CheckpointError: the file is too short.
    """
    out = torch.empty(info.shape, dtype=info.dtype)
    view = _bytes_of(out)
    with open(path, "rb", buffering=0) as file:
        file.seek(info.offset)
        done = 0
        while done < len(view):
            n = file.readinto(view[done : done + _MAX_READ_BYTES])
            if not n:
                raise CheckpointError(f"{path}: byte {info.offset + done} must be there; the file ends before. Quantize again")
            done += n
    return out


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")
