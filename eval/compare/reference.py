"""What other checkpoints are measured against: a model that runs beside them, or what one left in a file.

Dimension letters: `P` predicted tokens of a step, `S` sampled ones of them, `L` layers, `A` active experts, `D` d_model, `V` vocabulary,
`K` tokens that a file keeps of each distribution.
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
from dbrx_q.sources.base import Source

__all__ = ["ModelReference", "Reference", "ReferenceStep"]


@dataclass(frozen=True)
class ReferenceStep:
    """What the reference made of one step. experts: uint8 [L, P, A], ascending. states: float32 [S, L, D].

    distribution: of some places of the step's P predicted tokens.
    """

    experts: torch.Tensor
    states: torch.Tensor
    distribution: Callable[[slice], Distribution]


class Reference(ABC):
    """Predictions for one text, cut by one protocol.

    Attributes:
        name, format, nbytes, bits_per_weight, sha256: of the checkpoint that they come from.
        config: its configuration.
        approximation: empty, or what is not exact about them.
    """

    name: str
    format: str
    nbytes: int
    bits_per_weight: float
    sha256: str
    config: DbrxConfig
    approximation: str = ""
    models: Sequence[DbrxForCausalLM] = ()

    @abstractmethod
    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        """The steps of a batch of windows, as `observe` takes them. index: of the first window; first: tokens predicted before it."""


class ModelReference(Reference):
    """A loaded model.

    Args:
        source: the checkpoint.
        model: what `source.load` gave.
    """

    def __init__(self, source: Source, model: DbrxForCausalLM) -> None:
        self.name, self.format, self.nbytes, self.sha256 = source.name, source.format, source.nbytes, source.sha256()
        self.bits_per_weight, self.config, self.model, self.models = source.bits_per_weight, source.config, model, [model]

    def steps(self, text: torch.Tensor, windows: Sequence[Window], *, index: int, first: int, interval: int) -> Iterator[ReferenceStep]:
        for seen in observe(self.model, text, windows, first=first, interval=interval):
            yield ReferenceStep(seen.experts, seen.states, self._distribution_of(seen))

    def _distribution_of(self, seen: Observation) -> Callable[[slice], Distribution]:
        return lambda place: Distribution.of(self.model.lm_head(seen.hidden[place]), seen.targets[place])
