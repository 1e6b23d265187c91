"""GGUF files of DBRX as a `Source`: as llama.cpp's converter and quantizer write them; the gguf package dequantizes their tensors."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dbrx_q.checkpoint.weights_hash import weights_sha256
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .gguf_file import GgufParts
from .gguf_tokenizer import tokenizer_of
from .gguf_weights import GgufWeights
from .kept_formats import kept_formats
from .streamed import ConvertedSource

__all__ = ["GgufSource"]

_GUESSED = 1024  # flag in general.file_type: the writer guessed the type


class GgufSource(ConvertedSource):
    """A GGUF file, or all parts of a split one; errors as for `GgufWeights`."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        with GgufWeights(path) as weights:
            self._parts, self.config, self.eos_token_ids = weights.parts, weights.config, weights.eos_token_ids
            self.formats = kept_formats(weights)
            self.parameters = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
        self.stored_dtype = torch.float32
        self.nbytes = sum(tensor.nbytes for tensor in self._parts.tensors.values())
        self.format = f"GGUF {_file_type(self._parts)}"

    def sha256(self) -> str:
        return weights_sha256(self._parts.paths)

    def tokenizer(self) -> DbrxTokenizer:
        return tokenizer_of(self._parts)

    def open_weights(self) -> GgufWeights:
        return GgufWeights(self.path, self._parts)


def _file_type(parts: GgufParts) -> str:
    """llama.cpp's name of the mixture of types; where the file names none, the type that most parameters have."""
    from gguf import LlamaFileType

    value = parts.metadata.get("general.file_type")
    labels = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    if isinstance(value, int) and value & ~_GUESSED in labels and value != _GUESSED:
        return labels[value & ~_GUESSED]
    counts: dict[str, int] = {}
    for tensor in parts.tensors.values():
        counts[tensor.kind.name] = counts.get(tensor.kind.name, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda kind: counts[kind])
