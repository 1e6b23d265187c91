"""A safetensors file of sequences that calibrate as they are: one tensor `token_ids`, int64, and in its metadata how they were made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.errors import CheckpointError, RequestError

__all__ = ["SUFFIX", "StoredSequences", "read_sequences", "write_sequences"]

SUFFIX = ".safetensors"
_TENSOR, _METADATA = "token_ids", "dbrx_q"


@dataclass(frozen=True)
class StoredSequences:
    """Sequences and how they were made."""

    ids: torch.Tensor
    """int64 [n, S]."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What decided them, in values that JSON has; empty where the file does not say."""

    @property
    def sha256(self) -> str:
        """Of the shape and the ids, in hexadecimal."""
        return hashlib.sha256(str(tuple(self.ids.shape)).encode() + self.ids.contiguous().numpy().tobytes()).hexdigest()


def write_sequences(path: Path, sequences: StoredSequences) -> None:
    """Write a file, or replace it whole.

    Raises:
        RequestError: it cannot be written.
    """
    beside = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(save({_TENSOR: sequences.ids.contiguous()}, {_METADATA: json.dumps(dict(sequences.options))}))
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise RequestError(f"{path}: sampled sequences must be written here; {error}. Make room, or give another destination") from None


def read_sequences(path: Path) -> StoredSequences:
    """The sequences of a file.

    Raises:
        RequestError: it is no such file.
    """
    rule = f"{path}: calibration sequences must be a safetensors file with an int64 tensor {_TENSOR} [sequences, tokens] of ids from 0 on"
    try:
        with SafetensorsFile(path) as file:
            info = file.tensors.get(_TENSOR)
            if info is None or len(info.shape) != 2 or not info.has_dtype(torch.int64):
                found = "no such tensor" if info is None else f"{info.dtype_label} {list(info.shape)}"
                raise RequestError(f"{rule}; found {found}. Sample them with --calibration self")
            ids, metadata = file.read(_TENSOR), file.metadata
    except CheckpointError as error:
        raise RequestError(f"{rule}; {error}. Sample them again") from None
    if ids.numel() and int(ids.min()) < 0:
        raise RequestError(f"{rule}; found {int(ids.min())}. Sample them again")
    try:
        options = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        options = {}
    return StoredSequences(ids, options if isinstance(options, dict) else {})
