"""A checkpoint on the hub whose shards come one by one, while it is worked on: their headers first, each file when it is read.

Everything is of one commit, which is looked up once. Shards go into the hub's own cache and stay there, or, to save disk, into a folder
from which each is deleted as soon as nobody will read it again.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dbrx_q.errors import CheckpointError, RequestError

from .hub import SMALL_FILES, fetched, hub_errors
from .safetensors_file import SafetensorsFile, TensorInfo, parse_header

__all__ = ["RemoteShard", "RemoteShards"]

_HEADER_BYTES = 100_000  # asked for at first: enough for the headers of a model of this size
_CONNECTIONS = 8
_MARKER_NAME = ".dbrx_q-fetched"  # in a folder whose shards are ours to delete


class RemoteShards:
    """The checkpoint of a hub repository, as `checkpoint.ShardSource`.

    Args:
        repository: its id.
        revision: branch, tag or commit; None for the main branch.
        storage: a folder for shards that are deleted after use; None keeps them in the hub's cache.

    Attributes:
        folder: holds the small files.
        commit: the version of all files.
        storage: as given; the hub's cache of the repository otherwise.

    Raises:
        CheckpointError: no repository that can be reached, or one without safetensors.
        RequestError: a storage that holds something else.
    """

    def __init__(self, repository: str, *, revision: str | None = None, storage: Path | None = None) -> None:
        from huggingface_hub import HfApi, snapshot_download

        if storage is not None and storage.exists() and not (storage / _MARKER_NAME).is_file():
            raise RequestError(f"{storage}: what is fetched goes here and is deleted, but this was made by something else. Move it away")
        self.repository, self._own = repository, storage
        with hub_errors(repository):
            self.commit = str(HfApi().model_info(repository, revision=revision or "main").sha)
            small = fetched(lambda: snapshot_download(repository, revision=self.commit, allow_patterns=SMALL_FILES))
        self.folder = Path(small)
        self.storage = storage or self.folder
        self._shards: dict[str, RemoteShard] = {}
        self._expected: list[str] = []
        self._fetches: dict[str, _Fetch] = {}
        self._lock = threading.Lock()

    def open_all(self, names: Sequence[str]) -> Sequence[RemoteShard]:
        """The shards of these file names, by their headers; fetched are only those.

        Raises:
            CheckpointError: a file that is not there, or no safetensors file.
        """
        with hub_errors(self.repository), ThreadPoolExecutor(_CONNECTIONS) as pool:
            self._shards = dict(zip(names, pool.map(lambda name: RemoteShard(self, name), names), strict=True))
        return list(self._shards.values())

    def expect(self, names: Sequence[str]) -> None:
        """Say from which shard each of the next pieces of work reads, in order."""
        with self._lock:
            self._expected = list(names)

    def done(self) -> None:
        """The next piece of work that was expected reads no more: a shard that none of the later ones reads is deleted, if it may be."""
        with self._lock:
            name = self._expected.pop(0)
            last = name not in self._expected
        if last and self._own is not None:
            self._shards[name].close()
            self._fetches.pop(name, None)
            (self._own / name).unlink(missing_ok=True)

    def to_fetch(self, names: Sequence[str]) -> tuple[int, int]:
        """(bytes to fetch for such work, bytes of disk that fetched shards take at most meanwhile); those that are there not counted."""
        missing = [name for name in names if self.lying(name) is None]
        sizes = {name: self._shards[name].size for name in missing}
        order = list(sizes)
        if self._own is None:
            return sum(sizes.values()), sum(sizes.values())
        first = {name: missing.index(name) for name in order}
        last = {name: len(missing) - 1 - missing[::-1].index(name) for name in order}
        most = 0
        for at, name in enumerate(missing):
            ahead = order[order.index(name) + 1 :][:1]
            held = [each for each in order if first[each] <= at <= last[each]]
            most = max(most, sum(sizes[each] for each in {*held, *ahead}))
        return sum(sizes.values()), most

    def stop(self) -> None:
        """Begin no more fetches; one that is under way ends with the process."""
        with self._lock:
            self._expected, fetches, self._fetches = [], list(self._fetches.values()), {}
        for fetch in fetches:
            fetch.give_up()

    def close(self, *, keep: bool) -> None:
        """End the use of it; keep: whether what was fetched to be deleted after use stays for a later run."""
        self.stop()
        if self._own is not None and not keep and (self._own / _MARKER_NAME).is_file():
            shutil.rmtree(self._own, ignore_errors=True)

    def lying(self, name: str) -> Path | None:
        """A shard that need not be fetched: in the hub's cache, or here since an earlier run."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, name, revision=self.commit)
        if isinstance(found, str):
            return Path(found)
        here = None if self._own is None else self._own / name
        return here if here is not None and here.is_file() else None

    def fetch(self, name: str) -> Path:
        """The file of a shard, which this waits for; the one that is expected after it comes meanwhile.

        Raises:
            CheckpointError: it could not be fetched.
        """
        with self._lock:
            later = [each for each in self._expected if each != name]
            needed = self._begun(name)
            ahead = next((each for each in later if each not in self._fetches), None)
        try:
            with hub_errors(self.repository, name):
                path = needed.result()
        except BaseException:
            with self._lock:
                self._fetches.pop(name, None)  # so that it is tried again
            raise
        if ahead is not None:
            with self._lock:
                self._begun(ahead)
        return path

    def _begun(self, name: str) -> _Fetch:
        if name not in self._fetches:
            self._fetches[name] = _Fetch(lambda: self._get(name))
        return self._fetches[name]

    def _get(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        if self._own is not None:
            self._own.mkdir(parents=True, exist_ok=True)
            (self._own / _MARKER_NAME).touch()
        return self.lying(name) or Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=self._own))


class RemoteShard:
    """A safetensors file on the hub, as `SafetensorsFile`; its header is read at once, the file fetched when a tensor is.

    Attributes:
        path: where the file will lie, for messages.
        size: its bytes.
        tensors: name to `TensorInfo`, in the order of the file.
    """

    def __init__(self, source: RemoteShards, name: str) -> None:
        self._source, self.name, self.path = source, name, source.storage / name
        self.size: int
        self.tensors: dict[str, TensorInfo]
        self._file: SafetensorsFile | None = None
        self._lock = threading.Lock()
        lying = source.lying(name)
        if lying is not None:
            with SafetensorsFile(lying) as file:
                self.size, self.tensors = file.size, file.tensors
        else:
            self.size, read = _remote(source.repository, name, source.commit)
            self.tensors = parse_header(self.path, self.size, read)[0]

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """As `SafetensorsFile.read`; also a CheckpointError where the file cannot be fetched, or is not what its header said."""
        return self._opened().read(name, into)

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """As `SafetensorsFile.read_rows`; errors as for `read`."""
        return self._opened().read_rows(name, first, count)

    def close(self) -> None:
        """Close the file; reading fetches and opens it again."""
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
                        f"{self._file.path}: must hold what its header on the hub said; it is damaged. Remove it and go on"
                    )
            return self._file


class _Fetch:
    """A file on its way, by a thread that the process does not wait for: the client itself answers Ctrl-C only when a file has come."""

    def __init__(self, get: Callable[[], Path]) -> None:
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(get,), daemon=True).start()

    def result(self) -> Path:
        """The file; raises what fetching it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise CheckpointError("a shard must have come before it is read; the run was ended while it was on its way")
        return self._path

    def give_up(self) -> None:
        """Let nobody wait any longer."""
        self._ended.set()

    def _run(self, get: Callable[[], Path]) -> None:
        try:
            self._path = get()
        except BaseException as error:
            self._error = error
        self._ended.set()


def _remote(repository: str, name: str, commit: str) -> tuple[int, Callable[[int, int], bytes]]:
    """(bytes of a file, a function that gives some at (first byte, how many))."""
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented, but not marked as exported

    url, headers = hf_hub_url(repository, name, revision=commit), build_hf_headers()
    size = get_hf_file_metadata(url).size
    if size is None:
        raise CheckpointError(
            f"{repository}: the hub must tell the size of {name}; it does not. Download the repository and give its folder"
        )

    def ask(first: int, count: int) -> bytes:
        response = get_session().get(url, headers=headers | {"range": f"bytes={first}-{first + count - 1}"}, follow_redirects=True)
        response.raise_for_status()
        return bytes(response.content[:count])

    begin = ask(0, min(size, _HEADER_BYTES))

    def read(first: int, count: int) -> bytes:
        return begin[first : first + count] if first + count <= len(begin) else ask(first, count)

    return size, read
