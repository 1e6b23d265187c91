"""Safetensors files, read in place and written as they grow.

Layout of a file: 8 bytes with the header's length (little endian), a JSON header, then the tensors' bytes back to back.

The safetensors package is the reference of the format: its parser accepts or refuses every header, and names, types and shapes are
taken from it. This module adds what the package does not offer. The package maps whole files into memory, which counts against a memory
budget, and writes whole dictionaries of tensors; a checkpoint of 264 GB needs neither. Here tensors and rows of them are read into memory
that the caller owns, and a file is written tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dbrx_q.errors import CheckpointError

__all__ = ["SafetensorsFile", "SafetensorsWriter", "TensorInfo", "parse_header", "read_tensor", "safetensors_header"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bits of an element of the types for which torch has no dtype of one element, or had none before 2.7 (F8_E8M0).
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the package refuses longer ones by their length alone
_MAX_READ_BYTES = 1 << 30  # Linux moves at most 2 GiB a call
_HASH_STEP_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape and place of a tensor in a file."""

    dtype_name: str
    """Type of the elements as the header spells it, such as "BF16"."""
    shape: tuple[int, ...]
    """Sizes, outermost first; () for a scalar."""
    offset: int
    """First byte of the tensor, counted from the beginning of the file."""
    nbytes: int
    """Bytes of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the elements.

        Raises:
            CheckpointError: the type is one of those that this module does not read.
        """
        if self.dtype_name not in _DTYPES:
            raise CheckpointError(f"a tensor that is read must have one of the dtypes {', '.join(_DTYPES)}; found {self.dtype_name}")
        return _DTYPES[self.dtype_name]

    @property
    def dtype_label(self) -> str:
        """The dtype in torch's spelling, such as "bfloat16"; in the header's where torch has none."""
        return str(_DTYPES.get(self.dtype_name, self.dtype_name)).removeprefix("torch.")

    def has_dtype(self, *dtypes: torch.dtype) -> bool:
        """Whether the elements are of one of these dtypes."""
        return _DTYPES.get(self.dtype_name) in dtypes


class SafetensorsFile:
    """An open safetensors file; use it as a context manager.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing or is no regular file, or the safetensors package refuses its header, as it does for a
            truncated file.
    """

    path: Path
    """The file."""
    size: int
    """Bytes of the file."""
    tensors: dict[str, TensorInfo]
    """The tensors by name, in the order of their bytes."""
    metadata: dict[str, str]
    """The header's `__metadata__`; empty where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that opening a pipe does not block
        except FileNotFoundError:
            raise CheckpointError(f"{path}: shard not found; every shard of a checkpoint must be in its folder: fetch it") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise CheckpointError(f"{path}: shard must be readable; {error}") from None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: a shard must be a regular file; found a folder, a pipe or a device")
            self.size = status.st_size
            self.tensors, self.metadata = _read_header(path, path, self.size, self._length_field())
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
        """The whole tensor `name`, read into `into` (contiguous, same shape and dtype) where it is given.

        Raises:
            CheckpointError: a read fails, or the tensor's type is none that torch has.
        """
        info, dtype = self.tensors[name], self._dtype_of(name)
        out = torch.empty(info.shape, dtype=dtype) if into is None else into
        assert (tuple(out.shape), out.dtype, out.is_contiguous()) == (info.shape, dtype, True)
        self._read_at(info.offset, out)
        return out

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of the tensor `name`; errors as for `read`."""
        info = self.tensors[name]
        row_bytes = info.nbytes // info.shape[0]
        out = torch.empty((count, *info.shape[1:]), dtype=self._dtype_of(name))
        self._read_at(info.offset + first * row_bytes, out)
        return out

    def _dtype_of(self, name: str) -> torch.dtype:
        try:
            return self.tensors[name].dtype
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: {error}") from None

    def _length_field(self) -> bytes:
        try:
            return os.pread(self._fd, 8, 0)
        except OSError as error:
            raise CheckpointError(f"{self.path}: shard must be readable; {error.strerror}") from None

    def _read_at(self, offset: int, out: torch.Tensor) -> None:
        view = _bytes_of(out)
        n_read = 0
        while n_read < len(view):
            try:
                n = os.preadv(self._fd, [view[n_read : n_read + _MAX_READ_BYTES]], offset + n_read)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: read failed at byte {offset + n_read}; {error.strerror}. Check the disk, or fetch it again"
                ) from None
            if n == 0:
                raise CheckpointError(
                    f"{self.path}: the file became shorter while it was read; byte {offset + n_read} is gone. Fetch it again"
                )
            n_read += n


def parse_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """`tensors` and `metadata`, as `SafetensorsFile` has them, of a file of which only the header is at hand.

    The package checks a header together with the size of its file, so it is given a temporary sparse file of that size: the header is
    written, the tensors' bytes are a hole that takes no space on the disk.

    Args:
        path: the file's name in messages.
        size: bytes of the file.
        read: returns the bytes at (first byte, count); fewer at the end of the file.

    Raises:
        CheckpointError: the package refuses the header, or there is no room for the temporary file.
    """
    header = read(0, 8)
    length = int.from_bytes(header, "little")
    if length <= min(size - 8, _MAX_HEADER_BYTES):
        header += read(8, length)
    try:
        with tempfile.NamedTemporaryFile(prefix="dbrx_q-header-", suffix=".safetensors") as sparse:
            sparse.write(header)
            sparse.truncate(size)
            sparse.flush()
            return _read_header(Path(sparse.name), path, size, header[:8])
    except OSError as error:
        raise CheckpointError(
            f"{path}: checking its header takes a sparse file of {size} bytes in {tempfile.gettempdir()}; {error.strerror}. "
            "Set TMPDIR to a folder on another disk"
        ) from None


def _read_header(file: Path, path: Path, size: int, length_field: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """`tensors` and `metadata` of a file, as the safetensors package reads them.

    Args:
        file: is read.
        path: the name in messages.
        size: bytes of the file.
        length_field: its first 8 bytes; fewer where it is shorter.
    """
    length = int.from_bytes(length_field, "little")
    try:
        # framework="numpy": "pt" would map the file a second time, as a torch storage.
        with safe_open(file, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            stored = {name: opened.get_slice(name) for name in opened.offset_keys()}
            types = {name: (str(tensor.get_dtype()), tuple(tensor.get_shape())) for name, tensor in stored.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'{path}: a shard must be a whole safetensors file; the safetensors package refuses it with "{error}", reading a header of '
            f"{length} bytes in a file of {size}. The file is truncated, damaged or of another kind: fetch it again"
        ) from None
    tensors, offset = {}, 8 + length
    for name, (dtype_name, shape) in types.items():  # the package has checked that they are stored back to back in this order
        nbytes = _nbytes(path, name, dtype_name, shape)
        tensors[name] = TensorInfo(dtype_name, shape, offset, nbytes)
        offset += nbytes
    if offset != size:
        raise CheckpointError(f"{path}: a shard must not change while it is opened; found {size} bytes, then {offset}. Try again")
    return tensors, metadata


def _nbytes(path: Path, name: str, dtype_name: str, shape: Sequence[int]) -> int:
    if dtype_name not in _DTYPES and dtype_name not in _BITS:
        known = ", ".join((*_DTYPES, *_BITS))
        raise CheckpointError(f"{path}: {name}: the dtype must be one of {known}; found {dtype_name}. Use a newer dbrx_q")
    bits = 8 * _DTYPES[dtype_name].itemsize if dtype_name in _DTYPES else _BITS[dtype_name]
    return math.prod(shape) * bits // 8


def safetensors_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file that holds `tensors`, each a (name, dtype, shape), in this order; and where each of them is stored."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin on a cache line
    infos, offset = {}, 8 + len(text)
    for name, dtype, shape in tensors:
        infos[name] = TensorInfo(_NAMES[dtype], tuple(shape), offset, math.prod(shape) * dtype.itemsize)
        offset += infos[name].nbytes
    return len(text).to_bytes(8, "little") + text, infos


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor and hashes it while writing.

    Args:
        path: the file; must not exist, unless it is `reopened`.
        tensors: (name, dtype, shape) of all tensors, in the order in which `write` receives them.
        metadata: further texts of the header, by name.
        reopened: continue the file that an earlier writer left at `path`: `keep` accepts its tensors, and the first `write` cuts off the
            rest.
    """

    nbytes: int
    """Bytes written or kept so far, the header included."""

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
        reopened: bool = False,
    ) -> None:
        self.path = path
        self._remaining = list(reversed(tensors))
        self._hash = hashlib.sha256()
        self.nbytes = 0
        header, self._infos = safetensors_header(tensors, metadata)
        reopened = reopened and path.exists()
        self._file = open(path, "r+b" if reopened else "x+b", buffering=0)  # noqa: SIM115 # closed by close()
        if not reopened or not self._keep_bytes(len(header), hashlib.sha256(header).hexdigest()):
            self._append(header)

    @property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of the bytes written or kept so far."""
        return self._hash.hexdigest()

    def keep(self, names: Sequence[str], digest: str) -> bool:
        """Keep the next tensors as an earlier writer left them, if the file up to their end has the SHA-256 `digest`.

        Returns:
            Whether they were kept; nothing changes where they were not.
        """
        announced = [name for name, _, _ in self._remaining[-len(names) :]]
        assert announced == list(reversed(names)), f"{names[0]} is not the next tensor"
        if not self._keep_bytes(sum(self._infos[name].nbytes for name in names), digest):
            return False
        del self._remaining[-len(names) :]
        return True

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which must be the one that was announced."""
        expected, dtype, shape = self._remaining.pop()
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape), f"got {name}; the next is {expected} {dtype} {shape}"
        self._append(_bytes_of(tensor.contiguous()))

    def write_pieces(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Append the next tensor, which must be the one that was announced, as pieces of its rows in order."""
        expected, dtype, shape = self._remaining.pop()
        assert name == expected, f"got {name}; the next is {expected}"
        rows = 0
        for piece in pieces:
            assert (piece.dtype, tuple(piece.shape[1:])) == (dtype, shape[1:]), f"{name}: got {piece.dtype} {list(piece.shape)}"
            self._append(_bytes_of(piece.contiguous()))
            rows += len(piece)
        assert rows == shape[0], f"{name}: got {rows} of {shape[0]} rows"

    def close(self) -> str:
        """Flush to the disk; returns the SHA-256 of the file, in hexadecimal."""
        assert not self._remaining, f"{self._remaining[-1][0]} was never written"
        self._file.truncate(self.nbytes)
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close without the checks of `close`, for a file that will be removed or reopened."""
        self._file.close()

    def _keep_bytes(self, length: int, digest: str) -> bool:
        hash_with_them, left = self._hash.copy(), length
        self._file.seek(self.nbytes)
        while left:
            piece = self._file.read(min(left, _HASH_STEP_BYTES))
            if not piece:
                return False
            hash_with_them.update(piece)
            left -= len(piece)
        if hash_with_them.hexdigest() != digest:
            return False
        self._hash, self.nbytes = hash_with_them, self.nbytes + length
        return True

    def _append(self, data: bytes | memoryview) -> None:
        if self._file.seek(0, os.SEEK_CUR) != self.nbytes:
            self._file.seek(self.nbytes)
            self._file.truncate()
        view = memoryview(data)
        n_written = 0
        while n_written < len(view):
            n_written += self._file.write(view[n_written : n_written + _MAX_READ_BYTES])
        self._hash.update(data)
        self.nbytes += len(view)


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a file that is still being written, so that its header cannot be checked against its size.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    out = torch.empty(info.shape, dtype=info.dtype)
    view = _bytes_of(out)
    with open(path, "rb", buffering=0) as file:
        file.seek(info.offset)
        n_read = 0
        while n_read < len(view):
            n = file.readinto(view[n_read : n_read + _MAX_READ_BYTES])
            if not n:
                raise CheckpointError(
                    f"{path}: a tensor must be whole; the file ends at byte {info.offset + n_read}, in the middle of one. Quantize again"
                )
            n_read += n
    return out


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")
