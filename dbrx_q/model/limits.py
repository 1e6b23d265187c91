"""The memory that a budget leaves to the requests of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
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
    """Bytes of logits on the device of the head: float32, beside those in the dtype of activations that they are converted from. Also of
    the hidden states, attention weights and router logits that a pass returns."""

    def check_logits(self, config: DbrxConfig, dtype: torch.dtype, columns: int) -> None:
        """Refuse logits that exceed the budget.

        Args:
            config: of the model.
            dtype: of activations.
            columns: how many columns of all sequences get logits.

        Raises:
            RequestError: they do.
        """
        needed = columns * config.vocab_size * (torch.float32.itemsize + dtype.itemsize)
        if self.logit_bytes is not None and needed > self.logit_bytes:
            raise RequestError(
                f"logits must fit {self.logit_bytes:,} bytes, the workspace of the model's budget; those of {columns} tokens take "
                f"{needed:,}. Name logits_to_keep, or pass fewer tokens at a time"
            )

    def check_outputs(
        self, config: DbrxConfig, dtype: torch.dtype, shape: tuple[int, int], past: int, states: int, attentions: bool, router_logits: bool
    ) -> None:
        """Refuse outputs of all layers that exceed the budget.

        Args:
            config: of the model.
            dtype: of activations.
            shape: (sequences, columns) of the call.
            past: columns before the call.
            states: how many hidden states are returned.
            attentions: whether attention weights are returned.
            router_logits: whether router logits are returned.

        Raises:
            RequestError: they do.
        """
        if self.logit_bytes is None or not (states or attentions or router_logits):
            return
        B, S = shape
        of_states = states * config.d_model * dtype.itemsize
        of_attentions = config.n_layers * config.n_heads * (past + S) * dtype.itemsize if attentions else 0
        of_routers = config.n_layers * config.ffn_config.moe_num_experts * torch.float32.itemsize if router_logits else 0
        needed = B * S * (of_states + of_attentions + of_routers)
        if needed > self.logit_bytes:
            raise RequestError(
                f"hidden states, attention weights and router logits must fit {self.logit_bytes:,} bytes, the workspace of the model's "
                f"budget; those of {B} x {S} tokens take {needed:,}. Ask for fewer of them, or pass fewer tokens at a time"
            )


def limits_of(placement: Placement, config: DbrxConfig, request: MemoryRequest) -> Limits:
    """The limits of a model that was placed for `request`."""
    # The head runs after the last layer, whose workspace is free again by then.
    last = next(plan for plan in reversed(placement.gpus or (placement.host,)) if plan.layers[1] > plan.layers[0])
    return Limits(
        kv_bytes=sum(plan.kv_cache for plan in placement.devices),
        step_tokens=step_tokens(config, request, "cuda" if placement.gpus else "cpu"),
        logit_bytes=last.workspace + _LOGIT_SLACK_BYTES,
    )
