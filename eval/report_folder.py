"""Folders of reports: checked before anything is measured, and written so that a file is whole or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dbrx_q.errors import RequestError

from .plots import check_plot_extra

__all__ = ["check_report_folder", "write_files"]


def check_report_folder(folder: Path) -> None:
    """Refuse what could not be written at the end.

    Raises:
        UnsupportedError: matplotlib is missing.
        RequestError: `folder` is a file, or cannot be written to.
    """
    check_plot_extra("the plot of --out")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: a report is a folder; found a file. Give another name")
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise RequestError(f"{folder}: a report's folder must be writable; {nearest} is not. Give another name")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, which is made where missing; each takes its place when all are on the disk. Other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in files}
    try:
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
