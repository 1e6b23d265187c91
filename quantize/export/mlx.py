"""Writes a checkpoint as mlx-lm writes and reads it: experts as linear layers of their own, quantized ones in MLX's affine mode.

A quantized layer [N, K] has three parts: `weight`, uint32 [N, K * bits / 32], whose lowest bits are the first code; `scales` and `biases`,
[N, K/G]. value = scale * code + bias. The bytes are those of our affine formats, so that no code is moved.

mlx-lm quantizes a layer when it loads a model only where `scales` are stored for it, so the router stays plain.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dbrx_q.checkpoint.folder import SINGLE_NAME
from dbrx_q.checkpoint.layout import PLAIN_KINDS, DenseTensor, Part, TensorFormat, kind_of
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.shards import SHARD_BYTES, shard_name, write_index, write_json
from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.kernels.formats.affine import GROUP_SIZES
from dbrx_q.model.saving import abandoning
from dbrx_q.sources.naming import mlx_module

from .pieces import check_memory, matrix_of, pieces_of
from .record import ExportRecord
from .small_files import copy_small_files
from .target import ExportPlan, OnBytes, Target
from .transformers import published_config

__all__ = ["BITS", "GROUP_SIZES", "MlxPlan", "MlxTarget"]

BITS = (4, 8)
"""The bits of a code into which weights are rounded."""
_METADATA = {"format": "mlx"}  # by which mlx-lm knows that names and shapes are its own
_HELD = {"affine4": 4, "affine4-bf16": 4, "affine8": 8, "affine8-bf16": 8}
"""The formats that MLX's affine mode holds exactly, with the bits of a code."""


class _Layer(NamedTuple):
    """A tensor of MLX's module tree."""

    tensor: DenseTensor
    """The tensor of the published layout, which may stack experts."""
    expert: int
    """-1 where it is no stack."""
    fmt: TensorFormat | None
    """None where it is plain."""
    parts: tuple[Part, ...]
    """What is stored."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class MlxPlan(ExportPlan):
    """The formats of the quantized layers."""

    quantized: Mapping[str, TensorFormat]
    """The affine format of every quantized tensor, by name."""
    held: frozenset[str]
    """Names of the tensors that have their format as they are stored."""
    dtype: torch.dtype
    """Of the plain tensors."""

    @property
    def to_round(self) -> dict[str, TensorFormat]:
        return {name: fmt for name, fmt in self.quantized.items() if name not in self.held}

    def formats(self, weights: StoredWeights) -> dict[str, TensorFormat]:
        return dict(self.quantized)

    def nbytes(self, weights: StoredWeights) -> int:
        return sum(layer.nbytes for layer in self.layers(weights))

    def layers(self, weights: StoredWeights) -> Iterator[_Layer]:
        """What is stored, in order."""
        for name, tensor in weights.tensors.items():
            fmt = self.quantized.get(name)
            for expert in range(tensor.experts) if tensor.experts else [-1]:
                yield _Layer(tensor, expert, fmt, tuple(self._parts(tensor, expert, fmt)))

    def _parts(self, tensor: DenseTensor, expert: int, fmt: TensorFormat | None) -> Iterator[Part]:
        module = mlx_module(tensor, expert)
        if fmt is None:
            yield Part(f"{module}.weight", self.dtype, tensor.shape if len(tensor.shape) == 1 else tensor.matrix)
            return
        N, K = tensor.matrix
        _, scales, offsets = fmt.parts(N, K)
        yield Part(f"{module}.weight", torch.uint32, (N, K * _HELD[fmt.format] // 32))
        yield Part(f"{module}.scales", scales.dtype, scales.shape)
        yield Part(f"{module}.biases", offsets.dtype, offsets.shape)


@dataclass(frozen=True)
class MlxTarget(Target):
    """A folder with config.json, shards and their index, tokenizer, generation settings and licence."""

    bits: int | None
    """Of a code; None for a copy in which no tensor is rounded."""
    group_size: int = 64
    """Elements that share a scale."""
    dtype: torch.dtype | None = None
    """Of scales, biases and plain tensors; None for the model's, or bfloat16 where that is float32, or of the scales that are kept."""
    shard_bytes: int = SHARD_BYTES
    """Bytes after which a shard is closed."""

    def plan(self, weights: StoredWeights) -> MlxPlan:
        _check_model(weights)
        model_dtype = weights.config.dtype
        dtype = self.dtype or (torch.bfloat16 if model_dtype == torch.float32 else model_dtype)
        quantized: dict[str, TensorFormat] = {}
        held: set[str] = set()
        for name, tensor in weights.tensors.items():
            exact = weights.exact_format(name)
            if kind_of(name) in PLAIN_KINDS:
                continue
            if self.bits is not None:
                fmt = TensorFormat(f"affine{self.bits}{'-bf16' if dtype == torch.bfloat16 else ''}", self.group_size)
                fmt.check(tensor.matrix[1])
                quantized[name] = fmt
                if exact == fmt:
                    held.add(name)
            elif exact is not None and exact.format in _HELD:
                quantized[name] = exact
                held.add(name)
            elif not weights.is_plain(tensor.name):
                raise RequestError(
                    f"{weights.folder}: without --bits a tensor must be of a format that MLX's affine mode holds exactly; {name} is "
                    f"{weights.label_of(name)}. Give --bits 4 to round what another program quantized; of a copy that dbrx-q quantized, "
                    "export the original with --bits"
                )
        if self.bits is None and self.dtype is None and quantized:  # MLX is slow where the dtypes of scales and activations differ
            dtype = next(fmt.parts(1, fmt.group_size)[1].dtype for fmt in quantized.values())
        return MlxPlan(quantized, frozenset(held), dtype)

    def write(
        self,
        weights: StoredWeights,
        plan: ExportPlan,
        destination: Path,
        *,
        memory: int | None = None,
        on_bytes: OnBytes = lambda done, total: None,
    ) -> ExportRecord:
        assert isinstance(plan, MlxPlan)
        assert not plan.to_round, "the source must be rounded first"
        started = time.perf_counter()
        check_memory(weights, memory)
        shards = _in_shards(plan.layers(weights), self.shard_bytes)
        names = [SINGLE_NAME] if len(shards) == 1 else [shard_name(number, len(shards)) for number in range(len(shards))]
        total, done = plan.nbytes(weights), 0
        sizes: dict[str, int] = {}
        weights.expect(list(weights.tensors))
        with staged_folder(destination, total) as partial:
            for name, shard in zip(names, shards, strict=True):
                parts = [(part.name, part.dtype, part.shape) for layer in shard for part in layer.parts]
                with abandoning(SafetensorsWriter(partial / name, parts, metadata=_METADATA)) as file:
                    for layer in shard:
                        _write_layer(file, weights, layer, plan.dtype)
                        done += layer.nbytes
                        label = str(plan.dtype).removeprefix("torch.") if layer.fmt is None else str(layer.fmt)
                        sizes[label] = sizes.get(label, 0) + layer.nbytes
                        on_bytes(done, total)
                        if layer.expert in (-1, layer.tensor.experts - 1):
                            weights.done()
                    file.close()
            located = zip(names, shards, strict=True)
            write_index(partial, {part.name: name for name, shard in located for layer in shard for part in layer.parts}, total)
            write_json(partial / "config.json", _config(weights, plan))
            copy_small_files(weights, partial)
        parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        return ExportRecord("mlx", tuple(names), total, parameters, sizes, time.perf_counter() - started)


def _check_model(weights: StoredWeights) -> None:
    """Refuse a DBRX that mlx-lm does not compute.

    Raises:
        UnsupportedError: names the setting.
    """
    config: DbrxConfig = weights.config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(f"{weights.folder}: mlx-lm scales no rotary embedding of DBRX; found rope_type {kind!r}. Export it as GGUF")
    if config.attn_config.clip_qkv is None:
        raise UnsupportedError(f"{weights.folder}: mlx-lm needs attn_config.clip_qkv; config.json has none. Export it as GGUF")


def _in_shards(layers: Iterator[_Layer], limit: int) -> list[list[_Layer]]:
    """The layers of every shard; a shard is closed before it grows past `limit` bytes."""
    shards: list[list[_Layer]] = [[]]
    size = 0
    for layer in layers:
        if shards[-1] and size + layer.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(layer)
        size += layer.nbytes
    return shards


def _write_layer(file: SafetensorsWriter, weights: StoredWeights, layer: _Layer, dtype: torch.dtype) -> None:
    """Append the parts of a layer."""
    if layer.fmt is None:
        pieces = [piece for piece in pieces_of(layer.tensor) if piece.expert == layer.expert]
        file.write_pieces(layer.parts[0].name, (matrix_of(weights, layer.tensor, piece, dtype) for piece in pieces))
        return
    weight = weights.packed(layer.tensor.name, layer.expert).contiguous()
    codes, scales, offsets = weight.parts.values()
    file.write(layer.parts[0].name, codes.view(torch.uint32))
    file.write(layer.parts[1].name, scales)
    file.write(layer.parts[2].name, offsets)


def _config(weights: StoredWeights, plan: MlxPlan) -> dict[str, Any]:
    """config.json as `mlx_lm.convert` writes it: the settings that most layers have, and by its name each layer that has others."""
    config = published_config(weights.raw_config, weights.config, plan.dtype)
    if not plan.quantized:
        return config
    formats = list(plan.quantized.values())
    most = max(formats, key=formats.count)
    settings: dict[str, Any] = _settings(most)
    for layer in plan.layers(weights):
        if layer.fmt is not None and _settings(layer.fmt) != _settings(most):
            settings[mlx_module(layer.tensor, layer.expert)] = _settings(layer.fmt)
    return config | {"quantization": settings, "quantization_config": settings}


def _settings(fmt: TensorFormat) -> dict[str, Any]:
    return {"group_size": fmt.group_size, "bits": _HELD[fmt.format], "mode": "affine"}
