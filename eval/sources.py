"""Checkpoints of every kind that can be measured, opened by one function."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from dbrx_q.budget import Budget
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.hub import resolve_folder
from dbrx_q.model import DbrxForCausalLM
from dbrx_q.tokenizer import DbrxTokenizer

__all__ = ["Source", "open_source"]


class Source(ABC):
    """A checkpoint on disk, of which only headers have been read.

    Attributes:
        name: as the user gave it.
        path: the folder or file.
        config: the model's configuration.
        format: of its weights, such as "bfloat16", "int4 g64 + int8 g64", "GGUF Q4_0", "bitsandbytes nf4 + bfloat16 experts".
        nbytes: of all tensors as stored, with scales and zero-points.
        parameters: of the plain model.
        quantize_seconds: what quantizing took, by the report beside the checkpoint; None where there is none.
        budget: what its model may take of the machine; None for as much as it wants of the device that it is loaded to.
    """

    name: str
    path: Path
    config: DbrxConfig
    format: str
    nbytes: int
    parameters: int
    quantize_seconds: float | None = None
    budget: Budget | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.nbytes / self.parameters

    @abstractmethod
    def sha256(self) -> str:
        """A hash of all weights: of a quantized checkpoint with a manifest the manifest's, else its files' in the order of names."""

    @abstractmethod
    def tokenizer(self) -> DbrxTokenizer:
        """The checkpoint's own tokenizer."""

    @abstractmethod
    def load(self, *, dtype: torch.dtype | None, device: torch.device, stream: bool | None = None) -> DbrxForCausalLM:
        """The model.

        Args:
            dtype: of activations and of weights that are not packed; None for the checkpoint's, which is float32 on a CPU and bfloat16 on
                a GPU where other programs' formats are decoded.
            device: where it computes.
            stream: whether experts are decoded layer by layer whenever the model asks for them, so that one layer's lie in memory; None for
                where the decoded model would not fit. Outputs are the same. Packed weights are never decoded.

        Raises:
            CheckpointError: a file that is damaged.
            RequestError: float32 on a GPU, streamed packed weights, or a model that would not fit even if its experts were streamed.
        """


def open_source(path_or_hub_id: str | os.PathLike[str], *, low_bit: bool = False) -> Source:
    """The checkpoint at a path: a folder that is plain or quantized by dbrx_q, one that transformers saved (plain, or in 4 bits through
    bitsandbytes), a GGUF file (of a split one, any part); or a hub id of such a folder, with the low-bit copy that it carries only if
    `low_bit` says so.

    Raises:
        CheckpointError: nothing there, a file that is damaged, or of another model.
        UnsupportedError: a GGUF file without the gguf package.
    """
    from .folder_source import open_folder
    from .gguf_file import is_gguf
    from .gguf_source import GgufSource

    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(f"{path}: a checkpoint must be a folder with config.json or a GGUF file; found another kind of file")
        return GgufSource(name, path)
    folder = resolve_folder(path_or_hub_id, low_bit=low_bit)
    ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: a checkpoint's folder must hold config.json; found GGUF files. Name one, such as {folder / ggufs[0]}"
        )
    return open_folder(name, folder)
