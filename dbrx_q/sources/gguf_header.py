"""The header of one GGUF file, as the gguf package reads it: metadata, and where each tensor is stored.

The package maps the file and touches the header alone; the mapping ends when the header is read. The package makes two or three objects of
every entry of a list, which takes nine seconds for the vocabulary of DBRX; lists are therefore read here, in a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbrx_q.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from gguf.gguf_reader import GGUFReader, ReaderField, ReaderTensor

__all__ = ["GgufTensor", "HeaderIncomplete", "begins_as_gguf", "can_dequantize", "read_header"]

_MAGIC = b"GGUF"
_STRING, _LIST = 8, 9  # types of metadata by their numbers in the file


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: what the header says about it."""

    name: str
    """GGUF's name."""
    kind: GGMLQuantizationType
    """Its type, such as Q4_K."""
    shape: tuple[int, ...]
    """Sizes, outermost first; every matrix has its reduction axis last."""
    path: Path
    """The file that holds it."""
    offset: int
    """Its first byte, counted from the beginning of the file."""
    nbytes: int
    """Bytes of the tensor."""


class HeaderIncomplete(Exception):  # noqa: N818 # not an error: more of the file is needed
    """The header reaches beyond the bytes that are at hand.

    Args:
        name: of the file.
        end: bytes of it that are needed at least.
    """

    def __init__(self, name: str, end: int) -> None:
        super().__init__(name, end)
        self.name, self.end = name, end


def read_header(path: Path, available: int | None = None) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata by GGUF's keys, and the tensors in the order of the file.

    Args:
        path: the file.
        available: bytes of the file that are at hand, where the rest is a hole; None for all.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged or has another byte order.
        HeaderIncomplete: the header reaches beyond `available`.
        UnsupportedError: the gguf package is not installed.
    """
    if not begins_as_gguf(path):
        raise CheckpointError(f"{path}: a GGUF file must begin with 'GGUF'; it does not. Fetch it again, or give a checkpoint's folder")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UnsupportedError(f"{path}: reading GGUF files needs the gguf package. Install it with: pip install 'dbrx_q[gguf]'") from None
    try:
        with np.errstate(all="ignore"):  # sizes from a damaged file overflow
            reader = _reader(GGUFReader, available)(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise CheckpointError(
            f"{path}: must be a whole GGUF file of a version and of tensor types that the installed gguf package knows; reading it failed "
            f"with {type(error).__name__}: {error}. Fetch it again, or install a newer gguf"
        ) from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: a GGUF file must have this machine's byte order; it has the other. Convert the model again")
    return _metadata(reader, path), [_tensor(stored, path) for stored in reader.tensors]


def begins_as_gguf(path: Path) -> bool:
    """Whether a file has GGUF's first bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: a GGUF file must be readable; {error.strerror}") from None


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantize tensors of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _reader(base: type[GGUFReader], available: int | None) -> type[GGUFReader]:
    """`base` with a check of every read against the file's end: without it, a damaged length lets the package loop for ever."""

    class Reader(base):  # type: ignore[misc,valid-type] # a base class that is known at run time only
        in_header = True

        def __init__(self, path: Path) -> None:
            self.name = path.name
            self.lists: dict[int, list[Any]] = {}  # by the offset of the list's own type
            super().__init__(path)

        def _check(self, offset: int, count: int, itemsize: int) -> None:
            end = offset + count * itemsize
            if end > len(self.data):
                raise ValueError(f"the file ends at byte {len(self.data)}, and {count} values were to follow byte {offset}")
            if available is not None and self.in_header and end > available:
                raise HeaderIncomplete(self.name, end)

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            self._check(int(offset), int(count), np.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, *rest, **named)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != _LIST or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            raw_kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind = next((kind for kind in (*self.gguf_scalar_to_np, _STRING) if kind == int(raw_kind[0])), None)
            if kind is None:
                return super()._get_field_parts(orig_offs, raw_type)
            first = orig_offs + 12
            if kind == _STRING:
                self.lists[orig_offs], end = self._strings(first, int(count[0]))
            else:
                values = self._get(first, self.gguf_scalar_to_np[kind], int(count[0]))
                self.lists[orig_offs], end = values.tolist(), first + values.nbytes
            return end - orig_offs, [raw_kind, count], [], []

        def _strings(self, offset: int, count: int) -> tuple[list[str], int]:
            """The strings that begin at a byte, and the byte after them."""
            data, strings = memoryview(self.data), []
            self._check(offset, count, 8)
            for _ in range(count):
                self._check(offset, 1, 8)
                length = int.from_bytes(data[offset : offset + 8], "little")
                self._check(offset + 8, length, 1)
                offset += 8 + length
                strings.append(str(data[offset - length : offset], "utf-8"))
            return strings, offset

        def _build_tensors(self, *arguments: Any) -> None:
            self.in_header = False
            super()._build_tensors(*arguments)

    return Reader


def _metadata(reader: Any, path: Path) -> dict[str, Any]:
    try:
        return {name: _value(reader, field) for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: its metadata must be readable; {error}. Fetch it again") from None


def _value(reader: Any, field: ReaderField) -> Any:
    begin = field.offset + sum(int(part.nbytes) for part in field.parts[:3])  # after the key's length, the key and the type
    return reader.lists[begin] if begin in reader.lists else field.contents()


def _tensor(stored: ReaderTensor, path: Path) -> GgufTensor:
    shape = tuple(reversed(stored.shape.tolist()))
    return GgufTensor(stored.name, stored.tensor_type, shape, path, int(stored.data_offset), int(stored.n_bytes))
