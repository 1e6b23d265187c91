"""Failures of the Hugging Face hub, its network and its client become errors that state the next step."""

from __future__ import annotations

import errno
import os

from dbrx_q.errors import CheckpointError

__all__ = ["first_line", "hub_errors", "is_hub_failure", "is_offline"]

# The client's HTTP library: httpx for huggingface_hub 1.x, httpx2 for 2.x.
_HTTP_LIBRARIES = ("httpx", "httpx2")


class hub_errors:  # noqa: N801 # used as a with statement, like a function
    """A with block in which failures of the hub become CheckpointErrors. Errors of the program itself, such as a TypeError, pass through.

    Args:
        repository: the hub id.
        file: the file that the block fetches, where the repository is known to exist; else the errors are about the repository.
        revision: the branch, tag or commit that the block asks for; None for the main branch.
    """

    def __init__(self, repository: str | os.PathLike[str], file: str = "", *, revision: str | None = None) -> None:
        self.repository, self.file, self.revision = os.fspath(repository), file, revision

    def __enter__(self) -> None:
        import logging

        from huggingface_hub.utils.logging import get_verbosity, set_verbosity

        # The client logs every failed attempt before it repeats it; the last error is reported anyway.
        self.verbosity = get_verbosity()
        set_verbosity(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from huggingface_hub.utils.logging import set_verbosity

        set_verbosity(self.verbosity)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{self.repository}: the disk of the hub's cache must have room for the repository; it is full. "
                "Free some, or set HF_HOME to a folder on another disk"
            ) from None
        if isinstance(error, PermissionError):
            raise CheckpointError(
                f"{self.repository}: the hub's cache must be writable; {error.filename or 'a file in it'}: {error.strerror}. "
                "Set HF_HOME to a folder that you may write to"
            ) from None
        if error is None or not is_hub_failure(error):
            return
        raise CheckpointError(self._message(error)) from None

    def _message(self, error: BaseException) -> str:
        reason = first_line(error)
        if is_offline(error) and not self.file:
            return (
                f"{self.repository}: no such folder here, and the hub cannot be asked for a repository of that name: "
                f"{_offline_reason(error)}. Its cache holds no copy. Check the name and the network, or give a checkpoint's folder"
            )
        if self.file:
            return f"{self.repository}: the hub must give {self.file}; it did not ({reason}). Check the network and try again"
        if type(error).__name__ == "RevisionNotFoundError":
            return f"{self.repository}: --revision must name a branch, tag or commit of the repository; found {self.revision!r}. Check it"
        return (
            f"{self.repository}: no such folder here, and the hub did not give a repository of that name ({reason}). "
            "Check the name, the network and, for a gated repository, the token"
        )


def is_hub_failure(error: BaseException) -> bool:
    """Whether the hub, the network or a file failed, and not the program that asked.

    The client raises its HfHubHTTPError, other OSErrors, its ValueError for a name that no repository can have, and the errors of its HTTP
    library; the library that transfers large files raises a plain RuntimeError.
    """
    from huggingface_hub.errors import HFValidationError

    return isinstance(error, OSError | HFValidationError) or type(error) is RuntimeError or _is_of_http_library(error)


def is_offline(error: BaseException) -> bool:
    """Whether the hub was not asked, because of HF_HUB_OFFLINE, or did not answer."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError | ConnectionError):  # OfflineModeIsEnabled is a ConnectionError
        return True
    return _is_of_http_library(error) and not isinstance(error, HfHubHTTPError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _offline_reason(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else first_line(error)


def _is_of_http_library(error: BaseException) -> bool:
    return any(kind.__module__.split(".")[0] in _HTTP_LIBRARIES for kind in type(error).__mro__)
