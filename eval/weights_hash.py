"""The SHA-256 of files that may be hundreds of gigabytes, computed once for every state of a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dbrx_q.manifest import sha256_of
from dbrx_q.user_cache import user_cache

__all__ = ["weights_sha256"]


def weights_sha256(files: Sequence[Path]) -> str:
    """The SHA-256 over "name NUL digest LF" of every file in the order of names, digest being that of the content in hexadecimal.

    Digests are kept in the user's cache under a file's real path, size and time of change; a cache that cannot be written keeps none.
    """
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        whole.update(f"{path.name}\0{_digest(path)}\n".encode())
    return whole.hexdigest()


def _digest(path: Path) -> str:
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
