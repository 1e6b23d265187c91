"""Report folders: checked before a measurement starts, and written so that each file is complete or absent."""

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
    """Refuse a folder to which the report could not be written at the end.

    Args:
        folder: where the report is to be written.
        files: names of the report's files, one of which ends in .json.
        keys: keys that mark the object in that JSON file as an earlier report; only an earlier report is replaced.

    Raises:
        UnsupportedError: matplotlib is missing.
        RequestError: `folder` is a file, cannot be written to, or holds files of these names that are not an earlier report's.
    """
    check_plot_extra("the plot of --out")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: a report is a folder; found a file. Name another folder")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise RequestError(f"{folder}: a report's folder must be writable; {nearest} is not. Name another folder")
    existing = next((name for name in files if (folder / name).exists()), None)
    if existing and not _is_report(folder / next(name for name in files if name.endswith(".json")), keys):
        raise RequestError(
            f"{folder / existing}: only an earlier report is replaced; this file is not part of one. Name another folder, or move the file"
        )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into `folder`, which is created if missing. All are written under temporary names before the first is renamed.

    Other files in the folder stay.

    Raises:
        RequestError: a file cannot be written; existing files are unchanged unless a rename failed.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise RequestError(f"{folder}: a report's folder must be writable; {error.strerror}. Name another folder or free space") from None
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for path in absent:  # fails, as it should, where the folder holds the report
            with suppress(OSError):
                path.rmdir()


def _is_report(path: Path, keys: Collection[str]) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and set(keys) <= data.keys()
