"""The registry of weight formats, and `TensorFormat`: a format with a group size, spelled `int4:64`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import affine, int2_int3, int4, int8, nf4, q4_0, trellis
from .errors import FormatError
from .format import PLAIN, Format, Part
from .groups import check_group_size
from .quantized_weight import QuantizedWeight

__all__ = ["FORMATS", "PLAIN", "TensorFormat", "offered_formats"]

FORMATS: dict[str, Format] = {
    record.name: record
    for record in (
        int4.FORMAT,
        int8.FORMAT,
        nf4.FORMAT,
        nf4.DOUBLE_FORMAT,
        *affine.FORMATS,
        q4_0.FORMAT,
        *int2_int3.FORMATS,
        *trellis.FORMATS,
    )
}
"""The weight formats by their names. A new format is one more record here."""


@dataclass(frozen=True)
class TensorFormat:
    """The format of a tensor; `str` spells it as `int4:64`, which `parse` reads."""

    format: str
    """A name in `FORMATS`."""
    group_size: int
    """One of the format's `group_sizes`."""

    @classmethod
    def parse(cls, text: str) -> TensorFormat:
        """The format that `text` spells: `int4:64`, or the bare name of a format with a single group size or of a trellis format.

        Raises:
            FormatError: an unknown format or group size.
        """
        name, colon, group = text.partition(":")
        sizes = FORMATS[name].group_sizes if name in FORMATS else ()
        bare = not colon and (len(sizes) == 1 or (name in FORMATS and FORMATS[name].trellis is not None))
        size = int(group) if group.isdecimal() else sizes[0] if bare else 0
        if size not in sizes:
            raise FormatError(f"a format must be one of {', '.join(map(str, offered_formats()))}; found {text!r}")
        return cls(name, size)

    def __str__(self) -> str:
        return f"{self.format}:{self.group_size}"

    @classmethod
    def of(cls, name: str, group_size: int | None = None) -> TensorFormat:
        """The format with groups of `group_size`; None picks the format's default."""
        return cls(name, FORMATS[name].default_group_size if group_size is None else group_size)

    @property
    def record(self) -> Format:
        """The format's record."""
        return FORMATS[self.format]

    @property
    def fast(self) -> TensorFormat:
        """The format of the same layout with a quicker search; this one where there is none."""
        return TensorFormat(self.record.fast or self.format, self.group_size)

    @property
    def in_memory(self) -> TensorFormat:
        """The format that a loaded weight has."""
        return TensorFormat(self.record.weight.format, self.group_size)

    def check(self, K: int) -> None:
        """Refuse a group size that the format does not offer or that does not divide K, the length of the reduction axis.

        Raises:
            FormatError: names the rule and, where K rules the group size out, what fits: the format's other group sizes or, where none
                does, other formats.
        """
        try:
            check_group_size(K, self.group_size, self.record.group_sizes)
        except FormatError as error:
            fitting = [fmt for fmt in offered_formats() if K % fmt.group_size == 0]
            same = [fmt for fmt in fitting if fmt.format == self.format]
            if same and self.group_size not in self.record.group_sizes:
                raise
            names = [str(fmt) for fmt in same or fitting]
            raise FormatError(f"{error} ({', '.join(names) or 'no format'} {'fit' if len(names) > 1 else 'fits'})") from None

    def parts(self, N: int, K: int) -> tuple[Part, ...]:
        """The stored parts of one matrix [N, K]."""
        return self.record.parts(N, K, self.group_size)

    def load(self, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight in memory, from its stored parts by name; the parts may have leading axes."""
        record = self.record
        return record.weight.of(parts, self.group_size) if record.stored is None else record.stored.load(parts, self.group_size)


def offered_formats() -> list[TensorFormat]:
    """Every format with every group size."""
    return [TensorFormat(record.name, size) for record in FORMATS.values() for size in record.group_sizes]
