"""`dbrx-q quantize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dbrx_q.planning.sizes import parse_size

from . import options, quantize_report, terminal
from .calibration import load_sequences, parse_sources
from .check_texts import check_unseen, load_checks
from .choices import WEIGHT_FORMATS
from .help import example
from .options import CALIBRATION, FORMATS, HUB, MEMORY, METHOD, OUTPUT, argument, option
from .quantization import check_method, open_location, run_requests
from .self_calibration import Sampling

if TYPE_CHECKING:
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.checkpoint.stored_weights import StoredWeights
    from dbrx_q.quantize.calibration.sources import CalibrationSequences
    from dbrx_q.quantize.pipeline.run import QuantizationRequest

__all__ = ["EXAMPLE", "command"]

_MEASURED_TOKENS = 2048  # for --target-bpw
_FREE_SHARE = 4  # fifths of the free memory
EXAMPLE = example("dbrx-q quantize databricks/dbrx-instruct dbrx-int4 --format int4 --group-size 64")

_Format = Annotated[
    str,
    option(FORMATS, "Format of the experts: {}; other matrices get int8.", metavar="FORMAT", one_of=WEIGHT_FORMATS),
]
_Rules = Annotated[
    list[str] | None,
    option(
        FORMATS,
        "Format of the tensors that a rule names, as w2=int8:64, blocks.0-3.experts=int4:32 or head=plain; later rules win.",
        metavar="RULE",
    ),
]
_TargetBpw = Annotated[
    float | None,
    option(
        FORMATS,
        "Bits per weight of the whole, by the best format for each tensor; needs --calibration.",
        metavar="BITS",
    ),
]
_Keep = Annotated[
    bool,
    option(FORMATS, "Repack what another program quantized, and keep plain matrices but experts; round the rest.", "--keep"),
]
_FallbackFormat = Annotated[
    str | None,
    option(FORMATS, "Smaller copy for `generate --fallback`.", metavar="FORMAT", one_of=WEIGHT_FORMATS),
]
_Fast = Annotated[bool, option(FORMATS, "Make trellis2-fast of trellis2 and so on: more error in half of the time.", "--fast")]
_LowDisk = Annotated[bool, option(HUB, "Delete each downloaded shard after use; with --target-bpw, download all twice.", "--low-disk")]


def command(
    source: Annotated[str, argument("SRC", "A checkpoint: folder, GGUF file or hub id.")],
    destination: Annotated[Path, argument("DST", "Folder to write; new or empty.")],
    format: _Format = "int4",
    group_size: options.GroupSize = None,
    tensor: _Rules = None,
    target_bpw: _TargetBpw = None,
    fast: _Fast = False,
    keep: _Keep = False,
    fallback_format: _FallbackFormat = None,
    method: options.Method = "rtn",
    act_order: Annotated[bool, option(METHOD, "With gptq and best, quantize the columns with the largest inputs first.")] = True,
    calibration: options.Calibration = None,
    sequences: Annotated[int, option(CALIBRATION, "Sequences to draw from all sources together.", metavar="N")] = 256,
    length: Annotated[int, option(CALIBRATION, "Tokens of a sequence.", metavar="N")] = 512,
    seed: Annotated[int, option(CALIBRATION, "Seed of the draw and, for self, of the sampling.", metavar="N")] = 0,
    activations: options.Activations = "quantized",
    all_experts: options.AllExperts = False,
    check_text: options.CheckText = None,
    check_sequences: Annotated[int, option(CALIBRATION, "Most sequences of each check text.", metavar="N", least=1)] = 64,
    no_worse_than_rtn: options.NoWorse = False,
    memory: Annotated[str | None, option(MEMORY, "Host memory to use, as 24GiB.", metavar="SIZE", default="4/5 of what is free")] = None,
    device: options.RoundingDevice = "cpu",
    device_memory: Annotated[str | None, option(MEMORY, "GPU memory to use, as 20GiB.", metavar="SIZE", default="9/10 of it")] = None,
    revision: Annotated[str | None, option(HUB, "Branch, tag or commit of SRC.", metavar="NAME")] = None,
    low_disk: _LowDisk = False,
    push: Annotated[str | None, option(HUB, "Upload the result to this repository.", metavar="OWNER/NAME")] = None,
    public: Annotated[bool, option(HUB, "Make that repository public if it is new.", "--public")] = False,
    resume: options.Resume = False,
    dry_run: Annotated[bool, option(OUTPUT, "Print the plan of the run, then stop.", "--dry-run")] = False,
    json: options.Json = False,
) -> None:
    """Write a quantized copy of a checkpoint. An interrupted run keeps what is finished, and --resume continues it."""
    from dbrx_q.checkpoint.hub import check_push
    from dbrx_q.checkpoint.hub import push as upload
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.checkpoint.staging import partial_of
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.host_memory import available_bytes
    from dbrx_q.quantize.calibration.calibrated import CalibrationOptions
    from dbrx_q.quantize.pipeline.accelerator import open_accelerator
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, plan_checkpoint

    check_method(method, calibration or [], target_bpw, activations)
    _check_keep(keep=keep, target_bpw=target_bpw)
    sources = parse_sources(calibration or [])
    accelerator = open_accelerator(device, None if device_memory is None else parse_size(device_memory))
    if public and push is None:
        raise RequestError("--public says how a repository is made that --push names; found no --push. Add it, or leave --public out")
    stack = ExitStack()  # holds what a plan alone needs, until it is printed
    storage = partial_of(destination).with_suffix(".source") if low_disk else None
    opened = open_location(source, revision, storage, stack if dry_run and target_bpw is None else None)
    if push is not None and not dry_run:
        check_push(push, private=not public)
    folder = opened if isinstance(opened, Path) else opened.folder
    checks = load_checks(folder, check_text or [], count=check_sequences, length=length)
    budget = parse_size(memory) if memory is not None else _FREE_SHARE * available_bytes() // 5
    sampling = Sampling(source, opened, destination, budget, revision, accelerator, resume=resume, low_disk=low_disk, dry_run=dry_run)
    tokens, about = load_sequences(folder, sources, count=sequences, length=length, seed=seed, sampling=sampling)
    if dry_run and target_bpw is not None and sampling.plan is not None:
        raise RequestError(
            "--target-bpw measures errors on the sequences of --calibration self, which --dry-run does not sample. Leave one of them "
            "out, or name the file of sequences that an earlier run has sampled"
        )
    check_unseen(checks, tokens, about)
    request = QuantizationRequest(
        _formats(
            TensorFormat.of(format, group_size), tensor or [], target_bpw, tokens, fallback_format, method=method, keep=keep, fast=fast
        ),
        method=method,
        source=source,
        name=push or "",
        keep=keep,
        measured=None if target_bpw is None else {"target_bpw": target_bpw, "rules": tensor or [], "calibration": about},
        sequences=tokens,
        about=about,
        options=CalibrationOptions(activations=activations, all_experts=all_experts, act_order=act_order),
        checks=tuple(checks.values()),
        no_worse_than_rtn=no_worse_than_rtn,
        accelerator=accelerator,
    )
    requests = _with_fallback(destination, request, fallback_format, fast=fast)
    try:
        if dry_run:
            plans = [plan_checkpoint(opened, request, memory=budget) for request in requests.values()]
            quantize_report.show_plans(plans, accelerator, sampling, tokens, json=json)
            return
        runs = run_requests(opened, requests, budget, resume=resume)
    finally:
        if not isinstance(opened, Path):
            opened.close(keep=any(partial_of(folder).exists() for folder in requests))
        stack.close()
    quantize_report.show_runs(runs, json=json)
    quantize_report.check_no_worse(runs, push)
    if push is not None:
        terminal.say(f"uploading {destination} to {push}")
        terminal.say(f"uploaded: {upload(destination, push)}")


def _check_keep(*, keep: bool, target_bpw: float | None) -> None:
    from dbrx_q.errors import RequestError

    if keep and target_bpw is not None:
        raise RequestError(
            f"--keep takes the formats of SRC, and --target-bpw chooses others; found {target_bpw} beside --keep. Leave one of them out"
        )


def _with_fallback(
    destination: Path, request: QuantizationRequest, fallback_format: str | None, *, fast: bool
) -> dict[Path, QuantizationRequest]:
    """Folder to what is written there: the checkpoint and, if it is wanted, the fallback copy, in this order."""
    from dataclasses import replace

    from dbrx_q.experts.fallback import FALLBACK_FOLDER
    from dbrx_q.quantize.methods.choose import METHODS
    from dbrx_q.quantize.pipeline.format_assignment import fallback_formats, fast_formats

    if fallback_format is None:
        return {destination: request}

    def assigned(checkpoint: StoredWeights) -> dict[str, TensorFormat]:
        formats = fallback_formats(checkpoint.config, fallback_format)
        return fast_formats(formats) if fast else formats

    # Check texts are for the checkpoint.
    fallback = replace(request, assign_formats=assigned, keep=False, measured=None, name="", checks=())
    if not METHODS[request.method].calibrated:  # the text was for --target-bpw
        fallback = replace(fallback, sequences=None, about=None)
    return {destination: request, destination / FALLBACK_FOLDER: fallback}


def _formats(
    experts: TensorFormat,
    rules: Sequence[str],
    target: float | None,
    tokens: CalibrationSequences | None,
    fallback_format: str | None,
    *,
    method: str,
    keep: bool,
    fast: bool,
) -> Callable[[StoredWeights], dict[str, TensorFormat]]:
    """A function that gives every tensor of a checkpoint the format that the options name.

    Args:
        experts: the format of the experts.
        rules: of --tensor.
        target: bits per weight of --target-bpw.
        tokens: the sequences to measure errors on for `target`.
        fallback_format: format of the fallback copy, which the function checks to be smaller.
        method: the name of the quantization method, which makes the formats that `target` chooses from.
        keep: whether tensors keep the formats that hold them exactly, and plain matrices outside the experts stay plain.
        fast: whether trellis formats become their `-fast` formats; without a target, the function refuses formats of which none is a
            trellis format, those of the fallback copy included.

    Raises:
        RequestError: a target without a text.
    """
    from dbrx_q.errors import RequestError
    from dbrx_q.experts.fallback import check_fallback
    from dbrx_q.quantize.pipeline.format_assignment import (
        allocated_formats,
        default_formats,
        fallback_formats,
        fast_formats,
        kept_or_default,
        override,
    )

    def checked(checkpoint: StoredWeights, formats: dict[str, TensorFormat]) -> dict[str, TensorFormat]:
        fallback = {} if fallback_format is None else fallback_formats(checkpoint.config, fallback_format)
        chosen = {str(fmt): fmt.record for fmt in (*formats.values(), *fallback.values())}
        if fast and target is None and not any(record.trellis for record in chosen.values()):
            names = ", ".join(sorted(chosen))
            raise RequestError(
                f"--fast is for trellis formats; found {names}. Choose --format trellis2, trellis3 or trellis4, or leave it out"
            )
        if fast:
            formats = fast_formats(formats)
        if fallback:
            check_fallback(checkpoint.config, formats, fallback, "--fallback-format")
        return formats

    def assigned(checkpoint: StoredWeights) -> dict[str, TensorFormat]:
        defaults = default_formats(checkpoint.config, experts)
        defaults = kept_or_default(checkpoint, defaults) if keep else defaults
        return checked(checkpoint, override(defaults, checkpoint.config, rules))

    if target is None:
        return assigned
    if tokens is None:
        raise RequestError("--target-bpw measures errors on a text; found none. Give --calibration SOURCE")

    ids, sources = tokens.interleaved
    measured = max(_MEASURED_TOKENS, sum(map(bool, tokens.counts)) * ids.shape[1])  # at least a sequence of each source

    def allocated(checkpoint: StoredWeights) -> dict[str, TensorFormat]:
        vocabulary, context = checkpoint.config.vocab_size, checkpoint.config.max_seq_len
        if int(ids.max()) >= vocabulary or ids.shape[1] > context:  # those that calibrate are checked later
            raise RequestError(
                f"the sequences of --target-bpw must fit the model: token ids below {vocabulary} and at most {context} tokens; found "
                f"{int(ids.max())} and {ids.shape[1]}. Use the tokenizer of this model, or a smaller --length"
            )
        with terminal.progress("measuring errors") as on_layer:
            formats = allocated_formats(
                checkpoint, ids, target, method=method, rules=rules, sources=sources, tokens=measured, on_layer=on_layer
            )
            return checked(checkpoint, formats)

    return allocated
