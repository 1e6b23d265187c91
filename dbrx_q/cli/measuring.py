"""What the commands that measure on a text share: their options, and what an interruption says."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import typer

from . import output

if TYPE_CHECKING:
    import torch

    from dbrx_q.config import DbrxConfig
    from dbrx_q.eval.windows import Protocol

    from .generate import Dtype

__all__ = [
    "CHECKPOINT_HELP",
    "CONTEXT_HELP",
    "DTYPE_HELP",
    "LIMIT_HELP",
    "PROTOCOL_HELP",
    "RESUME_HELP",
    "STRIDE_HELP",
    "TEXT_HELP",
    "ProtocolName",
    "dtype_of",
    "interrupted",
    "protocol_of",
]

CHECKPOINT_HELP = "Checkpoint: a folder or a hub id, plain, quantized by dbrx-q or by bitsandbytes; or a GGUF file."
TEXT_HELP = (
    "Text to predict: a UTF-8 file, JSON lines with a field 'text' (either may be gzipped), or wikitext2, wikitext2-tokenized or c4."
)
CONTEXT_HELP = "Tokens of a window; 2048 (half-window: 512), or the model's context where that is shorter."
STRIDE_HELP = "Tokens between the starts of windows, for the strided protocol."
PROTOCOL_HELP = "non-overlapping is GPTQ's; half-window, which predicts the second half of each, is llama.cpp's; strided needs --stride."
LIMIT_HELP = "Measure this many windows from the start of the text; all unless given."
DTYPE_HELP = "Dtype of activations; float32, which adds no noise of its own, on the CPU and auto on a GPU."
RESUME_HELP = "Go on where the same command was interrupted."


class ProtocolName(str, Enum):
    """Protocols of perplexity."""

    non_overlapping = "non-overlapping"
    half_window = "half-window"
    strided = "strided"


def protocol_of(name: ProtocolName | None, context: int | None, stride: int | None, limit: int | None, config: DbrxConfig) -> Protocol:
    """The protocol that the options name.

    Raises:
        RequestError: options that contradict each other, or values out of range.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.eval.windows import Protocol

    if name is ProtocolName.strided and stride is None:
        raise RequestError("the strided protocol must have a stride; found none. Give --stride, for example half of --context")
    if name is ProtocolName.non_overlapping and stride is not None:
        raise RequestError(f"windows that do not overlap have no stride; found {stride}. Leave --stride out, or name --protocol strided")
    half = name is ProtocolName.half_window
    context = min(512 if half else 2048, config.max_seq_len) if context is None else context
    if name is ProtocolName.strided and stride == context:
        raise RequestError(f"strided windows must overlap; found a stride of {stride}, the context. Give a smaller --stride")
    return Protocol.of(context, stride=stride, half_window=half, limit=limit)


def dtype_of(chosen: Dtype | None, device: torch.device) -> torch.dtype | None:
    """What to load with: float32 on the CPU unless another is chosen; None for the checkpoint's."""
    import torch

    name = chosen.value if chosen is not None else "float32" if device.type == "cpu" else "auto"
    return None if name == "auto" else getattr(torch, name)


def interrupted(done: int, total: int, *, kept: bool) -> typer.Exit:
    """Says on stderr that figures are of `done` of `total` tokens, and whether the rest can follow; raise what it gives."""
    how = "the same command with --resume goes on" if kept else "they could not be kept for --resume"
    message = f"interrupted after {done:,} of {total:,} tokens; the figures are of these alone, and {how}"
    output.stderr().print(f"dbrx-q: error: {message}", markup=False, soft_wrap=True)
    return typer.Exit(2)
