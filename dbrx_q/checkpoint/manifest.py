"""manifest.json: what a quantized checkpoint's files must be, and how well each tensor was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_q.errors import CheckpointError
from dbrx_q.json_file import read_json_object

__all__ = ["MANIFEST_NAME", "Manifest", "sha256_of"]

MANIFEST_NAME = "manifest.json"
_STEP_BYTES = 1 << 24


@dataclass
class Manifest:
    """shards, files: name to {"bytes", "sha256"}. tensors: name to statistics."""

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        return {"format_version": 1, "shards": self.shards, "files": self.files, "tensors": self.tensors}

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a checkpoint, None where it has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            return None
        data = read_json_object(path)
        try:
            manifest = cls(dict(data["shards"]), dict(data["files"]), dict(data["tensors"]))
            for name, entry in (manifest.shards | manifest.files).items():
                if Path(name).name != name or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                    raise ValueError(f"entry {name!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: must list shards and files with their bytes and sha256; found a wrong {error}") from None
        return manifest


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> str:
    """The SHA-256 of a file, in hexadecimal; `on_bytes` hears of every piece read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_STEP_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()
