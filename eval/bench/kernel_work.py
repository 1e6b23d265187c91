"""The work that the kernel benchmark times, at DBRX's shapes: by our kernels and by the alternatives that a user has.

Dimension letters: `T` tokens, `E` experts, `A` active experts, `D` d_model, `F` ffn hidden, `N` output features, `K` input features,
`B` sequences, `H`/`G` query and key/value heads, `L` tokens in the cache, `C` channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dbrx_q.kernels.attention import Sequences, cached_attention
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.kv import KVLayer, allocate_kv
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import store_qkv
from dbrx_q.kernels.router import norm_route, route

from .device_timing import copies, random_weight
from .kernel_shapes import DBRX, Shapes

if TYPE_CHECKING:
    from dbrx_q.model.modeling import DbrxForCausalLM

__all__ = ["COPY", "MATMUL", "NamedWork", "Work", "dbrx_works", "decode_step_work", "step_work"]

COPY, MATMUL = "copy bandwidth", "bf16 matmul rate"
"""The ceilings that a row can have."""
_INT4, _INT8, _NF4 = TensorFormat("int4", 64), TensorFormat("int8", 64), TensorFormat("nf4", 64)
_TRELLIS = tuple(TensorFormat.of(f"trellis{bits}") for bits in (2, 3, 4))
_BF16 = torch.bfloat16
_DEQUANTIZE = "dequantize, then matmul"

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """One row of the benchmark."""

    kernel: str
    """Name of the op."""
    case: str
    """Format and sizes, in words."""
    ceiling: str
    """COPY or MATMUL."""
    amount: float
    """Packed bytes to read if the ceiling is COPY, floating-point operations if it is MATMUL."""
    contenders: dict[str, Callable[[], Calls]]
    """By name, functions that prepare the calls; our kernel is "dbrx_q"."""
    target: float | None = None
    """Share of the ceiling that our kernel should reach."""
    rival: str | None = None
    """A contender that our kernel should be faster than."""
    capture: bool = True
    """Whether to capture the calls in a CUDA graph; False if they replay one themselves."""


@dataclass(frozen=True)
class NamedWork:
    """A row that is not built yet, so that the weights of one row are in memory at a time."""

    name: str
    """Op, format and sizes; names differ between rows."""
    make: Callable[[], Work]
    """Allocates its inputs."""


def dbrx_works(device: torch.device, shapes: Shapes = DBRX) -> Iterator[NamedWork]:
    """Each row except the whole decode step.

    Args:
        device: of the inputs; "meta" to record launches.
        shapes: of the model.
    """
    for fmt, T, target in ((_INT4, 1, 0.75), (_INT4, 8, 0.70), (_INT4, 4096, 0.55), (_INT8, 1, None), (_NF4, 1, None), (_INT8, 4096, None)):
        yield NamedWork(f"moe_experts {fmt} T={T}", partial(_experts, fmt, T, target, device, shapes))
    for fmt in _TRELLIS:
        yield NamedWork(f"moe_experts {fmt} T=1", partial(_experts, fmt, 1, None, device, shapes))
    for name, N in (("Wqkv", shapes.qkv), ("out_proj", shapes.width), ("lm_head", shapes.vocabulary)):
        for fmt in (_INT8, _INT4, _NF4):
            for T in (1, 8, 4096) if name == "Wqkv" else (1,):
                target = 0.75 if T == 1 and name != "lm_head" and fmt is not _NF4 else None
                yield NamedWork(f"{name} {fmt} T={T}", partial(_linear, name, N, fmt, T, target, device, shapes))
    for kv_format in ("int8", "int4", "plain"):
        for B in (1, 8):
            target = 0.75 if kv_format == "int8" else None
            yield NamedWork(f"attention decode {kv_format} B={B}", partial(_decode_attention, kv_format, B, target, device, shapes))
    yield NamedWork("attention prefill plain", partial(_prefill_attention, "plain", 4096, 0, device, shapes))
    yield NamedWork("attention prefill int8", partial(_prefill_attention, "int8", 2048, 30720, device, shapes))
    for T in (1, 8):
        for name, make in (("router", _router), ("norm", _norm), ("norm and router", _norm_and_router), ("store", _store)):
            yield NamedWork(f"{name} T={T}", partial(make, T, device, shapes))


def _experts(fmt: TensorFormat, T: int, target: float | None, device: torch.device, shapes: Shapes) -> Work:
    E, A, D, hidden = shapes.experts, shapes.active, shapes.width, shapes.hidden
    torch.manual_seed(0)
    w1, v1, w2 = (random_weight(fmt, E, *shape, device=device) for shape in ((hidden, D), (hidden, D), (D, hidden)))
    layer = ExpertWeights(w1, v1, w2)
    x = torch.randn(T, D, dtype=_BF16, device=device)
    experts = torch.rand(T, E, device=device).argsort(-1)[:, :A].contiguous()
    weights = torch.full((T, A), 1 / A, device=device)
    active = list(range(min(E, T * A))) if device.type == "meta" else experts.unique().tolist()
    pairs = {} if device.type == "meta" else {e: (experts == e).nonzero(as_tuple=True) for e in active}

    def by_expert(products: Callable[[int, str], Callable[[torch.Tensor], torch.Tensor]]) -> Calls:
        """One expert after the other. The host knows the pairs in advance, which spares the peer a synchronization."""
        multiply = {e: {name: products(e, name) for name in ("w1", "v1", "w2")} for e in active}

        def run() -> torch.Tensor:
            y = torch.zeros_like(x)
            for e, (tokens, rank) in pairs.items():
                part = x[tokens]
                h = F.silu(multiply[e]["w1"](part)) * multiply[e]["v1"](part)
                y.index_add_(0, tokens, multiply[e]["w2"](h) * weights[tokens, rank, None].to(_BF16))
            return y

        return [run]

    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(moe_experts, x, experts, weights, layer)],
        _DEQUANTIZE: lambda: by_expert(lambda e, name: partial(_dequantized, getattr(layer, name)[e])),
    }
    packed = _packed_peer(fmt)
    if packed is not None and T < 4096:
        peer, prepare = packed
        matrices = {"w1": (hidden, D), "v1": (hidden, D), "w2": (D, hidden)}
        contenders[peer] = lambda: by_expert(lambda e, name: prepare(*matrices[name], device))
    case = f"{fmt}, {T} token{'s' * (T > 1)}"
    if T < 4096:
        nbytes = sum(getattr(layer, name)[e].nbytes for name in ("w1", "v1", "w2") for e in active)
        return Work("moe_experts", f"{case} ({len(active)} experts)", COPY, nbytes, contenders, target)
    return Work("moe_experts", case, MATMUL, 2 * 3 * T * A * D * hidden, contenders, target)


def _linear(name: str, N: int, fmt: TensorFormat, T: int, target: float | None, device: torch.device, shapes: Shapes) -> Work:
    K = shapes.width
    x = torch.randn(T, K, dtype=_BF16, device=device)
    weights = [random_weight(fmt, N, K, device=device) for _ in range(copies(N * K * fmt.record.bits // 8, device))]
    clip = shapes.clip if name == "Wqkv" else None
    residual = torch.randn(T, N, dtype=_BF16, device=device) if name == "out_proj" else None
    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(linear, x, weight, clip=clip, residual=residual) for weight in weights],
        _DEQUANTIZE: lambda: [partial(_dequantized, weights[0], x)],
        "bf16 weight": lambda: [partial(F.linear, x, plain) for plain in _plain(N, K, device)],
    }
    packed = _packed_peer(fmt)
    if packed is not None:
        peer, prepare = packed
        contenders[peer] = lambda: [partial(prepare(N, K, device), x) for _ in weights]
    decode = T < 4096
    amount = weights[0].nbytes if decode else 2 * T * N * K
    case = f"{name}, {fmt}, {T} token{'s' * (T > 1)}"
    return Work("linear", case, COPY if decode else MATMUL, amount, contenders, target)


def _decode_attention(kv_format: str, B: int, target: float | None, device: torch.device, shapes: Shapes) -> Work:
    H, G, L, C = shapes.heads, shapes.kv_heads, shapes.context, shapes.channels
    q = torch.randn(B, H, C, dtype=_BF16, device=device)
    cache = _filled(kv_format, B, L, device, shapes)
    caches = [cache] + [_filled(kv_format, B, L, device, shapes) for _ in range(copies(cache.nbytes, device) - 1)]
    sequences = _sequences((1,) * B, (L,) * B, device)

    def sdpa() -> Calls:
        keys, values = (torch.randn(B, G, L, C, dtype=_BF16, device=device) for _ in range(2))
        return [partial(F.scaled_dot_product_attention, q.view(B, G, H // G, C), keys, values)]

    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(cached_attention, q, layer, sequences, implementation="triton") for layer in caches],
        "SDPA on bf16": sdpa,
    }
    rival = "SDPA on bf16" if target is not None else None
    return Work("attention decode", f"{kv_format} KV, context {L}, batch {B}", COPY, cache.nbytes, contenders, target, rival)


def _prefill_attention(kv_format: str, T: int, before: int, device: torch.device, shapes: Shapes) -> Work:
    H, G, C, L = shapes.heads, shapes.kv_heads, shapes.channels, T + before
    q = torch.randn(T, H, C, dtype=_BF16, device=device)
    cache, sequences = _filled(kv_format, 1, L, device, shapes), _sequences((T,), (L,), device)

    def sdpa() -> Calls:
        keys, values = (torch.randn(1, G, L, C, dtype=_BF16, device=device) for _ in range(2))
        mask = torch.ones(T, L, dtype=torch.bool, device=device).tril(before) if before else None
        call = partial(F.scaled_dot_product_attention, enable_gqa=True, attn_mask=mask, is_causal=mask is None)
        return [partial(call, q.transpose(0, 1)[None], keys, values)]

    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(cached_attention, q, cache, sequences, implementation="triton")],
        "SDPA on bf16": sdpa,
    }
    pairs = T * before + T * (T + 1) // 2  # of a query and a key
    return Work("attention prefill", f"{kv_format} KV, {T} tokens after {before}", MATMUL, 4 * H * C * pairs, contenders)


def _router(T: int, device: torch.device, shapes: Shapes) -> Work:
    x = torch.randn(T, shapes.width, dtype=_BF16, device=device)
    router = torch.randn(shapes.experts, shapes.width, dtype=_BF16, device=device)

    def by_torch() -> torch.Tensor:
        return (x.float() @ router.float().T).softmax(-1).topk(shapes.active).values

    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(route, x, router, shapes.active, 1)],
        "torch ops": lambda: [by_torch],
    }
    return Work("router", _tokens(T), COPY, x.nbytes + router.nbytes, contenders)


def _norm(T: int, device: torch.device, shapes: Shapes) -> Work:
    x, delta = (torch.randn(T, shapes.width, dtype=_BF16, device=device) for _ in range(2))
    weight = torch.ones(shapes.width, dtype=_BF16, device=device)
    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(add_norm, x, delta, weight, shapes.epsilon)],
        "torch ops": lambda: [lambda: F.layer_norm(x + delta, (shapes.width,), weight)],
    }
    return Work("add and norm", _tokens(T), COPY, 4 * x.nbytes, contenders)


def _norm_and_router(T: int, device: torch.device, shapes: Shapes) -> Work:
    x = torch.randn(T, shapes.width, dtype=_BF16, device=device)
    router = torch.randn(shapes.experts, shapes.width, dtype=_BF16, device=device)
    weight = torch.ones(shapes.width, dtype=_BF16, device=device)

    def by_torch() -> torch.Tensor:
        normed = F.layer_norm(x, (shapes.width,), weight)
        return (normed.float() @ router.float().T).softmax(-1).topk(shapes.active).values

    contenders: dict[str, Callable[[], Calls]] = {
        "dbrx_q": lambda: [partial(norm_route, x, weight, shapes.epsilon, router, shapes.active, 1)],
        "torch ops": lambda: [by_torch],
    }
    return Work("norm and router", _tokens(T), COPY, 2 * x.nbytes + router.nbytes, contenders)


def _store(T: int, device: torch.device, shapes: Shapes) -> Work:
    qkv = torch.randn(T, shapes.qkv, dtype=_BF16, device=device)
    cache = allocate_kv("int8", T, shapes.kv_heads, 1024, shapes.channels, _BF16, device)
    rows = torch.arange(T, dtype=torch.int32, device=device)
    angles = torch.randn(T, shapes.channels // 2, device=device)
    call = partial(store_qkv, qkv, cache, rows, rows, angles.cos(), angles.sin(), heads=shapes.heads, clip=shapes.clip)
    return Work("store qkv", f"int8 KV, {_tokens(T)}", COPY, 2 * qkv.nbytes, {"dbrx_q": lambda: [call]})


def decode_step_work(folder: Path, device: torch.device) -> Work:
    """`step_work` of the model in `folder`."""
    from dbrx_q.model.modeling import DbrxForCausalLM

    return step_work(DbrxForCausalLM.from_pretrained(folder, device=str(device), attn_implementation="triton"))


def step_work(model: DbrxForCausalLM, *, kv_format: str = "int8", context: int = 1024) -> Work:
    """One decode step of a whole model, as `generate` runs it: one sequence, its token the last of `context` in the cache.

    A step writes its inputs on the host before it replays its graph; `turns` hides that behind a spin.
    """
    from dbrx_q.checkpoint.layout import kind_of
    from dbrx_q.generation.decode_graph import DecodeStep
    from dbrx_q.model.kv_cache import KVCache

    config = model.config
    cache = KVCache(config, 1, context, dtype=model.dtype, device=model.device, format=kv_format)
    step = DecodeStep(model, cache, 1)
    share = {"embedding": 0.0, "experts": config.ffn_config.moe_top_k / config.ffn_config.moe_num_experts}
    tensors = chain(model.named_parameters(), model.named_buffers())
    weights = sum(tensor.nbytes * share.get(kind_of(name), 1.0) for name, tensor in tensors)
    case = f"{config.n_layers} layers, {kv_format} KV, context {context}, {'CUDA graph' if step.captured else 'no graph'}"
    call = partial(step, [0], [context], [0])
    return Work("decode step", case, COPY, weights + cache.nbytes, {"dbrx_q": lambda: [call]}, 0.70, capture=False)


def _dequantized(weight: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, dequantize(weight, _BF16))


def _plain(N: int, K: int, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(N, K, dtype=_BF16, device=device) for _ in range(copies(2 * N * K, device))]


_Prepare = Callable[[int, int, torch.device], Callable[[torch.Tensor], torch.Tensor]]


def _packed_peer(fmt: TensorFormat) -> tuple[str, _Prepare] | None:
    """Another library's product with packed weights: its name, and a function that prepares one with a random weight [N, K]."""
    if fmt.format == "int4":
        return "torch._weight_int4pack_mm", partial(_int4pack, fmt.group_size)
    if fmt.format == "nf4":
        return "bitsandbytes NF4", _bitsandbytes
    return None


def _int4pack(group: int, N: int, K: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    codes = torch.empty(N, K // 2, dtype=torch.uint8, device=device).random_(0, 256)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = torch.empty(K // group, N, 2, dtype=_BF16, device=device).uniform_(0.002, 0.004)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)


def _bitsandbytes(N: int, K: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(torch.randn(N, K, dtype=_BF16, device=device), blocksize=64, quant_type="nf4")
    return lambda x: matmul_4bit(x, codes.t(), quant_state=state)


def _filled(kv_format: str, B: int, L: int, device: torch.device, shapes: Shapes) -> KVLayer:
    cache = allocate_kv(kv_format, B, shapes.kv_heads, L, shapes.channels, _BF16, device)
    for part in (cache.keys, cache.values):
        if part.is_floating_point():
            part.normal_()
        else:
            part.random_(0, 256) if part.dtype == torch.uint8 else part.random_(-127, 128)
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.uniform_(0.01, 0.02)
    return cache


def _sequences(counts: tuple[int, ...], ends: tuple[int, ...], device: torch.device) -> Sequences:
    starts = torch.tensor((0, *counts), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(ends, dtype=torch.int32, device=device)
    return Sequences(starts, lengths, counts, ends)


def _tokens(T: int) -> str:
    return f"{T} token{'s' * (T > 1)}"
