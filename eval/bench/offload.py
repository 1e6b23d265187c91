"""Benchmarks decode and prefill with experts on disk against the speed that the missed bytes and the disk's bandwidth allow."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import RequestError
from dbrx_q.eval.provenance import provenance
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.fallback import carried_formats
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.measured_rates import measure_rates
from dbrx_q.experts.reader import ExpertReader, supports_direct
from dbrx_q.experts.slots import ExpertSlots
from dbrx_q.generation.decoding import decoder_for, prefill
from dbrx_q.model.loading import load_model
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.host_memory import available_bytes
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import staging_bytes
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import MissPolicy

__all__ = ["GpuRow", "OffloadBenchmark", "OffloadRow", "bench_gpu", "bench_offload", "disk_bandwidth"]

_SEED = 1
_LINK_SECONDS = 1.5
_UNCOUNTED_TOKENS = 2
_HOST_SHARE = 0.9  # of free host memory, so that it holds all experts if possible


@dataclass(frozen=True)
class OffloadRow:
    """One measurement with experts on disk."""

    share: float
    """Of the experts that have a slot."""
    slots: int
    """Experts that fit into host memory."""
    prefill: bool
    """Whether a prompt was run; otherwise tokens were decoded."""
    prefetch: bool
    """Whether experts were prefetched."""
    tokens: int
    """Of the prompt, or decoded."""
    tokens_per_second: float
    """Measured speed."""
    hit_rate: float
    """Of the requests for experts."""
    needed_bytes: float
    """Bytes per token of experts that were needed and not in host memory."""
    read_bytes: float
    """Bytes per token read from disk in all."""
    link: float
    """bytes/s of the disk alone, the mean of a measurement before and one after."""
    bound: float
    """tokens/s that the disk allows: link / needed_bytes."""
    of_bound: float
    """tokens_per_second / bound."""
    compute_seconds: float
    """Seconds per token of `ExpertStats.compute_seconds`."""
    wait_seconds: float
    """Seconds per token of `ExpertStats.wait_seconds`."""
    fallback_share: float = 0.0
    """Share of the requests that a fallback copy answered; the bound counts their experts as read from disk."""


@dataclass(frozen=True)
class GpuRow:
    """One measurement with experts on a GPU and in host memory."""

    share: float
    """Of the experts that have a slot on the GPU."""
    slots: int
    """Experts that fit into GPU memory."""
    miss_policy: str
    """How misses were served."""
    prefetch: bool
    """Whether experts were prefetched."""
    tokens: int
    """Decoded."""
    tokens_per_second: float
    """Measured speed."""
    hit_rate: float
    """Of the requests for experts."""
    needed_bytes: float
    """Bytes per token of experts that were needed and not on the GPU."""
    cpu: float
    """bytes/s of experts that the CPU computes: while the link copies for "hybrid", alone for "cpu", 0 for "copy"."""
    link: float
    """bytes/s of experts that the link copies: while the CPU computes for "hybrid", alone for "copy", 0 for "cpu"."""
    bound: float
    """tokens/s that both allow: (cpu + link) / needed_bytes."""
    of_bound: float
    """tokens_per_second / bound."""
    on_cpu: float
    """Share of the misses that the CPU computed."""


@dataclass
class OffloadBenchmark:
    """The results of one run."""

    path: str
    """Folder of the checkpoint, as given."""
    experts: int
    """Of all layers."""
    expert_bytes: int
    """Bytes of one expert."""
    direct: bool
    """Whether reads bypassed the page cache."""
    policy: str
    """Which expert is evicted."""
    provenance: dict[str, Any]
    """What is needed to repeat the run."""
    rows: list[OffloadRow] = field(default_factory=list)
    """Measurements with experts on disk."""
    gpus: list[GpuRow] = field(default_factory=list)
    """Measurements with experts on a GPU and in host memory."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `dbrx-q bench offload --json`."""
        return asdict(self)


def bench_offload(
    folder: Path,
    shares: Sequence[float],
    *,
    tokens: int = 24,
    prompt: int = 512,
    policy: str,
    prefetch: Sequence[bool] = (True, False),
    direct: bool | None = None,
    fallback: bool = False,
    command: str = "",
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> OffloadBenchmark:
    """Load a checkpoint with slots for a share of its experts, and time it on random tokens.

    Args:
        folder: a checkpoint, preferably quantized and of DBRX's own dimensions.
        shares: of the experts, each between 0 and 1.
        tokens: to decode for each row; 0 for no such rows.
        prompt: tokens of a prompt; 0 for no such rows.
        policy: which expert is evicted.
        prefetch: values to measure, in this order.
        direct: whether reads bypass the page cache; None for yes if the disk supports it.
        fallback: whether to measure with the fallback copy as well, in the same memory and without prefetch.
        command: recorded in the result.
        on_row: called with (rows done, total rows).

    Raises:
        RequestError: a share or a number of tokens is out of range, or the fallback copy does not fit into the memory of a share.
        CheckpointError: the checkpoint is damaged.
    """
    _check_shares(shares)
    if tokens < 0 or prompt < 0 or tokens + prompt == 0:
        raise RequestError(
            f"tokens to decode and of a prompt must be at least 0, and one of them above 0; found {tokens} and {prompt}. Change them"
        )
    with Checkpoint(folder) as checkpoint:
        config, formats = checkpoint.config, checkpoint.formats
        files = ExpertFiles(checkpoint, config.dtype)
        fallback_formats = carried_formats(folder, config, formats) if fallback else None
    direct = supports_direct(files.paths[0]) if direct is None else direct
    unlimited = place(config, formats, Machine(), MemoryRequest(tokens + prompt + _UNCOUNTED_TOKENS))
    record = provenance(torch.device("cpu"), command)
    host = unlimited.host
    rams = [host.total - host.experts + int(share * host.experts) + staging_bytes(files.kinds) for share in shares]
    for share, ram in zip(shares, rams, strict=True):  # fails before minutes of measurements
        plan = place(config, formats, Machine(ram), MemoryRequest(tokens + prompt + _UNCOUNTED_TOKENS, fallback=fallback_formats))
        if not plan.fits:
            copy = "the fallback copy and " if fallback else ""
            raise RequestError(
                f"the memory of a share must hold {copy}an expert; that of {100 * share:.4g}% is {plan.shortfall:,} bytes too "
                "small. Choose a larger --share"
            )
        if not plan.disk_experts:
            raise RequestError(
                f"a share must leave experts on disk; that of {100 * share:.4g}% and the memory to read into hold all {plan.experts}. "
                "Choose a smaller --share, or a model of more experts"
            )
    result = OffloadBenchmark(str(folder), unlimited.experts, unlimited.expert_bytes // unlimited.experts, direct, policy, record)
    prefill_modes = [prefills for prefills in (False, True) if (prompt if prefills else tokens)]
    store_modes = [(prefetches, False) for prefetches in prefetch] + ([(False, True)] if fallback else [])
    total = len(shares) * len(store_modes) * len(prefill_modes)
    for share, ram in zip(shares, rams, strict=True):
        budget = Budget(Machine(ram), tokens + prompt + _UNCOUNTED_TOKENS, cache_policy=policy, direct=direct)
        for prefetches, uses_fallback in store_modes:
            with closing(load_model(folder, budget=replace(budget, prefetch=prefetches, fallback=uses_fallback))) as model:
                for prefills in prefill_modes:
                    count = prompt if prefills else tokens
                    result.rows.append(_row(model, files, share, prefills=prefills, tokens=count, prefetch=prefetches, direct=direct))
                    on_row(len(result.rows), total)
            del model  # frees its memory before the next one is loaded
    return result


def bench_gpu(
    folder: Path,
    shares: Sequence[float],
    device: torch.device,
    *,
    tokens: int = 24,
    policy: str,
    prefetch: Sequence[bool] = (True, False),
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[GpuRow]:
    """Time decode with a share of the experts on a GPU and the others in host memory, for every miss policy.

    Arguments and errors are those of `bench_offload`; `device` is the GPU.
    """
    _check_shares(shares)
    if tokens < 1:
        raise RequestError(f"tokens to decode must be at least 1; found {tokens}. Choose more")
    with Checkpoint(folder) as checkpoint:
        config, formats = checkpoint.config, checkpoint.formats
    context = tokens + _UNCOUNTED_TOKENS
    request = MemoryRequest(context, step_tokens=_UNCOUNTED_TOKENS)
    plan = place(config, formats, Machine(None, (Gpu(1 << 50),)), request).gpus[0]  # all experts fit
    rows: list[GpuRow] = []
    for share in shares:
        machine = Machine(int(_HOST_SHARE * available_bytes()), (Gpu(plan.total - plan.experts + int(share * plan.experts)),))
        for miss_policy in MissPolicy:
            for prefetches in prefetch:
                budget = Budget(machine, context, step_tokens=_UNCOUNTED_TOKENS, cache_policy=policy, prefetch=prefetches)
                with closing(load_model(folder, budget=replace(budget, miss_policy=miss_policy.value, devices=(device,)))) as model:
                    rows.append(_gpu_row(model, share, miss_policy, tokens=tokens, prefetch=prefetches))
                    on_row(len(rows), len(shares) * len(MissPolicy) * len(prefetch))
                del model  # frees its memory before the next one is loaded
    return rows


def disk_bandwidth(files: ExpertFiles, *, direct: bool, seconds: float = _LINK_SECONDS) -> float:
    """Measure bytes/s of experts read in random order, two at a time, by the same reader threads as a store's."""
    experts = [(layer, e) for layer in range(len(files.kinds)) for e in range(files.n_experts)]
    random.Random(_SEED).shuffle(experts)
    kind = files.kinds[experts[0][0]]
    experts = [(layer, e) for layer, e in experts if files.kinds[layer] == kind]
    with closing(ExpertReader(files, direct=direct)) as reader:
        slots = ExpertSlots(kind, 2, torch.device("cpu"))
        loads = [reader.load(*experts[i % len(experts)], slots, i, urgent=True) for i in range(2)]
        started, number = time.perf_counter(), 2
        while time.perf_counter() - started < seconds:
            loads[number % 2].wait()
            loads[number % 2] = reader.load(*experts[number % len(experts)], slots, number % 2, urgent=True)
            number += 1
        for load in loads:
            load.wait()
        return reader.bytes_read / (time.perf_counter() - started)


def _check_shares(shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 < share < 1:
            raise RequestError(f"a share of the experts must be between 0 and 1; found {share}. Choose another")


def _row(
    model: DbrxForCausalLM, files: ExpertFiles, share: float, *, prefills: bool, tokens: int, prefetch: bool, direct: bool
) -> OffloadRow:
    store = model.expert_store
    assert isinstance(store, CpuExpertStore)
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens + _UNCOUNTED_TOKENS,), generator=generator).tolist()
    links = [disk_bandwidth(files, direct=direct)]
    with decoder_for(model, [len(ids)], "plain") as decoder:
        decoder.prefill(0, ids[:1])
        if prefills:
            before, started = store.stats(), time.perf_counter()
            prefill(model, ids[1 : 1 + tokens], decoder.cache_of(0), all_states=True)
        else:
            decoder.step({0: ids[1]})
            before, started = store.stats(), time.perf_counter()
            for token in ids[2:]:
                decoder.step({0: token})
        seconds = time.perf_counter() - started
    stats = store.stats() - before
    links.append(disk_bandwidth(files, direct=direct))
    link = statistics.mean(links)
    needed = (stats.cache.misses + stats.cache.prefetch_hits) * (files.nbytes / len(files.kinds) / files.n_experts) / tokens
    bound = link / needed if needed else float("inf")
    slots = model.placement.host.n_slots if model.placement is not None else 0
    return OffloadRow(
        share=share,
        slots=slots,
        prefill=prefills,
        prefetch=prefetch,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        hit_rate=stats.cache.hit_rate,
        needed_bytes=needed,
        read_bytes=stats.disk_bytes / tokens,
        link=link,
        bound=bound,
        of_bound=tokens / seconds / bound,
        compute_seconds=stats.compute_seconds / tokens,
        wait_seconds=stats.wait_seconds / tokens,
        fallback_share=stats.fallback_share,
    )


def _gpu_row(model: DbrxForCausalLM, share: float, miss_policy: MissPolicy, *, tokens: int, prefetch: bool) -> GpuRow:
    store, plan = model.expert_store, model.placement
    assert isinstance(store, GpuExpertStore)
    assert plan is not None
    [gpu] = store.gpus
    used = {"cpu": miss_policy is not MissPolicy.copy, "link": miss_policy is not MissPolicy.cpu}
    rates = measure_rates(gpu, store.tier, model.dtype, **used)
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens + _UNCOUNTED_TOKENS,), generator=generator).tolist()
    with decoder_for(model, [len(ids)], "plain") as decoder:
        decoder.prefill(0, ids[:1])
        decoder.step({0: ids[1]})
        before, started = store.stats(), _now(model.device)
        for token in ids[2:]:
            decoder.step({0: token})
        seconds = _now(model.device) - started
    stats = store.stats() - before
    combined = rates.cpu * used["cpu"] + rates.link * used["link"]
    needed = (stats.cache.misses + stats.cache.prefetch_hits) * (plan.expert_bytes / plan.experts) / tokens
    bound = combined / needed if needed else float("inf")
    return GpuRow(
        share=share,
        slots=plan.gpus[0].n_slots,
        miss_policy=miss_policy.value,
        prefetch=prefetch,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        hit_rate=stats.cache.hit_rate,
        needed_bytes=needed,
        cpu=rates.cpu if used["cpu"] else 0.0,
        link=rates.link if used["link"] else 0.0,
        bound=bound,
        of_bound=tokens / seconds / bound,
        on_cpu=stats.computed_on_cpu / stats.cache.misses if stats.cache.misses else 0.0,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
