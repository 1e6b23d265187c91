"""Folders of reports: checked before anything is measured, and written so that a file is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from dbrx_q.errors import RequestError
from dbrx_q.plots import check_plot_extra

__all__ = ["check_report_folder", "write_files"]


def check_report_folder(folder: Path, files: Collection[str], keys: Collection[str]) -> None:
    """Refuse what could not be written at the end.

    Args:
        folder: where the report shall be.
        files: the names of its files, one of which ends in .json.
        keys: what an object in that file has; one that lacks them is no former report's, which alone is replaced.

    Raises:
        UnsupportedError: matplotlib is missing.
        RequestError: `folder` is a file, cannot be written to, or holds files of these names that are no former report's.
    """
    check_plot_extra("the plot of --out")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: a report is a folder; found a file. Give another name")
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise RequestError(f"{folder}: a report's folder must be writable; {nearest} is not. Give another name")
    found = next((name for name in files if (folder / name).exists()), None)
    if found and not _is_report(folder / next(name for name in files if name.endswith(".json")), keys):
        raise RequestError(f"{folder / found}: only a former report is replaced, and there is none here. Give another folder, or move it")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, which is made where missing; each takes its place when all are on the disk. Other files stay.

    Raises:
        RequestError: a file cannot be written; no file has changed unless it was while they took their places.
    """
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise RequestError(f"{folder}: a report's folder must be writable; {error.strerror}. Give another name or make room") from None
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for place in absent:  # stays where it holds the report
            with suppress(OSError):
                place.rmdir()


def _is_report(path: Path, keys: Collection[str]) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and set(keys) <= data.keys()
