"""Writes a checkpoint as a GGUF file, or as the parts of a split one, for llama.cpp and what is built on it.

Norms and router are float32. The other matrices have the type that was asked for, the head Q8_0 where that type has 4 bits; or, where no
type was asked for, the type that holds each tensor as it is.

Dimension letters: `E` experts, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dbrx_q.checkpoint.layout import PLAIN_KINDS, DenseTensor, TensorFormat, kind_of
from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.sources.gguf_names import gguf_name, gguf_shape
from dbrx_q.sources.kept_formats import exact_formats

from .gguf_metadata import add_metadata
from .gguf_types import BLOCK, GGUF_TYPES, GgufType, holds, type_of_dtype
from .pieces import check_memory, matrix_of, pieces_of
from .record import ExportRecord
from .small_files import copy_licence
from .target import ExportPlan, OnBytes, Target

__all__ = ["GgufPlan", "GgufTarget"]

_ARCHITECTURE = "dbrx"
_METADATA_BYTES = 64 << 20  # for tokens and merges, of which the published tokenizer has 4 MB
_FOUR_BITS = ("q4_0", "q4_1")
_HEAD_OF_FOUR_BITS = "q8_0"  # llama.cpp takes Q6_K where K divides by 256, and Q8_0 elsewhere


@dataclass(frozen=True)
class GgufPlan(ExportPlan):
    """The types of the tensors of a GGUF file."""

    types: Mapping[str, str]
    """Name in `GGUF_TYPES` of every tensor's type, by the tensor's name."""
    held: frozenset[str]
    """Names of the tensors that have their type as they are stored."""

    def nbytes(self, weights: StoredWeights) -> int:
        return sum(GGUF_TYPES[self.types[name]].nbytes(math.prod(tensor.shape)) for name, tensor in weights.tensors.items())

    @property
    def to_round(self) -> dict[str, TensorFormat]:
        return {name: fmt for name, fmt in self._rounded().items() if name not in self.held}

    def formats(self, weights: StoredWeights) -> dict[str, TensorFormat]:
        kept = {name: fmt for name, fmt in exact_formats(weights).items() if name in self.held}
        return {name: kept.get(name, fmt) for name, fmt in self._rounded().items()}

    def _rounded(self) -> dict[str, TensorFormat]:
        records = {name: GGUF_TYPES[kind].rounded for name, kind in self.types.items()}
        return {name: fmt for name, fmt in records.items() if fmt is not None}


@dataclass(frozen=True)
class GgufTarget(Target):
    """`NAME-TYPE.gguf`, or its parts, with the licence beside it."""

    kind: str | None
    """A name in `GGUF_TYPES`; None for a file in which no tensor is rounded."""
    name: str
    """Of the model."""
    card: Path | None = None
    """The folder with the model card and the licence; None for that of the weights."""
    split_bytes: int = 0
    """Bytes of tensors after which another part is begun; 0 for one file."""

    def plan(self, weights: StoredWeights) -> GgufPlan:
        _writer_class()  # an error before hours of rounding
        types: dict[str, str] = {}
        held: set[str] = set()
        for name, tensor in weights.tensors.items():
            stored = _held_type(weights, tensor)
            if kind_of(name) in PLAIN_KINDS:
                types[name] = "f32"
            elif self.kind is not None:
                types[name] = _wanted_type(tensor, self.kind)
            elif stored is not None:
                types[name] = stored
            else:
                raise RequestError(
                    f"{weights.folder}: without --type a tensor must be of a format that {', '.join(GGUF_TYPES)} hold exactly; {name} is "
                    f"{weights.label_of(name)}. Give --type, such as q4_0, to round what another program quantized; of a copy that "
                    "dbrx-q quantized, export the original with --type"
                )
            if stored == types[name]:
                held.add(name)
        return GgufPlan(types, frozenset(held))

    def write(
        self,
        weights: StoredWeights,
        plan: ExportPlan,
        destination: Path,
        *,
        memory: int | None = None,
        on_bytes: OnBytes = lambda done, total: None,
    ) -> ExportRecord:
        assert isinstance(plan, GgufPlan)
        assert not plan.to_round, "the source must be rounded first"
        started = time.perf_counter()
        writer_class = _writer_class()
        check_memory(weights, memory)
        total = plan.nbytes(weights)
        with staged_folder(destination, total + _METADATA_BYTES) as partial:
            writer = writer_class(partial / f"{self.name}-{_label(weights, plan)}.gguf", _ARCHITECTURE, split_max_size=self.split_bytes)
            try:
                _announce(writer, weights, plan)
                add_metadata(writer, weights, self.name, self.card or weights.small_files, GGUF_TYPES[_main_type(weights, plan)].file_type)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                parts = [list(part) for part in writer.tensors]
                writer.write_ti_data_to_file()
                weights.expect(list(weights.tensors))
                _write_tensors(writer, parts, weights, plan, total, on_bytes)
                for file in writer.fout:
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                writer.close()
            copy_licence(self.card or weights.small_files, partial)
            files = tuple(sorted(path.name for path in partial.glob("*.gguf")))
        return ExportRecord(
            "gguf", files, total, sum(map(_elements, weights.tensors.values())), _by_type(weights, plan), time.perf_counter() - started
        )


def _held_type(weights: StoredWeights, tensor: DenseTensor) -> str | None:
    """The type that holds a tensor as it is stored; None where there is none."""
    fmt = weights.exact_format(tensor.name)
    if fmt is None:
        return type_of_dtype(weights.dtype_of(tensor.name)) if weights.is_plain(tensor.name) else None
    experts = range(tensor.experts) if tensor.experts else [-1]
    for name, kind in GGUF_TYPES.items():
        # int4 alone is read for this: of a tensor that the type does not hold, usually one matrix.
        if fmt.format in kind.formats:
            if fmt.format == "int4" and not all(holds(kind, fmt, weights.packed(tensor.name, expert)) for expert in experts):
                return None
            return name
    return None


def _wanted_type(tensor: DenseTensor, kind: str) -> str:
    """The type of a tensor in a file of a type, as llama.cpp's quantizer chooses it."""
    if GGUF_TYPES[kind].rounded is not None and tensor.matrix[1] % BLOCK:
        return "f16"
    return _HEAD_OF_FOUR_BITS if kind in _FOUR_BITS and kind_of(tensor.name) == "head" else kind


def _announce(writer: Any, weights: StoredWeights, plan: GgufPlan) -> None:
    """Tell the writer name, shape and type of every tensor."""
    import gguf

    for name, tensor in weights.tensors.items():
        kind = GGUF_TYPES[plan.types[name]]
        shape = gguf_shape(tensor)
        writer.add_tensor_info(
            gguf_name(name), shape, np.dtype(np.float32), kind.nbytes(math.prod(shape)), raw_dtype=gguf.GGMLQuantizationType[kind.name]
        )


def _write_tensors(writer: Any, parts: list[list[str]], weights: StoredWeights, plan: GgufPlan, total: int, on_bytes: OnBytes) -> None:
    """Append the tensors to the files of the writer, piece by piece; its own method takes whole tensors alone.

    Args:
        writer: after `write_ti_data_to_file`.
        parts: GGUF's names of the tensors of each file, in order.
        weights, plan, on_bytes: as for `Target.write`.
        total: bytes in all.
    """
    done = 0
    tensors = iter(weights.tensors.values())
    for file, names in zip(writer.fout, parts, strict=True):
        writer.write_padding(file, file.tell())
        for expected in names:
            tensor = next(tensors)
            assert gguf_name(tensor.name) == expected
            kind = GGUF_TYPES[plan.types[tensor.name]]
            size = 0
            for data in _encoded(weights, tensor, kind):
                data.tofile(file)
                size += data.nbytes
                on_bytes(done + size, total)
            assert size == kind.nbytes(_elements(tensor))
            writer.write_padding(file, size)
            weights.done()
            done += size


def _encoded(weights: StoredWeights, tensor: DenseTensor, kind: GgufType) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor, piece by piece, as contiguous arrays."""
    if kind.dtype is not None:
        yield from (_plain_bytes(matrix_of(weights, tensor, piece, kind.dtype)) for piece in pieces_of(tensor))
        return
    assert kind.blocks is not None
    whole = None if tensor.experts else weights.packed(tensor.name)
    for piece in pieces_of(tensor):
        matrix = weights.packed(tensor.name, piece.expert) if whole is None else whole.rows(piece.first, piece.first + piece.rows)
        yield np.ascontiguousarray(kind.blocks(matrix))


def _plain_bytes(matrix: torch.Tensor) -> npt.NDArray[np.uint8]:
    data: npt.NDArray[np.uint8] = matrix.contiguous().view(torch.uint8).numpy()
    return data


def _elements(tensor: DenseTensor) -> int:
    return math.prod(tensor.shape)


def _by_type(weights: StoredWeights, plan: GgufPlan) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in weights.tensors.items():
        kind = GGUF_TYPES[plan.types[name]]
        sizes[kind.name] = sizes.get(kind.name, 0) + kind.nbytes(_elements(tensor))
    return sizes


def _main_type(weights: StoredWeights, plan: GgufPlan) -> str:
    """The type that most weights have."""
    counts: dict[str, int] = {}
    for name, tensor in weights.tensors.items():
        counts[plan.types[name]] = counts.get(plan.types[name], 0) + _elements(tensor)
    return max(counts, key=lambda kind: counts[kind])


def _label(weights: StoredWeights, plan: GgufPlan) -> str:
    return GGUF_TYPES[_main_type(weights, plan)].name


def _writer_class() -> Any:
    with suppress(ImportError):
        from gguf import GGUFWriter

        return GGUFWriter
    raise UnsupportedError("writing GGUF files needs the gguf package. Install it with: pip install 'dbrx_q[gguf]'")
