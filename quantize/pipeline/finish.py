"""The end of a run: its record, and the small files beside the shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbrx_q.checkpoint.folder import INDEX_NAME
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.checkpoint.transformers_files import guarded, write_code
from dbrx_q.planning.host_memory import peak_memory_bytes

from .journal import Journal
from .model_card import model_card
from .records import RunRecord
from .report import NAME as REPORT_NAME
from .report import write_report
from .request import Run
from .shards import shard_name

__all__ = ["finish", "record_of"]

_CARD_NAME = "README.md"


def record_of(run: Run, journal: Journal, finished: int, seconds: float) -> RunRecord:
    """The record of a run, of which all tensors are in the journal.

    Args:
        run: that was made.
        journal: its entries.
        finished: how many of them earlier runs made.
        seconds: that this run took.
    """
    records = [entry.record for entry in journal.entries]
    notes = [entry.notes for entry in journal.entries]
    accelerator = run.request.accelerator
    return RunRecord(
        source=run.request.source or str(run.checkpoint.folder),
        method=run.request.method,
        options=run.quantization_config,
        bytes_in=run.plan.bytes_in,
        bytes_out=run.plan.bytes_out,
        parameters=run.plan.parameters,
        shards=len(run.shards),
        records=records,
        seconds=seconds,
        resumed_seconds=sum(record.seconds for record in records[:finished]),
        peak_memory_bytes=peak_memory_bytes(),
        device="cpu" if accelerator is None else accelerator.name,
        peak_device_bytes=0 if accelerator is None else accelerator.peak_bytes,
        stream_errors={note["stream_error"][0]: note["stream_error"][1] for note in notes if "stream_error" in note},
        expert_tokens={note["expert_tokens"][0]: note["expert_tokens"][1] for note in notes if "expert_tokens" in note},
    )


def finish(run: Run, record: RunRecord, manifest: Manifest, folder: Path) -> None:
    """Write all files but the shards; this can be repeated. The manifest does not list the report, which names this machine and time."""
    weight_map = {part.name: shard_name(run.shards, n) for n, jobs in enumerate(run.shards) for job in jobs for part in job.parts}
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": run.plan.bytes_out}, "weight_map": weight_map})
    _write_json(folder / "config.json", guarded(run.checkpoint.raw_config | {"quantization_config": run.quantization_config}))
    write_code(folder)
    _copy_other_files(run.checkpoint.folder, folder, manifest)
    files = [path.name for path in folder.iterdir()]
    card = model_card(run.request.name or _default_name(run), record.source, run.checkpoint.config, record, files)
    (folder / _CARD_NAME).write_text(card, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        if path.name not in manifest.shards and not path.name.startswith((".", REPORT_NAME)) and path.name != MANIFEST_NAME:
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(folder / MANIFEST_NAME, manifest.to_dict())
    write_report(folder, record)


def _default_name(run: Run) -> str:
    """As "dbrx-instruct-int4-g64"; where experts have several formats, with the bits per weight of all tensors."""
    experts = sorted({job.format_name.replace(":", "-g") for shard in run.shards for job in shard if job.expert >= 0})
    bits = f"{8 * run.plan.bytes_out / run.plan.parameters:.2f}-bits"
    return f"{Path(run.request.source or run.checkpoint.folder.name).name}-{experts[0] if len(experts) == 1 else bits}"


def _copy_other_files(source: Path, folder: Path, manifest: Manifest) -> None:
    """Copy the tokenizer, generation settings and licence."""
    written = {INDEX_NAME, "config.json", MANIFEST_NAME, *manifest.shards}
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".tiktoken") or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not path.name.endswith(".index.json") and path.name not in written:
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
