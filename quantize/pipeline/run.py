"""From a plain checkpoint to a quantized one, tensor by tensor: the memory it takes does not depend on the size of the model.

What is written lies in `DST.partial` until it is complete, and gets its final name in one step. A run that is killed at any moment is gone
on with from the last finished tensor, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import INDEX_NAME, Checkpoint, ShardSource
from dbrx_q.checkpoint.layout import TensorFormat, unpacked_experts
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest, sha256_of
from dbrx_q.checkpoint.safetensors_file import SafetensorsWriter, read_tensor, safetensors_header
from dbrx_q.checkpoint.staging import MARKER_NAME, check_destination, partial_of, staged_folder
from dbrx_q.errors import CheckpointError, FormatError, RequestError
from dbrx_q.json_file import read_json_object
from dbrx_q.planning.host_memory import peak_memory_bytes, resident_bytes
from dbrx_q.quantize.calibration.calibrated import ORIGINAL, QUANTIZED, Calibration, CalibrationOptions
from dbrx_q.quantize.methods.choose import METHODS, Method
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.workers import Workers

from .accelerator import Accelerator
from .jobs import Job, shards_of
from .journal import Entry, Journal, options_of
from .model_card import model_card
from .plan import RunPlan, plan_run
from .quantizer import Quantizer
from .records import RunRecord
from .report import NAME as REPORT_NAME
from .report import write_report

__all__ = ["QuantizationRequest", "already_there", "plan_checkpoint", "quantize_checkpoint"]

_SHARD_BYTES = 4 << 30
_CARD_NAME = "README.md"
_ACTIVATIONS_NAME = ".calibration"


@dataclass(frozen=True)
class QuantizationRequest:
    """What is to be made, by which the bytes of the result are decided.

    assign_formats: gives the formats of the tensors to pack once the source is open; the others are copied. method: one of
    `methods.METHODS`. sequences: int64 [B, S], the tokens that a calibrated method fits to; the others need none. about: what
    quantization_config shall say of them. options: how they calibrate. accelerator: a GPU that multiplies and rounds, whose results are not
    the CPU's to the last bit. shard_bytes: a shard is closed before it grows past this, unless one
    expert alone is larger. measured: what decides formats that take long to choose; a run that goes on after one with the same takes its
    formats. source, name: what the model card calls the source and the result; its own names unless given.
    """

    assign_formats: Callable[[Checkpoint], Mapping[str, TensorFormat]]
    method: str = "rtn"
    sequences: torch.Tensor | None = None
    about: Mapping[str, Any] | None = None
    options: CalibrationOptions = field(default_factory=CalibrationOptions)
    accelerator: Accelerator | None = None
    shard_bytes: int = _SHARD_BYTES
    measured: Mapping[str, Any] | None = None
    source: str = ""
    name: str = ""


@dataclass(frozen=True)
class _Run:
    """An opened source and what is to become of it."""

    checkpoint: Checkpoint
    request: QuantizationRequest
    method: Method
    formats: dict[str, TensorFormat]
    shards: list[list[Job]]
    sides: tuple[str, ...]
    plan: RunPlan

    @property
    def quantization_config(self) -> dict[str, Any]:
        tensors = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in self.formats.items()}
        rounding: dict[str, Any] = {"rounding": "nearest" if self.request.method == "rtn" else self.request.method}
        if self.request.about:
            rounding["calibration"] = dict(self.request.about)
            changed = {k: v for k, v in asdict(self.request.options).items() if v != getattr(CalibrationOptions(), k)}
            rounding["calibration"] |= changed
        return {"quant_method": "dbrx_q", "format_version": 1, **rounding, "tensors": tensors}

    @property
    def options(self) -> dict[str, Any]:
        """What decides the bytes, for a later run to compare."""
        source = dict(self.checkpoint.sizes) | ({"commit": self.checkpoint.source.commit} if self.checkpoint.source else {})
        ids = self.request.sequences
        return {
            "source": source,
            "config": self.checkpoint.raw_config,
            "quantization_config": self.quantization_config,
            "sequences": None if ids is None else _digest(ids),
            "options": asdict(self.request.options),
            "measured": self.request.measured,
            "accelerator": None if self.request.accelerator is None else [self.request.accelerator.name, self.request.accelerator.memory],
            "shard_bytes": self.request.shard_bytes,
        }


def quantize_checkpoint(
    source: Path | ShardSource,
    destination: Path,
    request: QuantizationRequest,
    *,
    resume: bool = False,
    memory: int | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> RunRecord:
    """Quantize the plain checkpoint in `source`.

    Args:
        source: a folder with a plain checkpoint, or what its shards are fetched from; read lazily.
        destination: a folder that does not exist or is empty.
        request: what is to be made.
        resume: go on with what an earlier run of the same request left unfinished, if one did.
        memory: bytes that this process may take; activations lie in files where they outgrow it. None for no limit.
        on_bytes: called with (bytes of weights that are done, in all).

    Raises:
        CheckpointError: the source is damaged, or already quantized.
        FormatError: some experts without a format, a tensor that its format cannot hold, or a format that the method does
            not make.
        RequestError: a calibrated method without sequences, tokens that the model does not know, too little memory, a destination that is
            not empty, cannot be written, or has too little room; an earlier run's progress without `resume`, or under another request.
    """
    started = time.perf_counter()
    check_destination(destination)
    _check_places(source, destination)
    with ExitStack() as stack:
        run = _open(source, request, memory, stack, partial_of(destination) / MARKER_NAME if resume else None)
        journal: list[Journal] = []

        def keep(error: BaseException) -> bool:
            """What is finished serves a later run, unless that must begin with other formats."""
            return bool(journal and journal[0].entries) and not isinstance(error, FormatError)

        with staged_folder(destination, run.plan.disk, resume=resume, keep=keep) as partial:
            journal.append(Journal(partial / MARKER_NAME, run.options))
            stack.callback(journal[0].close)
            try:
                manifest, finished = _write(run, journal[0], partial, on_bytes)
            except CheckpointError as error:
                if not journal[0].entries:
                    raise
                raise CheckpointError(f"{error}. What is finished is kept in {partial}: --resume goes on") from None
            record = _record(run, journal[0], finished, time.perf_counter() - started)
            _finish(run, record, manifest, partial)
    return record


def plan_checkpoint(source: Path | ShardSource, request: QuantizationRequest, *, memory: int | None = None) -> RunPlan:
    """What `quantize_checkpoint` would do; errors as for that."""
    with ExitStack() as stack:
        return _open(source, request, memory, stack).plan


def already_there(source: Path | ShardSource, destination: Path, request: QuantizationRequest) -> bool:
    """Whether the destination is what this request makes: an earlier run of it was killed after its last step, or not at all."""
    manifest = destination / MANIFEST_NAME
    if not manifest.exists():
        return False
    with ExitStack() as stack:
        run = _open(source, request, None, stack)
        same = read_json_object(destination / "config.json").get("quantization_config") == json.loads(json.dumps(run.quantization_config))
    if same:
        (destination / MARKER_NAME).unlink(missing_ok=True)
    return same


def _open(
    source: Path | ShardSource, request: QuantizationRequest, memory: int | None, stack: ExitStack, begun: Path | None = None
) -> _Run:
    """begun: the journal of an earlier run, if there is one."""
    checkpoint = stack.enter_context(Checkpoint(source))
    if checkpoint.formats:
        raise CheckpointError(f"{checkpoint.folder}: the source must be a plain checkpoint; this one is quantized. Give the original")
    try:
        formats = _measured_before(request, begun) or dict(request.assign_formats(checkpoint))
    except FormatError as error:
        raise FormatError(f"{checkpoint.folder}: {error}") from None
    left = unpacked_experts(checkpoint.config, formats)
    if left:
        raise FormatError(
            f"{checkpoint.folder}: the experts of every layer must be packed; {left[0]} and {len(left) - 1} more have no format"
        )
    method = _method(request.method, formats)
    tokens = 0
    if method.calibrated:
        tokens = _check_sequences(checkpoint, request).numel()
    sides = (QUANTIZED, ORIGINAL) if method.compares else (request.options.activations,)
    shards = shards_of(checkpoint, formats, request.shard_bytes)
    threads, base = torch.get_num_threads(), resident_bytes()
    plan = plan_run(
        checkpoint,
        shards,
        method,
        tokens=tokens,
        sides=len(sides),
        threads=threads,
        base=base,
        memory=memory,
        accelerator=request.accelerator,
    )
    return _Run(checkpoint, request, method, formats, shards, sides, plan)


def _measured_before(request: QuantizationRequest, begun: Path | None) -> dict[str, TensorFormat]:
    """The formats that an earlier run of the same request has measured; empty where there is none."""
    before = options_of(begun) if begun is not None and request.measured is not None else None
    if before is None or before.get("measured") != json.loads(json.dumps(request.measured)):
        return {}
    return {name: TensorFormat(entry["format"], entry["group_size"]) for name, entry in before["quantization_config"]["tensors"].items()}


def _method(name: str, formats: Mapping[str, TensorFormat]) -> Method:
    if name not in METHODS:
        raise RequestError(f"the method must be one of {', '.join(METHODS)}; found {name!r}")
    for fmt in formats.values():
        METHODS[name].check(name, fmt)
    return METHODS[name]


def _check_sequences(checkpoint: Checkpoint, request: QuantizationRequest) -> torch.Tensor:
    sequences, config = request.sequences, checkpoint.config
    if sequences is None or not sequences.numel():
        raise RequestError(
            f"the method {request.method} must have a text to calibrate with; found none. Give --calibration, or choose rtn, clip or hqq"
        )
    if int(sequences.max()) >= config.vocab_size or sequences.shape[1] > config.max_seq_len:
        raise RequestError(
            f"calibration sequences must fit the model: token ids below {config.vocab_size} and at most {config.max_seq_len} tokens; found "
            f"{int(sequences.max())} and {sequences.shape[1]}. Is the tokenizer this model's?"
        )
    return sequences


def _check_places(source: Path | ShardSource, destination: Path) -> None:
    target = destination.resolve()
    source = source if isinstance(source, Path) else source.storage
    if target.is_relative_to(source.resolve()):
        raise RequestError(f"{destination}: the destination must lie outside the source {source}. Give another name")
    partial = partial_of(destination)
    if source.resolve().is_relative_to(partial):
        raise RequestError(f"{destination}: the result is built in {partial}, which must not hold the source {source}. Give another name")


def _write(run: _Run, journal: Journal, partial: Path, on_bytes: Callable[[int, int], None]) -> tuple[Manifest, int]:
    """All shards, from where an earlier run stopped, and how many tensors that one had finished."""
    manifest = Manifest()
    with ExitStack() as stack:
        quantizer = _quantizer(run, partial, stack)
        shards = _Shards(run, journal, partial, manifest)
        stack.callback(shards.abandon)
        finished = shards.keep()
        jobs = [job for shard in run.shards for job in shard]
        replayed = _replayed(run, quantizer, jobs, finished)
        run.checkpoint.expect([job.tensor.name for job in (*replayed, *jobs[finished:])])
        _replay(run, quantizer, partial, replayed)
        done = sum(_bytes_in(run, job) for job in jobs[:finished])
        # Read ahead and written behind by a thread each. With a calibration the matrices would only take its memory.
        reader = stack.enter_context(ThreadPoolExecutor(1))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        if run.checkpoint.source is not None:
            stack.callback(run.checkpoint.source.stop)  # first, so that no thread waits for what is on its way
        ahead = 0 if run.method.calibrated else 1
        written: Future[None] | None = None
        for job, blocks in _read_ahead(quantizer, jobs[finished:], reader, ahead):
            record, notes, parts = quantizer.run(job, blocks)
            if written is not None:
                written.result()
            written = writer.submit(_put_down, run, shards, job, Entry(record, "", notes), parts)
            done += _bytes_in(run, job)
            on_bytes(done, run.plan.bytes_in)
        if written is not None:
            written.result()
        shards.close()
    shutil.rmtree(partial / _ACTIVATIONS_NAME, ignore_errors=True)
    return manifest, finished


def _put_down(run: _Run, shards: _Shards, job: Job, entry: Entry, parts: list[torch.Tensor]) -> None:
    shards.add(job, entry, parts)
    run.checkpoint.done()


def _quantizer(run: _Run, partial: Path, stack: ExitStack) -> Quantizer:
    workers = stack.enter_context(Workers()) if run.method.in_pieces else None
    accelerator = run.request.accelerator
    calibration = None
    if run.method.calibrated and workers is not None:
        assert run.request.sequences is not None
        calibration = Calibration(
            run.checkpoint.config,
            run.request.sequences,
            Products.fastest(workers, run.checkpoint.config.d_model, None if accelerator is None else accelerator.device),
            sides=run.sides,
            options=run.request.options,
            folder=partial / _ACTIVATIONS_NAME,
            in_files=run.plan.in_files,
            squares=run.method.squares,
            kept_tokens=run.plan.kept_tokens if accelerator is None else 0,
        )
        stack.callback(calibration.close)
    return Quantizer(run.checkpoint, run.formats, run.method, calibration, workers, accelerator)


def _replayed(run: _Run, quantizer: Quantizer, jobs: list[Job], finished: int) -> list[Job]:
    """Of the finished tensors those that the calibration must go past again: from its latest snapshot on."""
    if not run.method.calibrated or not 0 < finished < len(jobs):
        return []
    layer = quantizer.restore(quantizer.layer_of(jobs[finished]))
    return [job for job in jobs[:finished] if quantizer.layer_of(job) >= layer]


def _replay(run: _Run, quantizer: Quantizer, partial: Path, jobs: list[Job]) -> None:
    lying = _lying(run, partial) if jobs else {}
    for job in jobs:
        parts = [read_tensor(*lying[part.name]) for part in job.parts] if job.fmt is not None else []
        quantizer.replay(job, quantizer.read(job), parts)
        run.checkpoint.done()


def _read_ahead(quantizer: Quantizer, jobs: list[Job], reader: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Job, list[torch.Tensor]]]:
    if not ahead:
        for job in jobs:
            yield job, quantizer.read(job)
        return
    waiting = [reader.submit(quantizer.read, job) for job in jobs[:ahead]]
    for n, job in enumerate(jobs):
        blocks = waiting.pop(0).result()
        if n + ahead < len(jobs):
            waiting.append(reader.submit(quantizer.read, jobs[n + ahead]))
        yield job, blocks
        del blocks


class _Shards:
    """The files of the result, written in order, with what an earlier run left of them."""

    def __init__(self, run: _Run, journal: Journal, partial: Path, manifest: Manifest) -> None:
        self._run, self._journal, self._partial, self._manifest = run, journal, partial, manifest
        self._number = 0
        self._waiting: list[Job] = []
        self._writer: SafetensorsWriter | None = None

    def keep(self) -> int:
        """Take what is as the journal says; the number of tensors that need not be made again."""
        entries, kept = list(self._journal.entries), 0
        while kept < len(entries):
            job = self._next()
            assert self._writer is not None
            if not self._writer.keep([part.name for part in job.parts], entries[kept].digest):
                break
            self._waiting.pop(0)
            self._manifest.tensors[job.label] = entries[kept].record.statistics
            kept += 1
        self._journal.cut(kept)
        return kept

    def add(self, job: Job, entry: Entry, parts: list[torch.Tensor]) -> None:
        """Write the next tensor's parts, then that it is finished."""
        due = self._next()
        assert due is job, f"{job.label} came where {due.label} is due"
        assert self._writer is not None
        for part, tensor in zip(job.parts, parts, strict=True):
            self._writer.write(part.name, tensor)
        self._waiting.pop(0)
        self._journal.add(Entry(entry.record, self._writer.digest, entry.notes))
        self._manifest.tensors[job.label] = entry.record.statistics

    def close(self) -> None:
        """Close the last file; all tensors have come."""
        assert not self._waiting
        assert self._number == len(self._run.shards)
        self._end()

    def abandon(self) -> None:
        """Let go of an unfinished file."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def _next(self) -> Job:
        if not self._waiting:
            self._end()
            self._waiting = list(self._run.shards[self._number])
            path = self._partial / _shard_name(self._run, self._number)
            self._writer = SafetensorsWriter(path, _tensors_of(self._waiting), reopened=True)
            self._number += 1
        return self._waiting[0]

    def _end(self) -> None:
        if self._writer is not None:
            self._manifest.shards[self._writer.path.name] = {"bytes": self._writer.nbytes, "sha256": self._writer.close()}
            self._writer = None


def _finish(run: _Run, record: RunRecord, manifest: Manifest, partial: Path) -> None:
    """The small files; each can be written again. The report, which tells of this machine and this time, is in no manifest."""
    weight_map = {part.name: _shard_name(run, n) for n, jobs in enumerate(run.shards) for job in jobs for part in job.parts}
    _write_json(partial / INDEX_NAME, {"metadata": {"total_size": run.plan.bytes_out}, "weight_map": weight_map})
    _write_json(partial / "config.json", run.checkpoint.raw_config | {"quantization_config": run.quantization_config})
    _copy_other_files(run.checkpoint.folder, partial, manifest)
    files = [path.name for path in partial.iterdir()]
    card = model_card(run.request.name or _name_of(run), record.source, run.checkpoint.config, record, files)
    (partial / _CARD_NAME).write_text(card, encoding="utf-8")
    for path in sorted(partial.iterdir()):
        if path.name not in manifest.shards and not path.name.startswith((".", REPORT_NAME)) and path.name != MANIFEST_NAME:
            manifest.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(partial / MANIFEST_NAME, manifest.to_dict())
    write_report(partial, record)


def _name_of(run: _Run) -> str:
    """As "dbrx-instruct-int4-g64"; where experts have several formats, by the bits of all tensors."""
    experts = sorted({job.format_name.replace(" ", "-") for shard in run.shards for job in shard if job.expert >= 0})
    bits = f"{8 * run.plan.bytes_out / run.plan.parameters:.2f}-bits"
    return f"{Path(run.request.source or run.checkpoint.folder.name).name}-{experts[0] if len(experts) == 1 else bits}"


def _record(run: _Run, journal: Journal, finished: int, seconds: float) -> RunRecord:
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


def _bytes_in(run: _Run, job: Job) -> int:
    return run.checkpoint.infos[job.tensor.name].nbytes // max(1, job.tensor.experts if job.expert >= 0 else 1)


def _shard_name(run: _Run, number: int) -> str:
    return f"model-{number + 1:05d}-of-{len(run.shards):05d}.safetensors"


def _tensors_of(jobs: list[Job]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(part.name, part.dtype, part.shape) for job in jobs for part in job.parts]


def _lying(run: _Run, partial: Path) -> dict[str, Any]:
    """Where each stored tensor lies: (file, place)."""
    found = {}
    for number, jobs in enumerate(run.shards):
        for name, info in safetensors_header(_tensors_of(jobs))[1].items():
            found[name] = partial / _shard_name(run, number), info
    return found


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def _copy_other_files(source: Path, partial: Path, manifest: Manifest) -> None:
    """Tokenizer, generation settings and licence travel with the weights."""
    made = {INDEX_NAME, "config.json", MANIFEST_NAME, *manifest.shards}
    for path in sorted(source.iterdir()):
        travels = path.suffix in (".json", ".jinja", ".tiktoken") or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and travels and not path.name.endswith(".index.json") and path.name not in made:
            shutil.copyfile(path, partial / path.name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
