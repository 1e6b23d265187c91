"""The weights in a folder of safetensors files of any program, in any of the layouts that DBRX is stored in.

`naming.py` finds the stored layers of a tensor, an `Encoding` reads each. Dimension letters: `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import check_finite, open_any_shards
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, dense_tensors
from dbrx_q.checkpoint.shard_source import Shard, ShardSource
from dbrx_q.checkpoint.sharded_weights import ShardedWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.config_keys import CONVERTED_TYPE
from dbrx_q.config_rope import without_default_theta
from dbrx_q.errors import CheckpointError
from dbrx_q.json_file import read_json_object
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.quantize import concatenate_rows

from .encodings.base import Encoding, StoredLinear
from .encodings.choose import GPTQ_CONFIG_NAME, encodings_of, quantization_of
from .encodings.plain import FLOATS
from .naming import Module, Names, modules_of

__all__ = ["FolderWeights", "plain_config"]

_OF_OTHER_PROGRAMS = ("quantization_config", "quantization", "auto_map")  # keys of config.json that a plain checkpoint does not have
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".absmax")  # parts of a weight that no plain checkpoint has


@dataclass(frozen=True)
class _StoredModule:
    """A module, how it is stored, and where."""

    module: Module
    """The rows that it holds."""
    linear: StoredLinear
    """What headers say about it."""
    encoding: Encoding | None
    """What reads it; None for the plain weight of a norm."""
    names: Mapping[str, str]
    """Stored names by suffix."""


class FolderWeights(ShardedWeights):
    """A folder of safetensors files, or a repository on the hub, in a layout that is not dbrx_q's.

    Args:
        location: a folder that holds all files, or a source that fetches the shards.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, unknown or of the wrong shape or dtype, or the weights have a
            quantization that dbrx_q does not read.
        ConfigError: config.json is of another model.
    """

    def __init__(self, location: Path | ShardSource) -> None:
        self.source = None if isinstance(location, Path) else location
        self.folder = self.small_files = folder = location if isinstance(location, Path) else location.folder
        path = folder / "config.json"
        stored_config = read_json_object(path)
        gptq_config = read_json_object(folder / GPTQ_CONFIG_NAME) if (folder / GPTQ_CONFIG_NAME).is_file() else None
        self.raw_config = plain_config(stored_config)
        self.config = DbrxConfig.from_dict(self.raw_config, source=str(path))
        encodings = encodings_of(stored_config, gptq_config, str(path))
        self.tensors = {tensor.name: tensor for tensor in dense_tensors(self.config)}
        with ExitStack() as stack:
            self._file_of = open_any_shards(location, stack)
            names = Names(self._file_of, {suffix for encoding in encodings for suffix in encoding.suffixes | encoding.optional}, folder)
            self._stored = {tensor.name: self._find(tensor, names, encodings) for tensor in self.tensors.values()}
            self._check_unused(names)
            if len(encodings) > 1 and all(map(self.is_plain, self.tensors)):
                where = GPTQ_CONFIG_NAME if quantization_of(stored_config) is None else path.name
                raise CheckpointError(
                    f"{folder / where}: says that weights are quantized, so some must be; found none. Remove the quantization from it if "
                    "the weights are plain, or fetch them again"
                )
            self._open_files = stack.pop_all()

    def label_of(self, name: str) -> str:
        labels = [
            stored.linear.parts["weight"].dtype_label if stored.encoding is None else stored.encoding.label(stored.linear)
            for stored in self._stored[name]
        ]
        return " + ".join(dict.fromkeys(labels))

    def is_plain(self, name: str) -> bool:
        return all(stored.linear.parts.keys() == {"weight"} for stored in self._stored[name])

    def nbytes_of(self, name: str) -> int:
        return sum(info.nbytes for stored in self._stored[name] for info in stored.linear.parts.values())

    def dtype_of(self, name: str) -> torch.dtype:
        dtypes = {
            stored.linear.parts["weight"].dtype if stored.encoding is None else stored.encoding.dtype(stored.linear)
            for stored in self._stored[name]
        }
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def exact_format(self, name: str) -> TensorFormat | None:
        modules, tensor = self._stored[name], self.tensors[name]
        if tensor.experts and len(modules) != tensor.experts:
            return None
        formats = {None if stored.encoding is None else stored.encoding.exact_format(stored.linear) for stored in modules}
        return formats.pop() if len(formats) == 1 else None

    def packed(self, name: str, expert: int = -1) -> QuantizedWeight:
        modules = self._stored[name] if expert < 0 else [self._stored[name][expert]]
        weights = []
        for stored in modules:
            assert stored.encoding is not None
            parts = {suffix: self._file_of[name].read(name) for suffix, name in stored.names.items()}
            weights.append(stored.encoding.repack(stored.linear, parts))
        return weights[0] if len(weights) == 1 else concatenate_rows(weights)

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        tensor, dtype = self.tensors[name], self.dtype_of(name)
        touched = [s for s in self._stored[name] if s.module.first < first + count and first < s.module.first + s.module.rows]
        if len(touched) == 1:
            return self._rows(touched[0], first, count).to(dtype)
        rows = torch.empty((count, *tensor.shape[1:]), dtype=dtype)
        for stored in touched:  # one by one: memory holds one dequantized matrix beside the rows
            start, end = max(first, stored.module.first), min(first + count, stored.module.first + stored.module.rows)
            rows[start - first : end - first] = self._rows(stored, start, end - start)
        return rows

    def _rows(self, stored: _StoredModule, first: int, count: int) -> torch.Tensor:
        """Rows of a tensor, by their numbers in it, that are all in one module."""
        first -= stored.module.first
        if stored.module.transposed:
            values = self._module_rows(stored, 0, stored.module.shape[0])
            return values.T[first : first + count].contiguous()
        return self._module_rows(stored, first, count)

    def _module_rows(self, stored: _StoredModule, first: int, count: int) -> torch.Tensor:
        parts = _Parts(stored, self._file_of)
        if stored.encoding is None:
            values = parts.rows("weight", first, count)
        else:
            values = stored.encoding.read_rows(stored.linear, parts, first, count)
        check_finite(values, stored.module.name, stored.linear.path)
        return values

    def path_of(self, name: str) -> Path:
        return self._stored[name][0].linear.path

    def _stored_names(self, name: str) -> list[str]:
        return [part for stored in self._stored[name] for part in stored.names.values()]

    def _find(self, tensor: DenseTensor, names: Names, encodings: Sequence[Encoding]) -> list[_StoredModule]:
        """How a tensor is stored, checked."""
        modules = modules_of(tensor, self.config, names)
        missing = [module.name for module in modules if module.name not in names.modules]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            packed = next((stored for stored in self._file_of if stored.endswith(_QUANTIZED)), None)
            if packed is not None and len(encodings) == 1:
                raise CheckpointError(
                    f"{self.folder}: config.json must have the quantization_config of quantized weights, or {GPTQ_CONFIG_NAME} lie beside "
                    f"it; found the tensor {packed} and neither. Fetch these files again"
                )
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]}{more} is missing; config.json calls for it. Fetch the checkpoint again"
            )
        return [self._module(module, names.modules[module.name], encodings) for module in modules]

    def _module(self, module: Module, names: Mapping[str, str], encodings: Sequence[Encoding]) -> _StoredModule:
        infos = {suffix: self._file_of[stored].tensors[stored] for suffix, stored in names.items()}
        path = self._file_of[next(iter(names.values()))].path
        if len(module.shape) == 1:
            if infos.keys() != {"weight"} or infos["weight"].shape != module.shape or not infos["weight"].has_dtype(*FLOATS):
                stored = {suffix: f"{info.dtype_label} {list(info.shape)}" for suffix, info in infos.items()}
                raise CheckpointError(f"{path}: {module.name} must be a float {list(module.shape)}; found {stored}. Fetch it again")
            return _StoredModule(module, StoredLinear(module.name, (1, module.shape[0]), infos, path), None, names)
        linear = StoredLinear(module.name, (module.shape[0], module.shape[1]), infos, path)
        fitting = [e for e in encodings if e.suffixes <= infos.keys() <= e.suffixes | e.optional]
        if not fitting:
            expected = " or ".join(", ".join(sorted(encoding.suffixes)) for encoding in encodings)
            raise linear.wrong(f"its stored parts must be {expected} by config.json", ", ".join(sorted(infos)))
        fitting[0].check(linear)
        complete = _StoredModule(module, linear, fitting[0], names)
        if self.source is None:
            fitting[0].check_statistics(linear, _Parts(complete, self._file_of))
        return complete

    def _check_unused(self, names: Names) -> None:
        used = {stored.module.name for modules in self._stored.values() for stored in modules}
        for stored in names.unused(used):
            path = self._file_of[stored].path
            raise CheckpointError(f"{path}: tensor {stored} is in no DBRX of this config.json; is config.json of another model?")


class _Parts:
    """The parts of a module, read when they are asked for; as `encodings.base.Parts`."""

    def __init__(self, stored: _StoredModule, file_of: Mapping[str, Shard]) -> None:
        self._names, self._file_of = stored.names, file_of

    def whole(self, suffix: str) -> torch.Tensor:
        name = self._names[suffix]
        return self._file_of[name].read(name)

    def rows(self, suffix: str, first: int, count: int) -> torch.Tensor:
        name = self._names[suffix]
        return self._file_of[name].read_rows(name, first, count)


def plain_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as of a published checkpoint: without what other programs write about their quantization and their code, and without
    the theta that transformers 5 writes beside DBRX's own."""
    config = {key: value for key, value in stored.items() if key not in _OF_OTHER_PROGRAMS}
    if config.get("model_type") == CONVERTED_TYPE:
        config |= {"model_type": DbrxConfig.model_type, "architectures": ["DbrxForCausalLM"]}
    return without_default_theta(config)
