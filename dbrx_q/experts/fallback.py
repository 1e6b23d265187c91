"""The fallback copy that a checkpoint may contain: a checkpoint of the same model at fewer bits, in a subfolder.

A store uses its experts in place of those that are only on disk (`tiered_store.py`). It is a whole checkpoint and can be loaded by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.hub import resolve_file
from dbrx_q.checkpoint.layout import TensorFormat, router_name, tensor_formats
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.planning.expert_kinds import expert_kinds

__all__ = ["FALLBACK_FOLDER", "carried_formats", "check_fallback", "open_fallback"]

FALLBACK_FOLDER = "fallback"


def carried_formats(
    path_or_hub_id: str | os.PathLike[str], config: DbrxConfig, formats: Mapping[str, TensorFormat]
) -> dict[str, TensorFormat]:
    """The formats of the fallback copy of a checkpoint, from its config.json alone.

    Args:
        path_or_hub_id: of the checkpoint.
        config: of the checkpoint.
        formats: of the checkpoint's tensors.

    Raises:
        RequestError: the checkpoint has no fallback copy.
        CheckpointError: the copy is of another model, not quantized, or its experts take no fewer bytes.
    """
    name, problem = f"{FALLBACK_FOLDER}/config.json", "there is none"
    try:
        path = resolve_file(path_or_hub_id, name)
    except CheckpointError as error:  # the hub's
        path, problem = None, str(error)
    if path is None or not path.is_file():
        raise RequestError(
            f"{path_or_hub_id}: --fallback needs a fallback copy in the folder {FALLBACK_FOLDER!r}; {problem}. Make one with "
            f"`dbrx-q quantize --fallback-format int4`, or put an int4 checkpoint of the same model there"
        )
    fallback_config = DbrxConfig.from_pretrained(path.parent)
    fallback = tensor_formats(fallback_config, str(path))
    if _shape(fallback_config) != _shape(config):
        raise CheckpointError(f"{path.parent}: a fallback copy must be of the same model; its config.json is of another. Make it again")
    if not fallback:
        raise CheckpointError(
            f"{path.parent}: a fallback copy must be quantized; this one is plain. Make it with `dbrx-q quantize --fallback-format`"
        )
    check_fallback(config, formats, fallback, str(path.parent))
    return fallback


def check_fallback(config: DbrxConfig, formats: Mapping[str, TensorFormat], fallback: Mapping[str, TensorFormat], source: str) -> None:
    """Refuse a fallback copy whose experts take no fewer bytes than the checkpoint's.

    Raises:
        CheckpointError: with the bytes of both.
    """
    dtype = config.dtype
    full, small = ([kind.nbytes for kind in expert_kinds(config, layer_formats, dtype)] for layer_formats in (formats, fallback))
    if any(b > a for a, b in zip(full, small, strict=True)) or sum(small) >= sum(full):
        raise CheckpointError(
            f"{source}: the experts of a fallback copy must take fewer bytes than the checkpoint's; one of layer 0 takes "
            f"{small[0]:,}, and {full[0]:,} there. Make it at fewer bits"
        )


def open_fallback(checkpoint: Checkpoint) -> Checkpoint:
    """The fallback copy of an open checkpoint; the caller closes it.

    Raises:
        RequestError: the checkpoint has no fallback copy.
        CheckpointError: see `carried_formats`; or a file of the copy is damaged, or it was made from other weights.
    """
    carried_formats(checkpoint.folder, DbrxConfig.from_dict(checkpoint.raw_config), checkpoint.formats)
    fallback = Checkpoint(checkpoint.folder / FALLBACK_FOLDER)
    if not torch.equal(fallback.read(router_name(0)), checkpoint.read(router_name(0))):  # routers are never quantized
        fallback.close()
        raise CheckpointError(
            f"{fallback.folder}: a fallback copy must be made from the same weights; its router of layer 0 differs. "
            "Make it from the same original"
        )
    return fallback


def _shape(config: DbrxConfig) -> DbrxConfig:
    """All that two checkpoints of the same model have in common."""
    shape = copy(config)
    shape.quantization_config = None
    return shape
