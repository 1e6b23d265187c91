"""Layers as other programs store them, packed element by element as the formats' descriptions say; the tests' own packers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dbrx_q.checkpoint.safetensors_file import safetensors_header
from dbrx_q.sources.encodings.base import StoredLinear

__all__ = ["awq_parts", "gptq_parts", "linear_of", "mlx_parts", "words_of_stream"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def linear_of(shape: tuple[int, int], parts: Mapping[str, torch.Tensor], module: str = "layer") -> StoredLinear:
    """What the headers of a file would say about these parts."""
    _, infos = safetensors_header([(name, part.dtype, tuple(part.shape)) for name, part in parts.items()])
    return StoredLinear(module, shape, infos, Path("model.safetensors"))


def words_of_stream(codes: list[int], bits: int) -> list[int]:
    """Words of 32 bits of the codes, each in the lowest bits that are free."""
    stream = 0
    for i, code in enumerate(codes):
        stream |= int(code) << (i * bits)
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]


def _int32(words: object) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def gptq_parts(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, *, version: int = 1, g_idx: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """codes [N, K], zeros [n, N] and float16 scales [n, N] in GPTQ's parts; version 1 stores zero - 1, each field by itself."""
    qweight = np.array([words_of_stream(row.tolist(), bits) for row in codes], dtype=np.uint32).T
    stored = (zeros.astype(np.int64) - (version == 1)) % 2**bits
    qzeros = [words_of_stream(row.tolist(), bits) for row in stored]
    parts = {"qweight": _int32(qweight), "qzeros": _int32(qzeros), "scales": torch.from_numpy(scales)}
    return parts if g_idx is None else parts | {"g_idx": torch.from_numpy(g_idx.astype(np.int32))}


def awq_parts(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, torch.Tensor]:
    """codes [N, K], zeros [n, N] and float16 scales [n, N] in AWQ's parts."""

    def packed(rows: np.ndarray) -> torch.Tensor:
        words = np.zeros((rows.shape[0], rows.shape[1] // 8), dtype=np.uint32)
        for r in range(rows.shape[0]):
            for column in range(rows.shape[1] // 8):
                for nibble, output in enumerate(_AWQ_ORDER):
                    words[r, column] |= np.uint32(int(rows[r, column * 8 + output]) << (4 * nibble))
        return _int32(words)

    return {"qweight": packed(codes.T), "qzeros": packed(zeros), "scales": torch.from_numpy(scales)}


def mlx_parts(codes: np.ndarray, scales: torch.Tensor, biases: torch.Tensor | None, bits: int) -> dict[str, torch.Tensor]:
    """codes [N, K], scales and biases [N, n] in MLX's parts."""
    words = np.array([words_of_stream(row.tolist(), bits) for row in codes], dtype=np.uint32)
    parts = {"weight": torch.from_numpy(words), "scales": scales}
    return parts if biases is None else parts | {"biases": biases}
