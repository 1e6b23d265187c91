"""Sizes in bytes as text: `format_size` writes them, `parse_size` reads them."""

from __future__ import annotations

import re

from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_LARGEST = 1 << 60  # far above any machine's memory, and bytes of that number are counted in 64 bits


def format_size(n: float) -> str:
    """A number of bytes as readable text, in units of powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def parse_size(text: str) -> int:
    """Bytes of a size such as "96GiB" or "64GB".

    Raises:
        RequestError: `text` is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise RequestError(f"a size must be a number with a unit, as 96GiB or 64GB; found {shortened(text)}")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > _LARGEST:
        raise RequestError(f"a size must be at most {format_size(_LARGEST)}; found {shortened(text)}")
    return int(size)
