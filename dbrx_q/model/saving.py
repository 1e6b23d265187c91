"""Writes a model as a checkpoint, tensor by tensor: what its modules hold, and from its files the experts that no memory holds.

A packed model that was loaded from a folder that `quantize` wrote gives the same shards, byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dbrx_q.checkpoint.folder import SINGLE_NAME, Checkpoint
from dbrx_q.checkpoint.layout import (
    DenseTensor,
    Part,
    TensorFormat,
    dense_tensors,
    expert_of,
    inner_name,
    part_name,
    parts_of,
    tensor_formats,
)
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.shards import SHARD_BYTES, in_shards, list_files, shard_name, stored_matrices, write_index, write_json
from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.checkpoint.transformers_files import guarded, write_code
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError

from .generation_config import GenerationConfig
from .layers import PackedWeight

if TYPE_CHECKING:
    from .pretrained import DbrxPreTrainedModel

__all__ = ["Origin", "abandoning", "held", "model_tensors", "save_model", "write_whole"]

_GENERATION = "generation_config.json"
_COMPLETE = ".dbrx_q-saving"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Origin:
    """The files that a model was loaded from."""

    folder: Path
    """Holds config.json and the shards."""
    stamps: Mapping[str, tuple[int, int]]
    """(bytes, time of the last change in ns) of every shard, by its name."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin:
        """The files of an open checkpoint folder."""
        return cls(checkpoint.folder, _stamps(checkpoint.folder, [path.name for path in checkpoint.shards]))

    @property
    def unchanged(self) -> bool:
        """Whether the shards are those that were loaded."""
        try:
            return _stamps(self.folder, list(self.stamps)) == self.stamps
        except OSError:
            return False


def _stamps(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names}


def model_tensors(model: DbrxPreTrainedModel) -> list[DenseTensor]:
    """The tensors of a model, by their names in a checkpoint: all of DBRX's but the head of one that has none."""
    whole = model.base_model is not model
    return [tensor for tensor in dense_tensors(model.config) if whole or inner_name(tensor.name) is not None]


def held(model: DbrxPreTrainedModel, name: str) -> nn.Parameter | PackedWeight:
    """What the modules hold for a tensor, by its name in a checkpoint; a parameter on "meta" where an expert store reads it from files."""
    inner = inner_name(name)
    path, leaf = (inner or name).rsplit(".", 1)
    holder: nn.Parameter | PackedWeight = getattr((model if inner is None else model.base_model).get_submodule(path), leaf)
    return holder


def save_model(model: DbrxPreTrainedModel, folder: Path, *, shard_bytes: int | None = None) -> None:
    """Write config.json, generation_config.json, the shards and, for packed weights, the manifest into a folder.

    Everything is written into a folder of its own first and moved when it is complete. Weights that are there already are replaced; others,
    such as a tokenizer's, stay.

    Args:
        model: plain or packed; any of its experts may be on disk.
        folder: need not exist.
        shard_bytes: bytes after which a shard is closed; None for the shards of the files that the model was loaded from, 4 GiB without.

    Raises:
        RequestError: the folder cannot be written, or its disk has too little room.
        CheckpointError: the files hold experts that no memory holds, and have changed since they were loaded; or a weight is not finite.
    """
    if model.base_model.expert_store is not None:
        model.base_model.expert_store.check_weights()
    replaced = model.origin is not None and folder.exists() and folder.samefile(model.origin.folder)
    with ExitStack() as stack:
        writer = _ModelWriter(model, stack, shard_bytes)
        write_whole(folder, writer.nbytes, writer.write)
    if replaced:
        with Checkpoint(folder) as checkpoint:
            model.origin = Origin.of(checkpoint)


def write_whole(folder: Path, nbytes: int, write: Callable[[Path], None]) -> None:
    """Write a checkpoint into a folder of its own and move it to `folder` when it is complete; what was there stays until then.

    Args:
        folder: need not exist. If it holds files, the other folder is a hidden one inside it, which is on the same disk.
        nbytes: bytes of the weights.
        write: writes all files into the folder that it is given.

    Raises:
        RequestError: the folder cannot be written, or its disk has too little room.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        with staged_folder(folder, nbytes) as partial:
            write(partial)
        return
    complete = folder / _COMPLETE
    if complete.exists():
        raise RequestError(f"{complete}: an interrupted call left a whole checkpoint here. Move its files to {folder}, or remove it")
    with staged_folder(complete, nbytes) as partial:
        write(partial)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) or path.name == MANIFEST_NAME:
            path.unlink()
    for path in sorted(complete.iterdir(), key=lambda path: (not path.name.endswith(".safetensors"), path.name)):
        os.replace(path, folder / path.name)
    complete.rmdir()


class _ModelWriter:
    """Knows the shards of a model and where each of their tensors is.

    Args:
        model: the model.
        stack: closes the files that it was loaded from.
        shard_bytes: see `save_model`.
    """

    def __init__(self, model: DbrxPreTrainedModel, stack: ExitStack, shard_bytes: int | None) -> None:
        self._model = model
        self._formats = tensor_formats(model.config, "model.config")
        self._tensors = {tensor.name: tensor for tensor in model_tensors(model)}
        self._parts = {part.name: (tensor, part) for tensor in self._tensors.values() for part in self._parts_of(tensor)}
        self._source: Checkpoint | None = None
        if model.origin is not None and model.origin.unchanged:
            self._source = stack.enter_context(Checkpoint(model.origin.folder, headless=True))
        elif any(self._is_in_files(tensor) for tensor in self._tensors.values()):
            where = "no files" if model.origin is None else str(model.origin.folder)
            raise CheckpointError(
                f"{where}: a model whose experts are partly on disk is saved from the files that it was loaded from; they have changed. "
                "Load it again"
            )
        self.shards = self._shards(shard_bytes)
        self.nbytes = sum(part.nbytes for parts in self.shards.values() for part in parts)

    def write(self, folder: Path) -> None:
        """Write all files of the checkpoint."""
        manifest = Manifest()
        for name, parts in self.shards.items():
            with abandoning(SafetensorsWriter(folder / name, [(part.name, part.dtype, part.shape) for part in parts])) as file:
                for part in parts:
                    file.write(part.name, self._read(part))
                manifest.shards[name] = {"bytes": file.nbytes, "sha256": file.close()}
        if list(self.shards) != [SINGLE_NAME]:
            write_index(folder, {part.name: name for name, parts in self.shards.items() for part in parts}, self.nbytes)
        config = self._config().to_dict()
        write_json(folder / "config.json", guarded(config) if self._formats else config)
        self._write_generation_config(folder)
        if self._formats:
            write_code(folder)
            origin = None if self._source is None else Manifest.read(self._source.folder)
            if origin is not None:
                manifest.tensors, manifest.source, manifest.calibration = origin.tensors, origin.source, origin.calibration
            list_files(folder, manifest)

    def _config(self) -> DbrxConfig:
        config = deepcopy(self._model.config)
        config.torch_dtype = self._model.dtype
        config.architectures = ["DbrxModel" if self._model.base_model is self._model else "DbrxForCausalLM"]
        return config

    def _write_generation_config(self, folder: Path) -> None:
        own = getattr(self._model, "generation_config", None)
        source = None if self._model.origin is None else self._model.origin.folder / _GENERATION
        if source is not None and source.is_file() and own in (None, GenerationConfig.from_pretrained(source.parent)):
            (folder / _GENERATION).write_bytes(source.read_bytes())
        elif own is not None and own != GenerationConfig.from_model_config(self._model.config):
            own.save_pretrained(folder)

    def _shards(self, limit: int | None) -> dict[str, list[Part]]:
        """The stored tensors of every shard, by its name."""
        if limit is None and self._source is not None and self._source.infos.keys() == self._parts.keys():
            order: dict[str, list[Part]] = {path.name: [] for path in self._source.shards}
            for name in sorted(self._source.infos, key=lambda name: self._source.infos[name].offset if self._source else 0):
                order[self._source.path_of(name).name].append(self._parts[name][1])
            return order
        groups = stored_matrices(self._tensors.values(), self._formats, self._dtype_of)
        shards = [[part for matrix in shard for part in matrix.parts] for shard in in_shards(groups, limit or SHARD_BYTES)]
        if len(shards) == 1 and not self._formats:
            return {SINGLE_NAME: shards[0]}
        return {shard_name(number, len(shards)): parts for number, parts in enumerate(shards)}

    def _parts_of(self, tensor: DenseTensor) -> Iterator[Part]:
        fmt = self._formats.get(tensor.name)
        if fmt is None:
            yield Part(tensor.name, self._dtype_of(tensor), tensor.shape)
        else:
            yield from parts_of(tensor, fmt)

    def _dtype_of(self, tensor: DenseTensor) -> torch.dtype:
        holder = held(self._model, tensor.name)
        return self._model.dtype if isinstance(holder, PackedWeight) or holder.is_meta else holder.dtype

    def _is_in_files(self, tensor: DenseTensor) -> bool:
        """Whether a tensor must be read from the files: no memory holds it, or memory holds another form of it."""
        fmt: TensorFormat | None = self._formats.get(tensor.name)
        holder = held(self._model, tensor.name)
        return (
            isinstance(holder, nn.Parameter) and holder.is_meta
            if fmt is None
            else fmt.record.stored is not None or not isinstance(holder, PackedWeight)
        )

    def _read(self, part: Part) -> torch.Tensor:
        """A stored tensor on the CPU."""
        tensor, _ = self._parts[part.name]
        if self._is_in_files(tensor):
            assert self._source is not None
            return self._source.read(part.name).to(part.dtype)
        holder = held(self._model, tensor.name)
        if isinstance(holder, nn.Parameter):
            return holder.detach().cpu()
        stack = holder.value.parts[part_name(part)]
        return (stack[expert_of(part)] if tensor.experts else stack).cpu()


@contextmanager
def abandoning(writer: SafetensorsWriter) -> Iterator[SafetensorsWriter]:
    """Closes the file where writing it fails; a whole file is closed by the caller, which takes its SHA-256."""
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
