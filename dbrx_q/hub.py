"""Folders and hub ids: one of them becomes a local path."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import CheckpointError

__all__ = ["resolve_file", "resolve_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in other containers (.bin is a pickle) and the repository's pictures are never fetched.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]


def resolve_folder(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a checkpoint; a hub repository is downloaded into the hub's cache first.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    local = _local(path_or_hub_id)
    if local is not None:
        if not local.is_dir():
            raise CheckpointError(f"{local}: a checkpoint is a folder; found a file. Give the folder that holds config.json")
        return local
    from huggingface_hub import snapshot_download

    with _hub_errors(path_or_hub_id):
        return Path(_fetched(lambda: snapshot_download(str(path_or_hub_id), revision=revision, token=token, allow_patterns=_WANTED)))


def resolve_file(path_or_hub_id: str | os.PathLike[str], name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """One file of a checkpoint, fetched alone where the checkpoint is on the hub.

    Raises:
        CheckpointError: as for `resolve_folder`, or the repository has no such file.
    """
    local = _local(path_or_hub_id)
    if local is not None:
        return resolve_folder(local) / name
    from huggingface_hub import hf_hub_download

    with _hub_errors(path_or_hub_id):
        return Path(_fetched(lambda: hf_hub_download(str(path_or_hub_id), name, revision=revision, token=token)))


def _local(path_or_hub_id: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_hub_id, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such folder; give a checkpoint's folder or a hub id such as owner/name")
    return None


def _fetched(fetch: Callable[[], str]) -> str:
    """What `fetch` returns, from a thread: the client itself would answer Ctrl-C only when the files under way have come."""
    results: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(fetch())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class _hub_errors:  # noqa: N801 # used as a with statement, like a function
    """Turns what the hub client raises into a CheckpointError that says what to do."""

    def __init__(self, repository: str | os.PathLike[str]) -> None:
        self.repository = os.fspath(repository)

    def __enter__(self) -> None:
        import logging

        from huggingface_hub.utils.logging import get_verbosity, set_verbosity

        # The client logs every attempt that it repeats; what matters is in the error at the end.
        self.verbosity = get_verbosity()
        set_verbosity(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from huggingface_hub.utils.logging import set_verbosity

        set_verbosity(self.verbosity)
        # The client raises its own HfHubHTTPError, but also OSError, ValueError and its HTTP library's errors.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{self.repository}: the hub's cache has no room for it; free some, or set HF_HOME to another disk"
            ) from None
        if isinstance(error, Exception):
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{self.repository}: no such folder here, and the hub did not give a repository of that name ({first_line}). "
                "Check the name, the network and, for a gated repository, the token"
            ) from None
