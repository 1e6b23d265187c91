"""Decoding and prefill with experts on disk, beside what the bytes that are missed and the disk's bandwidth allow."""

from __future__ import annotations

import json
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
from dbrx_q.generation.decoding import decoder_for
from dbrx_q.model.loading import load_model
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.host_memory import available_bytes
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import staging_bytes
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import MissPolicy
from dbrx_q.planning.sizes import format_size

__all__ = [
    "FILES",
    "KEYS",
    "GpuRow",
    "OffloadBenchmark",
    "OffloadRow",
    "bench_gpu",
    "bench_offload",
    "disk_bandwidth",
    "files",
    "markdown",
]

FILES = ("offload.json", "offload.md")
KEYS = ("path", "rows", "provenance")
_SEED = 1
_LINK_SECONDS = 1.5
_UNCOUNTED_TOKENS = 2
_HOST_SHARE = 0.9  # of what is free, so that host memory holds all experts where it can


@dataclass(frozen=True)
class OffloadRow:
    """One budget. share: of the experts that have a slot. prefill: whether a prompt was run, or tokens were decoded. prefetch: whether
    experts were fetched ahead. hit_rate: of requests. needed_bytes: of experts that were needed and came from disk, a token; read_bytes:
    all that was read. link: bytes/s that the disk gave alone, before and after. bound: tokens/s = link / needed_bytes. of_bound:
    tokens_per_second over it. compute_seconds, wait_seconds: as of `ExpertStats`, a token. fallback_share: share of the requests
    that a fallback copy answered, which the bound has come from disk as well."""

    share: float
    slots: int
    prefill: bool
    prefetch: bool
    tokens: int
    tokens_per_second: float
    hit_rate: float
    needed_bytes: float
    read_bytes: float
    link: float
    bound: float
    of_bound: float
    compute_seconds: float
    wait_seconds: float
    fallback_share: float = 0.0


@dataclass(frozen=True)
class GpuRow:
    """One budget of a GPU over host memory. miss_policy: how misses were served. needed_bytes: of experts that were needed and not on the
    GPU, a token. cpu, link: bytes/s of experts that the CPU computed and the link carried, at the same time for "hybrid", alone for the
    others. bound: tokens/s = (cpu + link) / needed_bytes. on_cpu: misses that the CPU computed, of all."""

    share: float
    slots: int
    miss_policy: str
    prefetch: bool
    tokens: int
    tokens_per_second: float
    hit_rate: float
    needed_bytes: float
    cpu: float
    link: float
    bound: float
    of_bound: float
    on_cpu: float


@dataclass
class OffloadBenchmark:
    """All rows of a run. direct: whether the page cache was passed by. gpus: rows of a GPU over host memory."""

    path: str
    experts: int
    expert_bytes: int
    direct: bool
    policy: str
    provenance: dict[str, Any]
    rows: list[OffloadRow] = field(default_factory=list)
    gpus: list[GpuRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
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
    """Load a checkpoint with slots for a share of its experts and time it on random tokens.

    Args:
        folder: a checkpoint, best quantized and of DBRX's own dimensions.
        shares: of the experts, each between 0 and 1.
        tokens: to decode for each row; 0 for none.
        prompt: tokens of a prompt; 0 for none.
        policy: which expert gives way.
        prefetch: with and without, in this order.
        direct: whether to read past the page cache; None for yes where the disk can be read so.
        fallback: whether to run with the fallback copy, too, in the same memory as without it and without prefetch.
        command: that is noted with the results.
        on_row: called with (rows done, rows in all).

    Raises:
        RequestError: a share or a number of tokens that is none, or a share in whose place the fallback copy does not fit.
        CheckpointError: the checkpoint is damaged.
    """
    _check_shares(shares)
    if tokens < 0 or prompt < 0 or tokens + prompt == 0:
        raise RequestError(f"tokens to decode and of a prompt must be 0 or more, and one of them more; found {tokens} and {prompt}")
    with Checkpoint(folder) as checkpoint:
        config, formats = checkpoint.config, checkpoint.formats
        files = ExpertFiles(checkpoint, config.dtype)
        copy = carried_formats(folder, config, formats) if fallback else None
    by = supports_direct(files.paths[0]) if direct is None else direct
    whole = place(config, formats, Machine(), MemoryRequest(tokens + prompt + _UNCOUNTED_TOKENS))
    about = provenance(torch.device("cpu"), command)
    rams = [whole.host.total - whole.host.experts + int(share * whole.host.experts) + staging_bytes(files.kinds) for share in shares]
    for share, ram in zip(shares, rams, strict=True):  # before minutes of the others
        plan = place(config, formats, Machine(ram), MemoryRequest(tokens + prompt + _UNCOUNTED_TOKENS, fallback=copy))
        if not plan.fits:
            raise RequestError(
                f"the memory of a share must hold the fallback copy; in that of {share:.0%} {plan.shortfall:,} bytes are missing. Give a "
                "larger --share"
            )
    result = OffloadBenchmark(str(folder), whole.experts, whole.expert_bytes // whole.experts, by, policy, about)
    kinds = [kind for kind in (False, True) if (prompt if kind else tokens)]
    ways = [(ahead, False) for ahead in prefetch] + ([(False, True)] if fallback else [])
    total = len(shares) * len(ways) * len(kinds)
    for share, ram in zip(shares, rams, strict=True):
        budget = Budget(Machine(ram), tokens + prompt + _UNCOUNTED_TOKENS, cache_policy=policy, direct=by)
        for ahead, copied in ways:
            with closing(load_model(folder, budget=replace(budget, prefetch=ahead, fallback=copied))) as model:
                for prefill in kinds:
                    count = prompt if prefill else tokens
                    result.rows.append(_row(model, files, share, prefill=prefill, tokens=count, prefetch=ahead, direct=by))
                    on_row(len(result.rows), total)
            del model  # before the next one is loaded
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
    """Decode with a share of the experts on a GPU and the others in host memory, by every miss policy; errors as for `bench_offload`."""
    _check_shares(shares)
    if tokens < 1:
        raise RequestError(f"tokens to decode must be at least 1; found {tokens}")
    with Checkpoint(folder) as checkpoint:
        config, formats = checkpoint.config, checkpoint.formats
    context = tokens + _UNCOUNTED_TOKENS
    request = MemoryRequest(context, step_tokens=_UNCOUNTED_TOKENS)
    one = place(config, formats, Machine(None, (Gpu(1 << 50),)), request).gpus[0]
    rows: list[GpuRow] = []
    for share in shares:
        machine = Machine(int(_HOST_SHARE * available_bytes()), (Gpu(one.total - one.experts + int(share * one.experts)),))
        for miss_policy in MissPolicy:
            for ahead in prefetch:
                budget = Budget(machine, context, step_tokens=_UNCOUNTED_TOKENS, cache_policy=policy, prefetch=ahead)
                with closing(load_model(folder, budget=replace(budget, miss_policy=miss_policy.value, devices=(device,)))) as model:
                    rows.append(_gpu_row(model, share, miss_policy, tokens=tokens, prefetch=ahead))
                    on_row(len(rows), len(shares) * len(MissPolicy) * len(prefetch))
                del model  # before the next one is loaded
    return rows


def _gpu_row(model: DbrxForCausalLM, share: float, miss_policy: MissPolicy, *, tokens: int, prefetch: bool) -> GpuRow:
    store, plan = model.expert_store, model.placement
    assert isinstance(store, GpuExpertStore)
    assert plan is not None
    [gpu] = store.gpus
    which = {"cpu": miss_policy is not MissPolicy.copy, "link": miss_policy is not MissPolicy.cpu}
    rates = [measure_rates(gpu, store.tier, model.dtype, **which)]
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens + _UNCOUNTED_TOKENS,), generator=generator).tolist()
    with decoder_for(model, [len(ids)], "plain") as decoder:
        decoder.prefill(0, ids[:1])
        decoder.step({0: ids[1]})
        before, started = store.stats(), _now(model.device)
        for token in ids[2:]:
            decoder.step({0: token})
        seconds = _now(model.device) - started
    did = store.stats() - before
    both = [rate.cpu * which["cpu"] + rate.link * which["link"] for rate in rates]
    each = plan.expert_bytes / plan.experts
    needed = (did.cache.misses + did.cache.prefetch_hits) * each / tokens
    bound = statistics.mean(both) / needed if needed else float("inf")
    return GpuRow(
        share=share,
        slots=plan.gpus[0].n_slots,
        miss_policy=miss_policy.value,
        prefetch=prefetch,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        hit_rate=did.cache.hit_rate,
        needed_bytes=needed,
        cpu=rates[0].cpu if which["cpu"] else 0.0,
        link=rates[0].link if which["link"] else 0.0,
        bound=bound,
        of_bound=tokens / seconds / bound,
        on_cpu=did.computed_on_cpu / did.cache.misses if did.cache.misses else 0.0,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_shares(shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 < share < 1:
            raise RequestError(f"a share of the experts must be between 0 and 1; found {share}")


def disk_bandwidth(files: ExpertFiles, *, direct: bool, seconds: float = _LINK_SECONDS) -> float:
    """Bytes/s of experts in random order, two under way at a time, by the threads that a store has."""
    places = [(layer, e) for layer in range(len(files.kinds)) for e in range(files.n_experts)]
    random.Random(_SEED).shuffle(places)
    kind = files.kinds[places[0][0]]
    places = [where for where in places if files.kinds[where[0]] == kind]
    with closing(ExpertReader(files, direct=direct)) as reader:
        slots = ExpertSlots(kind, 2, torch.device("cpu"))
        loads = [reader.load(*places[i % len(places)], slots, i, urgent=True) for i in range(2)]
        started, number = time.perf_counter(), 2
        while time.perf_counter() - started < seconds:
            loads[number % 2].wait()
            loads[number % 2] = reader.load(*places[number % len(places)], slots, number % 2, urgent=True)
            number += 1
        for load in loads:
            load.wait()
        return reader.bytes_read / (time.perf_counter() - started)


def markdown(found: OffloadBenchmark) -> str:
    """The rows as a table."""
    how = "past the page cache" if found.direct else "through the page cache"
    about = found.provenance
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Experts on disk: {Path(found.path).name}",
        "",
        f"{about['device']}, {about['threads']} threads; {versions}. `{about['command']}`",
        "",
        f"{found.experts} experts of {format_size(found.expert_bytes)}, read {how}; policy {found.policy}. The bound is what the disk's "
        "bandwidth, measured before and after each row, allows for the experts that were needed and not there, even if a fallback "
        "copy answered; where nearly all of the time went into products of experts, the processor is what limits, not the disk.",
        "",
        "| experts held | test | prefetch | hits | fallback copy | needed from disk, a token | read, a token | disk | tokens/s | bound "
        "| of the bound | time in products |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found.rows:
        test = f"pp{row.tokens}" if row.prefill else f"tg{row.tokens}"
        lines.append(
            f"| {row.slots} ({row.share:.0%}) | {test} | {'yes' if row.prefetch else 'no'} | {row.hit_rate:.1%} | "
            f"{row.fallback_share:.1%} | {format_size(row.needed_bytes)} | {format_size(row.read_bytes)} | {format_size(row.link)}/s | "
            f"{row.tokens_per_second:.2f} | {row.bound:.2f} | {row.of_bound:.1%} | {row.compute_seconds * row.tokens_per_second:.0%} |"
        )
    if found.gpus:
        lines += [
            "",
            "A GPU over host memory; the bound is what the CPU computed and the link carried, at once for hybrid, of what was missed.",
            "",
            "| experts held | misses | prefetch | hits | needed, a token | CPU | link | by the CPU | tokens/s | bound | of the bound |",
            "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for gpu in found.gpus:
        lines.append(
            f"| {gpu.slots} ({gpu.share:.0%}) | {gpu.miss_policy} | {'yes' if gpu.prefetch else 'no'} | {gpu.hit_rate:.1%} | "
            f"{format_size(gpu.needed_bytes)} | {format_size(gpu.cpu)}/s | {format_size(gpu.link)}/s | {gpu.on_cpu:.0%} | "
            f"{gpu.tokens_per_second:.2f} | {gpu.bound:.2f} | {gpu.of_bound:.1%} |"
        )
    return "\n".join(lines) + "\n"


def files(found: OffloadBenchmark) -> dict[str, bytes]:
    """The report's files by name."""
    return {"offload.json": (json.dumps(found.to_dict(), indent=2) + "\n").encode(), "offload.md": markdown(found).encode()}


def _row(
    model: DbrxForCausalLM, files: ExpertFiles, share: float, *, prefill: bool, tokens: int, prefetch: bool, direct: bool
) -> OffloadRow:
    store = model.expert_store
    assert isinstance(store, CpuExpertStore)
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens + _UNCOUNTED_TOKENS,), generator=generator).tolist()
    links = [disk_bandwidth(files, direct=direct)]
    with decoder_for(model, [len(ids)], "plain") as decoder:
        decoder.prefill(0, ids[:1])
        if prefill:
            before, started = store.stats(), time.perf_counter()
            decoder.prefill(0, ids[1 : 1 + tokens])
        else:
            decoder.step({0: ids[1]})
            before, started = store.stats(), time.perf_counter()
            for token in ids[2:]:
                decoder.step({0: token})
        seconds = time.perf_counter() - started
    did = store.stats() - before
    links.append(disk_bandwidth(files, direct=direct))
    link = statistics.mean(links)
    needed = (did.cache.misses + did.cache.prefetch_hits) * (files.nbytes / len(files.kinds) / files.n_experts) / tokens
    bound = link / needed if needed else float("inf")
    slots = model.placement.host.n_slots if model.placement is not None else 0
    return OffloadRow(
        share=share,
        slots=slots,
        prefill=prefill,
        prefetch=prefetch,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        hit_rate=did.cache.hit_rate,
        needed_bytes=needed,
        read_bytes=did.disk_bytes / tokens,
        link=link,
        bound=bound,
        of_bound=tokens / seconds / bound,
        compute_seconds=did.compute_seconds / tokens,
        wait_seconds=did.wait_seconds / tokens,
        fallback_share=did.fallback_share,
    )
