"""manifest.json: sizes and hashes of a quantized checkpoint's files, and the quantization error of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbrx_q.errors import CheckpointError
from dbrx_q.json_file import check_regular, read_json_object

__all__ = ["MANIFEST_NAME", "Manifest", "sha256_of"]

MANIFEST_NAME = "manifest.json"
_STEP_BYTES = 1 << 24


@dataclass
class Manifest:
    """The contents of a checkpoint's manifest.json."""

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{"bytes", "sha256"} of every safetensors file, by file name."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{"bytes", "sha256"} of every other file, by file name."""
    tensors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Statistics of every tensor, by its plain name."""
    source: dict[str, str] = field(default_factory=dict)
    """What the checkpoint was made of: "sha256" over all matrices, of a hub repository also "commit"; empty where it was not noted."""

    calibration: list[dict[str, Any]] = field(default_factory=list)
    """The sources that calibrated it, as `quantization_config` names them; empty where at most one text did."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the file."""
        source: dict[str, Any] = {"source": self.source} if self.source else {}
        source |= {"calibration": self.calibration} if self.calibration else {}
        return {"format_version": 1, **source, "shards": self.shards, "files": self.files, "tensors": self.tensors}

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a checkpoint; None where there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / MANIFEST_NAME
        if not path.exists():
            return None
        data = read_json_object(path)
        try:
            source, calibration = dict(data.get("source") or {}), list(data.get("calibration") or [])
            manifest = cls(dict(data["shards"]), dict(data["files"]), dict(data["tensors"]), source, calibration)
            for name, entry in (manifest.shards | manifest.files).items():
                if Path(name).name != name or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                    raise ValueError(f"entry {name!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: must list shards and files with their bytes and sha256; found a wrong {error}. Fetch it again"
            ) from None
        return manifest


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> str:
    """The SHA-256 of a file, in hexadecimal; `on_bytes` is called with the bytes of every piece read.

    Raises:
        CheckpointError: a pipe or a device.
    """
    check_regular(path, path.stat())
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_STEP_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()
