"""The interface of a checkpoint of any program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import Budget
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

__all__ = ["Source"]


class Source(ABC):
    """A checkpoint on disk. Opening one reads headers and metadata, no weights."""

    name: str
    """The path or hub id as the user gave it."""
    path: Path
    """The folder or file on this machine."""
    config: DbrxConfig
    """The model's configuration."""
    format: str
    """Format of the weights, such as "bfloat16", "int4:64 + int8:64", "GGUF Q4_0", "bitsandbytes nf4 + bfloat16 experts"."""
    nbytes: int
    """Bytes of all tensors as stored, with scales and zero-points."""
    parameters: int
    """Parameters of the plain model."""
    quantize_seconds: float | None = None
    """Seconds that quantizing took, by the report beside the checkpoint; None where there is none."""
    budget: Budget | None = None
    """Limits on the memory that the model may take; None for as much as it needs of the device that it is loaded to."""
    use_mmap: bool = True
    """Whether packed weights on a CPU may be views of mapped files, without a budget."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.nbytes / self.parameters

    @abstractmethod
    def sha256(self) -> str:
        """A hash of all weights, in hexadecimal: the SHA-256 of the manifest where there is one, else of the weights' files.

        Raises:
            CheckpointError: a file differs from the manifest.
        """

    @abstractmethod
    def tokenizer(self) -> DbrxTokenizer:
        """The checkpoint's own tokenizer."""

    @abstractmethod
    def load(self, *, dtype: torch.dtype | None, device: torch.device, stream: bool | None = None) -> DbrxForCausalLM:
        """The model.

        Args:
            dtype: of activations and of weights that are not packed; None for the checkpoint's own. Formats of other programs are
                dequantized to float32 on a CPU and to bfloat16 on a GPU.
            device: on which the model computes.
            stream: whether experts are dequantized layer by layer, each time the model asks for them, so that memory holds the experts of
                one layer; None does so where the dequantized model would not fit. Outputs are the same. Packed weights stay packed.

        Raises:
            CheckpointError: a file is damaged.
            RequestError: float32 on a GPU, `stream` for packed weights, or a model that would not fit even with streamed experts.
        """
