"""From a checkpoint of any program to a quantized one, tensor by tensor, in memory that does not depend on the size of the model.

The result is built in `DST.partial` and renamed to `DST` when it is complete. A run that is killed at any moment can be resumed from the
last finished tensor, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest
from dbrx_q.checkpoint.safetensors_file import read_tensor
from dbrx_q.checkpoint.shard_source import ShardSource
from dbrx_q.checkpoint.staging import MARKER_NAME, check_destination, partial_of, staged_folder
from dbrx_q.errors import CheckpointError, FormatError, RequestError
from dbrx_q.json_file import read_json_object
from dbrx_q.planning.cpu_quota import bound_threads
from dbrx_q.quantize.calibration.calibrated import Calibration
from dbrx_q.quantize.calibration.held_out import NEAREST, HeldOutForward
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.workers import Workers

from .finish import finish, record_of
from .guard import Guard
from .jobs import Job, read_blocks
from .journal import Entry, Journal
from .plan import RunPlan
from .quantizer import Quantizer
from .records import RunRecord
from .request import QuantizationRequest, Run, open_run
from .shards import ShardFiles, part_locations
from .source_digest import check_source, digest_of_blocks, source_digest, source_files

__all__ = ["QuantizationRequest", "already_there", "check_places", "plan_checkpoint", "quantize_checkpoint"]

_ACTIVATIONS_NAME = ".calibration"


def quantize_checkpoint(
    source: Path | ShardSource,
    destination: Path,
    request: QuantizationRequest,
    *,
    resume: bool = False,
    memory: int | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> RunRecord:
    """Quantize the checkpoint in `source`.

    Args:
        source: a folder, a GGUF file, or a remote source that fetches its shards, in any layout that `sources` reads; read lazily.
        destination: a folder that does not exist or is empty.
        request: what to make.
        resume: continue an unfinished run of the same request, if there is one.
        memory: bytes that this process may take; activations are stored in files where they would exceed it. None for no limit.
        on_bytes: called with (bytes of weights that are done, bytes in all).

    Raises:
        CheckpointError: the source is damaged, or quantized by dbrx_q already.
        FormatError: some experts have no format, or a tensor has a format that cannot hold it or that the method does not make.
        RequestError: a calibrated method without sequences, tokens that the model does not know, too little memory, a destination that is
            not empty, cannot be written, or has too little room; an unfinished run without `resume`, or one of another request.
    """
    started = time.perf_counter()
    bound_threads()
    check_destination(destination)
    check_places(source, destination)
    with ExitStack() as stack:
        run = open_run(source, request, memory, stack, partial_of(destination) / MARKER_NAME if resume else None)
        journal: list[Journal] = []

        def keep(error: BaseException) -> bool:
            """Whether a later run can use the finished tensors: not if it must begin with other formats."""
            return bool(journal and journal[0].entries) and not isinstance(error, FormatError)

        with staged_folder(destination, run.plan.disk, resume=resume, keep=keep) as partial:
            journal.append(Journal(partial / MARKER_NAME, run.options, source_files(run.checkpoint)))
            stack.callback(journal[0].close)
            try:
                manifest, finished = _write_shards(run, journal[0], partial, on_bytes)
            except CheckpointError as error:
                if not journal[0].entries:
                    raise
                raise CheckpointError(f"{error}. The finished tensors are kept in {partial}: --resume continues from there") from None
            record = record_of(run, journal[0], finished, time.perf_counter() - started)
            finish(run, record, manifest, journal[0], partial)
    return record


def plan_checkpoint(source: Path | ShardSource, request: QuantizationRequest, *, memory: int | None = None) -> RunPlan:
    """The plan that `quantize_checkpoint` would follow; it raises the same errors."""
    with ExitStack() as stack:
        return open_run(source, request, memory, stack).plan


def already_there(source: Path | ShardSource, destination: Path, request: QuantizationRequest) -> bool:
    """Whether the destination is the complete result of this request, so that nothing is left to resume.

    Raises:
        RequestError: it is the result of the same request for another checkpoint.
    """
    manifest = destination / MANIFEST_NAME
    if not manifest.exists():
        return False
    with ExitStack() as stack:
        run = open_run(source, request, None, stack)
        same = read_json_object(destination / "config.json").get("quantization_config") == json.loads(json.dumps(run.quantization_config))
        if same:
            _check_made_of(run, destination)
    if same:
        (destination / MARKER_NAME).unlink(missing_ok=True)  # left by a run that was killed after its last step
    return same


def _check_made_of(run: Run, destination: Path) -> None:
    """Refuse a complete result of another source; manifests of versions that did not note the source are accepted.

    Raises:
        RequestError: with both digests.
    """
    manifest = Manifest.read(destination) or Manifest()
    recorded, remote = manifest.source.get("sha256"), run.checkpoint.source
    if recorded is None or (remote is not None and manifest.source.get("commit") == remote.commit):
        return
    found = source_digest(run.checkpoint, [job for shard in run.shards for job in shard], lambda job: read_blocks(run.checkpoint, job))
    if found != recorded:
        raise RequestError(
            f"{destination}: --resume finds a complete result, which must be of the checkpoint that is given; it was made of one with the "
            f"SHA-256 {recorded}, and {run.checkpoint.folder} has {found}. Give that checkpoint, or another destination"
        )


def check_places(source: Path | ShardSource, destination: Path) -> None:
    """Refuse a destination within the source, and a source within the folder in which the result is built.

    Raises:
        RequestError: names both.
    """
    folder = source if isinstance(source, Path) else source.storage
    if destination.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"{destination}: the destination must be outside the source {folder}. Give another name")
    partial = partial_of(destination)
    if folder.resolve().is_relative_to(partial):
        raise RequestError(f"{destination}: the result is built in {partial}, which must not hold the source {folder}. Give another name")


def _write_shards(run: Run, journal: Journal, partial: Path, on_bytes: Callable[[int, int], None]) -> tuple[Manifest, int]:
    """Write all shards, from where an earlier run stopped; returns their manifest and the number of tensors that run had finished."""
    manifest = Manifest()
    with ExitStack() as stack:
        quantizer = _quantizer(run, partial, stack)
        shards = ShardFiles(run.shards, journal, partial, manifest)
        stack.callback(shards.abandon)
        finished = shards.keep_finished()
        jobs = [job for shard in run.shards for job in shard]
        check_source(run.checkpoint, jobs[:finished], journal.entries, journal.files, partial, quantizer.read)
        replayed = _jobs_to_replay(run, quantizer, jobs, finished)
        run.checkpoint.expect([job.tensor.name for job in (*replayed, *jobs[finished:])])
        _replay(run, quantizer, partial, replayed)
        bytes_done = sum(run.bytes_in(job) for job in jobs[:finished])
        # One thread reads the next matrix and another writes the last one. A run with tokens reads no matrix ahead: it needs the memory.
        reader = stack.enter_context(ThreadPoolExecutor(1))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        if run.checkpoint.source is not None:
            stack.callback(run.checkpoint.source.stop)  # before the threads are joined: the reader may wait for a download
        ahead = 0 if quantizer.runs_tokens else 1
        written: Future[None] | None = None
        for job, blocks, digest in _read_ahead(quantizer, jobs[finished:], reader, ahead):
            record, notes, parts = quantizer.run(job, blocks)
            if written is not None:
                written.result()
            written = writer.submit(_write_parts, run, shards, job, Entry(record, "", notes, digest), parts)
            bytes_done += run.bytes_in(job)
            on_bytes(bytes_done, run.plan.bytes_in)
        if written is not None:
            written.result()
        shards.close()
    shutil.rmtree(partial / _ACTIVATIONS_NAME, ignore_errors=True)
    return manifest, finished


def _quantizer(run: Run, partial: Path, stack: ExitStack) -> Quantizer:
    in_pieces = run.method.in_pieces or any(map(run.method.takes_pieces, run.formats.values()))
    workers = stack.enter_context(Workers()) if in_pieces or run.held_out is not None else None
    accelerator = run.request.accelerator
    calibration, guard, config, folder = None, None, run.checkpoint.config, partial / _ACTIVATIONS_NAME
    if workers is not None and (run.method.calibrated or run.held_out is not None):
        products = Products.fastest(workers, config.d_model, None if accelerator is None else accelerator.device)
        if run.method.calibrated:
            assert run.request.sequences is not None
            calibration = Calibration(
                config,
                run.request.sequences,
                products,
                models=run.models,
                options=run.request.options,
                folder=folder,
                in_files=run.plan.in_files,
                squares=run.method.squares,
                shrinks=run.method.shrinks,
                kept_tokens=run.plan.kept_tokens if accelerator is None else 0,
            )
            stack.callback(calibration.close)
        if run.held_out is not None:
            nearest = run.request.method != NEAREST
            forward = HeldOutForward(config, run.held_out, products, nearest=nearest, folder=folder, in_files=run.plan.in_files)
            stack.callback(forward.close)
            guard = Guard(forward, workers, nearest=nearest, falls_back=run.request.no_worse_than_rtn)
    return Quantizer(run.checkpoint, run.formats, run.method, calibration, workers, accelerator, guard)


def _jobs_to_replay(run: Run, quantizer: Quantizer, jobs: list[Job], finished: int) -> list[Job]:
    """The finished tensors that the tokens must run through again: those after the latest snapshot of the activations."""
    if not quantizer.runs_tokens or not 0 < finished < len(jobs):
        return []
    layer = quantizer.restore(quantizer.layer_of(jobs[finished]))
    return [job for job in jobs[:finished] if quantizer.layer_of(job) >= layer]


def _replay(run: Run, quantizer: Quantizer, partial: Path, jobs: list[Job]) -> None:
    locations = part_locations(run.shards, partial) if jobs else {}
    for job in jobs:
        parts = [read_tensor(*locations[part.name]) for part in job.parts] if job.fmt is not None else []
        quantizer.replay(job, quantizer.read(job), parts)
        run.checkpoint.done()


def _read_ahead(
    quantizer: Quantizer, jobs: list[Job], reader: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Job, list[torch.Tensor], str]]:
    """Each job with its matrix in blocks of rows, read `ahead` jobs before it is needed, and the SHA-256 of the matrix."""

    def read(job: Job) -> tuple[list[torch.Tensor], str]:
        blocks = quantizer.read(job)
        return blocks, digest_of_blocks(blocks)

    if not ahead:
        for job in jobs:
            yield job, *read(job)
        return
    waiting = [reader.submit(read, job) for job in jobs[:ahead]]
    for n, job in enumerate(jobs):
        blocks, digest = waiting.pop(0).result()
        if n + ahead < len(jobs):
            waiting.append(reader.submit(read, jobs[n + ahead]))
        yield job, blocks, digest
        del blocks  # frees the matrix before the next one is awaited


def _write_parts(run: Run, shards: ShardFiles, job: Job, entry: Entry, parts: list[torch.Tensor]) -> None:
    shards.add(job, entry, parts)
    run.checkpoint.done()
