"""`dbrx-q verify`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import output

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q verify dbrx-int4")


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a hub id.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Recompute the SHA-256 of every file and compare; exit code 1 where one differs, 2 where experts of some layer are not quantized.

    A plain checkpoint has no manifest: its headers are checked against config.json, its shards against the sums that the hub's cache
    keeps, where it came from there, and every sum is printed.
    """
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.checkpoint.hub import resolve_folder
    from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
    from dbrx_q.errors import CheckpointError
    from dbrx_q.experts.fallback import FALLBACK_FOLDER

    folder = resolve_folder(path, fallback=True)
    manifest = Manifest.read(folder)
    if manifest is None:
        with Checkpoint(folder) as checkpoint:
            if checkpoint.formats:
                raise CheckpointError(
                    f"{folder}: a quantized checkpoint must hold {MANIFEST_NAME}; it is missing. Fetch it or quantize again"
                )
            recorded = {shard.name: _hub_sum(shard) for shard in checkpoint.shards}
    else:
        recorded = {name: str(entry["sha256"]) for name, entry in (manifest.shards | manifest.files).items()}
        unlisted = sorted({shard.name for shard in folder.glob("*.safetensors")} - recorded.keys())
        if unlisted:
            raise CheckpointError(f"{folder / MANIFEST_NAME}: must list every shard; {unlisted[0]} is not in it. Fetch the manifest again")
        recorded |= _of_fallback(folder)
    present = [name for name in recorded if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in present)
    files: list[dict[str, Any]] = []
    done = 0
    with output.progress("verifying", unit_bytes=True) as on_bytes:
        for name, expected in recorded.items():

            def count(n: int) -> None:
                nonlocal done
                done += n
                on_bytes(done, total)

            found = sha256_of(folder / name, count) if name in present else None
            state = "missing" if found is None else "unrecorded" if expected is None else "ok" if found == expected else "differs"
            files.append({"name": name, "state": state, "sha256": found, "expected": expected})
    bad = [entry for entry in files if entry["state"] in ("missing", "differs")]
    if json:
        output.print_json({"path": str(folder), "ok": not bad, "files": files})
    else:
        for entry in files:
            if entry["state"] == "unrecorded":
                print(f"{entry['sha256']}  {entry['name']}")
        for entry in bad:
            where = folder / entry["name"]
            print(f"{where}: {entry['state']}; expected SHA-256 {entry['expected']}, found {entry['sha256']}", file=sys.stderr)
        print(
            f"{len(files) - len(bad)} of {len(files)} files are as recorded"
            if manifest
            else f"{len(files)} shards; the folder has no manifest"
        )
    if bad:
        raise typer.Exit(1)
    if manifest is not None:
        _check_experts(folder)
        if (folder / FALLBACK_FOLDER).is_dir():
            _check_experts(folder / FALLBACK_FOLDER)


def _of_fallback(folder: Path) -> dict[str, str]:
    """The sums of the fallback copy that a checkpoint carries, if it does."""
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
    """The hub's cache names a large file by its SHA-256 and links to it."""
    blob = shard.resolve().name
    return blob if shard.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None
