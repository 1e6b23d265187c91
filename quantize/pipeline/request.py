"""A request for a quantized checkpoint, and the run that it becomes once the source is open and everything is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint, check_is_plain
from dbrx_q.checkpoint.layout import TensorFormat, unpacked_experts
from dbrx_q.checkpoint.shard_source import ShardSource
from dbrx_q.checkpoint.shards import SHARD_BYTES
from dbrx_q.checkpoint.stored_weights import StoredWeights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.planning.host_memory import resident_bytes
from dbrx_q.quantize.calibration.calibrated import CalibrationOptions, random_sequences
from dbrx_q.quantize.calibration.forward import ORIGINAL, QUANTIZED
from dbrx_q.quantize.calibration.held_out import NEAREST, CheckSequences, HeldOutSequences, models_of
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.choose import METHODS, Method
from dbrx_q.sources.kept_formats import exact_formats
from dbrx_q.sources.open_weights import open_weights

from .accelerator import Accelerator
from .jobs import Job, shards_of
from .journal import options_of
from .plan import RunPlan, TokenCounts, plan_run

__all__ = ["QuantizationRequest", "Run", "open_run"]


@dataclass(frozen=True)
class QuantizationRequest:
    """Everything that decides the bytes of a quantized checkpoint, beside the source."""

    assign_formats: Callable[[StoredWeights], Mapping[str, TensorFormat]]
    """Gives the formats of the tensors to pack, by name, once the source is open; the other tensors are copied."""
    method: str = "rtn"
    """The quantization method, one of `methods.choose.METHODS`."""
    sequences: CalibrationSequences | None = None
    """The tokens that a calibrated method fits weights to; the other methods need none."""
    about: Mapping[str, Any] | None = None
    """What quantization_config says about the sequences."""
    keep: bool = False
    """Whether tensors whose stored codes a format holds exactly are repacked, where `assign_formats` gives them that format."""
    options: CalibrationOptions = field(default_factory=CalibrationOptions)
    """How the tokens calibrate a matrix."""
    checks: tuple[CheckSequences, ...] = ()
    """Texts on which the result is measured before it is complete; they decide nothing."""
    no_worse_than_rtn: bool = False
    """Whether a matrix that errs more on held-out tokens than one that is rounded to nearest is stored as the latter."""
    accelerator: Accelerator | None = None
    """A GPU that multiplies and rounds; its results differ from the CPU's in the last bits. None for the CPU alone."""
    shard_bytes: int = SHARD_BYTES
    """A shard is closed before it grows past so many bytes, unless one expert alone is larger."""
    measured: Mapping[str, Any] | None = None
    """What decides formats that take long to measure; a run that resumes one with the same value takes that run's formats."""
    source: str = ""
    """The source as the model card names it; its folder unless given."""
    name: str = ""
    """The result as the model card names it; derived from the source and the formats unless given."""


@dataclass(frozen=True)
class Run:
    """A request on an open source, checked and planned."""

    checkpoint: StoredWeights
    """The source."""
    request: QuantizationRequest
    """As given."""
    method: Method
    """The method that the request names."""
    formats: dict[str, TensorFormat]
    """Formats of the tensors that are packed, by name."""
    kept: frozenset[str]
    """Those that are repacked without rounding."""
    shards: list[list[Job]]
    """The jobs of each shard."""
    models: tuple[str, ...]
    """The models that the calibration tokens run through: `QUANTIZED`, `ORIGINAL` or both."""
    held_out: HeldOutSequences | None
    """Sequences that measure what calibration does to tokens to which nothing is fitted, and those of check texts; None without any."""
    plan: RunPlan
    """Bytes to read and write, and memory."""

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The entry of the result's config.json."""
        tensors = {name: {"format": fmt.format, "group_size": fmt.group_size} for name, fmt in self.formats.items()}
        rounding: dict[str, Any] = {"rounding": "nearest" if self.request.method == "rtn" else self.request.method}
        if self.request.about:
            rounding["calibration"] = dict(self.request.about)
            defaults = CalibrationOptions()
            rounding["calibration"] |= {k: v for k, v in asdict(self.request.options).items() if v != getattr(defaults, k)}
            rounding["calibration"] |= {"no_worse_than_rtn": True} if self.request.no_worse_than_rtn else {}
        if self.kept:
            rounding["kept"] = sorted({self.checkpoint.label_of(name) for name in self.kept})
        return {"quant_method": "dbrx_q", "format_version": 1, **rounding, "tensors": tensors}

    @property
    def options(self) -> dict[str, Any]:
        """What decides the bytes, for a later run to compare with its own."""
        source = dict(self.checkpoint.sizes) | ({"commit": self.checkpoint.source.commit} if self.checkpoint.source else {})
        sequences = self.request.sequences
        return {
            "source": source,
            "config": self.checkpoint.raw_config,
            "quantization_config": self.quantization_config,
            "sequences": None if sequences is None else _digest(sequences.ids),
            **({} if sequences is None or len(sequences.counts) == 1 else {"source_counts": list(sequences.counts)}),
            "held_out": None if sequences is None or not len(sequences.held_out) else _digest(sequences.held_out),
            "checks": [_digest(check.ids) for check in self.request.checks] or None,
            "no_worse_than_rtn": self.request.no_worse_than_rtn or None,  # None as in journals of versions without it
            "options": asdict(self.request.options),
            "measured": self.request.measured,
            "accelerator": None if self.request.accelerator is None else [self.request.accelerator.name, self.request.accelerator.memory],
            "shard_bytes": self.request.shard_bytes,
        }

    def bytes_in(self, job: Job) -> int:
        """Bytes of the source's weights that a job reads."""
        return self.checkpoint.nbytes_of(job.tensor.name) // max(1, job.tensor.experts if job.expert >= 0 else 1)


def open_run(
    source: Path | ShardSource, request: QuantizationRequest, memory: int | None, stack: ExitStack, journal: Path | None = None
) -> Run:
    """Open the source, choose the formats, check the request and plan the run.

    Args:
        source: as for `run.quantize_checkpoint`.
        request: what to make.
        memory: bytes that this process may take; None for no limit.
        stack: closes the source.
        journal: of an earlier run, whose measured formats are taken where they are of the same request; it need not exist.

    Raises:
        CheckpointError: the source is damaged, or quantized by dbrx_q already.
        FormatError: some experts have no format, or a tensor has a format that cannot hold it or that the method does not make.
        RequestError: no such method, a calibrated one without sequences, tokens that the model does not know, or too little memory.
    """
    checkpoint = stack.enter_context(open_weights(source))
    if isinstance(checkpoint, Checkpoint):
        check_is_plain(checkpoint)
    try:
        formats = _measured_formats(request, journal) or dict(request.assign_formats(checkpoint))
    except FormatError as error:
        raise FormatError(f"{checkpoint.folder}: {error}") from None
    unpacked = unpacked_experts(checkpoint.config, formats)
    if unpacked:
        raise FormatError(
            f"{checkpoint.folder}: the experts of every layer must be packed; {unpacked[0]} and {len(unpacked) - 1} more have no format. "
            "Give them one"
        )
    exact = exact_formats(checkpoint) if request.keep else {}
    kept = frozenset(name for name, fmt in formats.items() if exact.get(name) == fmt)
    method = _method(request.method, {name: fmt for name, fmt in formats.items() if name not in kept})
    calibrating = _check_sequences(checkpoint, request) if method.calibrated else None
    _check_guard(checkpoint, request, calibrating)
    held_out = HeldOutSequences.of(calibrating, request.checks)
    noise = 0
    if calibrating is not None and method.shrinks:
        noise = random_sequences(checkpoint.config, *calibrating.ids.shape).numel()
    models = (QUANTIZED, ORIGINAL) if method.compares else (request.options.activations,)
    shards = shards_of(checkpoint, formats, request.shard_bytes, kept)
    plan = plan_run(
        checkpoint,
        shards,
        method,
        tokens=TokenCounts(
            calibration=0 if calibrating is None else calibrating.ids.numel() + noise,
            folds=0 if calibrating is None or not method.shrinks else 2 * len(calibrating.counts) + 1,
            models=len(models),
            held_out=0 if held_out is None else held_out.tokens,
            checked=0 if held_out is None else held_out.checked_tokens,
            held_out_models=0 if held_out is None else len(models_of(nearest=request.method != NEAREST)),
            falls_back=request.no_worse_than_rtn,
        ),
        threads=torch.get_num_threads(),
        base=resident_bytes(),
        memory=memory,
        accelerator=request.accelerator,
    )
    return Run(checkpoint, request, method, formats, kept, shards, models, held_out, plan)


def _measured_formats(request: QuantizationRequest, journal: Path | None) -> dict[str, TensorFormat]:
    """The formats that an earlier run of the same request has measured; empty where it has not."""
    options = options_of(journal) if journal is not None and request.measured is not None else None
    if options is None or options.get("measured") != json.loads(json.dumps(request.measured)):
        return {}
    return {name: TensorFormat(entry["format"], entry["group_size"]) for name, entry in options["quantization_config"]["tensors"].items()}


def _method(name: str, formats: Mapping[str, TensorFormat]) -> Method:
    if name not in METHODS:
        raise RequestError(f"the method must be one of {', '.join(METHODS)}; found {name!r}")
    for fmt in formats.values():
        METHODS[name].check(name, fmt)
    return METHODS[name]


def _check_sequences(checkpoint: StoredWeights, request: QuantizationRequest) -> CalibrationSequences:
    sequences = request.sequences
    if isinstance(sequences, torch.Tensor):  # as versions with one text took them
        raise RequestError(
            f"the sequences of a request must be CalibrationSequences; found a tensor of shape {list(sequences.shape)}. Pass "
            "CalibrationSequences.single(tensor), or what `draw` returns"
        )
    if sequences is None or not sequences.ids.numel():
        raise RequestError(
            f"the method {request.method} must have a text to calibrate with; found none. Give --calibration, or choose rtn, clip or hqq"
        )
    _check_ids(checkpoint.config, torch.cat([sequences.ids, sequences.held_out]), "calibration sequences")
    return sequences


def _check_guard(checkpoint: StoredWeights, request: QuantizationRequest, calibrating: CalibrationSequences | None) -> None:
    """Refuse check texts that the model cannot run, and a fallback to rounding to nearest without tokens that could decide it."""
    for check in request.checks:
        _check_ids(checkpoint.config, check.ids, f"the sequences of the check text {check.name}")
    lengths = {check.ids.shape[1] for check in request.checks} | (set() if calibrating is None else {calibrating.ids.shape[1]})
    if len(lengths) > 1:
        raise RequestError(f"calibration and check sequences must have one length; found {sorted(lengths)}. Cut all texts alike")
    if request.no_worse_than_rtn and (calibrating is None or not len(calibrating.held_out)):
        without = "the method takes no calibration" if calibrating is None else "none of the sources has tokens to spare"
        raise RequestError(
            f"--no-worse-than-rtn compares with rounding to nearest on held-out tokens; found none, as {without}. "
            + (
                "Leave it out, or name gptq or best and --calibration"
                if calibrating is None
                else "Give longer texts, or a smaller --length"
            )
        )


def _check_ids(config: DbrxConfig, ids: torch.Tensor, what: str) -> None:
    if int(ids.max()) >= config.vocab_size or ids.shape[1] > config.max_seq_len:
        raise RequestError(
            f"{what} must fit the model: token ids below {config.vocab_size} and at most {config.max_seq_len} tokens; found "
            f"{int(ids.max())} and {ids.shape[1]}. Use the tokenizer of this model"
        )


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()).hexdigest()
