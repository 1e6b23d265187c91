"""`QuantizedWeight`: the base class of quantized weights, with all that does not depend on the format.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis); `...` is any number of leading axes, such as the
experts of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["QuantizedWeight"]


class QuantizedWeight(ABC):
    """A quantized weight [..., N, K].

    Subclasses are frozen dataclasses. Their fields are the parts, tensors in the order of `part_names`, followed by `group_size`. Every
    part has the leading axes of the weight and then an axis of rows, so an index selects the same matrices and a range of rows the same
    rows of each part. An entry of the axis of rows holds one row, or as many as `row_units` says.
    """

    format: ClassVar[str]
    """The name of its record in `registry.FORMATS`."""
    part_names: ClassVar[tuple[str, ...]]
    """The names of its tensors; the codes are first."""
    row_units: ClassVar[Mapping[str, int]] = {}
    """Rows that an entry of a part holds together, by the part's name, where they are more than one."""
    group_size: int
    """Elements along the reduction axis that share a scale."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors by their names."""
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return cast(torch.Tensor, getattr(self, self.part_names[0])).device

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], group_size: int) -> Self:
        """The weight with the given tensors, by part name."""
        return cast(Any, cls)(*(parts[name] for name in cls.part_names), group_size)

    def __getitem__(self, index: int | torch.Tensor) -> Self:
        """The weight at `index` of the first axis, without a copy; an int64 tensor of indices copies."""
        return self._map(lambda part: part[index])

    def rows(self, first: int, end: int) -> Self:
        """Rows first .. end-1 of a weight [N, K], without a copy; `first` is a multiple of `row_unit`."""
        return cast(Any, type(self))(*(part[self.entries(name, first, end)] for name, part in self.parts.items()), self.group_size)

    @classmethod
    def row_unit(cls) -> int:
        """Rows that can be selected together: the largest of `row_units`, or 1."""
        return max(cls.row_units.values(), default=1)

    @classmethod
    def entries(cls, part: str, first: int, end: int) -> slice:
        """The entries of a part that hold rows first .. end-1; `first` is a multiple of `row_unit`."""
        unit = cls.row_units.get(part, 1)
        assert first % unit == 0, f"rows must begin at a multiple of {unit}; found {first}"
        return slice(first // unit, -(-end // unit))

    def to(self, device: torch.device) -> Self:
        """The same weight on a device; no copy where it is there already."""
        return self._map(lambda part: part.to(device))

    def contiguous(self) -> Self:
        """The same weight with contiguous parts, as the compiled kernels require; parts that are contiguous already are not copied."""
        return self._map(torch.Tensor.contiguous)

    def contiguous_matrices(self) -> Self:
        """The same weight with contiguous matrices [N, K], which may be at any distance from each other, as in a mapped file.

        Dot products take such stacks. Parts that are in this form already are not copied.
        """
        if all(_has_contiguous_matrices(getattr(self, name)) for name in self.part_names):
            return self
        return self.contiguous()

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return cast(Any, type(self))(*(function(getattr(self, name)) for name in self.part_names), self.group_size)


def _has_contiguous_matrices(part: torch.Tensor) -> bool:
    return part.is_contiguous() or (part.dim() == 3 and part.stride()[1:] == (part.shape[2], 1))
