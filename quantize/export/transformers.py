"""Writes a checkpoint as plain weights under the published names, which transformers loads, and with it all that reads the original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import SINGLE_NAME
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.shards import SHARD_BYTES, in_shards, shard_name, stored_matrices, write_index, write_json
from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.checkpoint.transformers_files import GUARDED_KEYS
from dbrx_q.config import DbrxConfig
from dbrx_q.model.saving import abandoning

from .pieces import check_memory, pieces_of, published_rows
from .record import ExportRecord
from .small_files import copy_small_files
from .target import ExportPlan, OnBytes, Target

__all__ = ["PlainPlan", "TransformersTarget", "published_config"]

_FORMAT = {"format": "pt"}  # which transformers wants in the metadata of every safetensors file


@dataclass(frozen=True)
class PlainPlan(ExportPlan):
    """All tensors plain."""

    dtypes: Mapping[str, torch.dtype]
    """The dtype of every tensor, by name."""

    @property
    def to_round(self) -> dict[str, TensorFormat]:
        return {}

    def formats(self, weights: StoredWeights) -> dict[str, TensorFormat]:
        return {}

    def nbytes(self, weights: StoredWeights) -> int:
        return sum(math.prod(weights.tensors[name].shape) * dtype.itemsize for name, dtype in self.dtypes.items())

    def by_dtype(self, weights: StoredWeights) -> dict[str, int]:
        """Bytes of the tensors of each dtype."""
        sizes: dict[str, int] = {}
        for name, dtype in self.dtypes.items():
            label = str(dtype).removeprefix("torch.")
            sizes[label] = sizes.get(label, 0) + math.prod(weights.tensors[name].shape) * dtype.itemsize
        return sizes


@dataclass(frozen=True)
class TransformersTarget(Target):
    """A plain checkpoint: config.json, shards with their index, tokenizer, generation settings and licence."""

    dtype: torch.dtype | None = torch.bfloat16
    """Of all tensors; packed ones are dequantized. None leaves plain tensors in their dtypes, and gives quantized ones the model's."""
    shard_bytes: int = SHARD_BYTES
    """Bytes after which a shard is closed."""

    def plan(self, weights: StoredWeights) -> PlainPlan:
        return PlainPlan({name: self.dtype or _kept_dtype(weights, tensor) for name, tensor in weights.tensors.items()})

    def write(
        self,
        weights: StoredWeights,
        plan: ExportPlan,
        destination: Path,
        *,
        memory: int | None = None,
        on_bytes: OnBytes = lambda done, total: None,
    ) -> ExportRecord:
        assert isinstance(plan, PlainPlan)
        started = time.perf_counter()
        check_memory(weights, memory)
        matrices = stored_matrices(weights.tensors.values(), {}, lambda tensor: plan.dtypes[tensor.name])
        shards = [[matrix.tensor for matrix in shard] for shard in in_shards(matrices, self.shard_bytes)]
        names = [SINGLE_NAME] if len(shards) == 1 else [shard_name(number, len(shards)) for number in range(len(shards))]
        total, done = plan.nbytes(weights), 0
        weights.expect([tensor.name for shard in shards for tensor in shard])
        with staged_folder(destination, total) as partial:
            for name, shard in zip(names, shards, strict=True):
                tensors = [(tensor.name, plan.dtypes[tensor.name], tensor.shape) for tensor in shard]
                with abandoning(SafetensorsWriter(partial / name, tensors, metadata=_FORMAT)) as file:
                    for tensor in shard:
                        file.write_pieces(tensor.name, _converted(weights, tensor, plan.dtypes[tensor.name]))
                        done += math.prod(tensor.shape) * plan.dtypes[tensor.name].itemsize
                        on_bytes(done, total)
                        weights.done()
                    file.close()
            if len(shards) > 1:
                write_index(partial, {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}, total)
            write_json(partial / "config.json", published_config(weights.raw_config, weights.config, self.dtype or weights.config.dtype))
            copy_small_files(weights, partial)
        parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        return ExportRecord("transformers", tuple(names), total, parameters, plan.by_dtype(weights), time.perf_counter() - started)


def _kept_dtype(weights: StoredWeights, tensor: DenseTensor) -> torch.dtype:
    """The dtype of a tensor for which none was asked."""
    return weights.dtype_of(tensor.name) if weights.is_plain(tensor.name) else weights.config.dtype


def published_config(raw: Mapping[str, Any], config: DbrxConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a plain checkpoint in a dtype.

    `rope_parameters` names the base of the rotary embedding, because transformers 5 ignores `attn_config.rope_theta` and computes with
    10000 otherwise; the older keys, which must not differ from it, are left out. transformers 4 reads `attn_config.rope_theta`.

    Args:
        raw: config.json of the source.
        config: what it says.
        dtype: of the weights.
    """
    left_out = {"quantization_config", "quantization", "rope_scaling", "rope_theta", "dtype", *GUARDED_KEYS}
    plain = {name: value for name, value in raw.items() if name not in left_out}
    plain |= {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "torch_dtype": str(dtype).removeprefix("torch.")}
    plain["attn_config"] = {**(plain.get("attn_config") or {}), "rope_theta": config.rope_theta}
    return plain | {"rope_parameters": dict(config.rope_parameters)}


def _converted(weights: StoredWeights, tensor: DenseTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of a tensor, piece by piece, in a dtype."""
    for piece in pieces_of(tensor):
        yield published_rows(weights, tensor, piece, dtype)
