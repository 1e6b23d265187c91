"""What the models share beside `forward`: `DbrxPreTrainedModel`, which loads them, with the names that transformers has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dbrx_q.checkpoint.hub import Download
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError

from .pretrained_arguments import device_of_map, foreign_arguments, one_dtype

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

    @property
    def name_or_path(self) -> str:
        """The folder or hub id that the model was loaded from; empty for one that was not loaded."""
        return self.config.name_or_path

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
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: DbrxConfig | Mapping[str, Any] | str | os.PathLike[str] | Any = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        budget: Budget | None = None,
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        output_loading_info: bool = False,
        **others: Any,
    ) -> Self:
        """Load a plain or a quantized checkpoint. Packed weights stay packed.

        Three ways to say where the model is held:

        - `device`: all of it on one device. This is the default, with the CPU. `device_map` with one device means the same.
        - `device_map="auto"`, with or without `max_memory`: spread over GPUs and host memory, as in transformers. Experts that do not fit
          are read from disk when they are needed.
        - `budget`: the same with a say in the context, the KV cache, and how experts are cached and fetched.

        A model in 24 GiB of host memory, with room for one sequence of 8,192 tokens:

            from dbrx_q import Budget, DbrxForCausalLM, Machine

            budget = Budget(Machine.detect({"cpu": "24GiB"}), context=8192)
            model = DbrxForCausalLM.from_pretrained("dbrx-int4", budget=budget)

        Args:
            pretrained_model_name_or_path: a folder, or an `owner/name` of the Hugging Face hub.
            config: in place of config.json: a `DbrxConfig`, of this package or of transformers, a dictionary, or a path. What it says of
                quantization is ignored: the files say how they are packed.
            device: "cpu", which None stands for, or "cuda" (also for a ROCm build), "cuda:N" or N.
            dtype: of activations and of weights that are not quantized, or its name; None or "auto" for the checkpoint's. A GPU needs
                bfloat16 or float16.
            torch_dtype: the older name of `dtype`.
            device_map: a device or `{"": device}`, which mean the same as `device`; or "auto", which means
                `budget=Budget(Machine.detect(max_memory))`, as do "balanced", "balanced_low_0" and "sequential": a budget has one way to
                spread a model.
            max_memory: with "auto", how much may be taken of each device: bytes, or a size such as "22GiB", by index of a GPU and by
                "cpu". None for all that is free.
            budget: memory limits and how experts are served within them; see `Budget`.
            attn_implementation: "triton", the default on a GPU and only available there; "sdpa", the default on a CPU; or "eager".
            cache_dir: where the hub's files are kept; None for the hub's own cache.
            force_download: fetch files from the hub even if the cache has them.
            local_files_only: use the cache alone, without a network.
            token: access token for a gated repository.
            revision: branch, tag or commit on the hub.
            output_loading_info: return (model, a dictionary with the lists that transformers returns), which are empty: a checkpoint with
                missing or unknown tensors is an error.
            others: values in place of those in config.json, such as `use_cache=False`; and arguments of transformers, of which
                `pretrained_arguments.py` says what becomes of them.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
            ConfigError: a value that no DBRX model can have.
            RequestError: arguments that contradict each other, or a model that exceeds its memory; the message names the smallest budget
                that works.
            TypeError: an unknown argument.
            UnsupportedError: a value that this version does not support.
        """
        # Imported here, since `loading` imports the classes that derive from this one: a model loads itself, as in transformers.
        from dbrx_q.planning.budget import Budget
        from dbrx_q.planning.machine import Machine

        from .loading import load_as

        path, overrides = foreign_arguments(cls, pretrained_model_name_or_path, others)
        device, spread = device_of_map(device, device_map)
        if not spread and max_memory is not None:
            raise RequestError(f"max_memory needs device_map='auto'; found {max_memory!r} alone")
        if spread and budget is not None:
            raise RequestError(
                f"a budget takes the place of device_map and max_memory; found device_map={device_map!r} beside it. Leave one of them out"
            )
        model = load_as(
            cls,
            path,
            config=config,
            overrides=overrides,
            budget=Budget(Machine.detect(max_memory)) if spread else budget,
            device=device,
            dtype=one_dtype(dtype, torch_dtype),
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
            download=Download(cache_dir, local_files_only, force_download),
        )
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        result: Any = (model, nothing) if output_loading_info else model
        return result
