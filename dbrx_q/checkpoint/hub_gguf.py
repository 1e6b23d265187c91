"""GGUF files on the hub: which one of a repository is meant, and its download, of the whole or of the header alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbrx_q.errors import CheckpointError

from .gguf_files import gguf_models, holds_only_gguf, with_label
from .hub import ANY_GGUF, Download, HubName, HubRevision, call_in_thread, find_revision
from .hub_errors import hub_errors
from .remote_shards import remote_file

__all__ = ["HubGguf", "find_gguf"]

_BY_DEFAULT = Download()


@dataclass(frozen=True)
class HubGguf:
    """A GGUF model in a repository of the hub: one file, or the parts of a split one."""

    repository: str
    """The hub id, owner/name."""
    files: tuple[str, ...]
    """The paths of its files in the repository, in order."""
    at: HubRevision
    """The commit."""
    revision: str | None
    """The branch, tag or commit that the user named; None for the main branch."""
    token: str | bool | None
    """The hub's access token; None for the one of `hf auth login` or HF_TOKEN."""
    download: Download
    """How files are fetched."""

    def fetch(self) -> Path:
        """The first file, after all are downloaded into the hub's cache.

        Raises:
            CheckpointError: a download fails, or the hub cannot be reached and the cache lacks a file.
        """
        from huggingface_hub import hf_hub_download

        at = self.revision if self.at.online else self.at.commit  # the cache notes which commit a branch stands for
        arguments = self.download.arguments(online=self.at.online)
        paths = []
        for name in self.files:
            self._check_online(name)
            with hub_errors(self.repository, name):
                paths.append(
                    Path(
                        call_in_thread(
                            lambda name=name: hf_hub_download(self.repository, name, revision=at, token=self.token, **arguments)  # type: ignore[misc]
                        )
                    )
                )
        return paths[0]

    def cached(self) -> Path | None:
        """The first file, where the hub's cache holds all; else None."""
        paths = [self._cached(name) for name in self.files]
        return None if None in paths else paths[0]

    def fetch_beginnings(self, folder: Path, lengths: Mapping[str, int]) -> tuple[Path, dict[str, int]]:
        """Write files of the full sizes of which only the first bytes are fetched, by range requests; the rest is a hole.

        Args:
            folder: gets `owner/name/` with the files.
            lengths: bytes to fetch of each file, by its path in the repository.

        Returns:
            (the first file, bytes fetched of each by its name).

        Raises:
            CheckpointError: the hub does not give a part of a file, or there is no room for the temporary file.
        """
        fetched = {}
        for name in self.files:
            self._check_online(name)
            with hub_errors(self.repository, name):
                size, read = remote_file(self.repository, name, self.at.commit, token=self.token)
                data = read(0, min(size, lengths[name]))
            path = folder / self.repository / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                os.truncate(path, size)
            except OSError as error:
                raise CheckpointError(
                    f"{self.repository}: reading the header of {name} takes a sparse file of {size} bytes in {folder}; {error.strerror}. "
                    "Set TMPDIR to a folder on another disk"
                ) from None
            fetched[path.name] = len(data)
        return folder / self.repository / self.files[0], fetched

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        folder = None if self.download.cache_dir is None else os.fspath(self.download.cache_dir)
        cached = try_to_load_from_cache(self.repository, name, cache_dir=folder, revision=self.at.commit)
        return Path(cached) if isinstance(cached, str) else None

    def _check_online(self, name: str) -> None:
        if not self.at.online and self._cached(name) is None:
            raise CheckpointError(
                f"{self.repository}: all files must be in the hub's cache where the hub cannot be reached; {name} of commit "
                f"{self.at.commit} is not. Connect to the network and unset HF_HUB_OFFLINE, or give a file"
            )


def find_gguf(
    name: str, *, revision: str | None = None, token: str | bool | None = None, download: Download = _BY_DEFAULT
) -> HubGguf | None:
    """The GGUF model that a user named on the hub; None where a repository is named that holds safetensors files, or no weights.

    Args:
        name: owner/name of a repository with one GGUF model, `owner/name/path/to/file.gguf` or `owner/name:Q4_K_M`.
        revision: branch, tag or commit; None for the main branch.
        token: the hub's access token; None for the one of `hf auth login` or HF_TOKEN.
        download: how files are fetched.

    Raises:
        CheckpointError: the hub does not give the repository, it holds no such file, or several of which none is named.
    """
    parsed = HubName.parse(name)
    assert parsed is not None, f"{name} is no name of the hub"
    at = find_revision(parsed.repository, revision=revision, token=token, file=parsed.file or ANY_GGUF, download=download)
    models = gguf_models(at.files)
    if parsed.file:
        chosen = {first: parts for first, parts in models.items() if parsed.file in parts}
        if parsed.file in at.files and not chosen:  # a file beside the models, which opening refuses
            chosen = {parsed.file: [parsed.file]}
    elif parsed.label:
        chosen = with_label(models, parsed.label)
    elif holds_only_gguf(at.files):
        chosen = models
    else:
        return None
    if len(chosen) != 1:
        raise CheckpointError(_refusal(parsed, at, chosen or models, token))
    [parts] = chosen.values()
    return HubGguf(parsed.repository, tuple(parts), at, revision, token, download)


def _refusal(name: HubName, at: HubRevision, models: Mapping[str, list[str]], token: str | bool | None) -> str:
    """Why none of the models is meant, with what the user can name instead."""
    repository, sizes = name.repository, _sizes(name.repository, at, token)
    if not models:
        return f"{repository}: must hold GGUF files, of which {name.file or name.label} names one; found none. Check the name"
    listed = "; ".join(
        first
        + (f" and {len(parts) - 1} more parts" if len(parts) > 1 else "")
        + (f" ({sum(sizes[part] for part in parts) / 1e9:.1f} GB)" if all(part in sizes for part in parts) else "")
        for first, parts in models.items()
    )
    named = name.file or name.label
    rule = f"{named} must name one GGUF model" if named else "one GGUF model must be named where there are several"
    return f"{repository}: {rule}; found {listed}. Give {repository}/{next(iter(models))}, or {repository}:LABEL with a part of its name"


def _sizes(repository: str, at: HubRevision, token: str | bool | None) -> dict[str, int]:
    """Bytes of the files by their paths, where the hub tells them."""
    from huggingface_hub import HfApi

    if not at.online:
        return {}
    with hub_errors(repository):
        entries = HfApi(token=token).list_repo_tree(repository, recursive=True, revision=at.commit)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
