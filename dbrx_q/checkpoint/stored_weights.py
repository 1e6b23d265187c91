"""`StoredWeights`: the weights of a checkpoint of any program, read as those of a plain one, some rows at a time.

Dimension letters: `E` experts, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .layout import DenseTensor, TensorFormat
from .shard_source import ShardSource

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StoredWeights"]


class StoredWeights(ABC):
    """An open checkpoint of any program; use it as a context manager. Opening reads headers, no weights.

    Every tensor has the name and the shape that it has in a plain checkpoint (`layout.dense_tensors`), however it is stored.
    """

    folder: Path
    """The folder of config.json, or the file that holds all; for messages."""
    small_files: Path | None
    """The folder of the tokenizer, generation settings and licence; None where `write_small_files` writes what there is of them."""
    source: ShardSource | None
    """What fetches the shards; None where they are on this machine."""
    config: DbrxConfig
    """The model's configuration."""
    raw_config: dict[str, Any]
    """config.json with the keys that inference ignores, without what other programs write about their quantization."""
    tensors: dict[str, DenseTensor]
    """Every tensor of the model, by name."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    @property
    @abstractmethod
    def shards(self) -> list[Path]:
        """The files of the weights, by name."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of the files of the weights, by their names."""

    @abstractmethod
    def label_of(self, name: str) -> str:
        """How a tensor is stored, such as "bfloat16", "int4:64", "GPTQ int4:128" or "GGUF Q4_K"."""

    @abstractmethod
    def is_plain(self, name: str) -> bool:
        """Whether a tensor is stored as floating-point numbers of 16 or 32 bits."""

    @abstractmethod
    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor as stored, with scales and zero-points."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The floating-point dtype of what `read` returns: the stored one of a plain tensor."""

    @abstractmethod
    def exact_format(self, name: str) -> TensorFormat | None:
        """The format that holds the values of a stored tensor exactly, with no code rounded again; None where there is none.

        Headers decide it. A plain tensor has none.
        """

    @abstractmethod
    def packed(self, name: str, expert: int = -1) -> QuantizedWeight:
        """A matrix [N, K] of a tensor with an `exact_format`, in that format, repacked from the stored codes.

        Args:
            name: of the tensor.
            expert: of a stack; -1 for a tensor that is none.

        Raises:
            CheckpointError: the data are not as the headers promised, or a scale is NaN or infinite.
        """

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, dequantized, in the shape of a plain checkpoint.

        Raises:
            CheckpointError: a read fails, or a value is NaN or infinite.
        """

    @abstractmethod
    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows first .. first+count-1 of a tensor, dequantized; of a stack of experts, rows of one expert. Errors as for `read`."""

    @abstractmethod
    def path_of(self, name: str) -> Path:
        """The file, or the first of the files, that holds a tensor; for messages."""

    @abstractmethod
    def expect(self, names: Sequence[str]) -> None:
        """Announce the tensor that each of the next pieces of work reads, in order; see `ShardSource.expect`."""

    @abstractmethod
    def done(self) -> None:
        """End the first of the announced pieces of work; see `ShardSource.done`."""

    @abstractmethod
    def to_fetch(self, names: Sequence[str]) -> tuple[int, int]:
        """As `ShardSource.to_fetch`, for work that reads these tensors; (0, 0) without a source."""

    def write_small_files(self, folder: Path) -> None:
        """Write the tokenizer and the generation settings into `folder`, where `small_files` is None."""
        assert self.small_files is not None, "a class whose small_files is None writes them itself"
