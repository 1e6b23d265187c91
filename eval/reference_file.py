"""A reference that was saved: predictions on one text, to measure checkpoints against on a machine that cannot hold the reference itself.

One safetensors file. Its tensors, for T predicted tokens in the order of the text, W windows, and N tokens of the text that lie in them:

| tensor | dtype, shape | what |
|---|---|---|
| `text_ids` | int32 [N] | the text |
| `nll` | float64 [T] | negative log-likelihood of the token that came, in nats |
| `log_probs` | float16 [T, V] | of the whole vocabulary; normalised again when read |
| `top_log_probs` | float32 [T, K] | in its place with `top_k`: of the K likeliest |
| `top_ids` | int32 [T, K], or [T, 5] beside the whole vocabulary | the likeliest tokens, likeliest first |
| `experts` | uint8 [T, L, A] | chosen by the routers for the token before, ascending |
| `states` | float32 [S, L, D] | residual stream after every block, of every `interval`-th predicted token |
| `window_sha256` | uint8 [W, 32] | SHA-256 of a window's rows of the tensors above but the text's; zeros for one not written yet |

The header's metadata holds, under `dbrx_q_reference`, a JSON object that says whose predictions these are, on which text and how it was
cut, and under `sha256` its SHA-256 and that of `text_ids`.

Dimension letters: `T`, `W`, `N`, `K`, `S` as above, `V` vocabulary, `L` layers, `A` active experts, `D` d_model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.safetensors_file import SafetensorsFile, TensorInfo, safetensors_header

from .divergence import AGREEING, Distribution
from .observe import LOGIT_TOKENS, batches, sample_interval, step_sizes
from .reference import ModelReference, Reference, ReferenceStep
from .windows import Protocol, Window

__all__ = ["LEAST_TOP_K", "ReferenceFile", "is_reference_file", "reference_bytes", "save_reference"]

LEAST_TOP_K = 16
_KEY = "dbrx_q_reference"
_VERSION = 1
_RESERVE_BYTES = 16 << 20
_LEAST_LOG_PROB = -60000.0  # float16 holds this; below it there would be infinities


def is_reference_file(path: Path) -> bool:
    """Whether a path names a saved reference rather than a checkpoint: a single .safetensors file."""
    return path.suffix == ".safetensors" and path.is_file()


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
) -> bool:
    """Write what `reference` predicts for a text to `path`, which appears when it is complete; until then it is `path`.partial.

    Args:
        reference: a loaded model.
        ids: the text's token ids.
        protocol: how the text is cut.
        path: a file; must not exist.
        about: more to say in the file: "text", "text_sha256" and "provenance".
        top_k: tokens of each distribution to keep, at least 16; None for the whole vocabulary.
        resume: go on with a `path`.partial of the same run.
        on_window: called with (windows done, windows in all).

    Returns:
        Whether the file is complete; False where Ctrl-C ended it after at least one window.

    Raises:
        RequestError: a file in the way, a `path`.partial of another run, a full disk, or a top_k out of range.
    """
    config = reference.config
    protocol.check(len(ids), config)
    if top_k is not None and not LEAST_TOP_K <= top_k <= config.vocab_size:
        raise RequestError(f"top_k must be from {LEAST_TOP_K} to the vocabulary of {config.vocab_size}; found {top_k}")
    if path.exists():
        raise RequestError(f"{path}: the reference's file must not exist; found one. Give another name or remove it")
    windows = protocol.windows(len(ids))
    text = torch.tensor(ids[: windows[-1].end], dtype=torch.int32)
    predicted = sum(window.tokens for window in windows)
    interval = sample_interval(predicted, config.n_layers, config.d_model)
    settings = dict(about) | {
        "version": _VERSION,
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
    header, infos = safetensors_header(
        _layout(config, len(text), predicted, len(windows), interval, top_k),
        {_KEY: described, "sha256": _digest(described.encode(), _bytes(text))},
    )
    partial = path.with_name(path.name + ".partial")
    with _Writer(partial, header, infos, windows, fresh=not resume) as writer:
        writer.put("text_ids", 0, text)
        done = writer.windows_done()
        first = 0
        try:
            for index, batch in batches(windows):
                tokens = sum(window.tokens for window in batch)
                if index + len(batch) > done:
                    on_window(index, len(windows))
                    _write_batch(writer, reference, text.long(), batch, index, first, interval, top_k)
                    done = index + len(batch)
                first += tokens
        except KeyboardInterrupt:
            if not done:
                raise
            return False
        on_window(len(windows), len(windows))
    os.rename(partial, path)
    return True


def reference_bytes(config: DbrxConfig, ids: int, protocol: Protocol, top_k: int | None) -> int:
    """Bytes that a saved reference takes, but for its header."""
    windows = protocol.windows(ids)
    predicted = sum(window.tokens for window in windows)
    interval = sample_interval(predicted, config.n_layers, config.d_model)
    layout = _layout(config, windows[-1].end, predicted, len(windows), interval, top_k)
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)


class ReferenceFile(Reference):
    """A saved reference; use it as a context manager. Every window is checked against its SHA-256 when it is read.

    Attributes:
        protocol: how its text was cut.
        text, text_sha256: what its text is called, and its hash.
        ids: the text's token ids up to the end of the last window.
        tokens: how many the whole text has.

    Raises:
        CheckpointError: no such file, a damaged one, or one that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        try:
            self._read_settings(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ReferenceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_settings(self, path: Path) -> None:
        described = self._file.metadata.get(_KEY)
        if described is None:
            raise CheckpointError(
                f"{path}: a reference must be a checkpoint, a GGUF file or what `dbrx-q reference` saved; this safetensors file is neither"
            )
        ids = self._file.read("text_ids") if "text_ids" in self._file.tensors else torch.zeros(0, dtype=torch.int32)
        if _digest(described.encode(), _bytes(ids)) != self._file.metadata.get("sha256"):
            raise CheckpointError(
                f"{path}: the header of a reference must have the SHA-256 that it names; it differs, so the file is damaged: copy it again"
            )
        self.settings: dict[str, Any] = json.loads(described)
        if self.settings["version"] != _VERSION:
            raise CheckpointError(
                f"{path}: a saved reference must have version {_VERSION}; found {self.settings['version']}. Save it again with this dbrx-q"
            )
        self.path = path
        self.name, self.format, self.nbytes = self.settings["reference"], self.settings["format"], self.settings["bytes"]
        self.bits_per_weight, self.sha256 = self.settings["bits_per_weight"], self.settings["sha256"]
        self.config = DbrxConfig.from_dict(self.settings["config"], source=str(path))
        self.protocol = Protocol(**self.settings["protocol"])
        self.text, self.text_sha256, self.tokens = self.settings["text"], self.settings["text_sha256"], self.settings["tokens"]
        self.ids: list[int] = ids.tolist()
        self._digests = self._file.read("window_sha256")
        self._top_k = self.settings["top_k"]
        if self._top_k is not None:
            self.approximation = (
                f"the reference kept its {self._top_k} likeliest tokens: divergences count all others as one event and are lower bounds"
            )

    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        assert interval == self.settings["interval"]
        at = first
        for place, window in enumerate(windows, index):
            self._check_window(place, at, window.tokens)
            at += window.tokens
        for size in step_sizes(windows):
            experts = self._file.read_rows("experts", first, size).transpose(0, 1)  # [L, P, A]
            low, high = -(-first // interval), -(-(first + size) // interval)
            yield ReferenceStep(experts, self._file.read_rows("states", low, high - low), self._distribution_from(first))
            first += size

    def _distribution_from(self, first: int) -> Callable[[slice], Distribution]:
        def distribution(place: slice) -> Distribution:
            start, count = first + place.start, place.stop - place.start
            nll, ids = self._file.read_rows("nll", start, count), self._file.read_rows("top_ids", start, count).long()
            if self._top_k is None:
                stored = self._file.read_rows("log_probs", start, count).double()
                return Distribution(stored - stored.logsumexp(-1, keepdim=True), None, nll, ids)
            return Distribution(self._file.read_rows("top_log_probs", start, count).double(), ids, nll)

        return distribution

    def _check_window(self, index: int, first: int, tokens: int) -> None:
        if (
            _window_digest(self._file.read_rows, list(self._file.tensors), first, tokens, self.settings["interval"])
            != self._digests[index].numpy().tobytes()
        ):
            raise CheckpointError(
                f"{self.path}: every window must have the SHA-256 that was kept of it; window {index} differs. Copy the file again"
            )


_Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


def _layout(config: DbrxConfig, ids: int, predicted: int, windows: int, interval: int, top_k: int | None) -> _Layout:
    L, A = config.n_layers, config.ffn_config.moe_top_k
    if top_k is None:
        kept: _Layout = [("log_probs", torch.float16, (predicted, config.vocab_size)), ("top_ids", torch.int32, (predicted, AGREEING))]
    else:
        kept = [("top_log_probs", torch.float32, (predicted, top_k)), ("top_ids", torch.int32, (predicted, top_k))]
    return [
        ("text_ids", torch.int32, (ids,)),
        ("nll", torch.float64, (predicted,)),
        *kept,
        ("experts", torch.uint8, (predicted, L, A)),
        ("states", torch.float32, (-(-predicted // interval), L, config.d_model)),
        ("window_sha256", torch.uint8, (windows, 32)),
    ]


class _Writer:
    """Writes rows of the tensors of a file that is made at its full size, so that a run can go on where it stopped."""

    def __init__(self, path: Path, header: bytes, infos: Mapping[str, TensorInfo], windows: Sequence[Window], *, fresh: bool) -> None:
        self._path, self._header, self._infos, self._windows, self._fresh = path, header, infos, windows, fresh

    def __enter__(self) -> _Writer:
        size = max(info.offset + info.nbytes for info in self._infos.values())
        if not self._fresh and self._path.exists():
            self._fd = os.open(self._path, os.O_RDWR)
            if os.pread(self._fd, len(self._header), 0) == self._header:
                return self
            os.close(self._fd)
            raise RequestError(
                f"{self._path}: what is resumed must be the same run; this file was begun by another command, checkpoint or version. "
                "Give the same options, or leave --resume out to begin again"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._path.parent).free
        if free < size + _RESERVE_BYTES:
            raise RequestError(
                f"{self._path.parent}: the reference takes {size:,} bytes and the disk has {free:,} free. Make room, or give --top-k"
            )
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.truncate(self._fd, size)
        self._put_at(0, self._header)
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def put(self, name: str, row: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor from `row` on."""
        info = self._infos[name]
        assert (rows.dtype, tuple(rows.shape[1:])) == (info.dtype, info.shape[1:]), f"{name}: {rows.dtype} {list(rows.shape)}"
        self._put_at(info.offset + row * (info.nbytes // info.shape[0]), _bytes(rows))

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows that were written before."""
        info = self._infos[name]
        each = info.nbytes // info.shape[0]
        data = bytearray(os.pread(self._fd, count * each, info.offset + first * each))
        return (
            torch.frombuffer(data, dtype=info.dtype).view(count, *info.shape[1:])
            if count
            else torch.empty(0, *info.shape[1:], dtype=info.dtype)
        )

    def finish_window(self, index: int, first: int, tokens: int, interval: int) -> None:
        """Write the SHA-256 of a window whose rows are all there."""
        digest = _window_digest(self.rows, list(self._infos), first, tokens, interval)
        self.put("window_sha256", index, torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None])

    def windows_done(self) -> int:
        """Windows from the first on that are complete."""
        digests = self.rows("window_sha256", 0, len(self._windows))
        missing = (digests == 0).all(1).nonzero()
        return int(missing[0]) if len(missing) else len(self._windows)

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
    at = first
    for step, size in zip(reference.steps(text, batch, index=index, first=first, interval=interval), step_sizes(batch), strict=True):
        for start in range(0, size, LOGIT_TOKENS):
            place = slice(start, min(start + LOGIT_TOKENS, size))
            found = step.distribution(place)
            writer.put("nll", at + start, found.nll.cpu())
            ids = found.likeliest(top_k or AGREEING)
            writer.put("top_ids", at + start, ids.to(torch.int32).cpu())
            if top_k is None:
                writer.put("log_probs", at + start, found.log_probs.clamp(min=_LEAST_LOG_PROB).half().cpu())
            else:
                writer.put("top_log_probs", at + start, found.log_probs.gather(-1, ids).float().cpu())
        writer.put("experts", at, step.experts.transpose(0, 1).contiguous())
        writer.put("states", -(-at // interval), step.states)
        at += size
    at = first
    for place, window in enumerate(batch, index):
        writer.finish_window(place, at, window.tokens, interval)
        at += window.tokens


def _window_digest(rows: Callable[[str, int, int], torch.Tensor], names: Sequence[str], first: int, tokens: int, interval: int) -> bytes:
    """SHA-256 of a window's rows, tensor after tensor."""
    digest = hashlib.sha256()
    for name in names:
        if name in ("text_ids", "window_sha256"):
            continue
        low, high = first, first + tokens
        if name == "states":
            low, high = -(-low // interval), -(-high // interval)
        for start in range(low, high, LOGIT_TOKENS):
            digest.update(_bytes(rows(name, start, min(LOGIT_TOKENS, high - start))))
    return digest.digest()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
