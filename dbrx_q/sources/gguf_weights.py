"""The weights of a GGUF file, read as those of a plain checkpoint: the gguf package dequantizes them, some rows at a time.

Types whose values a format of ours holds exactly are repacked instead (`kernels/cpu/repack_gguf.py`). Tensors are read from the file, not
mapped, so that memory holds what was asked for and no pages of the file besides.

Dimension letters: `E` experts, `N` rows, `K` the reduction axis, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dbrx_q.checkpoint.folder import check_finite
from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, may_have
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .gguf_config import config_of
from .gguf_file import GgufParts, open_parts
from .gguf_header import GgufTensor
from .gguf_names import check_tensors, gguf_name
from .gguf_tokenizer import eos_ids_of, tokenizer_of

__all__ = ["GgufWeights"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_READ_BYTES = 1 << 30  # Linux reads less than 2 GiB at once
# Bytes of float32 that one call of the gguf package makes: it takes about twice as much besides. Larger pieces are not faster.
_PIECE_BYTES = 1 << 22


class GgufWeights(StoredWeights):
    """An open GGUF file, or all parts of a split one; use it as a context manager.

    Args:
        path: the file, or any part of a split one.
        parts: its header, where it has been read before; None to read it.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged or of another architecture, or holds a tensor that the gguf package cannot
            dequantize.
        ConfigError: the metadata has a value that no DBRX can have.
        UnsupportedError: the gguf package is not installed.
    """

    parts: GgufParts
    """The metadata and the header."""
    config: DbrxConfig
    """The model's configuration by the metadata."""
    raw_config: dict[str, Any]
    """The configuration as config.json of a copy has it."""
    eos_token_ids: tuple[int, ...]
    """Token ids that end a generation."""

    def __init__(self, path: Path, parts: GgufParts | None = None) -> None:
        self.parts = parts = open_parts(path) if parts is None else parts
        self.folder, self.small_files, self.source = parts.path, None, None
        self.config = config_of(parts)
        self.raw_config = self.config.to_dict()
        self.eos_token_ids = eos_ids_of(parts)
        self.tensors = {tensor.name: tensor for tensor in dense_tensors(self.config)}
        check_tensors(parts, self.tensors.values())
        self._files = _Files(parts.paths)

    def close(self) -> None:
        self._files.close()

    @property
    def shards(self) -> list[Path]:
        return list(self.parts.paths)

    @property
    def sizes(self) -> dict[str, int]:
        return {path.name: size for path, size in self._files.sizes.items()}

    @property
    def tokenizer(self) -> DbrxTokenizer:
        """The tokenizer by the metadata."""
        return tokenizer_of(self.parts)

    def label_of(self, name: str) -> str:
        return f"GGUF {self._stored(name).kind.name}"

    def is_plain(self, name: str) -> bool:
        return self._stored(name).kind.name in _FLOATS

    def nbytes_of(self, name: str) -> int:
        return self._stored(name).nbytes

    def dtype_of(self, name: str) -> torch.dtype:
        return _FLOATS.get(self._stored(name).kind.name, torch.float32)

    def exact_format(self, name: str) -> TensorFormat | None:
        from dbrx_q.kernels.cpu.repack_gguf import REPACKED

        fmt = REPACKED.get(self._stored(name).kind.name)
        return fmt if fmt is not None and may_have(name, fmt) else None

    def packed(self, name: str, expert: int = -1) -> QuantizedWeight:
        from dbrx_q.kernels.cpu.repack_gguf import repack

        stored = self._stored(name)
        N, K = self.tensors[name].matrix
        weight = repack(self._rows(stored, max(0, expert) * N, N), stored.kind.name, K)
        for part in weight.parts.values():
            check_finite(part, stored.name, stored.path)
        return weight

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        out = torch.empty(tensor.shape, dtype=self.dtype_of(name))
        rows = tensor.shape[0] // max(1, tensor.experts)
        for first in range(0, tensor.shape[0], rows):
            out[first : first + rows] = self.read_rows(name, first, rows)
        return out

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        tensor, stored = self.tensors[name], self._stored(name)
        if len(tensor.shape) == 1:
            values = self._dequantized(stored, 0, 1, 0, tensor.shape[0])[0, first : first + count]
        elif tensor.transposed:
            N, K = tensor.matrix  # [D, F]; a plain checkpoint stores [F, D]
            expert, row = divmod(first, K)
            assert row + count <= K, "rows of one expert"
            values = self._dequantized(stored, expert * N, N, row, count, transposed=True)
        else:
            values = self._dequantized(stored, first, count, 0, tensor.shape[1])
        check_finite(values, stored.name, stored.path)
        return values

    def path_of(self, name: str) -> Path:
        return self._stored(name).path

    def expect(self, names: Sequence[str]) -> None:
        pass

    def done(self) -> None:
        pass

    def to_fetch(self, names: Sequence[str]) -> tuple[int, int]:
        return 0, 0

    def write_small_files(self, folder: Path) -> None:
        """Write the tokenizer with the chat template, and generation_config.json with the ids that end a generation.

        Raises:
            CheckpointError: the folder cannot be written.
            TokenizerError: the metadata describes a tokenizer that is not DBRX's.
        """
        self.tokenizer.save_pretrained(folder)
        ids = list(self.eos_token_ids)
        try:
            if ids:
                text = json.dumps({"eos_token_id": ids[0] if len(ids) == 1 else ids}, indent=2) + "\n"
                (folder / "generation_config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{folder}: must be a folder that can be written; {error.strerror}. Name another folder") from None

    def _stored(self, name: str) -> GgufTensor:
        return self.parts.tensors[gguf_name(name)]

    def _rows(self, stored: GgufTensor, first: int, count: int) -> torch.Tensor:
        """uint8 [count, bytes of a row]: stored rows first .. first+count-1; those of a stack are counted through all experts."""
        row_bytes = stored.nbytes // _row_count(stored)
        out = torch.empty(count, row_bytes, dtype=torch.uint8)
        self._files.read(stored.path, stored.offset + first * row_bytes, out)
        return out

    def _dequantized(
        self, stored: GgufTensor, first: int, count: int, column: int, columns: int, *, transposed: bool = False
    ) -> torch.Tensor:
        """[count, columns] of the stored rows, as `_rows` counts them, from a column on; [columns, count] where it is `transposed`.

        Stored rows are read and dequantized in pieces, so that memory holds a few MB beside the result.
        """
        from gguf import GGML_QUANT_SIZES, dequantize

        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        before = column // block  # blocks
        after = -(-(column + columns) // block)
        within = slice(column - before * block, column - before * block + columns)
        dtype = _FLOATS.get(stored.kind.name)
        out = torch.empty((columns, count) if transposed else (count, columns), dtype=dtype or torch.float32)
        rows = out.T if transposed else out
        step = max(1, _PIECE_BYTES // (stored.shape[-1] * torch.float32.itemsize))
        for row in range(0, count, step):
            data = self._rows(stored, first + row, min(step, count - row))[:, before * block_bytes : after * block_bytes].contiguous()
            if dtype is None:
                with np.errstate(all="ignore"):  # a damaged scale; the caller refuses the values
                    piece = torch.from_numpy(dequantize(data.numpy(), stored.kind))
            else:
                piece = data.view(dtype)
            rows[row : row + step] = piece[:, within]
        return out


class _Files:
    """Open files, of which threads may read at the same time."""

    sizes: dict[Path, int]
    """Bytes of each file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._descriptors: dict[Path, int] = {}
        with ExitStack() as stack:
            for path in paths:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: a GGUF file must be readable; {error.strerror}") from None
                stack.callback(os.close, self._descriptors[path])
            self.sizes = {path: os.fstat(descriptor).st_size for path, descriptor in self._descriptors.items()}
            self._open_files = stack.pop_all()

    def close(self) -> None:
        self._descriptors.clear()
        self._open_files.close()

    def read(self, path: Path, offset: int, out: torch.Tensor) -> None:
        """Fill a contiguous uint8 tensor with the bytes from `offset` on.

        Raises:
            CheckpointError: a read fails, or the file has become shorter.
        """
        view = out.view(-1).numpy().data.cast("B") if out.numel() else memoryview(b"")
        assert path in self._descriptors, f"{path} is closed"
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._descriptors[path], [view[done : done + _MAX_READ_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: read failed at byte {offset + done}; {error.strerror}. Check the disk, or fetch it again"
                ) from None
            if n == 0:
                raise CheckpointError(f"{path}: the file became shorter while it was read; byte {offset + done} is gone. Fetch it again")
            done += n


def _row_count(stored: GgufTensor) -> int:
    """Rows of all matrices of a tensor; a vector is one row."""
    return int(np.prod(stored.shape[:-1], dtype=np.int64))
