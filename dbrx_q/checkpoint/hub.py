"""A checkpoint's folder or hub id becomes a local path; finished checkpoints are pushed to the hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dbrx_q.errors import OF_ANOTHER_PROGRAM, CheckpointError, RequestError

from .hub_errors import first_line, hub_errors, is_hub_failure
from .transformers_files import CODE_NAME

__all__ = [
    "ANY_GGUF",
    "SMALL_FILES",
    "Download",
    "HubName",
    "HubRevision",
    "call_in_thread",
    "check_push",
    "find_commit",
    "find_revision",
    "is_on_hub",
    "push",
    "resolve_file",
    "resolve_folder",
    "upload",
]

_COMMIT_MESSAGE = "Quantized by dbrx_q"
_UPLOAD_MESSAGE = "Saved by dbrx_q"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_NAME = re.compile(rf"(?P<repository>{_HUB_ID.pattern})(?:/(?P<file>[^:]+\.gguf)|:(?P<label>[\w.-]+))?")
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md", CODE_NAME]
"""Patterns of the files of a repository that a checkpoint needs besides its weights."""
ANY_GGUF = "*.gguf"
"""Stands for any GGUF file in `find_revision`."""
# Other files are never fetched, such as pictures, and weights in other containers (.bin is a pickle).
_WANTED = ["*.safetensors", *SMALL_FILES]
_FALLBACK = "fallback/*"  # see `fallback.py`


@dataclass(frozen=True)
class Download:
    """How files are fetched from the hub; arguments of transformers' `from_pretrained` by these names."""

    cache_dir: str | os.PathLike[str] | None = None
    """The folder that keeps them; None for the hub's own cache."""
    local_files_only: bool = False
    """Whether the cache alone is used, without a network."""
    force_download: bool = False
    """Whether files are fetched even if the cache has them."""

    def arguments(self, *, online: bool) -> dict[str, Any]:
        """As the hub's client takes them; `online` is whether the hub answers."""
        return {"cache_dir": self.cache_dir, "local_files_only": not online, "force_download": self.force_download and online}


_BY_DEFAULT = Download()


@dataclass(frozen=True)
class HubName:
    """What a user named on the hub: `owner/name`, or a GGUF file as `owner/name/path/to/file.gguf` or `owner/name:Q4_K_M`."""

    repository: str
    """The hub id, owner/name."""
    file: str = ""
    """The path of a GGUF file in the repository; empty where none was named."""
    label: str = ""
    """A part of the name of a GGUF file, such as its quantization type; empty where none was named."""

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """What `text` names; None where it cannot name anything on the hub."""
        match = _HUB_NAME.fullmatch(text)
        return None if match is None else cls(match["repository"], match["file"] or "", match["label"] or "")

    @property
    def names_a_file(self) -> bool:
        """Whether a GGUF file is named, and not the repository alone."""
        return bool(self.file or self.label)


@dataclass(frozen=True)
class HubRevision:
    """A commit of a hub repository."""

    commit: str
    """Its hash."""
    online: bool
    """Whether the hub gave it; else it is in the hub's cache."""
    files: tuple[str, ...]
    """The paths of its files; of a commit from the cache, of those that the cache holds."""


def resolve_folder(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    fallback: bool = False,
    weights: bool = True,
    download: Download = _BY_DEFAULT,
) -> Path:
    """The folder of a checkpoint; a hub repository is downloaded into the hub's cache first.

    Args:
        path_or_hub_id: a folder, or owner/name on the hub.
        revision: branch, tag or commit; None for the main branch.
        token: the hub's access token; None for the one of `hf auth login` or HF_TOKEN.
        fallback: whether the fallback copy that the repository carries is downloaded too.
        weights: whether the shards are downloaded, not the small files alone.
        download: how files are fetched.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    local = _local_path(path_or_hub_id)
    if local is not None:
        if not local.is_dir():
            next_step = OF_ANOTHER_PROGRAM if local.suffix == ".gguf" else "Give the folder that holds config.json"
            raise CheckpointError(f"{local}: a checkpoint is a folder; found a file. {next_step}")
        return local
    _refuse_gguf(path_or_hub_id)
    from huggingface_hub import snapshot_download

    repository, ignored = str(path_or_hub_id), None if fallback else [_FALLBACK]
    commit, online = find_commit(repository, revision=revision, token=token, download=download)
    with hub_errors(repository):
        return Path(
            call_in_thread(
                lambda: snapshot_download(
                    repository,
                    revision=revision if online else commit,  # the cache notes which commit a branch stands for
                    token=token,
                    allow_patterns=_WANTED if weights else [*SMALL_FILES, "additional_chat_templates/*.jinja"],
                    ignore_patterns=ignored,
                    **download.arguments(online=online),
                )
            )
        )


def resolve_file(
    path_or_hub_id: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    download: Download = _BY_DEFAULT,
) -> Path:
    """The path of one file of a checkpoint; of a checkpoint on the hub, only this file is downloaded.

    Raises:
        CheckpointError: as for `resolve_folder`, or the repository has no such file.
    """
    local = _local_path(path_or_hub_id)
    if local is not None:
        return resolve_folder(local) / name
    _refuse_gguf(path_or_hub_id)
    from huggingface_hub import hf_hub_download

    repository = str(path_or_hub_id)
    commit, online = find_commit(repository, revision=revision, token=token, file=name, download=download)
    arguments = download.arguments(online=online)
    with hub_errors(repository):
        return Path(
            call_in_thread(lambda: hf_hub_download(repository, name, revision=revision if online else commit, token=token, **arguments))
        )


def find_commit(
    repository: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    file: str = "config.json",
    download: Download = _BY_DEFAULT,
) -> tuple[str, bool]:
    """(the commit that a revision of a hub repository stands for, whether the hub gave it); as `find_revision`."""
    known = find_revision(repository, revision=revision, token=token, file=file, download=download)
    return known.commit, known.online


def find_revision(
    repository: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    file: str = "config.json",
    download: Download = _BY_DEFAULT,
) -> HubRevision:
    """The commit that a revision of a hub repository stands for.

    The hub is asked once, without the client's repetitions, which take half a minute where there is no network. If it does not give the
    repository, the commit is the one under which its cache holds `file` or config.json.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None for the main branch.
        token: the hub's access token; None for the one of `hf auth login` or HF_TOKEN.
        file: a file that a cached commit must hold; `*.gguf` stands for any GGUF file.
        download: how files are fetched.

    Raises:
        CheckpointError: the hub does not give the repository, and its cache holds no copy.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    def ask() -> HubRevision:
        if download.local_files_only:
            raise LocalEntryNotFoundError("local_files_only is set, and the cache does not hold it")
        info = HfApi(token=token).model_info(repository, revision=revision or "main", timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return HubRevision(str(info.sha), True, tuple(sibling.rfilename for sibling in info.siblings or ()))

    with hub_errors(repository, revision=revision):
        try:
            return call_in_thread(ask)
        except RevisionNotFoundError:
            raise
        except Exception as error:
            if not is_hub_failure(error):
                raise
            folder = None if download.cache_dir is None else os.fspath(download.cache_dir)
            for name in dict.fromkeys(("config.json", file)):
                cached = try_to_load_from_cache(repository, name, cache_dir=folder, revision=revision)
                if isinstance(cached, str):
                    snapshot = Path(cached).parents[len(Path(name).parents) - 1]
                    return HubRevision(snapshot.name, False, _files_in(snapshot))
            held = _cached_revision(repository, revision, folder) if file == ANY_GGUF else None
            if held is None or not any(name.endswith(".gguf") for name in held.files):
                raise
            return held


def is_on_hub(path_or_hub_id: str | os.PathLike[str]) -> bool:
    """Whether `path_or_hub_id` names a repository on the hub, or a GGUF file in one, and nothing on this machine.

    Raises:
        CheckpointError: it can name neither.
    """
    return _local_path(path_or_hub_id) is None


def check_push(repository: str, *, private: bool = True) -> None:
    """Create the repository unless it exists, so that a missing right shows before hours of work and not after.

    Raises:
        RequestError: there is no token, the hub refuses it or it may not write to `repository`, or that is no hub id.
    """
    from huggingface_hub import HfApi

    if not _HUB_ID.fullmatch(repository):
        raise RequestError(f"--push must name a repository as owner/name; found {repository!r}")
    api = HfApi()
    try:
        account = api.whoami()
        owners = [str(account["name"]), *(str(organization["name"]) for organization in account.get("orgs", []))]
        if repository.split("/")[0] not in owners:
            raise RequestError(f"{repository}: the token must belong to its owner; found one of {', '.join(owners)}. Push to one of these")
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
    except Exception as error:
        if not is_hub_failure(error):
            raise
        raise RequestError(
            f"{repository}: pushing must be allowed before the work begins; the hub says: {first_line(error)}. "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Upload a finished checkpoint and return the address of the commit. Files that the hub already has are not sent again.

    Raises:
        RequestError: the upload failed; the folder is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        return call_in_thread(
            lambda: str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=_COMMIT_MESSAGE).commit_url)
        )
    except Exception as error:
        if not is_hub_failure(error):
            raise
        raise RequestError(
            f"{folder}: complete, but pushing it to {repository} failed: {first_line(error)}. Push it again with "
            f"`hf upload {repository} {folder}`, or give the same command with --resume"
        ) from None


def upload(
    folder: Path, repository: str, *, token: str | bool | None = None, private: bool | None = None, message: str | None = None
) -> str:
    """Create a repository unless it exists, and upload a folder; returns the address of the commit.

    Args:
        folder: its files are uploaded.
        repository: owner/name; a name alone is one of the user's.
        token: the hub's access token; None for the one of `hf auth login` or HF_TOKEN.
        private: whether a new repository is private; None for the owner's default.
        message: of the commit.

    Raises:
        RequestError: the hub refuses it; the folder is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        name = str(api.create_repo(repository, repo_type="model", private=private, exist_ok=True).repo_id)
        text = message or _UPLOAD_MESSAGE
        return call_in_thread(lambda: str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=text).commit_url))
    except Exception as error:
        if not is_hub_failure(error):
            raise
        raise RequestError(
            f"{repository}: the hub must take {folder}; it says: {first_line(error)}. Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write there"
        ) from None


def _local_path(path_or_hub_id: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(path_or_hub_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_hub_id, os.PathLike) or HubName.parse(text) is None:
        raise CheckpointError(f"{text}: no such folder; give a checkpoint's folder or a hub id such as owner/name")
    return None


def _refuse_gguf(path_or_hub_id: str | os.PathLike[str]) -> None:
    name = HubName.parse(os.fspath(path_or_hub_id))
    if name is not None and name.names_a_file:
        raise CheckpointError(
            f"{path_or_hub_id}: this needs a checkpoint's folder or a hub id such as owner/name; found the name of a GGUF file. "
            "Quantize it with `dbrx-q quantize` and give the copy"
        )


def _cached_revision(repository: str, revision: str | None, cache: str | None) -> HubRevision | None:
    """The commit in the hub's cache that a revision stood for when it was fetched; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(repository, revision=revision, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return HubRevision(snapshot.name, False, _files_in(snapshot))


def _files_in(snapshot: Path) -> tuple[str, ...]:
    """The paths of the files in a folder of the hub's cache."""
    return tuple(sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()))


_Result = TypeVar("_Result")


def call_in_thread(call: Callable[[], _Result]) -> _Result:
    """The result of `call`, which runs in a thread: in the main thread, the hub's client answers Ctrl-C only between two files."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
