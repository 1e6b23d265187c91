"""Which tensor gets which format: one for all experts, rules that name others for some tensors, or what serves a number of bits best."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dbrx_q.checkpoint.layout import (
    ATTENTION_MATRICES,
    EXPERT_MATRICES,
    DenseTensor,
    TensorFormat,
    dense_tensors,
    embedding_formats,
    kind_of,
    may_have,
    parts_of,
)
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import FormatError, RequestError
from dbrx_q.kernels.formats.registry import FORMATS, PLAIN, offered_formats
from dbrx_q.quantize.calibration.allocation import FormatChoice, allocate
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.sources.kept_formats import exact_formats

if TYPE_CHECKING:
    import torch

    from dbrx_q.checkpoint.stored_weights import StoredWeights
    from dbrx_q.quantize.calibration.output_errors import OutputErrors

__all__ = [
    "EXPERT_FORMATS",
    "OTHER_FORMATS",
    "allocated_formats",
    "default_formats",
    "fallback_formats",
    "fast_formats",
    "kept_or_default",
    "override",
    "parse_rules",
]

EXPERT_FORMATS = (
    *(TensorFormat(name, size) for name in ("trellis2", "trellis3", "trellis4") for size in FORMATS[name].group_sizes),
    *(TensorFormat("int4", 128), TensorFormat("int4", 64), TensorFormat("int4", 32), TensorFormat("int8", 128)),
)
"""That `allocated_formats` chooses from for experts; of a trellis format the largest group size that divides a matrix."""
OTHER_FORMATS = (*EXPERT_FORMATS, TensorFormat("int8", 64), None)
"""For attention, embedding (only those of 8 bits) and head, None for plain."""

_INT8_KINDS = ("embedding", "attention", "head")
_INT8_GROUP = 64  # the largest group of those kinds
_NAMES = (*EXPERT_MATRICES, "experts", "attention", *ATTENTION_MATRICES, "embedding", "head")
_RULE = re.compile(r"(?:blocks\.(?P<first>\d+)(?:-(?P<last>\d+))?\.)?(?P<name>\w+)=(?P<format>[\w-]+(?::\d+)?)")


def default_formats(config: DbrxConfig, experts: TensorFormat) -> dict[str, TensorFormat]:
    """Experts in the given format; embedding, attention and head int8, in groups of at most 64; router and norms as they are.

    The groups of int8 are no larger than the experts', or int8's smallest where the experts' are smaller than that.

    Raises:
        FormatError: a group size that is not offered or does not divide a tensor's reduction axis.
    """
    sizes = FORMATS["int8"].group_sizes
    others = TensorFormat("int8", max((size for size in sizes if size <= min(experts.group_size, _INT8_GROUP)), default=min(sizes)))
    formats = {}
    for tensor in dense_tensors(config):
        kind = kind_of(tensor.name)
        if kind == "experts" or kind in _INT8_KINDS:
            fmt = experts if kind == "experts" else others
            formats[tensor.name] = fmt
            try:
                fmt.check(tensor.matrix[1])
            except FormatError as error:
                raise FormatError(f"{tensor.name}: {error}. Choose another --group-size or --format") from None
    return formats


def fallback_formats(config: DbrxConfig, name: str) -> dict[str, TensorFormat]:
    """`default_formats` with the experts in the format `name`: in its default group size or, where that does not divide their inputs, the
    largest that does.

    Raises:
        FormatError: no group size of the format divides the inputs.
    """
    inputs = [tensor.matrix[1] for tensor in dense_tensors(config) if tensor.experts]
    default = TensorFormat.of(name)
    sizes = (default.group_size, *sorted(default.record.group_sizes, reverse=True))
    fitting = [size for size in sizes if all(K % size == 0 for K in inputs)]
    return default_formats(config, TensorFormat(name, fitting[0]) if fitting else default)


def fast_formats(formats: Mapping[str, TensorFormat]) -> dict[str, TensorFormat]:
    """The formats, trellis formats with the quicker search."""
    return {name: fmt.fast for name, fmt in formats.items()}


def kept_or_default(checkpoint: StoredWeights, defaults: Mapping[str, TensorFormat]) -> dict[str, TensorFormat]:
    """The formats that hold stored codes exactly; of the other tensors those in `defaults`, but none for plain matrices outside the
    experts, which stay plain.

    Raises:
        RequestError: no tensor can be kept.
    """
    kept = exact_formats(checkpoint)
    if not kept:
        labels = ", ".join(sorted({checkpoint.label_of(tensor.name) for tensor in checkpoint.tensors.values() if tensor.experts}))
        raise RequestError(
            f"{checkpoint.folder}: --keep repacks weights whose codes a format holds exactly; found {labels}. Leave --keep out"
        )
    stays_plain = {tensor.name for tensor in checkpoint.tensors.values() if not tensor.experts and checkpoint.is_plain(tensor.name)}
    return {name: fmt for name, fmt in {**defaults, **kept}.items() if name not in stays_plain}


def override(formats: Mapping[str, TensorFormat], config: DbrxConfig, rules: Sequence[str]) -> dict[str, TensorFormat]:
    """`formats` with what the rules say of some tensors; one that a rule leaves plain is not in it.

    Args:
        formats: of the tensors that are packed.
        config: the model's.
        rules: as `parse_rules` reads them.

    Raises:
        RequestError: as `parse_rules` does.
    """
    changed: dict[str, TensorFormat | None] = {**formats, **parse_rules(config, rules)}
    return {tensor.name: fmt for tensor in dense_tensors(config) if (fmt := changed.get(tensor.name)) is not None}


def parse_rules(config: DbrxConfig, rules: Sequence[str]) -> dict[str, TensorFormat | None]:
    """The formats that rules give to tensors, None for plain; of several rules for a tensor the last.

    A rule is `NAME=FORMAT`, as `w2=int8:128`, or `blocks.A-B.NAME=FORMAT` for some blocks (`blocks.A.` for one). NAME: w1, v1, w2,
    experts (those three), Wqkv, out_proj, attention (those two), embedding or head. FORMAT: as `TensorFormat.parse` reads it, such as
    `int4:64` or `nf4`; or `plain`, which keeps the tensor as the source has it. Experts cannot be plain, and the embedding is plain or
    has a format whose record allows it.

    Raises:
        RequestError: a malformed rule, or one that matches no tensor or gives a tensor a format that it cannot have.
    """
    formats: dict[str, TensorFormat | None] = {}
    for rule in rules:
        tensors, fmt = _read(config, rule)
        formats |= {tensor.name: _checked(rule, tensor, fmt) for tensor in tensors}
    return formats


def _read(config: DbrxConfig, rule: str) -> tuple[list[DenseTensor], TensorFormat | None]:
    """The tensors that a rule names, and the format that it gives them."""
    match = _RULE.fullmatch(rule.strip())
    if match is None:
        raise RequestError(
            f"a --tensor rule must read NAME=FORMAT or blocks.A-B.NAME=FORMAT; found {rule!r}. For example blocks.0-3.w2=int8:64"
        )
    name, first, last = match["name"], match["first"], match["last"]
    if name not in _NAMES:
        raise RequestError(
            f"a --tensor rule must name one of {', '.join(_NAMES)}; found {name!r} in {rule!r}. Router and norms stay as they are"
        )
    blocks = range(config.n_layers) if first is None else range(int(first), int(last or first) + 1)
    if not blocks or blocks[-1] >= config.n_layers:
        raise RequestError(
            f"the blocks of a --tensor rule must run upwards within 0-{config.n_layers - 1}; found {rule!r}. Name those of this model"
        )
    wanted = [
        tensor
        for tensor in dense_tensors(config)
        if name in (kind_of(tensor.name), tensor.role) and (first is None or tensor.layer in blocks)
    ]
    if not wanted:
        raise RequestError(f"a --tensor rule must match a tensor; {rule!r} matches none, as {name} is outside the blocks. Write {name}=...")
    return wanted, _format(rule, match["format"])


def _format(rule: str, text: str) -> TensorFormat | None:
    if text == PLAIN:
        return None
    try:
        return TensorFormat.parse(text)
    except FormatError:
        offered = ", ".join(map(str, offered_formats()))
        raise RequestError(
            f"the format of a --tensor rule must be one of {offered} or {PLAIN}; found {text!r} in {rule!r}. Name one of them"
        ) from None


def _checked(rule: str, tensor: DenseTensor, fmt: TensorFormat | None) -> TensorFormat | None:
    """The format, if the tensor can have it."""
    kind = kind_of(tensor.name)
    if fmt is None:
        if kind == "experts":
            raise RequestError(f"experts must be packed in every layer; found {rule!r}. Name a format, as int8:128")
        return None
    if not may_have(tensor.name, fmt):
        raise RequestError(f"the embedding must be {embedding_formats()}; found {rule!r}. Name one of them")
    try:
        fmt.check(tensor.matrix[1])
    except FormatError as error:
        raise RequestError(f"{tensor.name}: {error}, by the rule {rule!r}. Choose another group size or format") from None
    return fmt


def allocated_formats(
    checkpoint: StoredWeights,
    sequences: torch.Tensor,
    target_bpw: float,
    *,
    method: str = "rtn",
    experts: Sequence[TensorFormat] = EXPERT_FORMATS,
    others: Sequence[TensorFormat | None] = OTHER_FORMATS,
    rules: Sequence[str] = (),
    sources: Sequence[int] | None = None,
    tokens: int = 2048,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TensorFormat]:
    """The formats with which the whole checkpoint takes at most so many bits per weight and its measured errors do least harm.

    Args:
        checkpoint: a plain one.
        sequences: int64 [B, S], ids of text like that which the model is for.
        target_bpw: stored bits over parameters, scales, zero-points, router and norms included.
        method: the name of the quantization method; formats that it does not make are not on offer.
        experts: formats on offer for w1, v1 and w2; those that do not fit a tensor's shape are skipped.
        others: formats on offer for attention, embedding (only those of 8 bits that it may have) and head; None for plain.
        rules: as `parse_rules` takes them; they fix the formats of the tensors that they name.
        sources: the number of each sequence's source; the errors are those of the source where they are largest.
        tokens: the most tokens to measure on, as `output_errors` takes them.
        on_layer: called with (layers measured, layers in all).

    Raises:
        RequestError: a target that no mix reaches, with the range that can be, or a rule as `parse_rules` refuses it.
        FormatError: experts that none of the formats on offer fits.
    """
    from dbrx_q.quantize.calibration.output_errors import output_errors

    fixed = parse_rules(checkpoint.config, rules)
    experts = [fmt for fmt in experts if fmt.format in METHODS[method].formats]
    others = [fmt for fmt in others if fmt is None or fmt.format in METHODS[method].formats]
    offered: dict[str, tuple[TensorFormat | None, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        kind = kind_of(name)
        if name in fixed:
            offered[name] = (fixed[name],)
        elif kind in ("router", "norms"):
            offered[name] = (None,)
        else:
            offered[name] = _fitting(tensor, experts if kind == "experts" else others)
            if not offered[name]:
                names = ", ".join(map(str, experts))
                raise FormatError(f"{name}: one of the formats on offer must divide its {tensor.matrix[1]} inputs; found {names}")
    bits = {name: [_bits(checkpoint, tensor, fmt) for fmt in offered[name]] for name, tensor in checkpoint.tensors.items()}
    target = _target(target_bpw, bits, sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()))
    packed = {name: kept for name, formats in offered.items() if (kept := [fmt for fmt in formats if fmt is not None])}
    measured = output_errors(checkpoint, sequences, packed, sources=sources, tokens=tokens, on_layer=on_layer)
    errors = {name: dict(zip(formats, measured.errors[name], strict=True)) for name, formats in packed.items()}
    choices = {
        name: [FormatChoice(fmt, size, errors[name][fmt] if fmt else 0.0) for fmt, size in zip(formats, bits[name], strict=True)]
        for name, formats in offered.items()
    }
    return {name: choice.fmt for name, choice in _least_harm(choices, measured, target).items() if choice.fmt is not None}


def _least_harm(choices: Mapping[str, Sequence[FormatChoice]], measured: OutputErrors, target: int) -> dict[str, FormatChoice]:
    """The formats of the least error at the end of the model.

    How much a tensor's error changes the end depends on the other errors that reach the same routers. So errors are weighted by their
    effect, formats are allocated, and both are repeated with the new errors while the total decreases.
    """
    best: dict[str, FormatChoice] = {}
    least = math.inf
    weights = dict.fromkeys(choices, 1.0)
    while True:
        weighted = {
            name: [replace(choice, error=weights[name] * choice.error) for choice in of_tensor] for name, of_tensor in choices.items()
        }
        formats = {name: choice.fmt for name, choice in allocate(weighted, target).items()}
        picked = {name: next(choice for choice in choices[name] if choice.fmt == fmt) for name, fmt in formats.items()}
        errors = {name: choice.error for name, choice in picked.items() if name in measured.errors}
        total = measured.total(errors)
        if total >= least:
            return best
        best, least, weights = picked, total, weights | measured.weights(errors)


def _target(target_bpw: float, bits: Mapping[str, Sequence[int]], parameters: int) -> int:
    """The bits that all tensors together may take."""
    least, most = (sum(of(sizes) for sizes in bits.values()) / parameters for of in (min, max))
    if not least <= target_bpw <= most:
        reach = f"from {math.ceil(1000 * least) / 1000:.3f} to {math.floor(1000 * most) / 1000:.3f} bits per weight"
        raise RequestError(f"the target must be one that a mix of formats reaches, {reach} for this checkpoint; found {target_bpw}")
    return math.floor(target_bpw * parameters)


def _fitting(tensor: DenseTensor, formats: Sequence[TensorFormat | None]) -> tuple[TensorFormat | None, ...]:
    """The formats that a tensor can have; of a trellis format the first group size, since all of them take the same bits."""
    fitting: list[TensorFormat | None] = []
    for fmt in formats:
        repeated = fmt is not None and fmt.record.trellis is not None and any(other and other.format == fmt.format for other in fitting)
        if _fits(tensor, fmt) and not repeated:
            fitting.append(fmt)
    return tuple(fitting)


def _fits(tensor: DenseTensor, fmt: TensorFormat | None) -> bool:
    if fmt is None:
        return not tensor.experts
    embedding_of_4_bits = kind_of(tensor.name) == "embedding" and fmt.record.bits < 8
    return tensor.matrix[1] % fmt.group_size == 0 and may_have(tensor.name, fmt) and not embedding_of_4_bits


def _bits(checkpoint: StoredWeights, tensor: DenseTensor, fmt: TensorFormat | None) -> int:
    """Bits of all parts of a tensor as they are written: of one that another program packed, plain means dequantized."""
    if fmt is None:
        return 8 * math.prod(tensor.shape) * checkpoint.dtype_of(tensor.name).itemsize
    return 8 * sum(math.prod(part.shape) * part.dtype.itemsize for part in parts_of(tensor, fmt))
