"""The fallback copy that a checkpoint may carry: in a folder of its own within, a checkpoint of the same model at fewer bits.

Its experts answer for those that would have to come from disk (`experts/tiered.py`). It is a whole checkpoint and runs by itself as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.hub import resolve_file
from dbrx_q.checkpoint.layout import TensorFormat, tensor_formats
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.planning.expert_kinds import expert_kinds

__all__ = ["FALLBACK_FOLDER", "carried_formats", "check_fallback", "open_fallback"]

FALLBACK_FOLDER = "fallback"
_ROUTER = "transformer.blocks.0.ffn.router.layer.weight"


def carried_formats(
    path_or_hub_id: str | os.PathLike[str], config: DbrxConfig, formats: Mapping[str, TensorFormat]
) -> dict[str, TensorFormat]:
    """The formats of the copy that a checkpoint carries, from its config.json alone.

    Args:
        path_or_hub_id: of the checkpoint.
        config: its own.
        formats: its own.

    Raises:
        RequestError: it carries none.
        CheckpointError: the copy is of another model, not quantized, or its experts take as many bytes.
    """
    name, problem = f"{FALLBACK_FOLDER}/config.json", "there is none"
    try:
        path = resolve_file(path_or_hub_id, name)
    except CheckpointError as error:  # of the hub
        path, problem = None, str(error)
    if path is None or not path.is_file():
        raise RequestError(
            f"{path_or_hub_id}: --fallback needs a fallback copy in the folder {FALLBACK_FOLDER!r}; {problem}. Make one with "
            f"`dbrx-q quantize --fallback-format int4`, or put an int4 checkpoint of the same model there"
        )
    found = DbrxConfig.from_pretrained(path.parent)
    fallback = tensor_formats(found, str(path))
    if _shape(found) != _shape(config):
        raise CheckpointError(f"{path.parent}: a fallback copy must be of the same model; its config.json is of another. Make it again")
    if not fallback:
        raise CheckpointError(
            f"{path.parent}: a fallback copy must be quantized; this one is plain. Make it with `dbrx-q quantize --fallback-format`"
        )
    check_fallback(config, formats, fallback, str(path.parent))
    return fallback


def check_fallback(config: DbrxConfig, formats: Mapping[str, TensorFormat], fallback: Mapping[str, TensorFormat], source: str) -> None:
    """Refuse a copy in which experts take as many bytes.

    Raises:
        CheckpointError: with the bytes of both.
    """
    dtype = config.dtype
    own, its = (expert_kinds(config, some, dtype) for some in (formats, fallback))
    if any(b.nbytes > a.nbytes for a, b in zip(own, its, strict=True)) or sum(b.nbytes for b in its) >= sum(a.nbytes for a in own):
        raise CheckpointError(
            f"{source}: the experts of a fallback copy must take fewer bytes than the checkpoint's; one of layer 0 takes "
            f"{its[0].nbytes:,}, and {own[0].nbytes:,} there. Make it at fewer bits"
        )


def open_fallback(checkpoint: Checkpoint) -> Checkpoint:
    """The copy that an open checkpoint carries; the caller closes it.

    Raises:
        RequestError: it carries none.
        CheckpointError: as for `carried_formats`, or a file of the copy is damaged, or it was made of other weights.
    """
    carried_formats(checkpoint.folder, checkpoint.config, checkpoint.formats)
    found = Checkpoint(checkpoint.folder / FALLBACK_FOLDER)
    if not torch.equal(found.read(_ROUTER), checkpoint.read(_ROUTER)):  # never packed
        found.close()
        raise CheckpointError(
            f"{found.folder}: a fallback copy must be made of the same weights; its router of layer 0 differs. Make it of the same original"
        )
    return found


def _shape(config: DbrxConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
