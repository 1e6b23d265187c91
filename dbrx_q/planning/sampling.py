"""What it takes to sample many sequences from a model: the batch, its memory, and the time, by bytes over bandwidths.

A step gives every sequence of a batch a token and reads each expert that any of them needs once. Time therefore depends on the number of
steps, tokens of a sequence times batches, more than on the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, kind_of
from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.formats.kv import KV_FORMATS

from .footprint import MemoryRequest
from .machine import Machine, Placement
from .placement import place
from .speed import expected_terms

__all__ = ["SamplingPlan", "plan_sampling"]

_LARGEST_BATCH = 2048
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)  # and one sequence at a time
_TOLERANCE = 1.05  # a smaller batch is as good if it takes so much more time
# The bundled model takes 48 ms of processor time for a step of 256 sequences: 22 ms for the draw from 256 x 4,096 probabilities, the rest
# mostly for calls of its 64 experts.
_SECONDS_PER_PROBABILITY = 2.1e-8
_SECONDS_PER_EXPERT = 2e-4


@dataclass(frozen=True)
class SamplingPlan:
    """How sequences are sampled, and what that takes."""

    sequences: int
    """How many."""
    length: int
    """Tokens of each."""
    batch: int
    """Sequences that advance together."""
    placement: Placement
    """What each device holds; it may not fit, where no batch does."""
    step_bytes: float
    """Bytes of experts that a step reads from the disk."""
    seconds: float
    """The time, about."""

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-self.sequences // self.batch)

    @property
    def steps(self) -> int:
        """Forward passes of all batches."""
        return self.batches * self.length

    @property
    def memory(self) -> int:
        """Bytes of host memory."""
        return self.placement.host.total


def plan_sampling(
    config: DbrxConfig, formats: Mapping[str, TensorFormat], machine: Machine, *, sequences: int, length: int, flops: float = math.inf
) -> SamplingPlan:
    """The fastest plan within the memory of a machine, and of those almost as fast the one with the smallest batch.

    Args:
        config: of the model.
        formats: of its packed tensors, by name; empty for a plain checkpoint.
        machine: whose memory may be taken.
        sequences: how many.
        length: tokens of each.
        flops: floating-point operations a second of the device that computes; infinite to count bytes alone.
    """
    plans = []
    for batches in (*(n for n in _BATCHES if n < sequences), sequences):
        batch = -(-sequences // batches)
        if batch > _LARGEST_BATCH and batches < sequences:
            continue
        placement = place(config, formats, machine, MemoryRequest(length, batch, KV_FORMATS[0], step_tokens=batch))
        step_bytes, seconds = _step(config, placement, machine, batch, length, flops)
        plans.append(SamplingPlan(sequences, length, batch, placement, step_bytes, -(-sequences // batch) * length * seconds))
    fitting = [plan for plan in plans if plan.placement.fits]
    if not fitting:
        return plans[-1]
    limit = _TOLERANCE * min(plan.seconds for plan in fitting)
    return min((plan for plan in fitting if plan.seconds <= limit), key=lambda plan: plan.batch)


def _step(config: DbrxConfig, placement: Placement, machine: Machine, batch: int, length: int, flops: float) -> tuple[float, float]:
    """(bytes from the disk, seconds) of a step."""
    ffn = config.ffn_config
    E, A = ffn.moe_num_experts, ffn.moe_top_k
    distinct = E * (1 - (1 - A / E) ** batch)  # experts of a layer that a step needs, if tokens chose at random
    terms = expected_terms(placement, machine, n_experts=E, top_k=distinct)
    keys_and_values = sum(plan.kv_cache for plan in placement.devices) / 2  # half of it, on average over a sequence
    bandwidth = machine.gpus[0].bandwidth if placement.gpus else machine.host_bandwidth
    seconds = sum(term.seconds for term in terms) + keys_and_values / bandwidth + 2 * batch * _active_parameters(config) / flops
    seconds += batch * config.vocab_size * _SECONDS_PER_PROBABILITY + config.n_layers * distinct * _SECONDS_PER_EXPERT
    return sum(term.nbytes for term in terms if term.path == "disk"), seconds


def _active_parameters(config: DbrxConfig) -> float:
    """Parameters that one token multiplies."""
    share = config.ffn_config.moe_top_k / config.ffn_config.moe_num_experts
    tensors = [tensor for tensor in dense_tensors(config) if kind_of(tensor.name) != "embedding"]
    return sum(math.prod(tensor.shape) * (share if tensor.experts else 1.0) for tensor in tensors)
