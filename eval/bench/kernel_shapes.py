"""Every Triton kernel at DBRX's own shapes, as launches that nothing runs: what the tile choices return on a chip, read from them.

Dimension letters: `T` tokens, `N` output features, `K` input features, `D` d_model, `F` ffn hidden, `E` experts, `A` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch._meta_registrations as meta_registrations

from dbrx_q.config import NORM_EPS
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.kv import KV_FORMATS, allocate_kv
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat, offered_formats
from dbrx_q.kernels.formats.trellis_codes import CODES as TRELLIS_CODES
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import store_qkv
from dbrx_q.kernels.router import norm_route, route
from dbrx_q.kernels.triton.codes import CODES
from dbrx_q.kernels.triton.launch import Chip, Launch, recording

from .kernel_resources import launch_key

__all__ = ["BATCHES", "DBRX", "FORMATS", "TOKENS", "Shapes", "dbrx_launches", "empty_weight", "essential", "loop_key", "usual_launches"]

# The command line defers what torch has in Python for meta tensors (`dbrx_q/deferred_torch.py`); the first use of a name loads it.
_ = meta_registrations.register_meta

TOKENS = (*range(1, 17), 17, *(1 << power for power in range(5, 13)))
"""Tokens of one call: every one of the matrix-vector regime, then powers of two."""

BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences of one decode step: the sizes that CUDA graphs are kept for."""


FORMATS = tuple(
    sorted((fmt for fmt in offered_formats() if fmt.format in CODES), key=lambda fmt: (CODES[fmt.format], fmt.group_size != 64))
)
"""Every weight format that Triton kernels have code for, each with groups of 64, the default, first."""


@dataclass(frozen=True)
class Shapes:
    """The dimensions of a model that kernels see; the defaults are DBRX's."""

    width: int = 6144
    """D."""
    heads: int = 48
    """Query heads."""
    kv_heads: int = 8
    """Key/value heads."""
    channels: int = 128
    """Of a head."""
    experts: int = 16
    """E."""
    active: int = 4
    """A."""
    hidden: int = 10752
    """F."""
    vocabulary: int = 100352
    """Rows of the head."""
    context: int = 32768
    """Tokens of a sequence."""
    clip: float = 8.0
    """Bound of queries, keys and values."""
    epsilon: float = NORM_EPS
    """Of the norms."""

    @property
    def qkv(self) -> int:
        """Rows of Wqkv."""
        return (self.heads + 2 * self.kv_heads) * self.channels


DBRX = Shapes()


def empty_weight(fmt: TensorFormat, *shape: int, device: torch.device | str = "meta") -> QuantizedWeight:
    """A packed weight [..., N, K] of `fmt`, uninitialized."""
    *rows, K = shape
    N = rows[-1]
    parts = {part.name: torch.empty(*rows[:-1], *part.shape, dtype=part.dtype, device=device) for part in fmt.parts(N, K)}
    return fmt.load(parts)


@dataclass(frozen=True)
class _Call:
    """One call of an op on meta tensors."""

    name: str
    """As tables name it."""
    run: Callable[[], object]
    """Makes the call."""


def dbrx_launches(
    chip: Chip,
    *,
    formats: tuple[TensorFormat, ...] = FORMATS,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
    shapes: Shapes = DBRX,
    searched: Sequence[str] = tuple(TRELLIS_CODES),
) -> list[tuple[str, Launch]]:
    """(case, launch) of every op at the shapes of DBRX, each distinct kernel once, as the tile choices for `chip` have them.

    Args:
        chip: whose choices are read.
        formats: of weights; the KV cache is walked through all of its own.
        dtypes: of activations.
        shapes: of the model.
        searched: trellis formats whose streams are searched, with feedback and without.
    """
    distinct: dict[tuple[object, ...], tuple[str, Launch]] = {}
    for dtype in dtypes:
        for call in _calls(formats, dtype, shapes):
            with recording(chip) as launches:
                call.run()
            for launch in launches:
                distinct.setdefault(launch_key(launch), (f"{call.name} {str(dtype).removeprefix('torch.')}", launch))
    for call in _searches(searched, shapes):
        with recording(chip) as launches:
            call.run()
        for launch in launches:
            distinct.setdefault(launch_key(launch), (call.name, launch))
    return list(distinct.values())


_AROUND_THE_LOOP = frozenset({"CLIP", "FEEDBACK", "MISSING", "PROGRAMS", "RESIDUAL", "ROWS", "SLOTS", "SPLITS"})


def loop_key(launch: Launch) -> tuple[object, ...]:
    """A key that is equal for launches whose code differs only before and after the main loop."""
    loop = sorted((name, value) for name, value in launch.constants.items() if name not in _AROUND_THE_LOOP)
    types = {str(part.dtype) for part in launch.arguments if isinstance(part, torch.Tensor) and part.is_floating_point()}
    return launch.kernel.__name__, str(loop), str(sorted(types)), launch.warps, launch.stages


def essential(launches: Sequence[tuple[str, Launch]]) -> list[tuple[str, Launch]]:
    """One of all launches that share their main loop: the one with the most before and after it, which needs the most registers."""
    kept: dict[tuple[object, ...], tuple[str, Launch]] = {}
    for case, launch in launches:
        key = loop_key(launch)
        if key not in kept or _extent(launch) > _extent(kept[key][1]):
            kept[key] = case, launch
    return list(kept.values())


_USUAL = (TensorFormat("int4", 64), TensorFormat("int8", 64), *(TensorFormat.of(f"trellis{bits}") for bits in (2, 3, 4)))
_SEARCHED_TOGETHER = 128  # columns of a block of GPTQ
_USUALLY_SEARCHED = ("trellis2",)
_EVERY_FORMAT_ON = "sm_86"


def usual_launches(chip: Chip) -> list[tuple[str, Launch]]:
    """The essential launches in bfloat16: int4 and int8 weights in groups of 64, trellis formats, every KV format.

    On sm_86 also plain experts, and every other weight format that the kernels have code for, in its usual groups. The search of one
    trellis format; of all on sm_86.
    """
    if chip.name == _EVERY_FORMAT_ON:
        usual_groups = tuple(dict.fromkeys(TensorFormat.of(fmt.format) for fmt in FORMATS))
        return essential(dbrx_launches(chip, formats=usual_groups))
    launches = essential(dbrx_launches(chip, formats=_USUAL, searched=_USUALLY_SEARCHED))
    return [(case, launch) for case, launch in launches if not case.startswith("experts plain")]


def _extent(launch: Launch) -> int:
    return sum(int(launch.constants.get(name, 0)) > (name == "SPLITS") for name in _AROUND_THE_LOOP)


def _calls(formats: tuple[TensorFormat, ...], dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    for fmt in formats:
        yield from _linear(fmt, dtype, shapes)
        yield from _experts(str(fmt), partial(empty_weight, fmt), dtype, shapes)
    yield from _experts("plain", partial(_meta, dtype=dtype), dtype, shapes)
    yield from _small(dtype, shapes)
    for kv_format in KV_FORMATS:
        yield from _store(kv_format, dtype, shapes)
        yield from _attention(kv_format, dtype, shapes)


def _linear(fmt: TensorFormat, dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    D = shapes.width
    places = (("Wqkv", shapes.qkv, shapes.clip, False), ("out_proj", D, None, True), ("lm_head", shapes.vocabulary, None, False))
    for name, N, clip, adds in places:
        weight = empty_weight(fmt, N, D)
        for T in TOKENS:
            x = _meta(T, D, dtype=dtype)
            residual = _meta(T, N, dtype=dtype) if adds else None
            yield _Call(
                f"{name} {fmt} T={T}",
                partial(linear, x, weight, clip=clip, residual=residual, backend=Backend.TRITON),
            )


def _experts(name: str, weight: Callable[..., Weight], dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    E, D, F = shapes.experts, shapes.width, shapes.hidden
    w1, v1, w2 = weight(E, F, D), weight(E, F, D), weight(E, D, F)
    if isinstance(w2, torch.Tensor):  # a plain checkpoint stores [E, F, D]
        w2 = w2.new_empty(E, F, D).transpose(1, 2)
    slots = missing = _meta(E, dtype=torch.int32)
    kinds: list[tuple[str, ExpertWeights, torch.Tensor | None]] = [("", ExpertWeights(w1, v1, w2), None)]
    if name == str(FORMATS[0]):  # a slot is an offset, whatever its format
        kinds.append((" slots", ExpertWeights(w1, v1, w2, slots), missing))
    for what, layer, count in kinds:
        for T in TOKENS:
            chosen = _meta(T, shapes.active, dtype=torch.int64)
            arguments = _meta(T, D, dtype=dtype), chosen, _meta(T, shapes.active, dtype=torch.float32), layer
            yield _Call(
                f"experts {name}{what} T={T}",
                partial(moe_experts, *arguments, missing=count, backend=Backend.TRITON),
            )


def _small(dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    D, backend = shapes.width, Backend.TRITON
    weight, router = _meta(D, dtype=dtype), _meta(shapes.experts, D, dtype=dtype)
    for T in TOKENS:
        x = _meta(T, D, dtype=dtype)
        yield _Call(f"norm T={T}", partial(add_norm, x, None, weight, shapes.epsilon, backend=backend))
        yield _Call(f"add and norm T={T}", partial(add_norm, x, x, weight, shapes.epsilon, backend=backend))
        yield _Call(f"norm and router T={T}", partial(norm_route, x, weight, shapes.epsilon, router, shapes.active, 1, backend=backend))
        yield _Call(f"router T={T}", partial(route, x, router, shapes.active, 1, backend=backend))


def _searches(names: Sequence[str], shapes: Shapes) -> Iterator[_Call]:
    from dbrx_q.kernels.triton import viterbi as triton_viterbi

    N, K, B = shapes.hidden, shapes.width, _SEARCHED_TOGETHER
    for name in names:
        code: TrellisCode = TRELLIS_CODES[name]
        scales, factor = _meta(N, dtype=torch.float16), _meta(B, B, dtype=torch.float32)
        yield _Call(f"search {name}", partial(triton_viterbi.trellis_block, _meta(B, N, dtype=torch.float32), factor, scales, code))
        yield _Call(f"search {name}, no feedback", partial(triton_viterbi.encode, _meta(N, K, dtype=torch.float32), scales, code))


def _store(kv_format: str, dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    C = shapes.channels
    for T in TOKENS:
        cache = allocate_kv(kv_format, T, shapes.kv_heads, shapes.context, C, dtype, torch.device("meta"))
        angles = _meta(T, C // 2, dtype=torch.float32)
        places = _meta(T, dtype=torch.int32)
        qkv = _meta(T, shapes.qkv, dtype=dtype)
        yield _Call(
            f"store {kv_format} T={T}",
            partial(store_qkv, qkv, cache, places, places, angles, angles, heads=shapes.heads, clip=shapes.clip, backend=Backend.TRITON),
        )


def _attention(kv_format: str, dtype: torch.dtype, shapes: Shapes) -> Iterator[_Call]:
    from dbrx_q.kernels.triton import attention_decode as triton_attention_decode
    from dbrx_q.kernels.triton import attention_prefill as triton_attention_prefill

    H, C = shapes.heads, shapes.channels
    for B in BATCHES:
        cache = allocate_kv(kv_format, B, shapes.kv_heads, shapes.context, C, dtype, torch.device("meta"))
        q, lengths, starts = _meta(B, H, C, dtype=dtype), _meta(B, dtype=torch.int32), _meta(B + 1, dtype=torch.int32)
        for what, rows in ((f"{kv_format} B={B}", None), (f"{kv_format} rows B={B}", lengths)):
            yield _Call(f"decode {what}", partial(triton_attention_decode.decode, q, cache, lengths, rows))
            yield _Call(f"prefill {what}", partial(triton_attention_prefill.prefill, q, cache, starts, lengths, rows, 512))


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
