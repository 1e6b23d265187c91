"""Reads a checkpoint's JSON files; errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError

__all__ = ["read_json_object"]


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, is not UTF-8, is not JSON, or does not hold an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found; a checkpoint folder must hold it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be a readable JSON file; {error}. Fetch it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; found {type(data).__name__}. Fetch it again")
    return data
