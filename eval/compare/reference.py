"""The predictions that checkpoints are measured against: of a model that runs along with them, or read from a file.

Dimension letters: `P` predicted tokens of a step, `S` sampled tokens among them, `L` layers, `A` active experts, `D` d_model,
`N` tokens of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.eval.divergence import Distribution
from dbrx_q.eval.observe import Observation, observe
from dbrx_q.eval.windows import Window
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import finite_logits
from dbrx_q.sources.base import Source

__all__ = ["ModelReference", "Reference", "ReferenceStep"]


@dataclass(frozen=True)
class ReferenceStep:
    """The reference's results for one step."""

    experts: torch.Tensor
    """uint8 [L, P, A], the experts that the routers chose, ascending."""
    states: torch.Tensor
    """float32 [S, L, D], the residual stream after every block."""
    distribution: Callable[[slice], Distribution]
    """Gives the predictions for a slice of the step's P predicted tokens."""


class Reference(ABC):
    """A checkpoint's predictions for one text, cut by one protocol."""

    name: str
    """The checkpoint's path or hub id, as given."""
    format: str
    """The checkpoint's formats, such as "bfloat16"."""
    nbytes: int
    """Bytes of all tensors as stored."""
    bits_per_weight: float
    """Stored bits over parameters, scales included."""
    sha256: str
    """Of the checkpoint."""
    config: DbrxConfig
    """The checkpoint's configuration."""
    approximation: str = ""
    """What is not exact about the predictions; empty if they are exact."""
    models: Sequence[DbrxForCausalLM] = ()
    """The loaded model, if there is one."""

    @abstractmethod
    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        """Yield the steps of a batch of windows, divided as by `observe`.

        Args:
            text: int64 [N], on the CPU.
            windows: a batch of `observe.batches`.
            index: of the first window of the batch.
            first: tokens of the text that were predicted before the batch.
            interval: distance in predicted tokens between two samples of the residual stream.
        """


class ModelReference(Reference):
    """The predictions of a loaded model.

    Args:
        source: the checkpoint.
        model: loaded by `source.load`.
    """

    def __init__(self, source: Source, model: DbrxForCausalLM) -> None:
        self.name, self.format, self.nbytes, self.sha256 = source.name, source.format, source.nbytes, source.sha256()
        self.bits_per_weight, self.config, self.model, self.models = source.bits_per_weight, source.config, model, [model]

    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        for step in observe(self.model, text, windows, first=first, interval=interval):
            yield ReferenceStep(step.experts, step.states, self._distribution_of(step))

    def _distribution_of(self, step: Observation) -> Callable[[slice], Distribution]:
        return lambda chunk: Distribution.of(finite_logits(self.model, step.hidden[chunk]), step.targets[chunk])
