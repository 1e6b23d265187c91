"""What the commands that run a model share: a checkpoint of any program is loaded, and it is said where that is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import terminal

if TYPE_CHECKING:
    import torch

    from dbrx_q.model.modeling import DbrxForCausalLM
    from dbrx_q.sources.base import Source

__all__ = ["load_to_run"]


def load_to_run(source: Source, *, dtype: torch.dtype | None, device: torch.device) -> DbrxForCausalLM:
    """The model of a checkpoint from `open_runnable`, within the budget that the source has.

    Args:
        source: the checkpoint.
        dtype: of activations; None for the checkpoint's own, and bfloat16 for one that another program quantized.
        device: on which the model computes.

    Raises:
        RequestError: a fallback copy of a checkpoint that has none by its kind; otherwise as `Source.load`.
    """
    import torch

    from dbrx_q.errors import RequestError
    from dbrx_q.sources.streamed import ConvertedSource

    if isinstance(source, ConvertedSource):
        if source.budget is not None and source.budget.fallback:
            raise RequestError(
                f"{source.name}: --fallback is for checkpoints that dbrx_q quantized; this one is {source.format}. Leave it out"
            )
        if dtype is None and source.is_quantized:
            dtype = torch.bfloat16
    model = source.load(dtype=dtype, device=device)
    if model.expert_store.reloads_each_step:
        terminal.say(
            f"dbrx-q: note: {source.name} ({source.format}) does not fit in memory as it is stored; its experts are read again for every "
            f"token. `dbrx-q quantize {source.name} DST --keep` makes a copy that keeps experts in memory and runs faster"
        )
    return model
