"""What the commands that run a model share: a checkpoint of any program is loaded, and it is said where that is slow."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from . import terminal

if TYPE_CHECKING:
    import torch

    from dbrx_q.model.modeling import DbrxForCausalLM
    from dbrx_q.sources.base import Source

__all__ = ["load_to_run"]


def load_to_run(source: Source, *, dtype: torch.dtype | None, device: torch.device) -> DbrxForCausalLM:
    """As `sources.open.load_runnable`; says where each token reads the experts again."""
    from dbrx_q.checkpoint.layout import dense_tensors
    from dbrx_q.sources.open import load_runnable
    from dbrx_q.sources.streamed import ConvertedSource

    model = load_runnable(source, dtype=dtype, device=device)
    if model.expert_store.reloads_each_step:
        experts = [tensor.name for tensor in dense_tensors(source.config) if tensor.experts]
        keep = " --keep" if isinstance(source, ConvertedSource) and all(name in source.formats for name in experts) else ""
        terminal.say(
            f"dbrx-q: note: {source.name} ({source.format}) does not fit in memory as it is loaded; its experts are read again for every "
            f"token. `dbrx-q quantize {shlex.quote(source.name)} DST{keep}` makes a copy that keeps experts in memory and runs faster"
        )
    return model
