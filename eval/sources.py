"""Checkpoints of every kind that can be measured, opened by one function."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.model import DbrxForCausalLM
from dbrx_q.tokenizer import DbrxTokenizer

__all__ = ["Source", "open_source"]


class Source(ABC):
    """A checkpoint on disk, of which only headers have been read.

    Attributes:
        name: as the user gave it.
        path: the folder or file.
        config: the model's configuration.
        format: of its weights, such as "bfloat16", "int4 g64 + int8 g64", "GGUF Q4_0", "bitsandbytes nf4 + bfloat16".
        nbytes: of all tensors as stored, with scales and zero-points.
        parameters: of the plain model.
    """

    name: str
    path: Path
    config: DbrxConfig
    format: str
    nbytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.nbytes / self.parameters

    @abstractmethod
    def sha256(self) -> str:
        """A hash of all weights: of a checkpoint with a manifest the manifest's, of any other that of its files in the order of their names."""

    @abstractmethod
    def tokenizer(self) -> DbrxTokenizer:
        """The checkpoint's own tokenizer."""

    @abstractmethod
    def load(self, *, dtype: torch.dtype | None, device: torch.device) -> DbrxForCausalLM:
        """The model; `dtype` of activations and of weights that are not packed, None for the checkpoint's."""


def open_source(path_or_hub_id: str | os.PathLike[str]) -> Source:
    """The checkpoint at a path: a folder that is plain or quantized by dbrx_q, one that transformers saved (plain, or in 4 bits through
    bitsandbytes), a GGUF file; or a hub id of such a folder.

    Raises:
        CheckpointError: nothing there, a file that is damaged, or of another model.
    """
    raise AssertionError
