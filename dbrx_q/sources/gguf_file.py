"""Opens GGUF files with the gguf package: one file or the parts of a split one, with errors that name the file.

The package reads the metadata and says where each tensor is stored. It maps the file for that and touches the header alone; the mapping
ends when the file is open.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbrx_q.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from gguf.gguf_reader import GGUFReader, ReaderTensor

__all__ = ["GgufParts", "GgufTensor", "can_dequantize", "is_gguf", "open_parts"]

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether a file has GGUF's ending or its first bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return path.suffix == ".gguf" or _begins_as_gguf(path)


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


@dataclass(frozen=True)
class GgufParts:
    """The metadata and the header of a GGUF file, or of all parts of a split one.

    The methods read values of the metadata; they raise CheckpointError where a value is missing or of another type.
    """

    path: Path
    """The first file."""
    paths: list[Path]
    """All files, in order."""
    metadata: dict[str, Any]
    """Metadata of the first file, by GGUF's keys."""
    tensors: dict[str, GgufTensor]
    """Tensors of all files, by GGUF's names."""

    def text(self, key: str) -> str:
        """A string of the metadata."""
        return str(self._value(key, str, "a string"))

    def count(self, key: str) -> int:
        """A whole number of the metadata."""
        return int(self._value(key, int, "a whole number"))

    def number(self, key: str) -> float:
        """A number of the metadata."""
        return float(self._value(key, (int, float), "a number"))

    def strings(self, key: str) -> list[str]:
        """A list of strings of the metadata."""
        return self._list(key, str, "strings")

    def counts(self, key: str) -> list[int]:
        """A list of whole numbers of the metadata."""
        return self._list(key, int, "whole numbers")

    def _value(self, key: str, kind: Any, rule: str) -> Any:
        value = self.metadata.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {key} must be {rule}; found {value!r:.80}. Convert the model again, or fetch the file again"
            )
        return value

    def _list(self, key: str, kind: type, rule: str) -> list[Any]:
        value = self._value(key, list, f"a list of {rule}")
        if not all(type(entry) is kind for entry in value):
            raise CheckpointError(f"{self.path}: {key} must be a list of {rule}. Convert the model again, or fetch the file again")
        return list(value)


def open_parts(path: Path) -> GgufParts:
    """The GGUF file at `path`; all parts where its name is that of one part (`-00001-of-0000N.gguf`).

    Raises:
        CheckpointError: the file is no GGUF file or is damaged, or a part is missing.
        UnsupportedError: the gguf package is not installed.
    """
    paths = _paths_of_parts(path)
    tensors: dict[str, GgufTensor] = {}
    metadata: dict[str, Any] = {}
    for number, part in enumerate(paths):
        reader = _read(part)
        part_metadata = _metadata(reader, part)
        count, stored_number = part_metadata.get("split.count", 1), part_metadata.get("split.no")
        if (count, stored_number or 0) != (len(paths), number) and not (len(paths) == 1 and count in (0, 1)):
            raise CheckpointError(
                f"{part}: must be part {number + 1} of {len(paths)} by its name; its metadata says part {stored_number} (from 0) of "
                f"{count}. Give all parts the names that llama-gguf-split gave them"
            )
        metadata = metadata or part_metadata
        for tensor in (_tensor(stored, part) for stored in reader.tensors):
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise CheckpointError(f"{part}: tensor {tensor.name} is in {other} too. Fetch the parts of one model")
            tensors[tensor.name] = tensor
    announced = metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CheckpointError(f"{paths[0]}: its parts must hold {announced} tensors; found {len(tensors)}. Fetch the parts of one model")
    return GgufParts(paths[0], paths, metadata, tensors)


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


def _begins_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: a GGUF file must be readable; {error.strerror}") from None


def _paths_of_parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, int(match["count"]) + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: all parts of a split GGUF file must be in one folder; {missing[0]} is not. Fetch it")
    return paths


def _read(path: Path) -> GGUFReader:
    if not _begins_as_gguf(path):
        raise CheckpointError(f"{path}: a GGUF file must begin with 'GGUF'; it does not. Fetch it again, or give a checkpoint's folder")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UnsupportedError(f"{path}: reading GGUF files needs the gguf package. Install it with: pip install 'dbrx_q[gguf]'") from None
    try:
        with np.errstate(all="ignore"):  # sizes from a damaged file overflow
            reader = _within_the_file(GGUFReader)(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise CheckpointError(
            f"{path}: must be a whole GGUF file of a version and of tensor types that the installed gguf package knows; reading it failed "
            f"with {type(error).__name__}: {error}. Fetch it again, or install a newer gguf"
        ) from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: a GGUF file must have this machine's byte order; it has the other. Convert the model again")
    return reader


def _within_the_file(reader: type[GGUFReader]) -> type[GGUFReader]:
    """`reader` with a check of every read against the file's end: without it, a damaged length lets the reader loop for ever."""

    class Reader(reader):  # type: ignore[misc,valid-type] # a base class that is known at run time only
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"the file ends at byte {len(self.data)}, and {int(count)} values were to follow byte {int(offset)}")
            return super()._get(offset, dtype, count, *rest, **named)

    return Reader


def _tensor(stored: ReaderTensor, path: Path) -> GgufTensor:
    shape = tuple(reversed(stored.shape.tolist()))
    return GgufTensor(stored.name, stored.tensor_type, shape, path, int(stored.data_offset), int(stored.n_bytes))


def _metadata(reader: GGUFReader, path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: its metadata must be readable; {error}. Fetch it again") from None
