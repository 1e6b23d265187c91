"""Where a checkpoint of any program is: a path or a hub id becomes a folder or a GGUF file on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbrx_q.checkpoint.gguf_files import gguf_models, holds_only_gguf
from dbrx_q.checkpoint.hub import Download, is_on_hub, resolve_folder
from dbrx_q.checkpoint.hub_gguf import HubGguf, find_gguf
from dbrx_q.errors import CheckpointError

from .gguf_file import is_gguf, open_parts
from .gguf_header import HeaderIncomplete
from .gguf_weights import GgufWeights

__all__ = ["gguf_header", "open_gguf_header", "resolve_location"]

_BY_DEFAULT = Download()
# Bytes that are fetched at first: the header of DBRX's first part takes 5 MB, of which its vocabulary and merges are all but 30 kB.
_FIRST_PART_BYTES, _OTHER_PART_BYTES = 8 << 20, 1 << 18
_LONGEST_HEADER = 1 << 28


def resolve_location(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    fallback: bool = False,
    download: Download = _BY_DEFAULT,
) -> Path:
    """The folder or the GGUF file of a checkpoint; what is on the hub is downloaded into the hub's cache first.

    Args:
        path_or_hub_id: a folder with config.json; a GGUF file, any part of a split one, or a folder that holds one GGUF model and no
            config.json; or on the hub owner/name, owner/name/path/to/file.gguf or owner/name:LABEL, where LABEL is a part of the name of
            one GGUF file, such as Q4_K_M.
        revision, token, fallback, download: as for `resolve_folder`.

    Raises:
        CheckpointError: nothing of the name can be reached, or several GGUF models are meant.
    """
    if not is_on_hub(path_or_hub_id):
        return _local(Path(path_or_hub_id).expanduser())
    model = find_gguf(os.fspath(path_or_hub_id), revision=revision, token=token, download=download)
    if model is not None:
        return model.fetch()
    return resolve_folder(path_or_hub_id, revision=revision, token=token, fallback=fallback, download=download)


@contextmanager
def open_gguf_header(model: HubGguf) -> Iterator[GgufWeights]:
    """A GGUF model on the hub of which only the header is fetched: its weights cannot be read. The cache serves files that it holds.

    Raises:
        CheckpointError: as for `gguf_header` and `GgufWeights`.
        ConfigError: the metadata has a value that no DBRX can have.
    """
    with gguf_header(model) as path, GgufWeights(path) as weights:
        if path != model.cached():
            weights.close()  # the rest of the files is a hole: nothing may read zeros from it
        yield weights


@contextmanager
def gguf_header(model: HubGguf) -> Iterator[Path]:
    """A GGUF file of the hub's cache, or else a temporary one of the full size in which the header alone is stored.

    Raises:
        CheckpointError: as for `HubGguf.fetch_beginnings`, or the header is damaged.
    """
    cached = model.cached()
    if cached is not None:
        yield cached
        return
    lengths = {name: _OTHER_PART_BYTES if number else _FIRST_PART_BYTES for number, name in enumerate(model.files)}
    with tempfile.TemporaryDirectory(prefix="dbrx_q-header-") as folder:
        while True:
            path, fetched = model.fetch_beginnings(Path(folder), lengths)
            try:
                open_parts(path, fetched)
                break
            except HeaderIncomplete as header:
                if header.end > _LONGEST_HEADER:
                    raise CheckpointError(
                        f"{path}: the header of a GGUF file of DBRX takes at most {_LONGEST_HEADER} bytes; found {header.end}. "
                        "The file is damaged or of another model"
                    ) from None
                [name] = [name for name in lengths if Path(name).name == header.name]
                lengths[name] = max(2 * lengths[name], header.end)
        yield path


def _local(path: Path) -> Path:
    """See `resolve_location`."""
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(
                f"{path}: a checkpoint must be a folder with config.json or a GGUF file; found another kind of file. Give the folder that "
                "holds it"
            )
        return path
    files = [entry.name for entry in path.iterdir() if entry.is_file()]
    if not holds_only_gguf(files):
        return path
    models = gguf_models(files)
    if len(models) > 1:
        raise CheckpointError(
            f"{path}: a folder that is opened must hold one checkpoint; found the GGUF models {', '.join(models)}. "
            f"Name one, such as {path / min(models)}"
        )
    return path / next(iter(models))
