"""What the commands that measure a model on a text share: the protocol and the dtype that their options name, and how they end when they
are interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import terminal

if TYPE_CHECKING:
    import torch
    import typer

    from dbrx_q.config import DbrxConfig
    from dbrx_q.eval.windows import Protocol

__all__ = ["dtype_of", "interrupted", "named_dtype", "protocol_of"]


def protocol_of(name: str | None, context: int | None, stride: int | None, limit: int | None, config: DbrxConfig) -> Protocol:
    """The protocol that the options name.

    Raises:
        RequestError: options that contradict each other, or values out of range.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.windows import Protocol

    if name == "strided" and stride is None:
        raise RequestError("the strided protocol must have a stride; found none. Give --stride, for example half of --context")
    if name == "non-overlapping" and stride is not None:
        raise RequestError(f"windows that do not overlap have no stride; found {stride}. Leave --stride out, or name --protocol strided")
    half = name == "half-window"
    context = min(512 if half else 2048, config.max_seq_len) if context is None else context
    if name == "strided" and stride == context:
        raise RequestError(f"strided windows must overlap; found a stride of {stride}, the context. Give a smaller --stride")
    return Protocol.of(context, stride=stride, half_window=half, limit=limit)


def dtype_of(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype to measure in: float32 on the CPU unless another is named; None for the checkpoint's."""
    return named_dtype(name if name is not None else "float32" if device.type == "cpu" else "auto")


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype that `--dtype` names; None for `auto`, the checkpoint's."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def interrupted(done: int, total: int, *, kept: bool) -> typer.Exit:
    """Print on stderr that the figures are of `done` of `total` tokens; raise the result.

    kept: whether the state of the run was saved, so that --resume can continue it.
    """
    resume = "the same command with --resume continues" if kept else "they could not be kept for --resume"
    return terminal.failed(f"interrupted after {done:,} of {total:,} tokens; the figures are of these alone, and {resume}")
