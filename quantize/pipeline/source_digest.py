"""What identifies the source of a run: a SHA-256 of each matrix as it is read, and one of all of them.

A run that resumes compares the matrices that were finished with those of its own source, so that no checkpoint is made of two models. A
shard that was damaged and fetched again stays welcome: none of its damaged matrices was finished. Files whose size and modification time
are those that the journal noted are not read again, unless config.json, which says how they are read, has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache

from .jobs import Job
from .journal import Entry

__all__ = ["check_source", "digest_of_all", "digest_of_blocks", "remember_digest", "source_digest", "source_files"]

Read = Callable[[Job], Sequence[torch.Tensor]]
"""Gives the matrix of a job in blocks of rows."""


def digest_of_blocks(blocks: Iterable[torch.Tensor]) -> str:
    """The SHA-256, in hexadecimal, of a matrix in blocks of rows, with its dtype; of a transposed block, as it is stored."""
    digest = hashlib.sha256()
    for number, block in enumerate(blocks):
        stored = block if block.is_contiguous() else block.T.contiguous()
        if not number:
            digest.update(str(block.dtype).encode())
        digest.update(stored.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_all(labels: Iterable[str], digests: Sequence[str]) -> str:
    """The SHA-256 of a source, from the labels and digests of its matrices in the order of the model; "" where one is not known."""
    if not all(digests):
        return ""
    return hashlib.sha256("".join(f"{label} {digest}\n" for label, digest in zip(labels, digests, strict=True)).encode()).hexdigest()


def source_files(checkpoint: StoredWeights) -> dict[str, list[object]]:
    """[real path, bytes, modification time in nanoseconds], by name, of the shards of a folder and of the files that say how they are to
    be read; empty for a hub repository."""
    if checkpoint.source is not None:
        return {}
    status = {path: path.stat() for path in (*checkpoint.shards, *_configurations(checkpoint))}
    return {path.name: [os.path.realpath(path), stat.st_size, stat.st_mtime_ns] for path, stat in status.items()}


def check_source(
    checkpoint: StoredWeights, jobs: Sequence[Job], entries: Sequence[Entry], files: Mapping[str, object], folder: Path, read: Read
) -> None:
    """Refuse to continue a run with another source.

    Args:
        checkpoint: the source.
        jobs: the finished ones.
        entries: of these jobs in the journal.
        files: of the shards, as the journal noted them when the run began.
        folder: of the unfinished result.
        read: gives the matrix of a job.

    Raises:
        RequestError: a finished matrix is of another source.
    """
    if checkpoint.source is not None:  # its commit is among the options that are compared
        return
    now = source_files(checkpoint)
    read_alike = all(files.get(path.name) == now[path.name] for path in _configurations(checkpoint))
    for job, entry in zip(jobs, entries, strict=True):
        shard = checkpoint.path_of(job.tensor.name).name
        if not entry.source or (read_alike and files.get(shard) == now[shard]):
            continue
        if digest_of_blocks(read(job)) != entry.source:
            raise RequestError(
                f"{folder}: --resume continues with the checkpoint that the run began with; {job.label} of {checkpoint.folder} is not the "
                "matrix that was quantized. Give that checkpoint, or remove the folder and start again"
            )


def source_digest(checkpoint: StoredWeights, jobs: Sequence[Job], read: Read) -> str:
    """`digest_of_all` of a whole source, which is read unless this machine has done so before."""
    entry = _cache_entry(checkpoint)
    if entry is not None:
        with suppress(OSError, ValueError):
            known = json.loads(entry.read_text(encoding="utf-8"))
            if isinstance(known, str):
                return known
    digest = digest_of_all([job.label for job in jobs], [digest_of_blocks(read(job)) for job in jobs])
    remember_digest(checkpoint, digest)
    return digest


def remember_digest(checkpoint: StoredWeights, digest: str) -> None:
    """Keep the digest of a source in the user's cache, under the paths, sizes and times of its files."""
    entry = _cache_entry(checkpoint)
    if entry is not None and digest:
        write_to_cache(entry, json.dumps(digest).encode())


def _configurations(checkpoint: StoredWeights) -> list[Path]:
    """The files that say how the source's weights are quantized; none of a GGUF file, which holds all."""
    folder = checkpoint.small_files
    return [] if folder is None else [path for name in ("config.json", "quantize_config.json") if (path := folder / name).is_file()]


def _cache_entry(checkpoint: StoredWeights) -> Path | None:
    """The file of a folder's digest; None for a hub repository, which its commit identifies."""
    if checkpoint.source is not None:
        return None
    key = json.dumps(source_files(checkpoint), sort_keys=True)
    return user_cache() / "sources" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
