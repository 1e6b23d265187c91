"""What the models share beside `forward`: `DbrxPreTrainedModel`, which loads them, with the names that transformers has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from typing import Self

    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Placement

    from .modeling import DbrxModel

__all__ = ["DbrxPreTrainedModel"]


class DbrxPreTrainedModel(nn.Module):
    """The base of `DbrxModel` and `DbrxForCausalLM`.

    Attributes:
        config: the model's configuration.
        eos_token_ids: tokens that end a generation: those of generation_config.json, or of the configuration without that file.
        placement: what each device holds; None for a model that was loaded without a budget.
    """

    config: DbrxConfig
    base_model_prefix = "transformer"
    eos_token_ids: tuple[int, ...] = ()
    placement: Placement | None = None

    def __init__(self, config: DbrxConfig | Any) -> None:
        """Keeps the configuration, which may be one of transformers, once its values are checked against each other."""
        super().__init__()
        self.config = DbrxConfig.of(config)
        self.config.validate()
        self.name_or_path = self.config.name_or_path

    @property
    def base_model(self) -> DbrxModel:
        """The transformer without its head: the model itself where it has none."""
        return cast("DbrxModel", getattr(self, self.base_model_prefix, self))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.base_model.norm_f.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the last layer and the head, which is the only device of most models."""
        return self.base_model.norm_f.weight.device

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        budget: Budget | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a plain or a quantized checkpoint. Packed weights stay packed.

        Three ways to say where the model is held:

        - `device`: all of it on one device. This is the default, with the CPU.
        - `device_map="auto"`, with or without `max_memory`: spread over GPUs and host memory, as in transformers. Experts that do not fit
          are read from disk when they are needed.
        - `budget`: the same with a say in the context, the KV cache, and how experts are cached and fetched.

        A model in 24 GiB of host memory, with room for one sequence of 8,192 tokens:

            from dbrx_q import Budget, DbrxForCausalLM, Machine

            budget = Budget(Machine.detect({"cpu": "24GiB"}), context=8192)
            model = DbrxForCausalLM.from_pretrained("dbrx-int4", budget=budget)

        Args:
            path_or_hub_id: a folder, or an `owner/name` of the Hugging Face hub.
            device: "cpu", which None stands for, or "cuda" (also for a ROCm build) or "cuda:N".
            dtype: of activations and of weights that are not quantized; None for the checkpoint's `torch_dtype`. A GPU needs bfloat16 or
                float16.
            device_map: None or "auto", which means `budget=Budget(Machine.detect(max_memory))`.
            max_memory: with "auto", how much may be taken of each device: bytes, or a size such as "22GiB", by index of a GPU and by
                "cpu". None for all that is free.
            budget: memory limits and how experts are served within them; see `Budget`.
            attn_implementation: "triton", the default on a GPU and only available there; "sdpa", the default on a CPU; or "eager".
            revision: branch, tag or commit on the hub.
            token: access token for a gated repository.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
            RequestError: arguments that contradict each other, or a model that exceeds its memory; the message names the smallest budget
                that works.
            UnsupportedError: a value that this version does not support.
        """
        # Imported here, since `loading` imports the classes that derive from this one: a model loads itself, as in transformers.
        from dbrx_q.planning.budget import Budget
        from dbrx_q.planning.machine import Machine

        from .loading import load_as

        if device_map not in (None, "auto"):
            raise UnsupportedError(f"device_map must be 'auto' or None; found {device_map!r}")
        if device_map is None and max_memory is not None:
            raise RequestError(f"max_memory needs device_map='auto'; found {max_memory!r} alone")
        if device_map is not None and budget is not None:
            raise RequestError(
                "a budget takes the place of device_map and max_memory; found device_map='auto' beside it. Leave one of them out"
            )
        if device_map is not None and device is not None:
            raise RequestError(f"device_map='auto' chooses the devices; found device {str(device)!r} beside it. Leave one of them out")
        return load_as(
            cls,
            path_or_hub_id,
            budget=budget if device_map is None else Budget(Machine.detect(max_memory)),
            device=device,
            dtype=_as_dtype(dtype),
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
        )


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RequestError(f"dtype must be float32, float16 or bfloat16; found {value!r}")
    return dtype
