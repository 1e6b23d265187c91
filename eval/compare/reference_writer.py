"""Writes a reference window by window, so that an interrupted run can be resumed; `reference_file.py` describes the format.

Dimension letters: `T` predicted tokens, `K` tokens kept of each distribution.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.safetensors_file import TensorInfo, safetensors_header
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.eval.divergence import AGREEING
from dbrx_q.eval.observe import LOGIT_TOKENS, batches, step_sizes, step_tokens
from dbrx_q.eval.windows import Protocol, Window

from .reference import ModelReference
from .reference_file import KEY, VERSION, bytes_of, digest_of, interval_of, layout_of, window_digest

__all__ = ["LEAST_TOP_K", "check_destination", "save_reference"]

LEAST_TOP_K = 16
"""Fewest tokens of each distribution that a reference may keep."""
_RESERVE_BYTES = 16 << 20  # of disk that stay free
_LEAST_LOG_PROB = -60000.0  # float16 would round much lower values to infinity


def check_destination(path: Path, config: DbrxConfig, ids: int, protocol: Protocol, top_k: int | None) -> None:
    """Refuse a file that cannot be written, before the model is loaded.

    Args:
        path: the file to write.
        config: of the reference.
        ids: number of tokens of the text.
        protocol: how the text is cut.
        top_k: tokens of each distribution to keep.

    Raises:
        RequestError: the file exists, top_k is out of range, or the disk has too little free space.
    """
    if top_k is not None and not LEAST_TOP_K <= top_k <= config.vocab_size:
        raise RequestError(f"top_k must be from {LEAST_TOP_K} to the vocabulary of {config.vocab_size}; found {top_k}. Choose another")
    if path.exists():
        raise RequestError(f"{path}: the file of a new reference must not exist; it does. Choose another name or delete it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    partial = _partial(path)
    free = shutil.disk_usage(folder).free + (partial.stat().st_blocks * 512 if partial.exists() else 0)
    size = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout_of(config, protocol.windows(ids), top_k))
    if free < size + _RESERVE_BYTES:
        raise RequestError(f"{path}: the reference takes {size:,} bytes; the disk has {free:,} free. Free space, or use --top-k")


def save_reference(
    reference: ModelReference,
    ids: Sequence[int],
    protocol: Protocol,
    path: Path,
    *,
    about: Mapping[str, Any],
    top_k: int | None = None,
    resume: bool = False,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Write the predictions of `reference` for a text to `path`. The file is called `path`.partial until it is complete.

    Args:
        reference: a loaded model.
        ids: the text's token ids.
        protocol: how the text is cut.
        path: a file; must not exist.
        about: further settings to store: "text", "text_sha256" and "provenance".
        top_k: tokens of each distribution to keep, at least 16; None for the whole vocabulary.
        resume: continue a `path`.partial of the same run.
        on_window: called with (windows done, total windows).

    Returns:
        (tokens done, total tokens). They differ if Ctrl-C ended the run after at least one window.

    Raises:
        RequestError: as for `check_destination`, or `path`.partial is of another run.
    """
    config = reference.config
    protocol.check(len(ids), config)
    check_destination(path, config, len(ids), protocol, top_k)
    windows = protocol.windows(len(ids))
    text = torch.tensor(ids[: windows[-1].end], dtype=torch.int32)
    interval = interval_of(config, windows)
    settings = dict(about) | {
        "version": VERSION,
        "reference": reference.name,
        "format": reference.format,
        "bytes": reference.nbytes,
        "bits_per_weight": reference.bits_per_weight,
        "sha256": reference.sha256,
        "config": config.to_dict(),
        "dtype": str(reference.model.dtype).removeprefix("torch."),
        "protocol": asdict(protocol),
        "tokens": len(ids),
        "interval": interval,
        "top_k": top_k,
    }
    described = json.dumps(settings, sort_keys=True)
    metadata = {KEY: described, "sha256": digest_of(described.encode(), bytes_of(text))}
    header, infos = safetensors_header(layout_of(config, windows, top_k), metadata)
    first = done = 0
    with _Writer(_partial(path), header, infos, windows, resume=resume) as writer:
        writer.put("text_ids", 0, text)
        finished = writer.windows_done(interval)
        try:
            for index, batch in batches(windows, step_tokens(reference.models), [finished]):
                if index + len(batch) > finished:
                    on_window(index, len(windows))
                    _write_batch(writer, reference, text.long(), batch, index, first, interval, top_k)
                first += sum(window.tokens for window in batch)
                done = first
        except KeyboardInterrupt:
            if not done:
                raise
            return done, sum(window.tokens for window in windows)
        on_window(len(windows), len(windows))
    os.rename(_partial(path), path)
    return done, done


class _Writer:
    """Writes rows of tensors into a file of full size from the start, so that a run can be resumed where it stopped."""

    def __init__(self, path: Path, header: bytes, infos: Mapping[str, TensorInfo], windows: Sequence[Window], *, resume: bool) -> None:
        self._path, self._header, self._infos, self._windows, self._resume = path, header, infos, windows, resume

    def __enter__(self) -> _Writer:
        size = max(info.offset + info.nbytes for info in self._infos.values())
        if self._resume and self._path.exists():
            self._fd = os.open(self._path, os.O_RDWR)
            if os.pread(self._fd, len(self._header), 0) == self._header and os.fstat(self._fd).st_size == size:
                return self
            os.close(self._fd)
            raise RequestError(
                f"{self._path}: --resume must continue the same run; this file is of another command, checkpoint or version. "
                "Use the same options, or leave --resume out to start again"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.truncate(self._fd, size)
        self._put_at(0, self._header)
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._fd)
        has_window = bool(self.rows("window_sha256", 0, len(self._windows)).any())
        os.close(self._fd)
        if not has_window:
            self._path.unlink(missing_ok=True)  # it takes its full size on disk and has nothing to resume from

    def put(self, name: str, row: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor from `row` on."""
        info = self._infos[name]
        assert (rows.dtype, tuple(rows.shape[1:])) == (info.dtype, info.shape[1:]), f"{name}: {rows.dtype} {list(rows.shape)}"
        self._put_at(info.offset + row * (info.nbytes // info.shape[0]), bytes_of(rows))

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Read rows that were written before."""
        info = self._infos[name]
        row_bytes = info.nbytes // info.shape[0]
        data = bytearray(os.pread(self._fd, count * row_bytes, info.offset + first * row_bytes))
        return (
            torch.frombuffer(data, dtype=info.dtype).view(count, *info.shape[1:])
            if count
            else torch.empty(0, *info.shape[1:], dtype=info.dtype)
        )

    def finish_window(self, index: int, first: int, tokens: int, interval: int) -> None:
        """Write the SHA-256 of a window after all of its rows."""
        digest = window_digest(self.rows, list(self._infos), first, tokens, interval)
        self.put("window_sha256", index, torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None])

    def windows_done(self, interval: int) -> int:
        """How many windows, from the first on, match their SHA-256."""
        first = 0
        for index, window in enumerate(self._windows):
            stored = bytes_of(self.rows("window_sha256", index, 1))
            if stored == bytes(len(stored)) or stored != window_digest(self.rows, list(self._infos), first, window.tokens, interval):
                return index
            first += window.tokens
        return len(self._windows)

    def _put_at(self, offset: int, data: bytes) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)


def _write_batch(
    writer: _Writer,
    reference: ModelReference,
    text: torch.Tensor,
    batch: Sequence[Window],
    index: int,
    first: int,
    interval: int,
    top_k: int | None,
) -> None:
    row = first
    for step, size in zip(reference.steps(text, batch, index=index, first=first, interval=interval), step_sizes(batch), strict=True):
        for start in range(0, size, LOGIT_TOKENS):
            predicted = step.distribution(slice(start, min(start + LOGIT_TOKENS, size)))
            writer.put("nll", row + start, predicted.nll.cpu())
            ids = predicted.likeliest(top_k or AGREEING)
            writer.put("top_ids", row + start, ids.to(torch.int32).cpu())
            if top_k is None:
                writer.put("log_probs", row + start, predicted.log_probs.clamp(min=_LEAST_LOG_PROB).half().cpu())
            else:
                writer.put("top_log_probs", row + start, predicted.log_probs.gather(-1, ids).float().cpu())
        writer.put("experts", row, step.experts.transpose(0, 1).contiguous())
        writer.put("states", -(-row // interval), step.states)
        row += size
    row = first
    for number, window in enumerate(batch, index):
        writer.finish_window(number, row, window.tokens, interval)
        row += window.tokens


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
