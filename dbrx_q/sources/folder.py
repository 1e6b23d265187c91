"""Folders of safetensors files: of the published layout, plain or quantized by dbrx_q, or written by another program."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.inventory import Inventory, take_inventory
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.checkpoint.weights_hash import file_sha256, weights_sha256
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.json_file import read_json_object
from dbrx_q.model.loading import eos_ids, load_pretrained
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.placement import place
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .base import Source
from .folder_weights import FolderWeights
from .kept_formats import format_label, is_packed_by_us, kept_formats
from .streamed import ConvertedSource

__all__ = ["ConvertedFolder", "NativeFolder", "open_folder"]

_REPORT_NAME = "quantization_report.json"


def open_folder(name: str, folder: Path) -> Source:
    """The checkpoint in `folder`, to be measured: plain weights are read as those of other programs are.

    Raises:
        CheckpointError, ConfigError: a file is missing, damaged or of another model, or the weights have a quantization that dbrx_q does
            not read.
    """
    raw = read_json_object(folder / "config.json")
    return NativeFolder(name, folder) if is_packed_by_us(raw) else ConvertedFolder(name, folder)


class NativeFolder(Source):
    """A checkpoint of the published layout, plain or quantized by dbrx_q, loaded as `from_pretrained` loads it: packed weights stay packed,
    and experts may be offloaded."""

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


class ConvertedFolder(ConvertedSource):
    """A checkpoint that another program saved, in any layout that `FolderWeights` reads."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder
        self.eos_token_ids = eos_ids(folder)
        with self.open_weights() as weights:
            self.config = weights.config
            self.is_quantized = not all(map(weights.is_plain, weights.tensors))
            self.stored_dtype = torch.float32 if self.is_quantized else self.config.dtype
            self.formats = kept_formats(weights)
            self.nbytes = sum(weights.nbytes_of(tensor) for tensor in weights.tensors)
            self.parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
            self.format = format_label(weights)
            self._shards = weights.shards

    def open_weights(self) -> FolderWeights:
        return FolderWeights(self.path)

    def sha256(self) -> str:
        return weights_sha256(self._shards)

    def tokenizer(self) -> DbrxTokenizer:
        return DbrxTokenizer.from_pretrained(self.path)


def _matrices_format(inventory: Inventory) -> str:
    """Formats of the matrices that can be packed, experts first."""
    labels = [label for kind in ("experts", "attention", "embedding", "head") for label in inventory.kinds[kind].format.split(" + ")]
    return " + ".join(dict.fromkeys(labels))
