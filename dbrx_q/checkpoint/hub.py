"""Folders and hub ids: one of them becomes a local path."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from dbrx_q.errors import CheckpointError, DbrxError, RequestError

__all__ = ["SMALL_FILES", "check_push", "fetched", "hub_errors", "is_on_hub", "push", "resolve_file", "resolve_folder"]

_COMMIT_MESSAGE = "Quantized by dbrx_q"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
"""Of a repository, besides its weights."""
# Weights in other containers (.bin is a pickle) and the repository's pictures are never fetched.
_WANTED = ["*.safetensors", *SMALL_FILES]
_FALLBACK = "fallback/*"  # see `fallback.py`


def resolve_folder(
    path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, fallback: bool = False
) -> Path:
    """The folder of a checkpoint; a hub repository is downloaded into the hub's cache first, with the fallback copy that it carries only if
    `fallback` says so.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    local = _local(path_or_hub_id)
    if local is not None:
        if not local.is_dir():
            raise CheckpointError(f"{local}: a checkpoint is a folder; found a file. Give the folder that holds config.json")
        return local
    from huggingface_hub import snapshot_download

    without = None if fallback else [_FALLBACK]
    with hub_errors(path_or_hub_id):
        return Path(
            fetched(
                lambda: snapshot_download(
                    str(path_or_hub_id), revision=revision, token=token, allow_patterns=_WANTED, ignore_patterns=without
                )
            )
        )


def resolve_file(path_or_hub_id: str | os.PathLike[str], name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """One file of a checkpoint, fetched alone where the checkpoint is on the hub.

    Raises:
        CheckpointError: as for `resolve_folder`, or the repository has no such file.
    """
    local = _local(path_or_hub_id)
    if local is not None:
        return resolve_folder(local) / name
    from huggingface_hub import hf_hub_download

    with hub_errors(path_or_hub_id):
        return Path(fetched(lambda: hf_hub_download(str(path_or_hub_id), name, revision=revision, token=token)))


def is_on_hub(path_or_hub_id: str | os.PathLike[str]) -> bool:
    """Whether it names a repository and no folder here.

    Raises:
        CheckpointError: it can name neither.
    """
    return _local(path_or_hub_id) is None


def check_push(repository: str, *, private: bool = True) -> None:
    """Make the repository unless it exists, so that a push will not fail hours later for want of a right.

    Raises:
        RequestError: no token, a token that the hub refuses or that may not write there, or a name that is no hub id.
    """
    from huggingface_hub import HfApi

    if not _HUB_ID.fullmatch(repository):
        raise RequestError(f"--push must name a repository as owner/name; found {repository!r}")
    api = HfApi()
    try:
        who = api.whoami()
        own = [str(who["name"]), *(str(each["name"]) for each in who.get("orgs", []))]
        if repository.split("/")[0] not in own:
            raise RequestError(f"{repository}: the token must belong to its owner; found one of {', '.join(own)}. Push to one of these")
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"{repository}: pushing must be allowed before the work begins; the hub says: {_first_line(error)}. "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Upload a finished checkpoint; the address of the commit. What the hub has already is not sent again.

    Raises:
        RequestError: it failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        return fetched(lambda: str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=_COMMIT_MESSAGE).commit_url))
    except Exception as error:
        raise RequestError(
            f"{folder}: complete, but pushing it to {repository} failed: {_first_line(error)}. Push it again with "
            f"`hf upload {repository} {folder}`, or give the same command with --resume"
        ) from None


def _local(path_or_hub_id: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_hub_id, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such folder; give a checkpoint's folder or a hub id such as owner/name")
    return None


def fetched(fetch: Callable[[], str]) -> str:
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


class hub_errors:  # noqa: N801 # used as a with statement, like a function
    """Turns what the hub client raises into a CheckpointError that says what to do. file: that is fetched of a repository that is there."""

    def __init__(self, repository: str | os.PathLike[str], file: str = "") -> None:
        self.repository, self.file = os.fspath(repository), file

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
        if isinstance(error, DbrxError):
            return
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{self.repository}: the hub's cache has no room for it; free some, or set HF_HOME to another disk"
            ) from None
        if isinstance(error, Exception) and self.file:
            raise CheckpointError(
                f"{self.repository}: the hub must give {self.file}; it did not ({_first_line(error)}). Check the network and try again"
            ) from None
        if isinstance(error, Exception):
            first_line = _first_line(error)
            raise CheckpointError(
                f"{self.repository}: no such folder here, and the hub did not give a repository of that name ({first_line}). "
                "Check the name, the network and, for a gated repository, the token"
            ) from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
