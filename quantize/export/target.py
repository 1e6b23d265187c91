"""`Target`: what to write, and `ExportPlan`: in which formats it holds each tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.stored_weights import StoredWeights

from .record import ExportRecord

__all__ = ["ExportPlan", "OnBytes", "Target"]

OnBytes = Callable[[int, int], None]
"""Called with (bytes that are written, bytes in all)."""


class ExportPlan(ABC):
    """What becomes of each tensor of a checkpoint."""

    @property
    @abstractmethod
    def to_round(self) -> dict[str, TensorFormat]:
        """The formats into which tensors must be rounded before they can be written, by name; empty where nothing is rounded."""

    @abstractmethod
    def formats(self, weights: StoredWeights) -> dict[str, TensorFormat]:
        """The formats of a checkpoint of ours that can be written without rounding, by the names of its packed tensors.

        `quantize_checkpoint` makes it of `weights` with `keep`, which repacks the tensors that have their format already.
        """

    @abstractmethod
    def nbytes(self, weights: StoredWeights) -> int:
        """Bytes of all tensors as they are written."""


class Target(ABC):
    """A layout with its options."""

    @abstractmethod
    def plan(self, weights: StoredWeights) -> ExportPlan:
        """Say what becomes of each tensor; reads headers and, where they do not tell it, zero-points.

        Raises:
            RequestError: the layout cannot hold a tensor that is not to be rounded.
        """

    @abstractmethod
    def write(
        self,
        weights: StoredWeights,
        plan: ExportPlan,
        destination: Path,
        *,
        memory: int | None = None,
        on_bytes: OnBytes = lambda done, total: None,
    ) -> ExportRecord:
        """Write the weights and the small files into a folder.

        Args:
            weights: to export.
            plan: of these weights, which has nothing to round.
            destination: a folder that does not exist or is empty.
            memory: bytes that this process may take; None for no limit.
            on_bytes: called after every piece.

        Raises:
            CheckpointError: the source is damaged, or a value is beyond what the layout holds.
            RequestError: the destination is not empty, cannot be written or has too little room, or too little memory.
            TokenizerError: the layout needs a tokenizer that the source does not have.
            UnsupportedError: the layout has no such model, or a package is not installed.
        """
