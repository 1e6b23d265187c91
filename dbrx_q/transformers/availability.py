"""Refuses to go on without a transformers that can load a DBRX. Imported before every module here that needs it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["MINIMUM", "check_transformers"]

MINIMUM = (5, 15)
"""The first version that can load a DBRX."""


def check_transformers() -> None:
    """Refuse a transformers that is missing or too old.

    Raises:
        ImportError: with the line that installs one.
    """
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = "none"
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    if numbers < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise ImportError(
            f"dbrx_q.transformers needs transformers >= {least}, the first that can load a DBRX; found {installed}. "
            "Install it with: pip install --upgrade 'dbrx_q[transformers]'"
        )


check_transformers()
