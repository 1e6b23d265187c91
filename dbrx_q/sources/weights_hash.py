"""The SHA-256 of files that may be hundreds of gigabytes, computed once for every state of a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.checkpoint.user_cache import user_cache

__all__ = ["file_sha256", "weights_sha256"]


def weights_sha256(files: Sequence[Path]) -> str:
    """The SHA-256 of the one file, or over the digests of several in hexadecimal, in the order of their names.

    Names themselves do not count, so that a file that was renamed is the same.
    """
    digests = [file_sha256(path) for path in sorted(files, key=lambda path: path.name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    It is kept in the user's cache under the file's real path, size and time of change; a cache that cannot be written keeps none.
    """
    status = path.stat()
    key = [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    kept = user_cache() / "sha256" / f"{name[:32]}.json"
    with suppress(OSError, ValueError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("key") == key and isinstance(found.get("sha256"), str):
            return str(found["sha256"])
    digest = sha256_of(path)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"key": key, "sha256": digest}), encoding="utf-8")
        os.replace(partial, kept)
    return digest
