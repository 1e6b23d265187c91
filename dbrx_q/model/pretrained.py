"""What the models share beside `forward`: `DbrxPreTrainedModel`, which loads them, with the names that transformers has."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from dbrx_q.checkpoint.hub import Download, upload
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.experts import ResidentExpertStore
from dbrx_q.planning.sizes import parse_size

from .embeddings import EmbeddingMethods
from .layers import DbrxLayerNorm, PackedWeight
from .pretrained_arguments import device_of_map, foreign_arguments, one_dtype
from .saving import Origin, model_tensors, save_model

if TYPE_CHECKING:
    from typing import Self

    from dbrx_q.planning.budget import Budget
    from dbrx_q.planning.machine import Placement

    from .modeling import DbrxModel

__all__ = ["DbrxPreTrainedModel"]


class DbrxPreTrainedModel(EmbeddingMethods):
    """The base of `DbrxModel` and `DbrxForCausalLM`.

    Attributes:
        config: the model's configuration.
        eos_token_ids: tokens that end a generation: those of generation_config.json, or of the configuration without that file.
        placement: what each device holds; None for a model that was loaded without a budget.
        origin: the files that the model was loaded from; None for one that was not loaded from a folder.
    """

    config: DbrxConfig
    base_model_prefix = "transformer"
    eos_token_ids: tuple[int, ...] = ()
    placement: Placement | None = None
    origin: Origin | None = None

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

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """Compute attention by another implementation from now on.

        Args:
            attn_implementation: as for `from_pretrained`; or a mapping with it under the key "", as transformers takes for models with
                parts of their own.

        Raises:
            UnsupportedError: an unknown name, or one that does not run on the model's devices.
        """
        from .implementations import choose_implementation, set_implementation

        current = self.base_model.attn_implementation
        name = attn_implementation if isinstance(attn_implementation, str) else attn_implementation.get("", current)
        for device in set(self.base_model.devices):
            choose_implementation(name, device)
        set_implementation(self.base_model, name)

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
        use_mmap: bool = True,
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
            use_mmap: whether weights that a CPU computes with are used where the checkpoint's files are mapped, which loads nothing before
                it is needed and shares memory with other processes; False reads them into memory of the process. A budget always reads.
            attn_implementation: "triton", the default on a GPU and only available there; "sdpa", the default on a CPU; "eager", which also
                gives attention weights; or "flash_attention_2", on a GPU with the package flash-attn.
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
            use_mmap=use_mmap,
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
            download=Download(cache_dir, local_files_only, force_download),
        )
        nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        result: Any = (model, nothing) if output_loading_info else model
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        state_dict: None = None,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write the model as a checkpoint: config.json, generation_config.json and safetensors shards.

        A packed model stays packed: one that was loaded from a folder that `quantize` wrote gives the same shards, byte for byte, and a
        manifest that `dbrx-q verify` accepts. A plain one is a checkpoint that transformers loads, too. Experts that are on disk are copied
        one by one. The tokenizer saves itself. Nothing half-written is left behind.

        Args:
            save_directory: need not exist. Weights that are there already are replaced; other files stay.
            max_shard_size: bytes or a size such as "5GB" after which a shard is closed; None for the shards that were loaded.
            push_to_hub: whether to upload the folder afterwards.
            is_main_process: of several processes, only the one with True writes.
            safe_serialization: must be True; pickles are never written.
            variant, state_dict: must be None; what is written is what the model holds.
            repo_id, token, private, commit_message: of `push_to_hub`; the repository's name is that of the folder by default.

        Raises:
            RequestError: the folder cannot be written, its disk has too little room, or the hub refuses the upload.
            CheckpointError: experts are on disk, and their files have changed since they were loaded.
        """
        if not safe_serialization:
            raise RequestError("safe_serialization must be True: weights are written as safetensors, never as a pickle")
        for name, value in (("variant", variant), ("state_dict", state_dict)):
            if value is not None:
                raise RequestError(f"{name} must be None; found {type(value).__name__}. load_state_dict changes what the model holds")
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise RequestError(f"{folder}: the destination must be a folder; found a file. Give another name")
        limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise RequestError(f"max_shard_size must be a number of bytes above 0; found {max_shard_size!r}")
        save_model(self, folder, shard_bytes=limit)
        if push_to_hub:
            upload(folder, repo_id or folder.name, token=token, private=private, message=commit_message)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Save the model into a temporary folder and upload it; returns the address of the commit.

        Args:
            repo_id: the repository, which is created if it does not exist; a name without an owner is the user's own.
            max_shard_size: see `save_pretrained`.
            token: the hub's access token; None for the one of `hf auth login` or HF_TOKEN.
            private: whether a new repository is private; None for the owner's default.
            commit_message: of the upload.

        Raises:
            RequestError: the hub refuses it.
        """
        with TemporaryDirectory(prefix="dbrx_q-push-") as parent:
            folder = Path(parent) / repo_id.split("/")[-1]
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return upload(folder, repo_id, token=token, private=private, message=commit_message)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights of the model; packed ones and those on disk count as those that they stand for.

        Args:
            only_trainable: count parameters that require gradients, of which a model has none unless the user changes that.
            exclude_embeddings: leave out the embedding.
        """
        if only_trainable:
            skipped = {id(self.base_model.wte.weight)} if exclude_embeddings else set()
            return sum(weight.numel() for weight in self.parameters() if weight.requires_grad and id(weight) not in skipped)
        tensors = [tensor for tensor in model_tensors(self) if not (exclude_embeddings and tensor.role == "embedding")]
        return sum(math.prod(tensor.shape) for tensor in tensors)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights in memory: of parameters, packed weights and the slots of experts.

        Args:
            return_buffers: has no effect: the parts of packed weights are buffers, and a DBRX has no others.
        """
        weights = [weight for weight in (*self.parameters(), *self.buffers()) if not weight.is_meta]
        return sum(weight.nbytes for weight in weights) + self.base_model.store.memory_bytes

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Refused: a model only infers.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("gradient checkpointing is for training; this package only infers. Train with transformers, then quantize")

    def train(self, mode: bool = True) -> Self:
        """Set the flag `training`, which changes no result: inference applies no dropout.

        Raises:
            UnsupportedError: packed weights, which cannot be trained.
        """
        if mode and self._is_packed:
            raise UnsupportedError("packed weights cannot be trained; found a call of train(). Train the original, then quantize it")
        return super().train(mode)

    @property
    def _is_packed(self) -> bool:
        return any(isinstance(module, PackedWeight) for module in self.modules())

    @property
    def _is_in_place(self) -> bool:
        """Whether weights stay where they are: packed, or served by a store that moves experts."""
        return self._is_packed or not isinstance(self.base_model.store, ResidentExpertStore)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move or convert all weights (`to`, `cuda`, `half` ...); a call that changes neither device nor dtype is served by every model.

        Raises:
            UnsupportedError: packed weights, or experts that a store moves.
        """
        norms = [module.weight for module in self.base_model.modules() if isinstance(module, DbrxLayerNorm)]
        moved = [fn(norm) for norm in norms]
        if all(new.device == norm.device and new.dtype == norm.dtype for new, norm in zip(moved, norms, strict=True)):
            if self._is_in_place:
                return self
        elif self._is_in_place:
            raise UnsupportedError(
                f"a model with packed weights, or with experts that are moved between memories, keeps its device and dtype, "
                f"{str(self.device)!r} and {str(self.dtype).removeprefix('torch.')}; found a call that changes them to "
                f"{str(moved[-1].device)!r} and {str(moved[-1].dtype).removeprefix('torch.')}. Give `device` and `dtype` to from_pretrained"
            )
        base = self.base_model
        if base.expert_store is not None:
            base.expert_store.check_weights()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch does not annotate it
        if base.expert_store is not None:  # it holds the weights as they were
            base.expert_store = ResidentExpertStore([block.ffn.experts.mlp.weights() for block in base.layers()])
        return self
