"""`DbrxQQuantizer`: what transformers calls while it loads a packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.planning.budget import Budget

from .config import METHOD
from .layers import adopt
from .loading import plan_for, put_packed_modules, read_packed_weights
from .modeling import as_packed

__all__ = ["DbrxQQuantizer"]


@register_quantizer(METHOD)
class DbrxQQuantizer(HfQuantizer):
    """Puts our modules into a model before its weights are read, and reads the packed ones after the others."""

    is_trainable = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.budget: Budget | None = quantization_config.budget
        self.folder: Path | None = None
        self.model: Any = None
        self.dtype = torch.float32

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            raise RequestError("transformers loads packed checkpoints and makes none. Quantize the checkpoint with `dbrx-q quantize`")
        if not checkpoint_files:
            raise RequestError("a packed model must be read from the files of a checkpoint; found a state_dict. Give its folder or hub id")
        self.folder, self.dtype = Path(checkpoint_files[0]).parent, dtype or model.dtype
        adopt(model)
        as_packed(model)
        with Checkpoint(self.folder) as checkpoint:
            if not checkpoint.formats:
                raise CheckpointError(f"{self.folder}: config.json must have a quantization_config; found none. Fetch it again")
            offloads = plan_for(checkpoint, self.dtype, self.budget).offloads
            put_packed_modules(model, checkpoint, self.dtype, without_experts=offloads)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assert self.folder is not None
        read_packed_weights(model, self.folder, self.budget)
