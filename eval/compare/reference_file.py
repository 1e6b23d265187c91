"""A saved reference: its predictions on one text, so that checkpoints can be measured on a machine without memory for the reference.

The file is a safetensors file with these tensors, for T predicted tokens in the order of the text, W windows, and the text's N tokens in
these windows:

| tensor | dtype, shape | content |
|---|---|---|
| `text_ids` | int32 [N] | token ids of the text |
| `nll` | float64 [T] | negative log-likelihood of the actual token, in nats |
| `log_probs` | float16 [T, V] | log-probabilities of the whole vocabulary; normalised again when read |
| `top_log_probs` | float32 [T, K] | with `top_k`, in place of `log_probs`: those of the K likeliest tokens |
| `top_ids` | int32 [T, K], or [T, 5] with `log_probs` | the likeliest tokens, likeliest first |
| `experts` | uint8 [T, L, A] | experts chosen by the routers for the preceding token, ascending |
| `states` | float32 [S, L, D] | residual stream after every block, of every `interval`-th predicted token |
| `window_sha256` | uint8 [W, 32] | SHA-256 of a window's rows of the tensors above except `text_ids`; zeros for a window not written yet |

The header's metadata has, under `dbrx_q_reference`, a JSON object that names the checkpoint, the text and how it was cut, and, under
`sha256`, one SHA-256 over this object and `text_ids`.

Dimension letters: `T`, `W`, `N`, `K`, `S` as above, `V` vocabulary, `L` layers, `A` active experts, `D` d_model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.eval.divergence import AGREEING, Distribution
from dbrx_q.eval.observe import LOGIT_TOKENS, sample_interval, step_sizes
from dbrx_q.eval.texts import Text
from dbrx_q.eval.windows import Protocol, Window

from .reference import Reference, ReferenceStep

__all__ = ["KEY", "VERSION", "ReferenceFile", "bytes_of", "digest_of", "interval_of", "is_reference_file", "layout_of", "window_digest"]

KEY = "dbrx_q_reference"
VERSION = 1


def is_reference_file(path: Path) -> bool:
    """Whether a path names a saved reference, which is a single .safetensors file, rather than a checkpoint."""
    return path.suffix == ".safetensors" and path.is_file()


class ReferenceFile(Reference):
    """A saved reference; use it as a context manager. Every window is checked against its SHA-256 when it is read.

    Attributes:
        settings: the JSON object of the header.
        path: of the file.
        protocol: how the text was cut.
        text: path or name of the text, as given.
        text_sha256: of the text's UTF-8 bytes.
        ids: the text's token ids up to the end of the last window.
        tokens: tokens of the whole text.

    Raises:
        CheckpointError: the file does not exist, is damaged, or is not a saved reference.
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
        described = self._file.metadata.get(KEY)
        if described is None:
            raise CheckpointError(
                f"{path}: a reference must be a checkpoint, a GGUF file or a file of `dbrx-q reference`; this file is none of these. "
                "Name the folder of the checkpoint"
            )
        ids = self._file.read("text_ids") if "text_ids" in self._file.tensors else torch.zeros(0, dtype=torch.int32)
        if digest_of(described.encode(), bytes_of(ids)) != self._file.metadata.get("sha256"):
            raise CheckpointError(
                f"{path}: the header of a reference must have the SHA-256 that it names; it differs, so the file is damaged. Copy it again"
            )
        self.settings: dict[str, Any] = json.loads(described)
        if self.settings["version"] != VERSION:
            raise CheckpointError(
                f"{path}: a saved reference must have version {VERSION}; found {self.settings['version']}. Save it again with this dbrx-q"
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
        if self._top_k is None:
            self.approximation = "the reference kept its log-probabilities in float16: divergences below about 0.000001 are rounding error"
        else:
            self.approximation = (
                f"the reference kept its {self._top_k} likeliest tokens: divergences treat all others as one event and are lower bounds"
            )

    def check_text(self, text: Text, ids: Sequence[int], protocol: Protocol) -> None:
        """Refuse a text or a protocol other than that of the saved predictions.

        Args:
            text: the text to measure checkpoints on.
            ids: its token ids, by a checkpoint's tokenizer.
            protocol: how it is to be cut.

        Raises:
            RequestError: the text, its tokens or the protocol differ; the error names the first difference.
        """
        if text.sha256 != self.text_sha256:
            raise RequestError(
                f"{text.name}: a saved reference must be used on its own text, {self.text} with the SHA-256 "
                f"{self.text_sha256[:16]}...; this text has {text.sha256[:16]}... Name that text, or save a reference on this one"
            )
        if protocol != self.protocol:
            raise RequestError(
                f"{self.path}: a saved reference must be used on its own windows, {_described(self.protocol)}; the options ask for "
                f"{_described(protocol)}. Leave the options out, or save a reference with them"
            )
        if list(ids[: len(self.ids)]) != self.ids or len(ids) != self.tokens:
            index = next((i for i, (ours, theirs) in enumerate(zip(ids, self.ids, strict=False)) if ours != theirs), len(ids))
            theirs = self.ids[index] if index < len(self.ids) else "none"
            ours = f"token {index} is {ids[index]}" if index < len(ids) else f"there are {len(ids)} tokens"
            raise RequestError(
                f"{self.path}: a checkpoint's tokenizer must encode the text as the reference's did; by the checkpoint's {ours}, by the "
                f"reference's {theirs} (of {self.tokens}). Compare checkpoints of one model"
            )

    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        assert interval == self.settings["interval"]
        window_first = first
        for window_index, window in enumerate(windows, index):
            self._check_window(window_index, window_first, window.tokens)
            window_first += window.tokens
        for size in step_sizes(windows):
            experts = self._file.read_rows("experts", first, size).transpose(0, 1)  # [L, P, A]
            low, high = -(-first // interval), -(-(first + size) // interval)
            yield ReferenceStep(experts, self._file.read_rows("states", low, high - low), self._distribution_from(first))
            first += size

    def _distribution_from(self, first: int) -> Callable[[slice], Distribution]:
        def distribution(chunk: slice) -> Distribution:
            start, count = first + chunk.start, chunk.stop - chunk.start
            nll, ids = self._file.read_rows("nll", start, count), self._file.read_rows("top_ids", start, count).long()
            if self._top_k is None:
                stored = self._file.read_rows("log_probs", start, count).double()
                return Distribution(stored - stored.logsumexp(-1, keepdim=True), None, nll, ids)
            return Distribution(self._file.read_rows("top_log_probs", start, count).double(), ids, nll)

        return distribution

    def _check_window(self, index: int, first: int, tokens: int) -> None:
        if (
            window_digest(self._file.read_rows, list(self._file.tensors), first, tokens, self.settings["interval"])
            != self._digests[index].numpy().tobytes()
        ):
            raise CheckpointError(
                f"{self.path}: every window must have the SHA-256 that the file names; window {index} differs. Copy the file again"
            )


_Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


def layout_of(config: DbrxConfig, windows: Sequence[Window], top_k: int | None) -> _Layout:
    """(name, dtype, shape) of every tensor of a file."""
    L, A, T = config.n_layers, config.ffn_config.moe_top_k, sum(window.tokens for window in windows)
    if top_k is None:
        predictions: _Layout = [("log_probs", torch.float16, (T, config.vocab_size)), ("top_ids", torch.int32, (T, AGREEING))]
    else:
        predictions = [("top_log_probs", torch.float32, (T, top_k)), ("top_ids", torch.int32, (T, top_k))]
    return [
        ("text_ids", torch.int32, (windows[-1].end,)),
        ("nll", torch.float64, (T,)),
        *predictions,
        ("experts", torch.uint8, (T, L, A)),
        ("states", torch.float32, (-(-T // interval_of(config, windows)), L, config.d_model)),
        ("window_sha256", torch.uint8, (len(windows), 32)),
    ]


def interval_of(config: DbrxConfig, windows: Sequence[Window]) -> int:
    """Distance in predicted tokens between two samples of the residual stream."""
    return sample_interval(windows, config.n_layers, config.d_model)


def window_digest(rows: Callable[[str, int, int], torch.Tensor], names: Sequence[str], first: int, tokens: int, interval: int) -> bytes:
    """SHA-256 of a window's rows of all tensors, one tensor after the other.

    Args:
        rows: reads rows of a tensor: (name, first row, count).
        names: of the tensors, in the order of the file.
        first: predicted tokens before the window.
        tokens: predicted tokens of the window.
        interval: distance in predicted tokens between two samples of the residual stream.
    """
    digest = hashlib.sha256()
    for name in names:
        if name in ("text_ids", "window_sha256"):
            continue
        low, high = first, first + tokens
        if name == "states":
            low, high = -(-low // interval), -(-high // interval)
        for start in range(low, high, LOGIT_TOKENS):
            digest.update(bytes_of(rows(name, start, min(LOGIT_TOKENS, high - start))))
    return digest.digest()


def _described(protocol: Protocol) -> str:
    count = "all of them" if protocol.limit is None else f"the first {protocol.limit}"
    return f"{protocol.name}, context {protocol.context}, stride {protocol.stride}, {count}"


def digest_of(*parts: bytes) -> str:
    """SHA-256 of the concatenated `parts`, in hexadecimal."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in the order of its elements."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
