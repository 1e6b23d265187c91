"""Chooses the implementation of attention, by name or from the device; a name that cannot run is an error, never another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import UnsupportedError
from dbrx_q.kernels.attention import IMPLEMENTATIONS
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.flash_attention import flash_attention_installed

if TYPE_CHECKING:
    from .modeling import DbrxModel

__all__ = ["choose_implementation", "initial_implementation", "set_implementation"]


def choose_implementation(name: str | None, device: torch.device) -> str:
    """`name` once checked; for None "triton" where its kernels run, else "sdpa".

    Args:
        name: one of `IMPLEMENTATIONS`, or None.
        device: where attention is computed.

    Raises:
        UnsupportedError: an unknown name, or one that does not run on the device or lacks its package.
    """
    triton = pick(device) is Backend.TRITON
    if name is None:
        return "triton" if triton else "sdpa"
    if name not in IMPLEMENTATIONS:
        raise UnsupportedError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}; found {name!r}")
    if name == "triton" and not triton:
        raise UnsupportedError(f"attn_implementation 'triton' needs a GPU; the device is {str(device)!r}. Choose 'sdpa' or 'eager'")
    if name == "flash_attention_2":
        if device.type != "cuda":
            raise UnsupportedError(
                f"attn_implementation 'flash_attention_2' needs a GPU; the device is {str(device)!r}. Choose 'sdpa' or 'eager'"
            )
        if not flash_attention_installed():
            raise UnsupportedError(
                "attn_implementation 'flash_attention_2' needs the package flash-attn; Python finds none. Run "
                "`pip install flash-attn --no-build-isolation`, or choose 'triton' or 'sdpa'"
            )
    return name


def initial_implementation(config: DbrxConfig, device: torch.device) -> str:
    """The implementation of a new model: that of its configuration, or "sdpa"; errors as for `choose_implementation`.

    On the device "meta", where a model waits for its weights, any known name is allowed: loading chooses again.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    if name is None or (device.type == "meta" and name in IMPLEMENTATIONS):
        return name or IMPLEMENTATIONS[0]
    return choose_implementation(name, device)


def set_implementation(model: DbrxModel, name: str) -> None:
    """Let every block of `model` use the checked implementation `name`, and note it in the configuration of a model with weights."""
    for block in model.layers():
        block.norm_attn_norm.attn.implementation = name
    if model.device.type != "meta":
        model.config._attn_implementation = name
