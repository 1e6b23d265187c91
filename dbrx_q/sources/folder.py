"""Folders of safetensors files: written by dbrx_q, or by transformers, plain or in 4 bits through bitsandbytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint, check_finite, open_shards
from dbrx_q.checkpoint.inventory import Inventory, take_inventory
from dbrx_q.checkpoint.layout import DenseTensor, dense_tensors, kind_of
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from dbrx_q.checkpoint.weights_hash import file_sha256, weights_sha256
from dbrx_q.config import DbrxConfig
from dbrx_q.config_rope import without_default_theta
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.json_file import read_json_object
from dbrx_q.model.loading import eos_ids, load_pretrained
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.placement import place
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .base import Source
from .bitsandbytes_state import PARTS, QUANT_STATE, check_packed, dequantize
from .streamed import DequantizedSource, Reader

__all__ = ["PackedFolder", "TransformersFolder", "open_folder"]

_REPORT_NAME = "quantization_report.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def open_folder(name: str, folder: Path) -> Source:
    """The checkpoint in `folder`.

    Raises:
        CheckpointError, ConfigError: a file is missing, damaged or of another model, or the weights have a quantization that dbrx_q does
            not read.
    """
    raw = read_json_object(folder / "config.json")
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if quantization is not None and method != "bitsandbytes":
        return PackedFolder(name, folder)
    if isinstance(quantization, Mapping) and quantization.get("load_in_8bit"):
        raise CheckpointError(
            f"{folder / 'config.json'}: bitsandbytes' 4-bit formats are read; found load_in_8bit. Save the model with load_in_4bit"
        )
    return TransformersFolder(name, folder, raw)


class PackedFolder(Source):
    """A checkpoint that dbrx_q quantized; its weights stay packed in memory."""

    loaded_bytes: int
    """Bytes of the weights in memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder
        with Checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            inventory = take_inventory(checkpoint)
            self._shards = checkpoint.shards
            host_plan = place(checkpoint.config, checkpoint.formats, Machine(), MemoryRequest(context=1)).host
        self.loaded_bytes = host_plan.dense + host_plan.experts
        self.nbytes, self.parameters = inventory.total.bytes, inventory.total.parameters
        self.format = _matrices_format(inventory)
        self.quantize_seconds = _quantize_seconds(folder)

    def sha256(self) -> str:
        """The SHA-256 of the manifest, after every shard is checked against it; of the shards where there is no manifest.

        Raises:
            CheckpointError: a shard differs from the manifest.
        """
        manifest = Manifest.read(self.path)
        if manifest is None:
            return weights_sha256(self._shards)
        for shard in self._shards:
            expected, actual = manifest.shards.get(shard.name, {}).get("sha256"), file_sha256(shard)
            if actual != expected:
                raise CheckpointError(
                    f"{shard}: a shard must have the SHA-256 of {MANIFEST_NAME}, {expected}; found {actual}. Fetch it again"
                )
        return sha256_of(self.path / MANIFEST_NAME)

    def tokenizer(self) -> DbrxTokenizer:
        return DbrxTokenizer.from_pretrained(self.path)

    def load(self, *, dtype: torch.dtype | None, device: torch.device, stream: bool | None = None) -> DbrxForCausalLM:
        if stream:
            raise RequestError(f"{self.name}: only dequantized experts can be streamed; these stay packed. Leave stream out")
        return load_pretrained(self.path, budget=self.budget, dtype=dtype, device=device, use_mmap=self.use_mmap)


def _quantize_seconds(folder: Path) -> float | None:
    """Seconds by the quantizer's report; None where there is none that can be read."""
    try:
        report = read_json_object(folder / _REPORT_NAME)
        return float(report["seconds"]) + float(report["resumed_seconds"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


class TransformersFolder(DequantizedSource):
    """A checkpoint that transformers saved: each tensor plain, or in 4 bits with bitsandbytes' statistics beside it."""

    def __init__(self, name: str, folder: Path, raw_config: Mapping[str, Any]) -> None:
        self.name, self.path = name, folder
        source = str(folder / "config.json")
        self.config = DbrxConfig.from_dict(_plain_config(raw_config), source=source)
        self.eos_token_ids = eos_ids(folder)
        quantized = raw_config.get("quantization_config") is not None
        self.stored_dtype = torch.float32 if quantized else self.config.dtype
        tensors = dense_tensors(self.config)
        with ExitStack() as stack:
            file_of = open_shards(folder, stack)
            infos = {stored: file.tensors[stored] for stored, file in file_of.items()}
            self._states = _check_tensors(folder, tensors, file_of)
            self._shards = sorted({file.path for file in file_of.values()})
        self.nbytes = sum(info.nbytes for info in infos.values())
        self.parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        self.format = self._format(tensors, infos)

    def sha256(self) -> str:
        return weights_sha256(self._shards)

    def tokenizer(self) -> DbrxTokenizer:
        return DbrxTokenizer.from_pretrained(self.path)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        with ExitStack() as stack:
            file_of = open_shards(self.path, stack)
            yield lambda tensor: self._read(tensor, file_of)

    def _read(self, tensor: DenseTensor, file_of: Mapping[str, SafetensorsFile]) -> torch.Tensor:
        file = file_of[tensor.name]
        values = file.read(tensor.name)
        state = self._states.get(tensor.name)
        if state is not None:
            parts = {part: file_of[f"{tensor.name}.{part}"].read(f"{tensor.name}.{part}") for part in state}
            values = dequantize(values, parts)
        check_finite(values, tensor.name, file.path)
        return values

    def _format(self, tensors: list[DenseTensor], infos: Mapping[str, TensorInfo]) -> str:
        plain = [tensor for tensor in tensors if tensor.name not in self._states]
        if not self._states:
            return " + ".join(_dtypes(plain, infos))
        packed = {part.removeprefix(QUANT_STATE) for state in self._states.values() for part in state if part.startswith(QUANT_STATE)}
        experts = [f"{dtype} experts" for dtype in _dtypes([tensor for tensor in plain if tensor.experts], infos)]
        return "bitsandbytes " + " + ".join(sorted(packed) + experts)


def _plain_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without bitsandbytes' section, and without the theta that transformers 5 writes beside DBRX's own."""
    return without_default_theta({key: value for key, value in raw.items() if key != "quantization_config"})


def _check_tensors(folder: Path, tensors: list[DenseTensor], file_of: Mapping[str, SafetensorsFile]) -> dict[str, list[str]]:
    """Check the names, shapes and dtypes of all tensors.

    Returns:
        The suffixes of the statistics that are stored beside each packed tensor, by the tensor's name.
    """
    states: dict[str, list[str]] = {}
    known = {tensor.name: tensor for tensor in tensors}
    for stored, file in file_of.items():
        if stored in known:
            continue
        base = next((stored[: -len(part) - 1] for part in PARTS if stored.endswith(f".{part}")), None)
        if base not in known:
            raise CheckpointError(f"{file.path}: tensor {stored} is in no DBRX of this config.json; is config.json of another model?")
        states.setdefault(base, []).append(next(part for part in PARTS if stored.endswith(f".{part}")))
    missing = [name for name in known if name not in file_of]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: tensor {missing[0]}{more} is missing; config.json calls for it. Fetch the checkpoint again")
    for name, tensor in known.items():
        file, info = file_of[name], file_of[name].tensors[name]
        if name in states:
            check_packed(tensor, states[name], file_of)
        elif info.shape != tensor.shape or not info.has_dtype(*_FLOATS):
            raise CheckpointError(
                f"{file.path}: tensor {name} must be a float {list(tensor.shape)} by config.json, or 4-bit values with bitsandbytes' "
                f"statistics beside them; found {info.dtype_label} {list(info.shape)}. Fetch the checkpoint again"
            )
    return states


def _matrices_format(inventory: Inventory) -> str:
    """Formats of the matrices that can be packed, experts first."""
    labels = [label for kind in ("experts", "attention", "embedding", "head") for label in inventory.kinds[kind].format.split(" + ")]
    return " + ".join(dict.fromkeys(labels))


def _dtypes(tensors: list[DenseTensor], infos: Mapping[str, TensorInfo]) -> list[str]:
    """Dtypes of `tensors`, by the number of parameters that have them, most first; norms and routers are not counted."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        if kind_of(tensor.name) not in ("norms", "router"):
            dtype = infos[tensor.name].dtype_label
            counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.shape)
    return sorted(counts, key=lambda dtype: -counts[dtype])
