"""`dbrx-q quantize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dbrx_q.planning.sizes import format_size, parse_size

from . import output

if TYPE_CHECKING:
    import torch

    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.checkpoint.remote_shards import RemoteShards
    from dbrx_q.quantize.pipeline.accelerator import Accelerator
    from dbrx_q.quantize.pipeline.plan import RunPlan
    from dbrx_q.quantize.pipeline.records import RunRecord

__all__ = ["EXAMPLE", "command"]

_FREE_SHARE = 4  # fifths of the memory that is free
EXAMPLE = output.example("dbrx-q quantize databricks/dbrx-instruct dbrx-int4 --format int4 --group-size 64")


class FormatName(str, Enum):
    """Formats for the experts."""

    int4 = "int4"
    int8 = "int8"
    nf4 = "nf4"
    nf4_double = "nf4-double"


class MethodName(str, Enum):
    """Quantization methods; the last three are calibrated with a text."""

    rtn = "rtn"
    clip = "clip"
    hqq = "hqq"
    awq = "awq"
    gptq = "gptq"
    best = "best"


class ActivationsFrom(str, Enum):
    """Whose activations enter a layer that is calibrated."""

    quantized = "quantized"
    original = "original"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint to quantize: a folder or a hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    format: Annotated[FormatName, typer.Option(help="Format of the experts; embedding, attention and head become int8.")] = FormatName.int4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128; nf4 and nf4-double have 64 alone.")] = 64,
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Another format for some tensors, as w2=int8:64 or blocks.0-3.experts=int4:32 or head=plain; repeatable, later rules win.",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Bits per weight of the whole checkpoint, for which every tensor gets the format that costs least; with --calibration.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        MethodName,
        typer.Option(help="Quantization method: rtn rounds to nearest, clip and hqq search ranges; awq, gptq and best take --calibration."),
    ] = MethodName.rtn,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to calibrate with: text, JSONL, either gzipped, or wikitext2 or c4.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate with; fewer where the text is shorter.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the draw of sequences from the text.")] = 0,
    activations: Annotated[
        ActivationsFrom, typer.Option(help="Whose activations enter a layer: of the layers before it as quantized, or as they were.")
    ] = ActivationsFrom.quantized,
    all_experts: Annotated[
        bool, typer.Option(help="Calibrate every expert with all tokens, not with those that are routed to it.")
    ] = False,
    act_order: Annotated[bool, typer.Option(help="Round the columns with the largest inputs first (gptq, best).")] = True,
    fallback_format: Annotated[
        FormatName | None,
        typer.Option(
            help="Also write a fallback copy, by the same method, for `--fallback`; it lies in DST/fallback and is a checkpoint by itself.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Host memory that may be used, as 24GiB; four fifths of what is free unless given.", show_default=False),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda or cuda:N to multiply and round on a GPU; what does not fit there is done by the CPU.")
    ] = "cpu",
    device_memory: Annotated[
        str | None,
        typer.Option(help="GPU memory that may be used, as 20GiB; nine tenths of what it has unless given.", show_default=False),
    ] = None,
    low_disk: Annotated[
        bool, typer.Option(help="Delete each shard from the hub as soon as it was used; --target-bpw then fetches all of them twice.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Repository on the hub to upload the result to; made if need be.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option(help="Make that repository public; private unless given.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where the same command was interrupted or killed.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be written and what it would take, and stop.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Write a quantized copy of a checkpoint; what was finished when it is interrupted or killed is kept for --resume."""
    from dataclasses import replace

    from dbrx_q.checkpoint.hub import check_push
    from dbrx_q.checkpoint.hub import push as upload
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.checkpoint.staging import partial_of
    from dbrx_q.errors import RequestError
    from dbrx_q.experts.fallback import FALLBACK_FOLDER
    from dbrx_q.planning.host_memory import available_bytes
    from dbrx_q.quantize.calibration.calibrated import CalibrationOptions
    from dbrx_q.quantize.methods.choose import METHODS
    from dbrx_q.quantize.pipeline.accelerator import open_accelerator
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, already_there, plan_checkpoint, quantize_checkpoint

    chosen = METHODS[method.value]
    if calibration is not None and not chosen.calibrated and target_bpw is None:
        raise RequestError(f"the method {method.value} takes no calibration; found {calibration!r}. Leave --calibration out, or name best")
    if chosen.compares and activations is ActivationsFrom.original:
        raise RequestError(f"the method {method.value} must see the quantized model's activations; found --activations original. Name gptq")
    accelerator = open_accelerator(device, None if device_memory is None else parse_size(device_memory))
    if public and push is None:
        raise RequestError("--public says how a repository is made that --push names; found no --push. Add it, or leave --public out")
    place = _opened(source, revision, partial_of(destination).with_suffix(".source") if low_disk else None)
    folder = place if isinstance(place, Path) else place.folder
    if push is not None and not dry_run:
        check_push(push, private=not public)
    tokens, about = _calibration(folder, calibration, sequences, length, seed)
    request = QuantizationRequest(
        _formats(TensorFormat(format.value, group_size), tensor or [], target_bpw, tokens, fallback_format),
        method=method.value,
        source=source,
        name=push or "",
        measured=None if target_bpw is None else {"target_bpw": target_bpw, "rules": tensor or [], "calibration": about},
        sequences=tokens,
        about=about,
        options=CalibrationOptions(activations=activations.value, all_experts=all_experts, act_order=act_order),
        accelerator=accelerator,
    )
    requests = [(destination, request)]
    if fallback_format is not None:
        small = _formats(TensorFormat(fallback_format.value, 64), [], None, None)
        other = replace(request, assign_formats=small, measured=None, name="")
        if not chosen.calibrated:  # the text was for --target-bpw
            other = replace(other, sequences=None, about=None)
        requests.append((destination / FALLBACK_FOLDER, other))
    budget = parse_size(memory) if memory is not None else _FREE_SHARE * available_bytes() // 5
    runs: dict[Path, RunRecord] = {}
    try:
        if dry_run:
            _show_plans([plan_checkpoint(place, some, memory=budget) for _, some in requests], accelerator, json=json)
            return
        for folder, some in requests:
            if resume and already_there(place, folder, some):
                output.stderr().print(f"{folder} is complete already", markup=False, soft_wrap=True)
                continue
            with output.progress("quantizing", unit_bytes=True) as on_bytes:
                runs[folder] = quantize_checkpoint(place, folder, some, resume=resume, memory=budget, on_bytes=on_bytes)
    except KeyboardInterrupt:
        left = [partial_of(folder) for folder, _ in requests if partial_of(folder).exists()]
        if not left:
            raise
        message = f"interrupted; what is finished is kept in {left[0]}, and the same command with --resume goes on from there"
        output.stderr().print(f"dbrx-q: error: {message}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        if not isinstance(place, Path):
            place.close(keep=any(partial_of(folder).exists() for folder, _ in requests))
    _show_runs(runs, json=json)
    if push is not None:
        output.stderr().print(f"uploading {destination} to {push}", markup=False, soft_wrap=True)
        output.stderr().print(f"uploaded: {upload(destination, push)}", markup=False, soft_wrap=True)


def _opened(source: str, revision: str | None, storage: Path | None) -> Path | RemoteShards:
    """A folder, or a repository of which no weights have been fetched.

    Raises:
        RequestError: a folder whose files shall be deleted.
    """
    from dbrx_q.checkpoint.hub import is_on_hub, resolve_folder
    from dbrx_q.checkpoint.remote_shards import RemoteShards
    from dbrx_q.errors import RequestError

    if is_on_hub(source):
        return RemoteShards(source, revision=revision, storage=storage)
    if storage is not None:
        raise RequestError(f"--low-disk deletes what was fetched from the hub; found the folder {source}, whose files stay. Leave it out")
    return resolve_folder(source)


def _formats(
    experts: TensorFormat,
    rules: Sequence[str],
    target: float | None,
    tokens: torch.Tensor | None,
    fallback_format: FormatName | None = None,
) -> Callable[[Checkpoint], dict[str, TensorFormat]]:
    """The formats of a checkpoint's tensors, by the options; those of the fallback copy that it is to carry must be smaller.

    Raises:
        RequestError: a target without a text to measure errors with.
    """
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.errors import RequestError
    from dbrx_q.experts.fallback import check_fallback
    from dbrx_q.quantize.pipeline.format_assignment import allocated_formats, default_formats, override

    def checked(checkpoint: Checkpoint, formats: dict[str, TensorFormat]) -> dict[str, TensorFormat]:
        if fallback_format is not None:
            check_fallback(
                checkpoint.config, formats, default_formats(checkpoint.config, TensorFormat(fallback_format.value, 64)), "--fallback-format"
            )
        return formats

    if target is None:
        return lambda checkpoint: checked(checkpoint, override(default_formats(checkpoint.config, experts), checkpoint.config, rules))
    if tokens is None:
        raise RequestError("--target-bpw measures errors on a text; found none. Give --calibration FILE")

    def allocated(checkpoint: Checkpoint) -> dict[str, TensorFormat]:
        with output.progress("measuring errors") as on_layer:
            return checked(checkpoint, allocated_formats(checkpoint, tokens, target, rules=rules, on_layer=on_layer))

    return allocated


def _calibration(folder: Path, text: str | None, count: int, length: int, seed: int) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    """(the sequences, what is said of them in config.json) for a text; nothing without one."""
    if text is None:
        return None, None
    from dbrx_q.eval.texts import load_text
    from dbrx_q.quantize.calibration.sequences import sequences_of
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    loaded = load_text(text)
    found = sequences_of(DbrxTokenizer.from_pretrained(folder).encode(loaded.text), count=count, length=length, seed=seed)
    return found, {"text_sha256": loaded.sha256, "sequences": len(found), "length": length, "seed": seed}


def _show_plans(plans: Sequence[RunPlan], accelerator: Accelerator | None, *, json: bool) -> None:
    """Of the checkpoint, and of the fallback copy that it is to carry."""
    from dataclasses import asdict

    from dbrx_q.quantize.pipeline.plan import seconds_of

    seconds = [seconds_of(plan) for plan in plans]
    bits = [8 * plan.bytes_out / plan.parameters for plan in plans]
    if json:
        shown = [
            asdict(plan) | {"peak_memory": plan.peak_memory, "bits_per_weight_out": each, "seconds": time}
            for plan, each, time in zip(plans, bits, seconds, strict=True)
        ]
        output.print_json(shown[0] | ({"fallback": shown[1]} if shown[1:] else {}))
        return
    for n, plan in enumerate(plans):
        if n:
            print("\nfallback copy:")
        _show_plan(plan, accelerator, bits[n], seconds[n])


def _show_plan(plan: RunPlan, accelerator: Accelerator | None, bits: float, seconds: float) -> None:
    print(f"reads       {format_size(plan.bytes_in):>10}  {8 * plan.bytes_in / plan.parameters:6.3f} bits per weight")
    print(f"writes      {format_size(plan.bytes_out):>10}  {bits:6.3f} bits per weight")
    for kind, each in plan.bits.items():
        print(f"  {kind:22}{each:6.3f} bits per weight")
    where = "in files" if plan.in_files else "in memory"
    print(
        f"memory      {format_size(plan.peak_memory):>10}  at most"
        + (f", activations of {format_size(plan.activations)} {where}" if plan.activations else "")
    )
    if accelerator is not None:
        where = f"at most on {accelerator.name}, which rounds {plan.accelerated:,} of {plan.matrices:,} matrices"
        print(f"GPU memory  {format_size(accelerator.memory):>10}  {where}")
    if plan.fetch:
        print(f"downloads   {format_size(plan.fetch):>10}  which take at most {format_size(plan.fetch_disk)} of disk at a time")
    print(f"disk        {format_size(plan.disk):>10}  must be free where it is written")
    print(f"time        {_duration(seconds):>10}  about, by the speed that this machine just showed")


def _show_runs(runs: dict[Path, RunRecord], *, json: bool) -> None:
    """Of the checkpoint, and of its fallback copy, where they were made."""
    if json and runs:
        first, *rest = (_as_dict(run, folder) for folder, run in runs.items())
        output.print_json(first | ({"fallback": rest[0]} if rest else {}))
        return
    for folder, run in runs.items():
        _show_run(run, folder)


def _as_dict(run: RunRecord, destination: Path) -> dict[str, Any]:
    return {
        "source": run.source,
        "destination": str(destination),
        "method": run.method,
        "calibration": run.options.get("calibration"),
        "undersampled_experts": _undersampled(run),
        "parameters": run.parameters,
        "bytes_in": run.bytes_in,
        "bytes_out": run.bytes_out,
        "bits_per_weight_in": 8 * run.bytes_in / run.parameters,
        "bits_per_weight_out": 8 * run.bytes_out / run.parameters,
        "shards": run.shards,
        "seconds": run.seconds,
        "resumed_seconds": run.resumed_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "device": run.device,
        "peak_device_bytes": run.peak_device_bytes,
    }


def _undersampled(run: RunRecord) -> list[tuple[int, int]]:
    return sorted({(record.layer, record.expert) for record in run.undersampled})


def _show_run(run: RunRecord, destination: Path) -> None:
    before, after = (8 * n / run.parameters for n in (run.bytes_in, run.bytes_out))
    undersampled, calibration = _undersampled(run), run.options.get("calibration")
    print(f"before  {format_size(run.bytes_in):>10}  {before:6.3f} bits per weight  {run.source}")
    print(f"after   {format_size(run.bytes_out):>10}  {after:6.3f} bits per weight  {destination}")
    if calibration is not None:
        print(f"calibrated with {calibration['sequences']} sequences of {calibration['length']} tokens")
    if undersampled:
        print(f"{len(undersampled)} expert(s) were reached by too few tokens, and took all of their layer's, weighted by the router")
    earlier = f", after {_duration(run.resumed_seconds)} of earlier runs" if run.resumed_seconds else ""
    speed = "" if run.resumed_seconds else f", {format_size(run.bytes_in / run.seconds)}/s"
    there = f", on {run.device} {format_size(run.peak_device_bytes)}" if run.device != "cpu" else ""
    print(f"{run.shards} shard(s) in {_duration(run.seconds)}{earlier}{speed}; peak memory {format_size(run.peak_memory_bytes)}{there}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
