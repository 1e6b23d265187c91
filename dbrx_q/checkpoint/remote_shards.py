"""A checkpoint on the hub, quantized while its shards are fetched.

All headers are fetched first, by range requests; a shard is downloaded when one of its tensors is read, and the shard that is expected
next is downloaded meanwhile. All files are of one commit, which is looked up once. Shards stay in the hub's cache, or, to save disk, go
to a folder of their own, in which each is deleted after its last read. Where the hub cannot be reached, the cache must hold all files.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dbrx_q.errors import CheckpointError, RequestError

from .hub import SMALL_FILES, call_in_thread, find_commit
from .hub_errors import hub_errors
from .safetensors_file import SafetensorsFile, TensorInfo, parse_header

__all__ = ["RemoteShard", "RemoteShards", "remote_file"]

_FIRST_REQUEST_BYTES = 100_000  # holds the header of a shard of this model
_CONNECTIONS = 8
_MARKER_NAME = ".dbrx_q-fetched"  # marks a folder whose shards may be deleted


class RemoteShards:
    """The checkpoint of a hub repository, as a `shard_source.ShardSource`.

    Args:
        repository: the hub id, owner/name.
        revision: branch, tag or commit; None for the main branch.
        storage: a folder for shards that are deleted after use; None keeps them in the hub's cache.

    Raises:
        CheckpointError: the repository cannot be reached, or holds no safetensors files.
        RequestError: `storage` holds files that dbrx_q did not put there.
    """

    folder: Path
    """Holds the small files, config.json and the index among them."""
    commit: str
    """The commit that all files are of."""
    storage: Path
    """The folder that shards are fetched to."""

    def __init__(self, repository: str, *, revision: str | None = None, storage: Path | None = None) -> None:
        from huggingface_hub import snapshot_download

        if storage is not None and storage.exists() and not (storage / _MARKER_NAME).is_file():
            raise RequestError(
                f"{storage}: shards are fetched to this folder and deleted there, but it was made by something else. Move it away"
            )
        self.repository, self._deletable = repository, storage
        commit, self._online = find_commit(repository, revision=revision)
        at = revision if self._online else commit  # the cache notes which commit a branch stands for
        with hub_errors(repository):
            self.folder = Path(
                call_in_thread(
                    lambda: snapshot_download(repository, revision=at, allow_patterns=SMALL_FILES, local_files_only=not self._online)
                )
            )
        self.commit = self.folder.name
        self.storage = storage or self.folder
        self._shards: dict[str, RemoteShard] = {}
        self._expected: list[list[str]] = []
        self._downloads: dict[str, _Download] = {}
        self._lock = threading.Lock()

    def open_all(self, names: Sequence[str]) -> Sequence[RemoteShard]:
        """Open the shards of these file names: fetch their headers, not their tensors.

        Raises:
            CheckpointError: a file does not exist or is no safetensors file.
        """
        with hub_errors(self.repository), ThreadPoolExecutor(_CONNECTIONS) as pool:
            self._shards = dict(zip(names, pool.map(lambda name: RemoteShard(self, name), names), strict=True))
        return list(self._shards.values())

    def has(self, name: str) -> bool:
        """Whether the commit holds a file; of a hub that cannot be reached, whether the cache does."""
        from huggingface_hub import HfApi

        if self.local_path(name) is not None or not self._online:
            return self.local_path(name) is not None
        with hub_errors(self.repository, name):
            return HfApi().file_exists(self.repository, name, revision=self.commit)

    def check_online(self, name: str) -> None:
        """Refuse to fetch a file from a hub that cannot be reached.

        Raises:
            CheckpointError: it could not be reached when the repository was opened.
        """
        if not self._online:
            raise CheckpointError(
                f"{self.repository}: all files must be in the hub's cache where the hub cannot be reached; {name} of commit {self.commit} "
                "is not. Connect to the network and unset HF_HUB_OFFLINE, or give a checkpoint's folder"
            )

    def expect(self, names: Sequence[Collection[str]]) -> None:
        """Announce the shards that each of the next pieces of work reads, in order."""
        with self._lock:
            self._expected = [sorted(shards) for shards in names]

    def done(self) -> None:
        """End the first of the announced pieces of work; delete its shards that no later one reads if shards are deleted after use."""
        with self._lock:
            read = self._expected.pop(0)
            later = {name for shards in self._expected for name in shards}
        if self._deletable is None:
            return
        for name in read:
            if name not in later:
                self._shards[name].close()
                self._downloads.pop(name, None)
                (self._deletable / name).unlink(missing_ok=True)

    def to_fetch(self, names: Sequence[Collection[str]]) -> tuple[int, int]:
        """(bytes to fetch for work that reads these shards in this order, bytes of disk that fetched shards take at most meanwhile).

        Shards that are on this machine already are not counted.
        """
        absent = {name for name in {name for shards in names for name in shards} if self.local_path(name) is None}
        reads = [name for shards in names for name in sorted(shards) if name in absent]
        sizes = {name: self._shards[name].size for name in reads}
        total = sum(sizes.values())
        if self._deletable is None:
            return total, total
        order = list(sizes)  # of the downloads
        first_read = {name: reads.index(name) for name in order}
        last_read = {name: len(reads) - 1 - reads[::-1].index(name) for name in order}
        peak = 0
        for step, name in enumerate(reads):
            ahead = order[order.index(name) + 1 :][:1]
            held = [shard for shard in order if first_read[shard] <= step <= last_read[shard]]
            peak = max(peak, sum(sizes[shard] for shard in {*held, *ahead}))
        return total, peak

    def stop(self) -> None:
        """Start no more downloads and cancel the waits for those under way, whose threads end with the process."""
        with self._lock:
            self._expected, downloads, self._downloads = [], list(self._downloads.values()), {}
        for download in downloads:
            download.cancel()

    def close(self, *, keep: bool) -> None:
        """Stop, and delete the folder of shards that are deleted after use, unless a later run shall find them (`keep`)."""
        self.stop()
        if self._deletable is not None and not keep and (self._deletable / _MARKER_NAME).is_file():
            shutil.rmtree(self._deletable, ignore_errors=True)

    def local_path(self, name: str) -> Path | None:
        """The file of a shard that need not be fetched: in the hub's cache, or left by an earlier run; None where there is none."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, name, revision=self.commit)
        if isinstance(cached, str):
            return Path(cached)
        kept = None if self._deletable is None else self._deletable / name
        return kept if kept is not None and kept.is_file() else None

    def fetch(self, name: str) -> Path:
        """The file of a shard. Waits until it is downloaded, then starts the download of the shard that is expected next.

        Raises:
            CheckpointError: the download fails.
        """
        with self._lock:
            later = [expected for shards in self._expected for expected in shards if expected != name]
            needed = self._start_download(name)
            ahead = next((expected for expected in later if expected not in self._downloads), None)
        try:
            with hub_errors(self.repository, name):
                path = needed.result()
        except BaseException:
            with self._lock:
                self._downloads.pop(name, None)  # so that the next read tries again
            raise
        if ahead is not None:
            with self._lock:
                self._start_download(ahead)
        return path

    def _start_download(self, name: str) -> _Download:
        if name not in self._downloads:
            self._downloads[name] = _Download(lambda: self._download(name))
        return self._downloads[name]

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        if self._deletable is not None:
            self._deletable.mkdir(parents=True, exist_ok=True)
            (self._deletable / _MARKER_NAME).touch()
        local = self.local_path(name)
        if local is not None:
            return local
        self.check_online(name)
        return Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=self._deletable))


class RemoteShard:
    """A safetensors file on the hub, as a `shard_source.Shard`. Opening it fetches the header; the first read fetches the file."""

    path: Path
    """Where the file will be stored; for messages."""
    size: int
    """Bytes of the file."""
    tensors: dict[str, TensorInfo]
    """The tensors by name, in the order of their bytes."""

    def __init__(self, source: RemoteShards, name: str) -> None:
        self._source, self.name, self.path = source, name, source.storage / name
        self._file: SafetensorsFile | None = None
        self._lock = threading.Lock()
        local = source.local_path(name)
        if local is not None:
            with SafetensorsFile(local) as file:
                self.size, self.tensors = file.size, file.tensors
        else:
            source.check_online(name)
            self.size, read = remote_file(source.repository, name, source.commit)
            self.tensors = parse_header(self.path, self.size, read)[0]

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """As `SafetensorsFile.read`; raises CheckpointError also where the file cannot be fetched, or differs from its header."""
        return self._opened().read(name, into)

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """As `SafetensorsFile.read_rows`; errors as for `read`."""
        return self._opened().read_rows(name, first, count)

    def close(self) -> None:
        """Close the file; the next read fetches and opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _opened(self) -> SafetensorsFile:
        with self._lock:
            if self._file is None:
                self._file = SafetensorsFile(self._source.fetch(self.name))
                if (self._file.size, self._file.tensors) != (self.size, self.tensors):
                    raise CheckpointError(
                        f"{self._file.path}: a fetched shard must have the header that the hub gave before; it differs, so the file is "
                        "damaged. Remove it and continue"
                    )
            return self._file


class _Download:
    """A download in a thread that does not keep the process alive: the hub's client answers Ctrl-C only between two files."""

    def __init__(self, download: Callable[[], Path]) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(download,), daemon=True).start()

    def result(self) -> Path:
        """Wait for the file; raises the download's own error."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise CheckpointError("a shard must be fetched before it is read; the run ended during the download")
        return self._path

    def cancel(self) -> None:
        """End all waits for the file."""
        self._ended.set()

    def _run(self, download: Callable[[], Path]) -> None:
        try:
            self._path = download()
        except BaseException as error:
            self._error = error
        self._ended.set()


def remote_file(repository: str, name: str, commit: str, *, token: str | bool | None = None) -> tuple[int, Callable[[int, int], bytes]]:
    """(bytes of a file on the hub, a function that returns its bytes at (first byte, count)).

    Raises:
        CheckpointError: the hub does not tell the size of the file, or answers a range request otherwise than with the range.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented, but not marked as exported

    url, headers = hf_hub_url(repository, name, revision=commit), build_hf_headers(token=token)
    size = get_hf_file_metadata(url, token=token).size
    if size is None:
        raise CheckpointError(
            f"{repository}: the hub must tell the size of {name}; it does not. Download the repository and give its folder"
        )

    def request(first: int, count: int) -> bytes:
        return _range_of(url, headers, f"{repository}: {name}", first, count) if count else b""

    head = request(0, min(size, _FIRST_REQUEST_BYTES))

    def read(first: int, count: int) -> bytes:
        return head[first : first + count] if first + count <= len(head) else request(first, count)

    return size, read


def _range_of(url: str, headers: Mapping[str, str], label: str, first: int, count: int) -> bytes:
    """Bytes first .. first+count-1 of a file on the hub; a server that sends more is cut short after them.

    Raises:
        CheckpointError: the server does not answer the range request with this range, uncompressed.
    """
    from huggingface_hub import constants, get_session

    wanted = {"range": f"bytes={first}-{first + count - 1}", "accept-encoding": "identity"}
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers={**headers, **wanted}, follow_redirects=True, timeout=seconds) as response:
        response.raise_for_status()
        content_range, encoding = response.headers.get("content-range", ""), response.headers.get("content-encoding", "identity")
        if response.status_code != 206 or not content_range.startswith(f"bytes {first}-") or encoding != "identity":
            answer = f"status {response.status_code}, content-range {content_range!r:.60}, content-encoding {encoding!r:.60}"
            raise CheckpointError(
                f"{label}: the hub, or the mirror or proxy in its place, must answer a request for bytes {first} to {first + count - 1} "
                f"with status 206 and these bytes; found {answer}. Download the repository with `hf download` and give its folder"
            )
        data = bytearray()
        for piece in response.iter_raw():
            data += piece
            if len(data) >= count:
                break
    return bytes(data[:count])
