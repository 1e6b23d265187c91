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
    """Whether a path names a saved reference rather than a checkpoint: a single .safetensors file."""
    return path.suffix == ".safetensors" and path.is_file()


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
        described = self._file.metadata.get(KEY)
        if described is None:
            raise CheckpointError(
                f"{path}: a reference must be a checkpoint, a GGUF file or what `dbrx-q reference` saved; this safetensors file is neither"
            )
        ids = self._file.read("text_ids") if "text_ids" in self._file.tensors else torch.zeros(0, dtype=torch.int32)
        if digest_of(described.encode(), bytes_of(ids)) != self._file.metadata.get("sha256"):
            raise CheckpointError(
                f"{path}: the header of a reference must have the SHA-256 that it names; it differs, so the file is damaged: copy it again"
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
            self.approximation = "the reference kept its log-probabilities in float16: divergences below about 0.000001 are its rounding"
        else:
            self.approximation = (
                f"the reference kept its {self._top_k} likeliest tokens: divergences count all others as one event and are lower bounds"
            )

    def check_text(self, text: Text, ids: Sequence[int], protocol: Protocol) -> None:
        """Refuse what these predictions are not of.

        Args:
            text: what checkpoints shall be measured on.
            ids: its tokens, by a checkpoint's tokenizer.
            protocol: how it shall be cut.

        Raises:
            RequestError: another text, other tokens or another protocol, with the first difference.
        """
        if text.sha256 != self.text_sha256:
            raise RequestError(
                f"{text.name}: a saved reference serves the text that it was made on, which is {self.text} with the SHA-256 "
                f"{self.text_sha256[:16]}...; this one has {text.sha256[:16]}... Give that text, or save a reference on this one"
            )
        if protocol != self.protocol:
            raise RequestError(
                f"{self.path}: a saved reference serves the windows that it was made on, {_cut(self.protocol)}; asked for are "
                f"{_cut(protocol)}. Leave the options out, or save a reference with them"
            )
        if list(ids[: len(self.ids)]) != self.ids or len(ids) != self.tokens:
            place = next((i for i, (ours, theirs) in enumerate(zip(ids, self.ids, strict=False)) if ours != theirs), len(ids))
            theirs = self.ids[place] if place < len(self.ids) else "none"
            found = f"token {place} is {ids[place]}" if place < len(ids) else f"the text has {len(ids)} tokens"
            raise RequestError(
                f"{self.path}: a checkpoint's tokenizer must cut the text as the reference's did; here {found}, there {theirs} "
                f"(of {self.tokens}). Compare checkpoints of one model"
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
            window_digest(self._file.read_rows, list(self._file.tensors), first, tokens, self.settings["interval"])
            != self._digests[index].numpy().tobytes()
        ):
            raise CheckpointError(
                f"{self.path}: every window must have the SHA-256 that was kept of it; window {index} differs. Copy the file again"
            )


_Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


def layout_of(config: DbrxConfig, windows: Sequence[Window], top_k: int | None) -> _Layout:
    """(name, dtype, shape) of every tensor of a file."""
    L, A, T = config.n_layers, config.ffn_config.moe_top_k, sum(window.tokens for window in windows)
    if top_k is None:
        kept: _Layout = [("log_probs", torch.float16, (T, config.vocab_size)), ("top_ids", torch.int32, (T, AGREEING))]
    else:
        kept = [("top_log_probs", torch.float32, (T, top_k)), ("top_ids", torch.int32, (T, top_k))]
    return [
        ("text_ids", torch.int32, (windows[-1].end,)),
        ("nll", torch.float64, (T,)),
        *kept,
        ("experts", torch.uint8, (T, L, A)),
        ("states", torch.float32, (-(-T // interval_of(config, windows)), L, config.d_model)),
        ("window_sha256", torch.uint8, (len(windows), 32)),
    ]


def interval_of(config: DbrxConfig, windows: Sequence[Window]) -> int:
    """Every how many predicted tokens the residual stream is kept."""
    return sample_interval(windows, config.n_layers, config.d_model)


def window_digest(rows: Callable[[str, int, int], torch.Tensor], names: Sequence[str], first: int, tokens: int, interval: int) -> bytes:
    """SHA-256 of a window's rows, tensor after tensor."""
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


def _cut(protocol: Protocol) -> str:
    some = "" if protocol.limit is None else f" the first {protocol.limit}"
    return f"{protocol.name}, context {protocol.context}, stride {protocol.stride},{some or ' all of them'}"


def digest_of(*parts: bytes) -> str:
    """The SHA-256 of `parts`, joined, in hexadecimal."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in the order of its elements."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
