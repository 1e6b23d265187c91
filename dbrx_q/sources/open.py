"""One function that opens a checkpoint of any kind."""

from __future__ import annotations

import os
from pathlib import Path

from dbrx_q.checkpoint.hub import resolve_folder
from dbrx_q.errors import CheckpointError

from .base import Source

__all__ = ["open_source"]


def open_source(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """The checkpoint at a path or hub id.

    Args:
        path_or_hub_id: a folder that dbrx_q quantized; a folder that transformers saved, plain or in 4 bits through bitsandbytes; a GGUF
            file, or any part of a split one; or the hub id of such a folder.
        fallback: whether the fallback copy in a hub repository is fetched too.

    Raises:
        CheckpointError: the path does not exist, or a file is damaged or of another model.
        UnsupportedError: a GGUF file, where the gguf package is not installed.
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
    gguf_names = sorted(entry.name for entry in folder.glob("*.gguf"))
    if gguf_names and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: a checkpoint's folder must hold config.json; found GGUF files. Name one, such as {folder / gguf_names[0]}"
        )
    return open_folder(name, folder)
