"""Measures sensitivity: what a model loses if one part of it is quantized and everything else stays plain.

Weights are quantized by rounding to nearest, as by `dbrx-q quantize`, and dequantized into the model's own dtype. A format can thus be
measured on any tensor, with or without a kernel for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
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
from dbrx_q.eval.windows import Protocol, Window
from dbrx_q.model.layers import PackedWeight
from dbrx_q.model.modeling import DbrxForCausalLM

from .result import Sensitivity, UnitResult, Unmeasured
from .rounding import Rounding
from .walk import Walk, packable

__all__ = ["BY", "Unit", "check_formats", "measurable", "sensitivity", "units_of"]

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
                raise FormatError(f"{name} in {fmt.format}: {error}. Choose another --group-size or --format") from None


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
    progress = _Progress.restored(state)
    complete = _run(model, torch.tensor(ids), windows, parts, progress, on_run)
    if not progress.results:
        raise FormatError(next(iter(progress.failed.values())))
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
        perplexity=progress.perplexity,
        complete=complete,
        units=[progress.results[part] for part in parts if part in progress.results],
        provenance=provenance,
        skipped=skipped,
        failed=[
            Unmeasured(unit.name, fmt.format, fmt.group_size, progress.failed[unit, fmt])
            for unit, fmt in parts
            if (unit, fmt) in progress.failed
        ],
    )


@dataclass
class _Progress:
    """The figures that a run has so far."""

    state: RunState | None
    """Where they are saved; None to save none."""
    perplexity: float = math.nan
    """Of the unquantized model."""
    results: dict[_Part, UnitResult] = field(default_factory=dict)
    """Figures of the parts that are measured."""
    failed: dict[_Part, str] = field(default_factory=dict)
    """The errors of parts that their format cannot represent; they are not saved."""

    @classmethod
    def restored(cls, state: RunState | None) -> _Progress:
        """The saved progress of an interrupted run, or that of a new run."""
        saved = None if state is None else state.load()
        if saved is None:
            return cls(state)
        rows = [UnitResult(**row) for row in json.loads(str(saved["units"]))]
        results = {(Unit(row.name, tuple(row.tensors)), TensorFormat(row.format, row.group_size)): row for row in rows}
        return cls(state, float(saved["perplexity"]), results)

    @property
    def done(self) -> int:
        """Parts that are measured or have failed."""
        return len(self.results) + len(self.failed)

    def save(self) -> None:
        """Save perplexity and results, once there is a result."""
        if self.state is not None and self.results:
            rows = json.dumps([asdict(row) for row in self.results.values()])
            self.state.save({"perplexity": np.array(self.perplexity), "units": np.array(rows)})


def _run(
    model: DbrxForCausalLM,
    text: torch.Tensor,
    windows: Sequence[Window],
    parts: Sequence[_Part],
    progress: _Progress,
    on_run: Callable[[int, int], None],
) -> bool:
    """Measure the parts that `progress` lacks, and add each to it.

    Returns:
        Whether the run is complete. False after Ctrl-C, which is raised if there is no result yet.
    """

    def report() -> None:
        on_run(progress.done, len(parts))

    complete = False
    try:
        waiting = [part for part in parts if part not in progress.results]
        if waiting:
            report()
            walk = Walk(model, text, windows)
            with np.errstate(over="ignore"):  # the model may overflow
                progress.perplexity = float(np.exp(walk.reference_nll()))
            for place, together in _groups(walk, waiting):
                walk.go_to(place)
                outcomes = walk.measure([(unit.tensors, fmt) for unit, fmt in together])
                for part, outcome in zip(together, outcomes, strict=True):
                    if isinstance(outcome, FormatError):
                        progress.failed[part] = str(outcome)
                    else:
                        progress.results[part] = _result(*part, outcome.scores, outcome.roundings)
                    progress.save()
                    if progress.done < len(parts):
                        report()
        complete = True
    except KeyboardInterrupt:
        if not progress.results:
            raise
        progress.save()
    report()
    return complete


def _groups(walk: Walk, parts: Sequence[_Part]) -> Iterator[tuple[int, list[_Part]]]:
    """(first place that is changed, parts that begin there and are measured together), in the model's order."""
    parts_at: dict[int, list[_Part]] = {}
    for unit, fmt in parts:
        parts_at.setdefault(min(walk.place_of(name) for name in unit.tensors), []).append((unit, fmt))
    for place, beginning in sorted(parts_at.items()):
        for first in range(0, len(beginning), walk.together):
            yield place, beginning[first : first + walk.together]


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
