"""A checkpoint folder, plain or quantized: opened, checked against its config.json, and read tensor by tensor."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from .config import DbrxConfig
from .errors import CheckpointError
from .jsonfile import read_json_object
from .layout import DenseTensor, TensorFormat, dense_tensors, parts_of, tensor_formats
from .safetensors_file import SafetensorsFile, TensorInfo

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "check_finite", "open_shards"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# The whole numbers that have their bits, and infinity's.
_INFINITY = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
_FINITE_STEP = 1 << 18  # elements looked at together, twice: half a MB of bfloat16, so that they stay in cache


class Checkpoint:
    """An open checkpoint; use it as a context manager.

    Every tensor that the configuration calls for is there with its shape and dtype, and nothing else is, before anything is read.

    Attributes:
        folder: where it lies.
        config: its `DbrxConfig`.
        raw_config: config.json as it is, with the keys that inference ignores.
        formats: the packed tensors and their formats; empty for a plain checkpoint.
        tensors: every tensor of the model by its plain name.
        infos: every stored tensor (part) by its stored name.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of the wrong shape or dtype.
        ConfigError: config.json is of another model or holds a value that no DBRX can have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw_config: dict[str, Any] = read_json_object(folder / "config.json")
        quantization = self.raw_config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config must be an object; found {quantization!r:.80}")
        self.config = DbrxConfig.from_dict(self.raw_config, source=str(folder / "config.json"))
        self.formats: dict[str, TensorFormat] = tensor_formats(self.config, str(folder / "config.json"))
        self.tensors: dict[str, DenseTensor] = {tensor.name: tensor for tensor in dense_tensors(self.config)}
        with ExitStack() as stack:
            self._file_of = open_shards(folder, stack)
            self.infos: dict[str, TensorInfo] = {name: file.tensors[name] for name, file in self._file_of.items()}
            self._check_tensors()
            self._open_files = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted({file.path for file in self._file_of.values()})

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """A stored tensor by its stored name, read into `into` where it is given.

        Raises:
            CheckpointError: a read fails, or a floating-point value is NaN or infinite.
        """
        out = self._file_of[name].read(name, into)
        check_finite(out, name, self._file_of[name].path)
        return out

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of a stored tensor; errors as for `read`."""
        out = self._file_of[name].read_rows(name, first, count)
        check_finite(out, name, self._file_of[name].path)
        return out

    def path_of(self, name: str) -> Path:
        """The file that holds the stored tensor `name`."""
        return self._file_of[name].path

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        for tensor in self.tensors.values():
            fmt = self.formats.get(tensor.name)
            if fmt is None:
                expected[tensor.name] = (_FLOATS, tensor.shape)
            else:
                expected |= {part.name: ((part.dtype,), part.shape) for part in parts_of(tensor, fmt)}
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]}{more} is missing; config.json calls for it. Fetch the checkpoint again"
            )
        for name, file in self._file_of.items():
            if name not in expected:
                raise CheckpointError(f"{file.path}: tensor {name} is in no DBRX of this config.json; is config.json of another model?")
            dtypes, shape = expected[name]
            info = file.tensors[name]
            if info.shape != shape:
                raise CheckpointError(
                    f"{file.path}: tensor {name} must have the shape {list(shape)} by config.json; found {list(info.shape)}"
                )
            if info.dtype not in dtypes:
                wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise CheckpointError(f"{file.path}: tensor {name} must be {wanted}; found {str(info.dtype).removeprefix('torch.')}")


def open_shards(folder: Path, stack: ExitStack) -> dict[str, SafetensorsFile]:
    """Every stored tensor's file in `folder`, by the tensor's name; `stack` closes the files.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names other tensors than the shards hold.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        if not (folder / SINGLE_NAME).exists():
            raise CheckpointError(
                f"{folder}: no weights found; a checkpoint holds {SINGLE_NAME}, or {INDEX_NAME} and the shards that it names"
            )
        file = stack.enter_context(SafetensorsFile(folder / SINGLE_NAME))
        return dict.fromkeys(file.tensors, file)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: must hold an object 'weight_map' of tensor names to file names; found {weight_map!r:.80}")
    files = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: a shard must be a file name in the index's own folder; found {shard!r}")
        files[shard] = stack.enter_context(SafetensorsFile(folder / shard))
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing, which {INDEX_NAME} places here. Fetch the shard again")
    for shard, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{file.path}: tensor {name} is not placed here by {INDEX_NAME}; shard and index do not belong together"
                )
    return {name: files[shard] for name, shard in weight_map.items()}


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Refuse NaN and infinity in a floating-point tensor.

    Raises:
        CheckpointError: with the tensor's name and the file's.
    """
    if tensor.dtype not in _INFINITY:
        return
    kind, infinity = _INFINITY[tensor.dtype]
    for piece in tensor.view(-1).view(kind).split(_FINITE_STEP):
        # As whole numbers, positive floats, and negative ones but for the sign, lie in the order of their size: infinity, then NaN.
        signed = piece.numpy()
        unsigned = signed.view(f"u{signed.dtype}")
        if signed.size and not (signed.max() < infinity and int(unsigned.max()) - (1 << 8 * signed.itemsize - 1) < infinity):
            raise CheckpointError(f"{path}: tensor {name} must be finite; found NaN or infinity. The file is damaged: fetch it again")
