"""The end of a run: its record, and the small files beside the shards."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbrx_q.checkpoint.folder import INDEX_NAME
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest
from dbrx_q.checkpoint.shards import list_files, shard_name, write_index, write_json
from dbrx_q.checkpoint.transformers_files import guarded, write_code
from dbrx_q.planning.host_memory import peak_memory_bytes
from dbrx_q.quantize.calibration.held_out import HeldOutSequences, SourceDivergence
from dbrx_q.tokenizer.copying import copy_tokenizer

from .journal import Journal
from .model_card import model_card
from .records import HeldOutRecord, RunRecord
from .report import NAME as REPORT_NAME
from .report import write_report
from .request import Run
from .source_digest import digest_of_all, remember_digest

__all__ = ["finish", "record_of"]

_CARD_NAME = "README.md"
_OF_OTHER_PROGRAMS = ("quantize_config.json", "quant_config.json", "quant_log.csv")  # what tools of GPTQ and AWQ say about their formats


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
        stream_errors=_by_layer(notes, "stream_error"),
        expert_tokens=_by_layer(notes, "expert_tokens"),
        expert_tokens_by_source=_by_layer(notes, "expert_tokens_by_source"),
        source_names=[] if run.request.sequences is None else list(run.request.sequences.names),
        held_out=_held_out(run.held_out, notes),
        falls_back=run.request.no_worse_than_rtn,
        rounded_again=_rounded_again(run),
    )


def _rounded_again(run: Run) -> dict[str, int]:
    """How many matrices that are not kept the source stores in each of its quantized formats."""
    labels = Counter(
        run.checkpoint.label_of(job.tensor.name)
        for shard in run.shards
        for job in shard
        if job.fmt is not None and not job.kept and not run.checkpoint.is_plain(job.tensor.name)
    )
    return dict(sorted(labels.items()))


def _held_out(sequences: HeldOutSequences | None, notes: Sequence[Mapping[str, Any]]) -> list[HeldOutRecord]:
    """What the journal notes of each source of which tokens were held out."""
    if sequences is None:
        return []
    errors, (divergences,) = _by_layer(notes, "held_out_errors"), _by_layer(notes, "held_out_divergence").values()
    predicted = sequences.ids.shape[1] - 1
    records = []
    for n, (name, kind, count) in enumerate(zip(sequences.names, sequences.kinds, sequences.counts, strict=True)):
        divergence = SourceDivergence.read(divergences[n])
        layers = {layer: (values[n][0], values[n][1]) for layer, values in sorted(errors.items())}
        records.append(HeldOutRecord(_public_name(name), kind, count, count * predicted, divergence, divergence.hurts, layers))
    return records


def _public_name(name: str) -> str:
    """A source, as `wiki.txt` or `self=copy`, without folders of this machine, which the report and the card do not name."""
    sampler, equals, path = name.partition("=")
    if equals and not Path(name).exists() and Path(path).exists():
        return f"{sampler}={Path(path).resolve().name}"
    return Path(name).name if Path(name).exists() else name


def _by_layer(notes: Sequence[Mapping[str, Any]], name: str) -> dict[int, Any]:
    """The figures of one name in the notes of a journal."""
    return {note[name][0]: note[name][1] for note in notes if name in note}


def finish(run: Run, record: RunRecord, manifest: Manifest, journal: Journal, folder: Path) -> None:
    """Write all files but the shards; this can be repeated. The manifest does not list the report, which names this machine and time."""
    count = len(run.shards)
    weight_map = {part.name: shard_name(n, count) for n, jobs in enumerate(run.shards) for job in jobs for part in job.parts}
    write_index(folder, weight_map, run.plan.bytes_out)
    write_json(folder / "config.json", guarded(run.checkpoint.raw_config | {"quantization_config": run.quantization_config}))
    write_code(folder)
    if run.checkpoint.small_files is None:
        run.checkpoint.write_small_files(folder)
    else:
        _copy_other_files(run.checkpoint.small_files, folder, manifest)
    files = [path.name for path in folder.iterdir()]
    card = model_card(run.request.name or _default_name(run), record.source, run.checkpoint.config, record, files)
    (folder / _CARD_NAME).write_text(card, encoding="utf-8")
    manifest.source = _source_of(run, journal)
    manifest.calibration = list(record.options.get("calibration", {}).get("sources", []))
    list_files(folder, manifest, without=lambda name: name.startswith(REPORT_NAME))
    write_report(folder, record)


def _source_of(run: Run, journal: Journal) -> dict[str, str]:
    """The manifest's entry on the source; without a digest where the journal was begun by a version that noted none."""
    digest = digest_of_all([entry.record.label for entry in journal.entries], [entry.source for entry in journal.entries])
    remember_digest(run.checkpoint, digest)
    commit = {} if run.checkpoint.source is None else {"commit": run.checkpoint.source.commit}
    return ({"sha256": digest} if digest else {}) | commit


def _default_name(run: Run) -> str:
    """As "dbrx-instruct-int4-g64"; where experts have several formats, with the bits per weight of all tensors."""
    experts = sorted({job.format_name.replace(":", "-g") for shard in run.shards for job in shard if job.expert >= 0})
    bits = f"{8 * run.plan.bytes_out / run.plan.parameters:.2f}-bits"
    name = Path(run.request.source or run.checkpoint.folder.name).name.removesuffix(".gguf")
    return f"{name}-{experts[0] if len(experts) == 1 else bits}"


def _copy_other_files(source: Path, folder: Path, manifest: Manifest) -> None:
    """Copy the tokenizer, so that transformers reads the right ids from it too, generation settings and licence."""
    written = {INDEX_NAME, "config.json", MANIFEST_NAME, *manifest.shards, *_OF_OTHER_PROGRAMS}
    for path in sorted(source.iterdir()):
        wanted = path.suffix in (".json", ".jinja", ".tiktoken") or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not path.name.endswith(".index.json") and path.name not in written:
            shutil.copyfile(path, folder / path.name)
    copy_tokenizer(source, folder)
