"""The SHA-256 of files of hundreds of gigabytes, computed once for every state of a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache

from .manifest import sha256_of

__all__ = ["file_sha256", "weights_sha256"]


def weights_sha256(files: Sequence[Path]) -> str:
    """The SHA-256, in hexadecimal, of one file; of several, the SHA-256 of their digests in hexadecimal, in the order of file names.

    Names themselves are not hashed, so that a renamed file has the same hash.
    """
    digests = [file_sha256(path) for path in sorted(files, key=lambda path: path.name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    The user's cache keeps it under the file's real path, size and modification time; nothing is kept where the cache cannot be written.
    """
    status = path.stat()
    key = [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    cache_file = user_cache() / "sha256" / f"{name[:32]}.json"
    with suppress(OSError, ValueError):
        entry = json.loads(cache_file.read_text(encoding="utf-8"))
        if isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("sha256"), str):
            return str(entry["sha256"])
    digest = sha256_of(path)
    write_to_cache(cache_file, json.dumps({"key": key, "sha256": digest}).encode())
    return digest
