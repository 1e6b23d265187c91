"""Speed and memory of a checkpoint on the CPU, each speed beside the read bandwidth of the same minute."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from dbrx_q.checkpoint import Checkpoint
from dbrx_q.decoding import decode_one_token, prefill
from dbrx_q.kv_cache import KVCache
from dbrx_q.layout import kind_of
from dbrx_q.model import DbrxForCausalLM

__all__ = ["CpuBenchmark", "bench_cpu"]

_READ_BYTES = 1 << 30
_VOCABULARY_SEED = 0


@dataclass(frozen=True)
class CpuBenchmark:
    """Medians. Memory in bytes, times in seconds, speeds in tokens/s, bandwidths in bytes/s.

    bytes: of all stored tensors. loaded_memory: growth of resident memory by loading. peak_memory: growth of its peak by loading.
    decode_bytes: what one token reads: every weight but the embedding and the experts that it is not sent to.
    read_bandwidth: of a plain sum over one GiB, taken between the runs.
    """

    bytes: int
    loaded_memory: int
    peak_memory: int
    load_seconds: float
    prefill_tokens: int
    prefill_speed: float
    decode_tokens: int
    decode_speed: float
    decode_bytes: int
    decode_bandwidth: float
    read_bandwidth: float


def bench_cpu(folder: Path, *, prefill_tokens: int = 512, decode_tokens: int = 32, repeats: int = 5) -> CpuBenchmark:
    """Load the checkpoint in `folder` and time prefill and decode on random prompts.

    Call it in a fresh process: the peak of resident memory is the process's.
    """
    _warm_libraries()
    before = _resident()
    started = time.perf_counter()
    model = DbrxForCausalLM.from_pretrained(folder)
    load_seconds = time.perf_counter() - started
    loaded, peak = _resident() - before, _peak_resident() - before
    with Checkpoint(folder) as checkpoint:
        sizes = {name: info.nbytes for name, info in checkpoint.infos.items()}
        config = checkpoint.config
    generator = torch.Generator().manual_seed(_VOCABULARY_SEED)
    prompt = torch.randint(0, config.vocab_size, (prefill_tokens,), generator=generator).tolist()
    field = torch.ones(_READ_BYTES // 8, dtype=torch.int64)

    def run_prefill() -> None:
        prefill(model, prompt, _cache(model, prefill_tokens))

    cache = _cache(model, prefill_tokens + decode_tokens * (repeats + 1))
    prefill(model, prompt, cache)

    def run_decode() -> None:
        for token in prompt[:decode_tokens]:
            decode_one_token(model, token, cache)

    times: dict[str, list[float]] = {"prefill": [], "decode": [], "read": []}
    for turn in range(repeats + 1):
        for name, work in (("read", field.sum), ("prefill", run_prefill), ("decode", run_decode)):
            seconds = _seconds(work)
            if turn:  # the first turn warms caches
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    active = config.ffn_config.moe_top_k / config.ffn_config.moe_num_experts
    share = {"embedding": 0.0, "experts": active}
    decode_bytes = round(sum(size * share.get(kind_of(name), 1.0) for name, size in sizes.items()))
    return CpuBenchmark(
        bytes=sum(sizes.values()),
        loaded_memory=loaded,
        peak_memory=peak,
        load_seconds=load_seconds,
        prefill_tokens=prefill_tokens,
        prefill_speed=prefill_tokens / median["prefill"],
        decode_tokens=decode_tokens,
        decode_speed=decode_tokens / median["decode"],
        decode_bytes=decode_bytes,
        decode_bandwidth=decode_bytes * decode_tokens / median["decode"],
        read_bandwidth=_READ_BYTES / median["read"],
    )


def _cache(model: DbrxForCausalLM, capacity: int) -> KVCache:
    return KVCache(model.config, 1, capacity, dtype=model.dtype)


def _warm_libraries() -> None:
    """Import what loading imports, so that only the checkpoint's own memory is counted."""
    import_module("dbrx_q.loading")
    import_module("dbrx_q.kernels.cpu")
    torch.ones(1 << 20).sum()
    gc.collect()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
