"""Checkpoints of every kind that can be measured, opened by one function."""

from __future__ import annotations

import os
from pathlib import Path

from dbrx_q.checkpoint.hub import resolve_folder
from dbrx_q.errors import CheckpointError

from .base import Source

__all__ = ["open_source"]


def open_source(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """The checkpoint at a path: a folder that is plain or quantized by dbrx_q, one that transformers saved (plain, or in 4 bits through
    bitsandbytes), a GGUF file (of a split one, any part); or a hub id of such a folder, with the fallback copy that it carries only if
    `fallback` says so.

    Raises:
        CheckpointError: nothing there, a file that is damaged, or of another model.
        UnsupportedError: a GGUF file without the gguf package.
    """
    from .folder import open_folder
    from .gguf import GgufSource
    from .gguf_file import is_gguf

    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(f"{path}: a checkpoint must be a folder with config.json or a GGUF file; found another kind of file")
        return GgufSource(name, path)
    folder = resolve_folder(path_or_hub_id, fallback=fallback)
    ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: a checkpoint's folder must hold config.json; found GGUF files. Name one, such as {folder / ggufs[0]}"
        )
    return open_folder(name, folder)
