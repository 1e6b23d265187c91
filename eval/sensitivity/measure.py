"""Sensitivity: what a model loses where one part of it is rounded to a packed format and all the rest stays as it is.

Weights are rounded to nearest, as `dbrx-q quantize` rounds them, and decoded into the model's own dtype, so that a format can be measured
on any tensor, whether or not a kernel of it is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dbrx_q.checkpoint.layout import TensorFormat, embedding_formats, kind_of, may_have
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
"""What is rounded at a time."""

_KINDS = ("embedding", "attention", "experts", "head")
_MATRICES = ("Wqkv", "out_proj", "w1", "v1", "w2")


@dataclass(frozen=True)
class Unit:
    """What is rounded together. name: in tables and plots. tensors: their names in a plain checkpoint."""

    name: str
    tensors: tuple[str, ...]


_Part = tuple[Unit, TensorFormat]


@dataclass(frozen=True)
class UnitResult:
    """One unit in one format.

    name, tensors: as `Unit`. format, group_size: as `TensorFormat`. bits_per_weight: of these tensors, scales and zero-points included.
    parameters: of these tensors. saved_bytes: against 16 bits a weight. weight_error: root of the sum of squared errors over the sum of
    squares. mean_kl: KL(model || model with these tensors rounded), mean over tokens, in nats. delta_ln_ppl: mean change of the negative
    log-likelihood, in nats. Both with their standard error (of a mean over tokens; paired). kl_per_saved_byte: mean_kl / saved_bytes.
    """

    name: str
    tensors: list[str]
    format: str
    group_size: int
    bits_per_weight: float
    parameters: int
    saved_bytes: int
    weight_error: float
    mean_kl: float
    mean_kl_stderr: float
    delta_ln_ppl: float
    delta_ln_ppl_stderr: float
    kl_per_saved_byte: float


@dataclass(frozen=True)
class Unmeasured:
    """A unit in a format of which there are no figures, and why. name: as `Unit`. format, group_size: as `TensorFormat`."""

    name: str
    format: str
    group_size: int
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """The JSON object of `dbrx-q sensitivity`, for whoever allots bits to tensors; later versions may add fields and rename none.

    checkpoint, text: as given; sha256, text_sha256: of the weights and of the text's UTF-8 bytes. by: one of `BY`. dtype: of activations
    and decoded weights. protocol, context: how the text was cut. windows, tokens: of every measurement (tokens: those predicted).
    perplexity: of the model as it is. complete: False where the run was interrupted: units that are there are whole. units: in the
    model's order; of a unit, formats in the order of their request. provenance: versions, device, command line. skipped: what no
    checkpoint may hold in that format. failed: what the format could not hold of these weights.
    """

    checkpoint: str
    sha256: str
    text: str
    text_sha256: str
    by: str
    dtype: str
    protocol: str
    context: int
    windows: int
    tokens: int
    perplexity: float
    complete: bool
    units: list[UnitResult]
    provenance: dict[str, Any]
    skipped: list[Unmeasured] = field(default_factory=list)
    failed: list[Unmeasured] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for a figure that is not finite, such as the perplexity of a model that overflows."""
        found = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        assert isinstance(found, dict)
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """What `to_dict` gave; NaN for a figure that is None."""
        units = [UnitResult(**_figures(unit)) for unit in data["units"]]
        without = {name: [Unmeasured(**part) for part in data.get(name, [])] for name in ("skipped", "failed")}
        return cls(**(_figures(data) | {"units": units} | without))


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in data.items()}


def units_of(config: DbrxConfig, by: str) -> list[Unit]:
    """What is rounded at a time, in the model's order.

    Args:
        config: of the model.
        by: "tensor": every matrix that can be packed by itself. "layer": all such matrices of a block. "kind": embedding, attention,
            experts and head of all layers, and every matrix of attention and experts in all layers.
    """
    tensors = packable(config)
    if by == "tensor":
        return [Unit(tensor.name, (tensor.name,)) for tensor in tensors]
    if by == "layer":
        return [
            Unit(f"layer {layer}", tuple(tensor.name for tensor in tensors if tensor.layer == layer)) for layer in range(config.n_layers)
        ]
    assert by == "kind"
    found = {kind: [tensor.name for tensor in tensors if kind_of(tensor.name) == kind] for kind in _KINDS}
    found |= {matrix: [tensor.name for tensor in tensors if tensor.name.removesuffix(".weight").endswith(matrix)] for matrix in _MATRICES}
    order = ("embedding", "attention", "Wqkv", "out_proj", "experts", "w1", "v1", "w2", "head")
    return [Unit(name, tuple(found[name])) for name in order]


def measurable(units: Sequence[Unit], formats: Sequence[TensorFormat]) -> tuple[list[_Part], list[Unmeasured]]:
    """(what is measured, what is not: units with an embedding in a format that no checkpoint may hold it in), in the units' order."""
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
    """Refuse formats that a unit's tensors cannot have.

    Raises:
        RequestError: nothing is left to measure, as units with an embedding are measured in no format but int8.
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis.
    """
    parts, skipped = measurable(units, formats)
    if skipped and not parts:
        found = ", ".join(dict.fromkeys(fmt.format for fmt in formats))
        raise RequestError(f"the embedding must be {embedding_formats()}; found {found} and no other part. Add int8, or other parts")
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
    """Measure every unit in every format. The model's weights are never written to, and are in place again afterwards.

    A unit is run from the first block that it changes, on what the blocks before make of the text: the same to the last bit as a run from
    the start. Memory, beside the model: of all windows 5 D numbers a token (the residual stream and what is added to it, before the block
    that is reached and where the run is; the last hidden states as they should be), the activations of one step, and of one block a second
    copy of the weights that are rounded. Experts that are streamed stay so: up to 8 units then run together, with 2 D numbers a token for
    each, so that experts are decoded once for all of them.

    Args:
        model: a model with plain weights.
        ids: the text's token ids.
        protocol: how the text is cut into windows; each is run whole.
        units: what `units_of` gave.
        formats: what each is rounded to.
        checkpoint: for the record, as sha256, text, by and provenance.
        state: where every figure is kept as soon as it is there, and found again; None for nowhere. Whoever gives it clears it when the
            figures are where they shall be.
        on_run: called with (units in a format that are done, in all).

    Returns:
        The figures; of Ctrl-C those of the units that are done, if any are. A unit of which a format cannot hold a tensor is among
        `failed`, and all others are measured.

    Raises:
        RequestError: a model with packed weights, a text shorter than one window, a context that the model does not have, ids that it
            does not know, or nothing but embeddings in formats that they cannot have.
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis, or no unit whose tensors a format can
            hold.
    """
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise RequestError("sensitivity must start from a model with plain weights; found packed ones. Give the checkpoint they come from")
    protocol.check(len(ids), model.config, source=text.name)
    check_ids(ids, model.config.vocab_size)
    check_formats(model.config, units, formats)
    windows = protocol.windows(len(ids))
    parts, skipped = measurable(units, formats)
    perplexity, found = _restored(state)
    failed: dict[_Part, str] = {}

    def report() -> None:
        on_run(len(found) + len(failed), len(parts))

    complete = False
    try:
        waiting = [part for part in parts if part not in found]
        if waiting:
            report()
            walk = Walk(model, torch.tensor(ids), windows)
            with np.errstate(over="ignore"):  # of a model that overflows
                perplexity = float(np.exp(walk.reference_nll()))
            for place, together in _groups(walk, waiting):
                walk.go_to(place)
                for part, seen in zip(together, walk.measure([(unit.tensors, fmt) for unit, fmt in together]), strict=True):
                    if isinstance(seen, FormatError):
                        failed[part] = str(seen)
                    else:
                        found[part] = _result(*part, seen.scores, seen.roundings)
                    _keep(state, perplexity, found)
                    if len(found) + len(failed) < len(parts):
                        report()
        complete = True
    except KeyboardInterrupt:
        if not found:
            raise
        _keep(state, perplexity, found)
    report()
    if not found:
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
        units=[found[part] for part in parts if part in found],
        provenance=provenance,
        skipped=skipped,
        failed=[Unmeasured(unit.name, fmt.format, fmt.group_size, failed[unit, fmt]) for unit, fmt in parts if (unit, fmt) in failed],
    )


def _groups(walk: Walk, parts: Sequence[_Part]) -> Iterator[tuple[int, list[_Part]]]:
    """(first place that is changed, parts that begin there and are measured together), in the model's order."""
    at: dict[int, list[_Part]] = {}
    for unit, fmt in parts:
        at.setdefault(min(walk.place_of(name) for name in unit.tensors), []).append((unit, fmt))
    for place, begin in sorted(at.items()):
        for first in range(0, len(begin), walk.together):
            yield place, begin[first : first + walk.together]


def _restored(state: RunState | None) -> tuple[float, dict[_Part, UnitResult]]:
    """(perplexity of the model as it is, what is done) of a run that did not end."""
    kept = None if state is None else state.load()
    if kept is None:
        return math.nan, {}
    rows = [UnitResult(**row) for row in json.loads(str(kept["units"]))]
    return float(kept["perplexity"]), {(Unit(row.name, tuple(row.tensors)), TensorFormat(row.format, row.group_size)): row for row in rows}


def _keep(state: RunState | None, perplexity: float, found: Mapping[_Part, UnitResult]) -> None:
    if state is not None and found:
        rows = json.dumps([asdict(row) for row in found.values()])
        state.save({"perplexity": np.array(perplexity), "units": np.array(rows)})


def _result(unit: Unit, fmt: TensorFormat, seen: TokenScores, roundings: Sequence[Rounding]) -> UnitResult:
    parameters, nbytes = sum(rounding.parameters for rounding in roundings), sum(rounding.nbytes for rounding in roundings)
    square = sum(rounding.square for rounding in roundings)
    with np.errstate(over="ignore", invalid="ignore"):  # of a model that overflows
        mean_kl, kl_error = mean_and_stderr(seen.kl)
        change, change_error = mean_and_stderr(seen.nll - seen.nll_reference)
    saved = 2 * parameters - nbytes
    return UnitResult(
        name=unit.name,
        tensors=list(unit.tensors),
        format=fmt.format,
        group_size=fmt.group_size,
        bits_per_weight=8 * nbytes / parameters,
        parameters=parameters,
        saved_bytes=saved,
        weight_error=math.sqrt(sum(rounding.error for rounding in roundings) / square) if square else 0.0,
        mean_kl=mean_kl,
        mean_kl_stderr=kl_error,
        delta_ln_ppl=change,
        delta_ln_ppl_stderr=change_error,
        kl_per_saved_byte=mean_kl / saved,
    )
