"""A checkpoint, plain or quantized: opened, checked against its config.json, and read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import OF_ANOTHER_PROGRAM, CheckpointError
from dbrx_q.json_file import read_json_object
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize, dequantize_range

from .layout import DenseTensor, TensorFormat, dense_tensors, inner_name, part_name, parts_of, tensor_formats
from .safetensors_file import SafetensorsFile, TensorInfo
from .shard_source import Shard, ShardSource
from .sharded_weights import ShardedWeights

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "check_finite",
    "check_is_plain",
    "converted",
    "open_any_shards",
    "open_shards",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# The integer dtype of the same size, and infinity's bits in it.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
_FINITE_STEP = 1 << 18  # elements a step, which are read twice: half a MB of bfloat16 stays in cache


_AnyShard = TypeVar("_AnyShard", bound=Shard)


class Checkpoint(ShardedWeights):
    """An open checkpoint; use it as a context manager.

    Opening checks that exactly the tensors that the configuration calls for are stored, with their shapes and dtypes.

    Args:
        location: a folder that holds all files, or a source that fetches the shards.
        config: in place of the one in config.json, which says nevertheless how tensors are packed; None for that one.
        headless: whether the head may be absent, as in a checkpoint of `DbrxModel`.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of the wrong shape or dtype.
        ConfigError: config.json is of another model or holds a value that no DBRX can have.
    """

    folder: Path
    """The folder of config.json; of the shards too, unless a source fetches them."""
    source: ShardSource | None
    """What fetches the shards; None for a folder."""
    config: DbrxConfig
    """The model's configuration."""
    raw_config: dict[str, Any]
    """config.json with the keys that inference ignores."""
    formats: dict[str, TensorFormat]
    """Formats of the packed tensors, by plain name; empty for a plain checkpoint."""
    tensors: dict[str, DenseTensor]
    """Every tensor of the model, by plain name."""
    infos: dict[str, TensorInfo]
    """Every stored tensor, which may be a part of a packed one, by stored name."""

    def __init__(self, location: Path | ShardSource, config: DbrxConfig | None = None, *, headless: bool = False) -> None:
        self.source = None if isinstance(location, Path) else location
        self.folder = self.small_files = folder = location if isinstance(location, Path) else location.folder
        self.raw_config = read_json_object(folder / "config.json")
        quantization = self.raw_config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config must be an object; found {quantization!r:.80}")
        self.config = DbrxConfig.from_dict(self.raw_config, source=str(folder / "config.json")) if config is None else copy(config)
        self.config.quantization_config = quantization
        if self.config.torch_dtype is None:
            self.config.torch_dtype = self.raw_config.get("torch_dtype") or self.raw_config.get("dtype")
        self.formats = tensor_formats(self.config, str(folder / "config.json"))
        self.tensors = {tensor.name: tensor for tensor in dense_tensors(self.config)}
        with ExitStack() as stack:
            self._file_of = open_any_shards(location, stack)
            self.infos = {name: file.tensors[name] for name, file in self._file_of.items()}
            self._check_tensors(headless)
            self._open_files = stack.pop_all()

    def label_of(self, name: str) -> str:
        return str(self.formats[name]) if name in self.formats else self.infos[name].dtype_label

    def is_plain(self, name: str) -> bool:
        return name not in self.formats

    def nbytes_of(self, name: str) -> int:
        return sum(self.infos[stored].nbytes for stored in self._stored_names(name))

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.formats else self.infos[name].dtype

    def exact_format(self, name: str) -> TensorFormat | None:
        return self.formats.get(name)

    def packed(self, name: str, expert: int = -1) -> QuantizedWeight:
        tensor, fmt = self.tensors[name], self.formats[name]
        parts = list(parts_of(tensor, fmt))
        step = len(parts) // max(1, tensor.experts)
        return fmt.load({part_name(part): self.read(part.name) for part in parts[max(0, expert) * step :][:step]})

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor by its name; a stored one, which may be a part of a packed one, by its stored name.

        Args:
            name: as in `tensors` or `infos`.
            into: the tensor that gets a stored one; None for a new one.

        Raises:
            CheckpointError: a read fails, or a floating-point value is NaN or infinite.
        """
        if name in self.formats:
            tensor = self.tensors[name]
            rows = tensor.shape[0] // max(1, tensor.experts)
            return torch.cat([self.read_rows(name, expert * rows, rows) for expert in range(max(1, tensor.experts))])
        out = self._file_of[name].read(name, into)
        check_finite(out, name, self._file_of[name].path)
        return out

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of a tensor, plain or packed; errors as for `read`."""
        if name in self.formats:
            tensor = self.tensors[name]
            expert, row = divmod(first, tensor.shape[0] // max(1, tensor.experts))
            weight = self.packed(name, expert if tensor.experts else -1)
            if tensor.transposed:
                return dequantize(weight).T[row : row + count].contiguous()
            return dequantize_range(weight, row, row + count)
        out = self._file_of[name].read_rows(name, first, count)
        check_finite(out, name, self._file_of[name].path)
        return out

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, by its name or its stored name."""
        return self._file_of[next(iter(self._stored_names(name)))].path

    def _stored_names(self, name: str) -> list[str]:
        return [part.name for part in parts_of(self.tensors[name], self.formats[name])] if name in self.formats else [name]

    def _stored_as(self, tensor: DenseTensor) -> Iterator[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]]:
        """(name, dtypes that it may have, shape) of every stored part of a tensor."""
        fmt = self.formats.get(tensor.name)
        if fmt is None:
            yield tensor.name, _FLOATS, tensor.shape
        else:
            yield from ((part.name, (part.dtype,), part.shape) for part in parts_of(tensor, fmt))

    def _check_tensors(self, headless: bool) -> None:
        # The stored tensors bound what is listed, not the numbers of config.json, by which there may be millions of parts.
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        first_missing, missing = "", 0
        for tensor in self.tensors.values():
            for name, dtypes, shape in self._stored_as(tensor):
                if name in self._file_of:
                    expected[name] = dtypes, shape
                elif not (headless and inner_name(tensor.name) is None):
                    first_missing, missing = first_missing or name, missing + 1
                    break
        if missing:
            more = f" and {missing - 1} more" if missing > 1 else ""
            by_expert = any(".experts." in name and name not in self.tensors for name in self._file_of) and not self.formats
            next_step = OF_ANOTHER_PROGRAM if by_expert else "Fetch the checkpoint again"
            raise CheckpointError(f"{self.folder}: tensor {first_missing}{more} is missing; config.json calls for it. {next_step}")
        for name, file in self._file_of.items():
            if name not in expected:
                raise CheckpointError(f"{file.path}: tensor {name} is in no DBRX of this config.json; is config.json of another model?")
            dtypes, shape = expected[name]
            info = file.tensors[name]
            if info.shape != shape:
                raise CheckpointError(
                    f"{file.path}: tensor {name} must have the shape {list(shape)} by config.json; found {list(info.shape)}"
                )
            if not info.has_dtype(*dtypes):
                allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise CheckpointError(f"{file.path}: tensor {name} must be {allowed}; found {info.dtype_label}")


def check_is_plain(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that dbrx_q has quantized.

    Raises:
        CheckpointError: the experts are packed.
    """
    if checkpoint.formats:
        raise CheckpointError(f"{checkpoint.folder}: the source must be a plain checkpoint; this one is quantized. Give the original")


def open_any_shards(location: Path | ShardSource, stack: ExitStack) -> Mapping[str, Shard]:
    """The shard of every stored tensor, by the tensor's name, in a folder or fetched; as `open_shards`."""
    return open_shards(location, stack) if isinstance(location, Path) else _fetched_shards(location, stack)


def open_shards(folder: Path, stack: ExitStack) -> dict[str, SafetensorsFile]:
    """The file of every stored tensor in `folder`, by the tensor's name; `stack` closes the files.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names other tensors than the shards hold.
    """
    if not (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
        raise CheckpointError(f"{folder}: no weights found; a checkpoint holds {SINGLE_NAME}, or {INDEX_NAME} and the shards that it names")
    return _by_tensor(
        folder, lambda names: [stack.enter_context(SafetensorsFile(folder / name)) for name in names], lambda name: (folder / name).exists()
    )


def _fetched_shards(source: ShardSource, stack: ExitStack) -> dict[str, Shard]:
    """As `open_shards`, for shards that `source` fetches."""

    def open_all(names: Sequence[str]) -> Sequence[Shard]:
        shards = source.open_all(names)
        for shard in shards:
            stack.callback(shard.close)
        return shards

    stack.callback(source.stop)
    return _by_tensor(source.folder, open_all, source.has)


def _by_tensor(folder: Path, open_all: Callable[[Sequence[str]], Sequence[_AnyShard]], has: Callable[[str], bool]) -> dict[str, _AnyShard]:
    """The shard of every tensor, by the tensor's name, after a check that the index and the shards name the same tensors.

    Args:
        folder: holds the index, unless the checkpoint is a single shard.
        open_all: opens shards by their file names.
        has: whether there is a file of a name.
    """
    weight_map = _weight_map(folder / INDEX_NAME, has)
    if weight_map is None:
        (file,) = open_all([SINGLE_NAME])
        return dict.fromkeys(file.tensors, file)
    shards = sorted(set(weight_map.values()))
    files = dict(zip(shards, open_all(shards), strict=True))
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing, which {INDEX_NAME} places here. Fetch the shard again")
    for shard, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{file.path}: tensor {name} is not placed here by {INDEX_NAME}; shard and index do not match. Fetch both again"
                )
    return {name: files[shard] for name, shard in weight_map.items()}


def _weight_map(index: Path, has: Callable[[str], bool]) -> dict[str, str] | None:
    """Tensor name to shard name by the index; None where `SINGLE_NAME` holds all tensors.

    A single file that the index does not name, beside shards that it names, is refused: either may be left over from an earlier save, and
    their dates tell nothing after a copy or a download. If shards of the index are absent, it is the index that is left over.

    Raises:
        CheckpointError: the index is damaged, or it and the single file hold two models.
    """
    if not index.exists():
        return None
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: must hold an object 'weight_map' of tensor names to file names; found {weight_map!r:.80}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: a shard must be a file name in the index's own folder; found {shard!r}")
    if SINGLE_NAME in shards or not has(SINGLE_NAME):
        return dict(weight_map)
    if shards and all(has(shard) for shard in shards):
        raise CheckpointError(
            f"{index.parent}: a checkpoint must hold its weights once; found {SINGLE_NAME} and, by {INDEX_NAME}, {shards[0]}"
            f"{f' and {len(shards) - 1} more' if len(shards) > 1 else ''}. One of them is left over from an earlier save: remove "
            f"{SINGLE_NAME}, or the index with its shards"
        )
    return None


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Refuse NaN and infinity in a floating-point tensor.

    Raises:
        CheckpointError: names the tensor and its file.
    """
    if not _is_finite(tensor):
        raise CheckpointError(f"{path}: tensor {name} must be finite; found NaN or infinity. The file is damaged: fetch it again")


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str, path: Path | str) -> torch.Tensor:
    """A finite tensor in another dtype.

    Args:
        tensor: on the CPU.
        dtype: a floating-point one.
        name: of the tensor, in messages.
        path: the file or checkpoint that holds it, in messages.

    Raises:
        CheckpointError: a value that `dtype` cannot hold.
    """
    out = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not _is_finite(out):
        label = str(dtype).removeprefix("torch.")
        wider = "bfloat16 or float32, which hold values up to 3.4e38" if dtype == torch.float16 else "float32"
        raise CheckpointError(
            f"{path}: tensor {name} must fit {label}, which holds values up to {torch.finfo(dtype).max:.6g}; found "
            f"{float(tensor.abs().max()):.6g}. Choose {wider} (--dtype)"
        )
    return out


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in _INFINITY:
        return True
    kind, infinity = _INFINITY[tensor.dtype]
    for piece in tensor.view(-1).view(kind).split(_FINITE_STEP):
        # Read as integers, floats without their sign bit are ordered by size, then follow infinity and all NaNs.
        signed = piece.numpy()
        unsigned = signed.view(f"u{signed.dtype}")
        if signed.size and not (signed.max() < infinity and int(unsigned.max()) - (1 << 8 * signed.itemsize - 1) < infinity):
            return False
    return True
