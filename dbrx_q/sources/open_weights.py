"""`open_weights`: the weights of a checkpoint of any program, for commands that read them in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from dbrx_q.checkpoint.folder import INDEX_NAME, Checkpoint, open_any_shards
from dbrx_q.checkpoint.hub import find_revision, is_on_hub, resolve_file
from dbrx_q.checkpoint.hub_gguf import find_gguf
from dbrx_q.checkpoint.layout import TensorFormat, tensor_formats
from dbrx_q.checkpoint.remote_shards import RemoteShards
from dbrx_q.checkpoint.shard_source import ShardSource
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.json_file import read_json_object

from .encodings.choose import GPTQ_CONFIG_NAME, quantization_of
from .folder_weights import FolderWeights, plain_config
from .gguf_weights import GgufWeights
from .kept_formats import format_label, is_packed_by_us, kept_formats
from .locations import open_gguf_header, resolve_location
from .naming import are_published

__all__ = ["PlannedWeights", "is_of_another_program", "open_headers", "open_weights", "planned_weights"]


def open_weights(location: Path | ShardSource) -> StoredWeights:
    """The weights at a location: a `Checkpoint` of the published layout, plain or quantized by dbrx_q, or those of another program.

    Args:
        location: a folder, a GGUF file, or a source that fetches the shards.

    Raises:
        CheckpointError: a file is missing or damaged, or of a layout that is not read.
        ConfigError: the model is no DBRX.
        UnsupportedError: a GGUF file, where the gguf package is not installed.
    """
    if isinstance(location, Path) and location.is_file():
        return GgufWeights(location)
    return FolderWeights(location) if is_of_another_program(location) else Checkpoint(location)


@contextmanager
def open_headers(path_or_hub_id: str) -> Iterator[StoredWeights]:
    """The weights at a path or hub id, of which only what opening reads is fetched; raises what `open_weights` raises."""
    if not is_on_hub(path_or_hub_id):
        with open_weights(resolve_location(path_or_hub_id)) as weights:
            yield weights
        return
    model = find_gguf(path_or_hub_id)
    if model is not None:
        with open_gguf_header(model) as header:
            yield header
        return
    shards = RemoteShards(path_or_hub_id)
    try:
        with open_weights(shards) as weights:
            yield weights
    finally:
        shards.close(keep=True)


class PlannedWeights(NamedTuple):
    """What a plan must know of a checkpoint before any weight is fetched."""

    config: DbrxConfig
    """The model's configuration."""
    formats: dict[str, TensorFormat]
    """Formats of the tensors that stay packed in memory, by name."""
    label: str
    """The format that another program stored the weights in; "" for a plain checkpoint, and for one that dbrx_q quantized."""


def planned_weights(path_or_hub_id: str) -> PlannedWeights:
    """What a plan must know of a checkpoint of any program.

    config.json alone says it of a plain checkpoint and of one that dbrx_q quantized; headers say it of others.
    """
    if find_gguf(path_or_hub_id) is None if is_on_hub(path_or_hub_id) else resolve_location(path_or_hub_id).is_dir():
        raw = read_json_object(resolve_file(path_or_hub_id, "config.json"))
        if is_packed_by_us(raw) or (quantization_of(raw) is None and not _has_gptq_config(path_or_hub_id)):
            config = DbrxConfig.from_dict(raw if is_packed_by_us(raw) else plain_config(raw), source=f"{path_or_hub_id}/config.json")
            return PlannedWeights(config, tensor_formats(config, path_or_hub_id), "")
    with open_headers(path_or_hub_id) as weights:
        return PlannedWeights(weights.config, kept_formats(weights), format_label(weights))


def is_of_another_program(location: Path | ShardSource) -> bool:
    """Whether the weights have another layout than the published one and dbrx_q's own."""
    folder = location if isinstance(location, Path) else location.folder
    raw = read_json_object(folder / "config.json")
    if is_packed_by_us(raw):
        return False
    if quantization_of(raw) is not None or (folder / GPTQ_CONFIG_NAME).is_file():
        return True
    return not are_published(_stored_names(location, folder))


def _has_gptq_config(path_or_hub_id: str) -> bool:
    """Whether AutoGPTQ's file, which may stand for `quantization_config`, lies beside config.json."""
    if is_on_hub(path_or_hub_id):
        return GPTQ_CONFIG_NAME in find_revision(path_or_hub_id).files
    return (resolve_location(path_or_hub_id) / GPTQ_CONFIG_NAME).is_file()


def _stored_names(location: Path | ShardSource, folder: Path) -> list[str]:
    """The names of the stored tensors: by the index, or by the header of a single file."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if isinstance(weight_map, dict):
            return list(weight_map)
    with ExitStack() as stack:
        return list(open_any_shards(location, stack))
