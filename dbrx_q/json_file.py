"""Reads a checkpoint's small files, JSON above all; errors name the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import CheckpointError

__all__ = ["check_regular", "read_json_object", "read_small_file"]

# The largest file of DBRX that is read whole, its tokenizer.json, has 4 MB; a manifest has 3.
_MOST_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, is no regular file, is too large, is not UTF-8, is not JSON, or does not hold an object.
    """
    try:
        data = json.loads(read_small_file(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found; a checkpoint folder must hold it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be a readable JSON file; {error}. Fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; found {type(data).__name__}. Fetch it again")
    return data


def read_small_file(path: Path) -> bytes:
    """The contents of a file that belongs to a checkpoint's small files.

    Raises:
        CheckpointError: it is a folder, a pipe or a device, or it is larger than any such file of a DBRX.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that opening a pipe does not block
    try:
        check_regular(path, os.fstat(fd))
        with open(fd, "rb", closefd=False) as file:
            data = file.read(_MOST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _MOST_BYTES:
        raise CheckpointError(f"{path}: must have at most {_MOST_BYTES:,} bytes; found {path.stat().st_size:,}. Fetch it again")
    return data


def check_regular(path: Path, status: os.stat_result) -> None:
    """Refuse what is no regular file: reading a pipe waits for ever, and reading a device may never end.

    Raises:
        CheckpointError: names the file.
    """
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: must be a regular file; found a folder, a pipe or a device. Fetch it again")
