"""The memory that a budget leaves to the requests of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass

from dbrx_q.config import DbrxConfig
from dbrx_q.planning.footprint import MemoryRequest, step_tokens
from dbrx_q.planning.machine import Placement

__all__ = ["Limits", "limits_of"]

# Logits may exceed the workspace by this much: it is part of what a process takes beside the plan.
_LOGIT_SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """What the requests of a loaded model may take. Each limit is None for a model that was loaded without a budget."""

    kv_bytes: int | None = None
    """Bytes of the KV caches of all sequences, over all devices."""
    step_tokens: int | None = None
    """Tokens of one forward pass, all sequences together."""
    logit_bytes: int | None = None
    """Bytes of logits on the device of the head: float32, beside those in the dtype of activations that they are converted from."""


def limits_of(placement: Placement, config: DbrxConfig, request: MemoryRequest) -> Limits:
    """The limits of a model that was placed for `request`."""
    # The head runs after the last layer, whose workspace is free again by then.
    last = next(plan for plan in reversed(placement.gpus or (placement.host,)) if plan.layers[1] > plan.layers[0])
    return Limits(
        kv_bytes=sum(plan.kv_cache for plan in placement.devices),
        step_tokens=step_tokens(config, request, "cuda" if placement.gpus else "cpu"),
        logit_bytes=last.workspace + _LOGIT_SLACK_BYTES,
    )
