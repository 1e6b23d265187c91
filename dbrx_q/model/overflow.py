"""Logits that are not finite: found where they appear, and traced to the layer where they began.

An overflow in one layer makes NaN of everything after it, and the most probable token of NaN is the token 0. Whoever takes tokens or
probabilities from logits therefore checks them first. The sum of the logits tells, for one pass over them; only if it is not finite, a
second pass through the model looks for the layer.

Dimension letters: `P` tokens that are predicted, `V` vocabulary, `D` d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from dbrx_q.errors import RequestError

from .batch import batch_of
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .modeling import DbrxForCausalLM, OnBlock

__all__ = ["all_finite", "finite_logits", "overflow_error", "repeat_sequence"]

_STEP_TOKENS = 512  # of the second pass


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; waits for the device of `values`. Sums of finite logits do not overflow float32."""
    return math.isfinite(float(values.sum(dtype=torch.float32)))


def finite_logits(model: DbrxForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """[P, V], the logits of finite hidden states [P, D], in the dtype of activations.

    Raises:
        RequestError: the head overflows.
    """
    logits = model.lm_head(hidden)
    if not all_finite(logits):
        raise overflow_error(model, lambda on_block: None)
    return logits


def overflow_error(model: DbrxForCausalLM, repeat: Callable[[OnBlock], object] | None) -> RequestError:
    """The error for logits or hidden states that are not finite.

    Args:
        model: that computed them.
        repeat: runs the same tokens through the model once more and calls its argument after every block, as `DbrxModel.run` does.
            None where the tokens are not known; then the error names no layer.
    """
    began = "" if repeat is None else f", which began in {_where_it_began(model, repeat)}"
    dtype = str(model.dtype).removeprefix("torch.")
    if model.dtype == torch.float16:
        advice = "float16 holds values up to 65,504, bfloat16 and float32 up to 3.4e38: choose one of these (--dtype bfloat16)"
    else:
        advice = f"{dtype} holds values up to 3.4e38, so weights are damaged or too large: check them with `dbrx-q verify`"
    return RequestError(f"logits must be finite; found NaN or infinity{began}, with activations in {dtype}. {advice}")


def repeat_sequence(model: DbrxForCausalLM, ids: Sequence[int], on_block: OnBlock) -> None:
    """Run one sequence through the model, with a KV cache of its own; `on_block` is called after every block."""
    cache = KVCache(model.config, 1, len(ids), dtype=model.dtype, device=model.transformer.devices)
    step = min(_STEP_TOKENS, model.limits.step_tokens or _STEP_TOKENS)
    for first in range(0, len(ids), step):
        tokens = torch.tensor(ids[first : first + step])
        model.transformer.run(tokens, batch_of([len(tokens)], [first], cache, model.device), on_block)
        cache.advance([len(tokens)])


class _FoundError(Exception):
    """Ends the second pass."""


@torch.inference_mode()
def _where_it_began(model: DbrxForCausalLM, repeat: Callable[[OnBlock], object]) -> str:
    """The part of the model that first gives a value that is not finite, as messages name it."""
    layer, place = 0, "the head"

    def look(stream: torch.Tensor, experts: torch.Tensor | None) -> None:
        nonlocal layer, place
        for name, values in (("attention", stream), ("the experts", experts)):
            if values is not None and not all_finite(values):
                place = f"{name} of layer {layer % model.config.n_layers}"
                raise _FoundError
        layer += 1

    try:
        repeat(look)
    except _FoundError:
        pass
    except (RequestError, MemoryError, RuntimeError):
        place = "a layer that a second pass had no memory to find"
    return place
