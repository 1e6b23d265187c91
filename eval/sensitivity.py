"""Sensitivity: what a model loses where one part of it is rounded to a packed format and all the rest stays as it is.

Weights are rounded to nearest, as `dbrx-q quantize` rounds them, and decoded into the model's own dtype, so that a format can be measured
on any tensor, whether or not a kernel of it is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.kernels.groups import check_group_size
from dbrx_q.layers import PackedWeight
from dbrx_q.layout import GROUP_SIZES, TensorFormat, kind_of
from dbrx_q.model import DbrxForCausalLM

from .divergence import TokenScores, mean_and_stderr
from .observe import check_ids
from .rounding import Rounding
from .texts import Text
from .walk import Walk, packable
from .windows import Protocol

__all__ = ["BY", "Sensitivity", "Unit", "UnitResult", "check_formats", "sensitivity", "units_of"]

BY = ("kind", "layer", "tensor")
"""What is rounded at a time."""

_KINDS = ("embedding", "attention", "experts", "head")
_MATRICES = ("Wqkv", "out_proj", "w1", "v1", "w2")


@dataclass(frozen=True)
class Unit:
    """What is rounded together. name: in tables and plots. tensors: their names in a plain checkpoint."""

    name: str
    tensors: tuple[str, ...]


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
class Sensitivity:
    """The JSON object of `dbrx-q sensitivity`, for whoever allots bits to tensors; later versions may add fields and rename none.

    checkpoint, text: as given; sha256, text_sha256: of the weights and of the text's UTF-8 bytes. by: one of `BY`. dtype: of activations
    and decoded weights. protocol, context: how the text was cut. windows, tokens: of every measurement (tokens: those predicted).
    perplexity: of the model as it is. complete: False where the run was interrupted: units that are there are whole. units: in the
    model's order; of a unit, formats in the order of their request. provenance: versions, device, command line.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for a figure that is not finite, such as the perplexity of a model that overflows."""
        found = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        assert isinstance(found, dict)
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """What `to_dict` gave; NaN for a figure that is None."""
        units = [UnitResult(**_figures(unit)) for unit in data["units"]]
        return cls(**(_figures(data) | {"units": units}))


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


def check_formats(config: DbrxConfig, units: Sequence[Unit], formats: Sequence[TensorFormat]) -> None:
    """Refuse formats that a unit's tensors cannot have.

    Raises:
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis.
    """
    tensors = {tensor.name: tensor for tensor in packable(config)}
    for fmt in formats:
        for name in dict.fromkeys(name for unit in units for name in unit.tensors):
            try:
                check_group_size(tensors[name].matrix[1], fmt.group_size, GROUP_SIZES[fmt.format])
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
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure every unit in every format. The model's weights are never written to, and are in place again afterwards.

    A unit is run from the first block that it changes, on what the blocks before make of the text: the same to the last bit as a run from
    the start. Of all windows the residual stream and the last hidden states are held, 3 D numbers a token, and of one block a second copy
    of the weights that are rounded; experts that are streamed stay so.

    Args:
        model: a model with plain weights.
        ids: the text's token ids.
        protocol: how the text is cut into windows; each is run whole.
        units: what `units_of` gave.
        formats: what each is rounded to.
        checkpoint: for the record, as sha256, text, by and provenance.
        on_run: called with (units in a format that are done, in all).

    Returns:
        The figures; of Ctrl-C those of the units that are done, if any are.

    Raises:
        RequestError: a model with packed weights, a text shorter than one window, a context that the model does not have, or ids that it
            does not know.
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis.
    """
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise RequestError("sensitivity must start from a model with plain weights; found packed ones. Give the checkpoint they come from")
    protocol.check(len(ids), model.config, source=text.name)
    check_ids(ids, model.config.vocab_size)
    check_formats(model.config, units, formats)
    windows = protocol.windows(len(ids))
    walk = Walk(model, torch.tensor(ids), windows)
    found: dict[tuple[int, int], UnitResult] = {}
    total = len(units) * len(formats)
    complete = False
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(walk.reference_nll()))
    try:
        first = [min(walk.place_of(name) for name in unit.tensors) for unit in units]
        for place in sorted(set(first)):
            walk.go_to(place)
            for index in (index for index, other in enumerate(first) if other == place):
                for number, fmt in enumerate(formats):
                    on_run(len(found), total)
                    found[index, number] = _result(units[index], fmt, *walk.measure(units[index].tensors, fmt))
        complete = True
    except KeyboardInterrupt:
        if not found:
            raise
    on_run(len(found), total)
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
        units=[found[key] for key in sorted(found)],
        provenance=provenance,
    )


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
