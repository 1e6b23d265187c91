"""`DbrxQQuantizer`: what transformers calls while it loads a packed checkpoint.

In order: `update_device_map` with the user's `device_map`; `_process_model_before_weight_loading` with a model that has no memory yet;
`adjust_max_memory` if devices are chosen by their sizes, for which `param_element_size` gives those of packed weights; then transformers
reads the plain weights; `_process_model_after_weight_loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.model.saving import Origin
from dbrx_q.planning.budget import Budget

from .config import METHOD
from .layers import adopt
from .loading import plan_for, put_packed_modules, read_packed_weights
from .memory import budget_for_layers, budget_for_weights, device_map_of, layers_below, main_device
from .modeling import as_packed
from .packed import PackedWeight

__all__ = ["DbrxQQuantizer"]

_UNLIMITED = 1 << 60
_CHOSEN_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantizer(METHOD)
class DbrxQQuantizer(HfQuantizer):
    """Puts our modules into a model before its weights are read, and reads the packed ones after the others."""

    is_trainable = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.budget: Budget | None = quantization_config.budget
        self.folder: Path | None = None
        self._model: Any = None
        self._dtype = torch.float32
        self._device_map: dict[str, Any] | None = None
        self._below: dict[str, list[str]] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> Any:
        if isinstance(device_map, Mapping):
            places = dict(device_map)
            if self.budget is not None and set(map(str, places.values())) != {"cpu"}:
                raise RequestError(f"a budget chooses the devices; found device_map {device_map!r} beside it. Leave one of them out")
            self._below = layers_below(places)
            return {"": main_device(places)} if self._below else places
        if self.budget is not None and self.budget.machine.gpus:
            self._device_map = {}  # filled once the checkpoint is known
            return self._device_map
        return None if self.budget is not None and device_map in _CHOSEN_BY_SIZE else device_map

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            raise RequestError("transformers loads packed checkpoints and makes none. Quantize the checkpoint with `dbrx-q quantize`")
        if not checkpoint_files:
            raise RequestError("a packed model must be read from the files of a checkpoint; found a state_dict. Give its folder or hub id")
        self.folder, self._dtype, self._model = Path(checkpoint_files[0]).parent, dtype or model.dtype, model
        adopt(model)
        with self._opened() as checkpoint:
            as_packed(model, Origin.of(checkpoint))
            if not checkpoint.formats:
                raise CheckpointError(f"{self.folder}: config.json must have a quantization_config; found none. Fetch it again")
            # A config that was made before dbrx_q.transformers was imported has another base; transformers computes the angles later.
            model.config.rope_parameters = dict(checkpoint.config.rope_parameters)
            if self._below:
                on_gpu = str(main_device(kwargs.get("device_map") or {})) != "cpu"
                self.budget = budget_for_layers(checkpoint, self._dtype, self._below, gpu=on_gpu)
            self._put_modules(checkpoint)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        with self._opened() as checkpoint:
            self.budget = budget_for_weights(checkpoint, self._dtype, max_memory)
            if self.budget is None:
                return max_memory
            self._put_modules(checkpoint)
        return {(0 if self.budget.machine.gpus else "cpu"): _UNLIMITED}

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        holder = model.get_submodule(param_name.rpartition(".")[0])
        return holder.nbytes / param.numel() if isinstance(holder, PackedWeight) else param.element_size()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assert self.folder is not None
        self._model = None
        for parameter in model.parameters():  # transformers 5.15 leaves those whose name lost a prefix, as in a model without a head
            parameter.data = parameter.data.to(self._dtype)
        read_packed_weights(model, self.folder, self.budget)

    def _opened(self) -> Checkpoint:
        assert self.folder is not None
        return Checkpoint(self.folder, headless=self._model is self._model.base_model)

    def _put_modules(self, checkpoint: Checkpoint) -> None:
        """Replace what is packed, or remove the experts that a store will serve."""
        plan = plan_for(checkpoint, self._dtype, self.budget)
        put_packed_modules(self._model, checkpoint, self._dtype, without_experts=plan.offloads)
        if self._device_map is not None and plan.placement is not None and self.budget is not None:
            self._device_map.update(device_map_of(checkpoint, plan.placement, dict(enumerate(self.budget.gpus))))
