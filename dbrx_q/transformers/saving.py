"""Writes a packed model of transformers as `dbrx-q quantize` would: the parts of an expert next to each other, with a manifest.

transformers would write the tensors in the order of their names, and copy all experts first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.hub import push
from dbrx_q.checkpoint.layout import DenseTensor, Part, expert_of, inner_name, part_name
from dbrx_q.checkpoint.manifest import Manifest
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.shards import in_shards, list_files, shard_name, stored_matrices, write_index, write_json
from dbrx_q.checkpoint.transformers_files import guarded, write_code
from dbrx_q.errors import CheckpointError, RequestError, UnsupportedError
from dbrx_q.model.saving import abandoning, write_whole
from dbrx_q.planning.sizes import parse_size

from .packed import packed_weights

__all__ = ["save_packed"]

_DEFAULT_SHARD = "50GB"


def save_packed(
    model: Any,
    folder: Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = _DEFAULT_SHARD,
    variant: str | None = None,
    *,
    repo_id: str | None = None,
    **ignored: Any,
) -> None:
    """`save_pretrained` of a packed model; arguments as transformers has them.

    Raises:
        UnsupportedError: a `state_dict` or a `variant`.
        RequestError: the model was loaded from no folder, or from the one that it would be saved to, or the folder cannot be written.
        CheckpointError: that folder has changed since.
    """
    for name, value in (("state_dict", state_dict), ("variant", variant)):
        if value is not None:
            raise UnsupportedError(f"a packed model is saved with its own weights and names; found {name}. Leave it out")
    origin = model.origin
    if origin is None:
        raise RequestError(
            "a packed model must be loaded from a checkpoint to be saved; found one that was made in memory. Save a plain model with "
            "save_pretrained and quantize that with `dbrx-q quantize`"
        )
    if folder.exists() and folder.samefile(origin.folder):
        raise RequestError(f"a packed model must be saved to another folder than it was loaded from; found {folder}. Name another")
    if not origin.unchanged:
        raise CheckpointError(f"{origin.folder}: must hold the files that the model was loaded from; they have changed. Load it again")
    if not is_main_process:
        return
    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size

    def write(partial: Path) -> None:
        manifest = Manifest()
        _write_shards(model, partial, limit, manifest)
        _write_config(model, partial)
        list_files(partial, manifest)

    write_whole(folder, sum(path.stat().st_size for path in map(origin.folder.joinpath, origin.stamps)), write)
    if push_to_hub:
        push(folder, repo_id or folder.name)


def _write_shards(model: Any, folder: Path, limit: int, manifest: Manifest) -> None:
    """Write the shards, one tensor after the other, and their index."""
    with Checkpoint(model.origin.folder, headless=True) as source:
        weights = _Weights(model, source)
        shards = in_shards(stored_matrices(weights.tensors, source.formats, weights.dtype_of), limit)
        weight_map, nbytes = {}, 0
        for number, shard in enumerate(shards):
            name = shard_name(number, len(shards))
            parts = [(part, matrix.tensor) for matrix in shard for part in matrix.parts]
            file = SafetensorsWriter(folder / name, [(part.name, part.dtype, part.shape) for part, _ in parts])
            with abandoning(file) as writer:
                for part, tensor in parts:
                    writer.write(part.name, weights.read(part, tensor))
                    weight_map[part.name], nbytes = name, nbytes + part.nbytes
                manifest.shards[name] = {"bytes": writer.nbytes, "sha256": writer.close()}
    write_index(folder, weight_map, nbytes)


class _Weights:
    """The stored tensors of a model: what its modules hold, and from the files what they do not hold, or not in that form.

    Args:
        model: the model.
        source: the checkpoint that it was loaded from; must be open.
    """

    def __init__(self, model: Any, source: Checkpoint) -> None:
        whole = model.base_model is not model
        self._source, self._packed = source, packed_weights(model)
        self._plain: Mapping[str, torch.Tensor] = model.state_dict()
        self._name = (lambda name: name) if whole else (lambda name: inner_name(name) or "")
        self.tensors = [tensor for tensor in source.tensors.values() if whole or inner_name(tensor.name) is not None]

    def dtype_of(self, tensor: DenseTensor) -> torch.dtype:
        """The dtype of a plain tensor."""
        held = self._held(tensor)
        return self._source.infos[tensor.name].dtype if held is None else held.dtype

    def read(self, part: Part, tensor: DenseTensor) -> torch.Tensor:
        """A stored tensor on the CPU."""
        fmt = self._source.formats.get(tensor.name)
        if fmt is None:
            held = self._held(tensor)
            return self._source.read(part.name) if held is None else held.detach().cpu()
        if tensor.name not in self._packed or fmt.in_memory != fmt:
            return self._source.read(part.name)
        stack = self._packed[tensor.name].value.parts[part_name(part)]
        return (stack[expert_of(part)] if tensor.experts else stack).cpu()

    def _held(self, tensor: DenseTensor) -> torch.Tensor | None:
        """A plain tensor that the model holds."""
        value = self._plain.get(self._name(tensor.name))
        return None if value is None or value.is_meta else value


def _write_config(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and what transformers needs beside them."""
    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    write_json(path, guarded(json.loads(path.read_text(encoding="utf-8"))))
    write_code(folder)
