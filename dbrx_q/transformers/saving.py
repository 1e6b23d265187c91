"""Writes a packed model of transformers as `dbrx-q quantize` would: the parts of an expert next to each other, with a manifest.

transformers would write the tensors in the order of their names and copy all experts first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import INDEX_NAME, Checkpoint
from dbrx_q.checkpoint.hub import push
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, expert_of, part_name, parts_of
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter
from dbrx_q.checkpoint.transformers_files import guarded, write_code
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.planning.sizes import parse_size

from .packed import PackedWeight, packed_weights

__all__ = ["save_packed"]

_Part = tuple[str, torch.Tensor]
_DEFAULT_SHARD = "50GB"


def save_packed(
    model: Any,
    folder: Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = _DEFAULT_SHARD,
    *,
    repo_id: str | None = None,
    **ignored: Any,
) -> None:
    """`save_pretrained` of a packed model; arguments as transformers has them.

    Raises:
        UnsupportedError: a `state_dict`, a `variant`, or a model without its head.
        RequestError: the folder is the one that the model's experts are read from.
    """
    for name, value in (("state_dict", state_dict), ("variant", ignored.get("variant"))):
        if value is not None:
            raise UnsupportedError(f"a packed model is saved with its own weights and names; found {name}. Leave it out")
    if model is model.base_model:
        raise UnsupportedError("a packed checkpoint has a head; found a DbrxModel. Save the DbrxForCausalLM that contains it")
    if model.source is not None and folder.exists() and folder.samefile(model.source):
        raise RequestError(f"a packed model must be saved to another folder than it was loaded from; found {folder}. Name another")
    if not is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    manifest = Manifest()
    formats = _write_shards(model, folder, limit, manifest)
    _write_config(model, folder, formats)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (MANIFEST_NAME, *manifest.shards):
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(folder / MANIFEST_NAME, manifest.to_dict())
    if push_to_hub:
        push(folder, repo_id or folder.name)


def _write_shards(model: Any, folder: Path, limit: int, manifest: Manifest) -> dict[str, TensorFormat]:
    """Write shards and index; returns the formats of the packed tensors."""
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    with ExitStack() as opened:
        source = opened.enter_context(Checkpoint(model.source))
        tensors = _Tensors(model, source)
        shards: list[list[_Part]] = [[]]
        size = 0
        for group in tensors.groups(values=False):
            nbytes = sum(part.nbytes for _, part in group)
            if shards[-1] and size + nbytes > limit:
                shards.append([])
                size = 0
            shards[-1] += group
            size += nbytes
        parts = (part for group in tensors.groups(values=True) for part in group)
        weight_map = {}
        for number, shard in enumerate(shards):
            path = folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            writer = SafetensorsWriter(path, [(name, part.dtype, tuple(part.shape)) for name, part in shard])
            for _ in shard:
                name, part = next(parts)
                writer.write(name, part.cpu())
                weight_map[name] = path.name
            manifest.shards[path.name] = {"bytes": writer.nbytes, "sha256": writer.close()}
        total = sum(part.nbytes for shard in shards for _, part in shard)
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return tensors.formats


class _Tensors:
    """The stored tensors of a model; those of experts that a store serves are read from the model's own checkpoint."""

    def __init__(self, model: Any, source: Checkpoint) -> None:
        self._source, self._packed, self._plain = source, packed_weights(model), model.state_dict()
        held = {name: weight.format.in_memory for name, weight in self._packed.items()}
        self.formats = {name: held.get(name, fmt) for name, fmt in source.formats.items()}

    def groups(self, *, values: bool) -> Iterator[list[_Part]]:
        """Tensors that must be in one file, in the order of `dbrx-q quantize`; without `values` on the meta device."""
        experts: list[tuple[DenseTensor, TensorFormat]] = []
        for tensor in self._source.tensors.values():
            fmt = self.formats.get(tensor.name)
            if fmt is None:
                yield [(tensor.name, self._plain_value(tensor, values))]
            elif not tensor.experts:
                yield list(self._parts(tensor, fmt, -1, values))
            else:
                experts.append((tensor, fmt))
                if tensor.role == "w2":
                    for e in range(tensor.experts):
                        yield [part for stack, packing in experts for part in self._parts(stack, packing, e, values)]
                    experts = []

    def _plain_value(self, tensor: DenseTensor, values: bool) -> torch.Tensor:
        held = self._plain.get(tensor.name)
        if held is None:
            held = torch.empty(tensor.shape, dtype=self._source.infos[tensor.name].dtype, device="meta")
            return self._source.read(tensor.name) if values else held
        return held.detach() if values else held.to("meta")

    def _parts(self, tensor: DenseTensor, fmt: TensorFormat, expert: int, values: bool) -> Iterator[_Part]:
        weight: PackedWeight | None = self._packed.get(tensor.name)
        for part in parts_of(tensor, fmt):
            if expert >= 0 and expert_of(part) != expert:
                continue
            if not values:
                yield part.name, torch.empty(part.shape, dtype=part.dtype, device="meta")
            elif weight is None:
                yield part.name, self._source.read(part.name)
            else:
                held = weight.value.parts[part_name(part)]
                yield part.name, held[expert] if expert >= 0 else held


def _write_config(model: Any, folder: Path, formats: dict[str, TensorFormat]) -> None:
    """Write config.json and what transformers needs beside it."""
    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in formats.items()}
    data["quantization_config"] = {**data["quantization_config"], "tensors": entries}
    _write_json(path, guarded(data))
    write_code(folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
