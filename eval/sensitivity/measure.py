"""Measures sensitivity: what a model loses if one part of it is quantized and everything else stays plain.

Weights are quantized by rounding to nearest, as by `dbrx-q quantize`, and dequantized into the model's own dtype. A format can thus be
measured on any tensor, with or without a kernel for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dbrx_q.checkpoint.layout import ATTENTION_MATRICES, EXPERT_MATRICES, TensorFormat, embedding_formats, kind_of, may_have
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.eval.divergence import TokenScores, mean_and_stderr
from dbrx_q.eval.observe import check_ids
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.texts import Text
from dbrx_q.eval.windows import Protocol
from dbrx_q.model.layers import PackedWeight
from dbrx_q.model.modeling import DbrxForCausalLM

from .rounding import Rounding
from .walk import Walk, packable

__all__ = ["BY", "Sensitivity", "Unit", "UnitResult", "Unmeasured", "check_formats", "measurable", "sensitivity", "units_of"]

BY = ("kind", "layer", "tensor")
"""Ways to divide a model into units, which are quantized one at a time."""

_KINDS = ("embedding", "attention", "experts", "head")
_MATRICES = (*ATTENTION_MATRICES, *EXPERT_MATRICES)


@dataclass(frozen=True)
class Unit:
    """Tensors that are quantized together."""

    name: str
    """In tables and plots."""
    tensors: tuple[str, ...]
    """Their names in a plain checkpoint."""


_Part = tuple[Unit, TensorFormat]


@dataclass(frozen=True)
class UnitResult:
    """The figures of one unit in one format."""

    name: str
    """Of the `Unit`."""
    tensors: list[str]
    """Of the `Unit`."""
    format: str
    """Of the `TensorFormat`."""
    group_size: int
    """Of the `TensorFormat`."""
    bits_per_weight: float
    """Of these tensors, scales and zero-points included."""
    parameters: int
    """Of these tensors."""
    saved_bytes: int
    """Compared with 16 bits per weight."""
    weight_error: float
    """Root of the sum of squared errors of the weights over their sum of squares."""
    mean_kl: float
    """KL(model || model with these tensors quantized), mean over tokens, in nats."""
    mean_kl_stderr: float
    """Standard error of `mean_kl`."""
    delta_ln_ppl: float
    """Mean change of the negative log-likelihood, in nats."""
    delta_ln_ppl_stderr: float
    """Standard error of that paired difference."""
    kl_per_saved_byte: float
    """mean_kl / saved_bytes."""


@dataclass(frozen=True)
class Unmeasured:
    """A unit and a format without figures."""

    name: str
    """Of the `Unit`."""
    format: str
    """Of the `TensorFormat`."""
    group_size: int
    """Of the `TensorFormat`."""
    reason: str
    """Why it was not measured, as an error says it."""


@dataclass(frozen=True)
class Sensitivity:
    """The JSON object of `dbrx-q sensitivity`, for programs that assign formats to tensors. Later versions may add fields only."""

    checkpoint: str
    """Path or hub id, as given."""
    sha256: str
    """Of the weights."""
    text: str
    """Path or name, as given."""
    text_sha256: str
    """Of the text's UTF-8 bytes."""
    by: str
    """One of `BY`."""
    dtype: str
    """Of activations and dequantized weights."""
    protocol: str
    """One of `windows.PROTOCOLS`."""
    context: int
    """Tokens of a window."""
    windows: int
    """Windows of every measurement."""
    tokens: int
    """Predicted tokens of every measurement."""
    perplexity: float
    """Of the unquantized model."""
    complete: bool
    """False if the run was interrupted; the units listed are measured completely."""
    units: list[UnitResult]
    """In the model's order; for each unit in the order of the requested formats."""
    provenance: dict[str, Any]
    """Versions, device, command line."""
    skipped: list[Unmeasured] = field(default_factory=list)
    """Units that a checkpoint may not have in that format."""
    failed: list[Unmeasured] = field(default_factory=list)
    """Units with weights that the format cannot represent."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; None for a figure that is not finite, such as the perplexity of a model that overflows."""
        data = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`; NaN for a figure that is None."""
        units = [UnitResult(**_figures(unit)) for unit in data["units"]]
        unmeasured = {name: [Unmeasured(**part) for part in data.get(name, [])] for name in ("skipped", "failed")}
        return cls(**(_figures(data) | {"units": units} | unmeasured))


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in data.items()}


def units_of(config: DbrxConfig, by: str) -> list[Unit]:
    """Divide a model into units, in the model's order.

    Args:
        config: of the model.
        by: "tensor": a unit for every matrix that can be packed. "layer": one for all such matrices of a block. "kind": one each for
            embedding, attention, experts and head of all layers, and for each matrix of attention and experts in all layers.
    """
    tensors = packable(config)
    if by == "tensor":
        return [Unit(tensor.name, (tensor.name,)) for tensor in tensors]
    if by == "layer":
        return [
            Unit(f"layer {layer}", tuple(tensor.name for tensor in tensors if tensor.layer == layer)) for layer in range(config.n_layers)
        ]
    assert by == "kind"
    tensors_of = {kind: [tensor.name for tensor in tensors if kind_of(tensor.name) == kind] for kind in _KINDS}
    tensors_of |= {matrix: [tensor.name for tensor in tensors if tensor.role == matrix] for matrix in _MATRICES}
    order = ("embedding", "attention", "Wqkv", "out_proj", "experts", "w1", "v1", "w2", "head")
    return [Unit(name, tuple(tensors_of[name])) for name in order]


def measurable(units: Sequence[Unit], formats: Sequence[TensorFormat]) -> tuple[list[_Part], list[Unmeasured]]:
    """(pairs to measure, units with an embedding and a format that it may not have), in the units' order."""
    parts, skipped = [], []
    for unit in units:
        for fmt in formats:
            if not all(may_have(name, fmt) for name in unit.tensors):
                reason = f"the embedding must be {embedding_formats()}; found {fmt.format}"
                skipped.append(Unmeasured(unit.name, fmt.format, fmt.group_size, reason))
            else:
                parts.append((unit, fmt))
    return list(dict.fromkeys(parts)), list(dict.fromkeys(skipped))


def check_formats(config: DbrxConfig, units: Sequence[Unit], formats: Sequence[TensorFormat]) -> None:
    """Refuse formats that no unit, or a unit's tensors, can have.

    Raises:
        RequestError: nothing is left to measure, as an embedding can only be int8.
        FormatError: a group size is not offered or does not divide a tensor's reduction axis.
    """
    parts, skipped = measurable(units, formats)
    if skipped and not parts:
        names = ", ".join(dict.fromkeys(fmt.format for fmt in formats))
        raise RequestError(f"the embedding must be {embedding_formats()}; found {names} and no other part. Add int8, or other parts")
    tensors = {tensor.name: tensor for tensor in packable(config)}
    for fmt in formats:
        for name in dict.fromkeys(name for unit, other in parts if other == fmt for name in unit.tensors):
            try:
                fmt.check(tensors[name].matrix[1])
            except FormatError as error:
                raise FormatError(f"{name} in {fmt.format}: {error}. Choose another --group-size") from None


@torch.inference_mode()
def sensitivity(
    model: DbrxForCausalLM,
    ids: Sequence[int],
    protocol: Protocol,
    units: Sequence[Unit],
    formats: Sequence[TensorFormat],
    *,
    checkpoint: str,
    sha256: str,
    text: Text,
    by: str,
    provenance: dict[str, Any],
    state: RunState | None = None,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure every unit in every format. The model's weights are never written to, and are restored afterwards.

    A unit runs from the first block that it changes, on the residual stream that the unchanged blocks before it computed; the result is
    bit-identical to a run from the start. Memory in addition to the model: for all windows 5 D numbers per token (residual stream and
    pending addition before the current block, the same for the unit's run, and the reference's last hidden states), the activations of
    one step, and a second copy of one block's quantized weights. Streamed experts stay streamed; up to 8 units then run together, with
    2 D numbers per token each, so that experts are dequantized once for all of them.

    Args:
        model: a model with plain weights.
        ids: the text's token ids.
        protocol: how the text is cut into windows; each window runs as a whole.
        units: from `units_of`.
        formats: to quantize each unit to.
        checkpoint: recorded in the result, as are sha256, text, by and provenance.
        state: where each figure is saved as soon as it is computed, and read from when the run is resumed; None to save none. The caller
            clears it after writing the result.
        on_run: called with (pairs of unit and format done, total pairs).

    Returns:
        The figures; after Ctrl-C those of the units done so far, if there are any. A unit with a tensor that a format cannot represent is
        listed in `failed`, and all others are measured.

    Raises:
        RequestError: the model has packed weights, the text is shorter than one window, the context is longer than the model's, an id is
            outside the vocabulary, or only embeddings are to be measured in formats that they cannot have.
        FormatError: a group size is not offered or does not divide a tensor's reduction axis, or no unit's tensors can have a format.
    """
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise RequestError("sensitivity must start from a model with plain weights; found packed ones. Name the unquantized checkpoint")
    protocol.check(len(ids), model.config, source=text.name)
    check_ids(ids, model.config.vocab_size)
    check_formats(model.config, units, formats)
    windows = protocol.windows(len(ids))
    parts, skipped = measurable(units, formats)
    perplexity, results = _restored(state)
    failed: dict[_Part, str] = {}

    def report() -> None:
        on_run(len(results) + len(failed), len(parts))

    complete = False
    try:
        waiting = [part for part in parts if part not in results]
        if waiting:
            report()
            walk = Walk(model, torch.tensor(ids), windows)
            with np.errstate(over="ignore"):  # the model may overflow
                perplexity = float(np.exp(walk.reference_nll()))
            for place, together in _groups(walk, waiting):
                walk.go_to(place)
                outcomes = walk.measure([(unit.tensors, fmt) for unit, fmt in together])
                for part, outcome in zip(together, outcomes, strict=True):
                    if isinstance(outcome, FormatError):
                        failed[part] = str(outcome)
                    else:
                        results[part] = _result(*part, outcome.scores, outcome.roundings)
                    _save(state, perplexity, results)
                    if len(results) + len(failed) < len(parts):
                        report()
        complete = True
    except KeyboardInterrupt:
        if not results:
            raise
        _save(state, perplexity, results)
    report()
    if not results:
        raise FormatError(next(iter(failed.values())))
    return Sensitivity(
        checkpoint=checkpoint,
        sha256=sha256,
        text=text.name,
        text_sha256=text.sha256,
        by=by,
        dtype=str(model.dtype).removeprefix("torch."),
        protocol=protocol.name,
        context=protocol.context,
        windows=len(windows),
        tokens=sum(window.tokens for window in windows),
        perplexity=perplexity,
        complete=complete,
        units=[results[part] for part in parts if part in results],
        provenance=provenance,
        skipped=skipped,
        failed=[Unmeasured(unit.name, fmt.format, fmt.group_size, failed[unit, fmt]) for unit, fmt in parts if (unit, fmt) in failed],
    )


def _groups(walk: Walk, parts: Sequence[_Part]) -> Iterator[tuple[int, list[_Part]]]:
    """(first place that is changed, parts that begin there and are measured together), in the model's order."""
    parts_at: dict[int, list[_Part]] = {}
    for unit, fmt in parts:
        parts_at.setdefault(min(walk.place_of(name) for name in unit.tensors), []).append((unit, fmt))
    for place, beginning in sorted(parts_at.items()):
        for first in range(0, len(beginning), walk.together):
            yield place, beginning[first : first + walk.together]


def _restored(state: RunState | None) -> tuple[float, dict[_Part, UnitResult]]:
    """(perplexity of the unquantized model, results so far) of an interrupted run."""
    saved = None if state is None else state.load()
    if saved is None:
        return math.nan, {}
    rows = [UnitResult(**row) for row in json.loads(str(saved["units"]))]
    return float(saved["perplexity"]), {(Unit(row.name, tuple(row.tensors)), TensorFormat(row.format, row.group_size)): row for row in rows}


def _save(state: RunState | None, perplexity: float, results: Mapping[_Part, UnitResult]) -> None:
    if state is not None and results:
        rows = json.dumps([asdict(row) for row in results.values()])
        state.save({"perplexity": np.array(perplexity), "units": np.array(rows)})


def _result(unit: Unit, fmt: TensorFormat, scored: TokenScores, roundings: Sequence[Rounding]) -> UnitResult:
    parameters, nbytes = sum(rounding.parameters for rounding in roundings), sum(rounding.nbytes for rounding in roundings)
    square = sum(rounding.square for rounding in roundings)
    with np.errstate(over="ignore", invalid="ignore"):  # the model may overflow
        mean_kl, kl_error = mean_and_stderr(scored.kl)
        change, change_error = mean_and_stderr(scored.nll - scored.nll_reference)
    saved_bytes = 2 * parameters - nbytes
    return UnitResult(
        name=unit.name,
        tensors=list(unit.tensors),
        format=fmt.format,
        group_size=fmt.group_size,
        bits_per_weight=8 * nbytes / parameters,
        parameters=parameters,
        saved_bytes=saved_bytes,
        weight_error=math.sqrt(sum(rounding.error for rounding in roundings) / square) if square else 0.0,
        mean_kl=mean_kl,
        mean_kl_stderr=kl_error,
        delta_ln_ppl=change,
        delta_ln_ppl_stderr=change_error,
        kl_per_saved_byte=mean_kl / saved_bytes,
    )
