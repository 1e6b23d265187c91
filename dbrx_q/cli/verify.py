"""`dbrx-q verify`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options, terminal
from .help import example

if TYPE_CHECKING:
    from dbrx_q.checkpoint.manifest import Manifest

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example("dbrx-q verify dbrx-int4")


def command(
    path: options.Checkpoint,
    json: options.Json = False,
) -> None:
    """Recompute the SHA-256 of every file and compare it with the manifest.

    Exit code 1: a file differs or is missing. Exit code 2: the experts of some layer are not quantized.

    A plain checkpoint, and one of another program, has no manifest. Its headers are checked against config.json, files in the hub's
    cache against the sums that the cache records, and every sum is printed.
    """
    import typer

    from dbrx_q.checkpoint.manifest import Manifest
    from dbrx_q.experts.fallback import FALLBACK_FOLDER
    from dbrx_q.sources.locations import resolve_location

    location = resolve_location(path, fallback=True)
    folder = location if location.is_dir() else location.parent
    manifest = Manifest.read(folder) if location.is_dir() else None
    files = _hashed(folder, _sums_of_plain(location) if manifest is None else _recorded_sums(folder, manifest))
    bad = [entry for entry in files if entry["state"] in ("missing", "differs")]
    if json:
        terminal.print_json({"path": str(folder), "ok": not bad, "files": files})
    else:
        _print(folder, files, bad, has_manifest=manifest is not None)
    if bad:
        raise typer.Exit(1)
    if manifest is not None:
        _check_experts(folder)
        if (folder / FALLBACK_FOLDER).is_dir():
            _check_experts(folder / FALLBACK_FOLDER)


def _sums_of_plain(location: Path) -> dict[str, str | None]:
    """File name to SHA-256 of the weights' files of a checkpoint without a manifest; None where nothing records one."""
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.checkpoint.manifest import MANIFEST_NAME
    from dbrx_q.errors import CheckpointError
    from dbrx_q.sources.open_weights import open_weights

    with open_weights(location) as weights:
        if isinstance(weights, Checkpoint) and weights.formats:
            raise CheckpointError(
                f"{location}: a quantized checkpoint must hold {MANIFEST_NAME}; it is missing. Fetch it or quantize again"
            )
        return {shard.name: _hub_sum(shard) for shard in weights.shards}


def _recorded_sums(folder: Path, manifest: Manifest) -> dict[str, str | None]:
    """File name to SHA-256 of every file that the manifest lists, and those of the fallback copy."""
    from dbrx_q.checkpoint.manifest import MANIFEST_NAME
    from dbrx_q.errors import CheckpointError

    recorded: dict[str, str | None] = {name: str(entry["sha256"]) for name, entry in (manifest.shards | manifest.files).items()}
    unlisted = sorted({shard.name for shard in folder.glob("*.safetensors")} - recorded.keys())
    if unlisted:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: must list every shard; {unlisted[0]} is not in it. Fetch the manifest again")
    return recorded | _fallback_sums(folder)


def _hashed(folder: Path, recorded: dict[str, str | None]) -> list[dict[str, Any]]:
    """Name, state, SHA-256 and recorded SHA-256 of every file."""
    from dbrx_q.checkpoint.manifest import sha256_of

    present = [name for name in recorded if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    files: list[dict[str, Any]] = []
    bytes_done = 0
    with terminal.progress("verifying", unit_bytes=True) as on_bytes:

        def count(n: int) -> None:
            nonlocal bytes_done
            bytes_done += n
            on_bytes(bytes_done, total)

        for name, expected in recorded.items():
            actual = sha256_of(folder / name, count) if name in present else None
            state = "missing" if actual is None else "unrecorded" if expected is None else "ok" if actual == expected else "differs"
            files.append({"name": name, "state": state, "sha256": actual, "expected": expected})
    return files


def _print(folder: Path, files: list[dict[str, Any]], bad: list[dict[str, Any]], *, has_manifest: bool) -> None:
    for entry in files:
        if entry["state"] == "unrecorded":
            print(f"{entry['sha256']}  {entry['name']}")
    for entry in bad:
        terminal.say(f"{folder / entry['name']}: {entry['state']}; expected SHA-256 {entry['expected']}, found {entry['sha256']}")
    if has_manifest:
        print(f"{len(files) - len(bad)} of {len(files)} files are as recorded")
    else:
        print(f"{len(files)} {'file' if len(files) == 1 else 'files'} with weights; there is no manifest")


def _fallback_sums(folder: Path) -> dict[str, str]:
    """The sums of the fallback copy, empty where the checkpoint carries none."""
    from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest
    from dbrx_q.errors import CheckpointError
    from dbrx_q.experts.fallback import FALLBACK_FOLDER

    inner = folder / FALLBACK_FOLDER
    if not inner.is_dir():
        return {}
    manifest = Manifest.read(inner)
    if manifest is None:
        raise CheckpointError(f"{inner}: a fallback copy must hold {MANIFEST_NAME}; it is missing. Fetch it, or quantize it again")
    return {f"{FALLBACK_FOLDER}/{name}": str(entry["sha256"]) for name, entry in (manifest.shards | manifest.files).items()}


def _check_experts(folder: Path) -> None:
    from dbrx_q.checkpoint.layout import tensor_formats, unpacked_experts
    from dbrx_q.config import DbrxConfig
    from dbrx_q.errors import CheckpointError

    config = DbrxConfig.from_pretrained(folder)
    formats = tensor_formats(config, str(folder / "config.json"))
    left = unpacked_experts(config, formats) if formats else []
    if left:
        raise CheckpointError(
            f"{folder}: the experts of every layer must be quantized; {left[0]} and {len(left) - 1} more are not. "
            "Quantize the original again"
        )


def _hub_sum(shard: Path) -> str | None:
    """The SHA-256 by which the hub's cache names a large file; None for a file from elsewhere."""
    blob = shard.resolve().name
    return blob if shard.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None
