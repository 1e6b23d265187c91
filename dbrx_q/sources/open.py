"""One function that opens a checkpoint of any kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .base import Source

__all__ = ["open_runnable", "open_source", "tokenizer_at"]


def open_source(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """The checkpoint at a path or hub id.

    Args:
        path_or_hub_id: a folder that dbrx_q quantized; a folder that transformers saved, plain or in 4 bits through bitsandbytes; a GGUF
            file, or any part of a split one; or the name of one of these on the hub, as `resolve_location` takes it.
        fallback: whether the fallback copy in a hub repository is fetched too.

    Raises:
        CheckpointError: the path does not exist, or a file is damaged or of another model.
        UnsupportedError: a GGUF file, where the gguf package is not installed.
    """
    from .folder import open_folder

    return _open(path_or_hub_id, open_folder, fallback=fallback)


def open_runnable(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """As `open_source`, for text generation: a plain checkpoint of the published layout is mapped, and its experts may be offloaded."""
    from .folder import ConvertedFolder, NativeFolder
    from .open_weights import is_of_another_program

    def open_folder(name: str, folder: Path) -> Source:
        return ConvertedFolder(name, folder) if is_of_another_program(folder) else NativeFolder(name, folder)

    return _open(path_or_hub_id, open_folder, fallback=fallback)


def tokenizer_at(location: Path) -> DbrxTokenizer:
    """The tokenizer of a checkpoint's folder or GGUF file.

    Raises:
        TokenizerError: it cannot be read.
    """
    from .gguf_file import open_parts
    from .gguf_tokenizer import tokenizer_of

    return tokenizer_of(open_parts(location)) if location.is_file() else DbrxTokenizer.from_pretrained(location)


def _open(path_or_hub_id: str | os.PathLike[str], open_folder: Callable[[str, Path], Source], *, fallback: bool) -> Source:
    from .gguf import GgufSource
    from .locations import resolve_location

    name, location = os.fspath(path_or_hub_id), resolve_location(path_or_hub_id, fallback=fallback)
    return open_folder(name, location) if location.is_dir() else GgufSource(name, location)
