"""Opens GGUF files: one file or the parts of a split one, with errors that name the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_q.checkpoint.gguf_files import GGUF_PART
from dbrx_q.errors import CheckpointError

from .gguf_header import GgufTensor, begins_as_gguf, read_header

__all__ = ["GgufParts", "is_gguf", "open_parts"]


def is_gguf(path: Path) -> bool:
    """Whether a file has GGUF's ending or its first bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return path.suffix == ".gguf" or begins_as_gguf(path)


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


def open_parts(path: Path, available: Mapping[str, int] | None = None) -> GgufParts:
    """The GGUF file at `path`; all parts where its name is that of one part (`-00001-of-0000N.gguf`).

    Args:
        path: the file, or any part.
        available: bytes of each file that are at hand, by its name, where the rest of it is a hole; None for all bytes.

    Raises:
        CheckpointError: the file is no GGUF file or is damaged, or a part is missing.
        HeaderIncomplete: a header reaches beyond `available`.
        UnsupportedError: the gguf package is not installed.
    """
    paths = _paths_of_parts(path)
    tensors: dict[str, GgufTensor] = {}
    metadata: dict[str, Any] = {}
    for number, part in enumerate(paths):
        part_metadata, part_tensors = read_header(part, None if available is None else available[part.name])
        count, stored_number = part_metadata.get("split.count", 1), part_metadata.get("split.no")
        if (count, stored_number or 0) != (len(paths), number) and not (len(paths) == 1 and count in (0, 1)):
            raise CheckpointError(
                f"{part}: must be part {number + 1} of {len(paths)} by its name; its metadata says part {stored_number} (from 0) of "
                f"{count}. Give all parts the names that llama-gguf-split gave them"
            )
        metadata = metadata or part_metadata
        for tensor in part_tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise CheckpointError(f"{part}: tensor {tensor.name} is in {other} too. Fetch the parts of one model")
            tensors[tensor.name] = tensor
    announced = metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CheckpointError(f"{paths[0]}: its parts must hold {announced} tensors; found {len(tensors)}. Fetch the parts of one model")
    return GgufParts(paths[0], paths, metadata, tensors)


def _paths_of_parts(path: Path) -> list[Path]:
    match = GGUF_PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, int(match["count"]) + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: all parts of a split GGUF file must be in one folder; {missing[0]} is not. Fetch it")
    return paths
