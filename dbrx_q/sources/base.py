"""The interface of a checkpoint that can be opened, whoever wrote it."""

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
