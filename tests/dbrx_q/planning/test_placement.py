"""Plans made from a configuration alone: their bytes equal those of real models, on machines of every size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxConfig, KVCache
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.kv import KV_FORMATS
from dbrx_q.planning.advice import advice
from dbrx_q.planning.footprint import Footprint, MemoryRequest
from dbrx_q.planning.machine import Gpu, Machine, Placement
from dbrx_q.planning.placement import place
from dbrx_q.planning.speed import hit_rate, speed_bounds
from dbrx_q.quantize.pipeline.format_assignment import default_formats

DBRX = DbrxConfig(
    d_model=6144,
    n_heads=48,
    n_layers=40,
    max_seq_len=32768,
    vocab_size=100352,
    attn_config={"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
    ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    torch_dtype="bfloat16",
)
INT4, INT8 = (default_formats(DBRX, TensorFormat(name, 64)) for name in ("int4", "int8"))
EXPERT = 3 * 6144 * 10752 * (4 + 16 / 64 + 4 / 64) / 8
GIB = 1 << 30


def gpu(gib: int, *, desktop: bool = False) -> Gpu:
    return Gpu(gib * GIB, desktop)


@dataclass(frozen=True)
class Case:
    """A machine."""

    gpus: tuple[int, ...]
    """GiB of each GPU, negative for a GPU that shows a desktop."""
    ram: int
    """GiB of host memory."""

    @property
    def machine(self) -> Machine:
        return Machine(self.ram * GIB, tuple(gpu(abs(gib), desktop=gib < 0) for gib in self.gpus))

    def __str__(self) -> str:
        names = [f"{abs(gib)}desktop" if gib < 0 else str(gib) for gib in self.gpus]
        return f"{'+'.join(names) or 'cpu'}-ram{self.ram}"


MACHINES = [(24,), (24, 24), (24, 24, 24), (24, 24, 24, 24), (24, 12), (12, 24), (24, -24)]
CASES = [Case(gpus, ram) for gpus in MACHINES for ram in (32, 64, 128)] + [Case((), ram) for ram in (32, 64, 128)]


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int4"])
def test_planned_weights_and_cache_equal_those_of_a_model(nano: Path, quantized_nano: Path, quantized: bool, kv_format: str) -> None:
    with Checkpoint(quantized_nano if quantized else nano) as checkpoint:
        plan = place(checkpoint.config, checkpoint.formats, Machine(), MemoryRequest(300, 2, kv_format))
        assert plan.host.dense + plan.host.experts == sum(info.nbytes for info in checkpoint.infos.values())
        assert plan.host.kv_cache == KVCache(checkpoint.config, 2, 300, dtype=torch.bfloat16, format=kv_format).nbytes
        assert plan.resident


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_byte_of_every_machine_is_accounted_for(case: Case) -> None:
    request = MemoryRequest(8192)
    plan = place(DBRX, INT4, case.machine, request)
    without_limit = place(DBRX, INT4, Machine(), request)
    assert plan.fits
    for device in plan.devices:
        assert device.budget is not None
        assert device.total <= device.budget
        assert device.experts == pytest.approx(device.n_slots * EXPERT)
    assert sum(device.dense for device in plan.devices) == without_limit.host.dense
    assert sum(device.kv_cache for device in plan.devices) == without_limit.host.kv_cache
    on_gpus = sum(device.n_slots - device.scratch for device in plan.gpus)
    if plan.disk_experts or not plan.gpus:
        assert on_gpus + plan.host.n_slots + plan.disk_experts == 640
    else:  # host memory holds the experts of GPUs as well, as far as there is room
        spare = case.ram * GIB - plan.host.total
        assert 640 - on_gpus <= plan.host.n_slots <= 640
        assert plan.host.n_slots in (0, 640) or spare < EXPERT
    assert all(device.scratch in (0, 2) for device in plan.gpus)
    assert plan.expert_bytes == pytest.approx(640 * EXPERT)
    if plan.disk_experts:  # then no device has room for one more
        assert all((device.budget or 0) - device.total < EXPERT for device in plan.devices if device.layers != (0, 0) or device.n_slots)
    ends = [end for layers in (device.layers for device in plan.gpus) for end in layers]
    assert ends == sorted(ends)
    assert not plan.gpus or (ends[0], ends[-1]) == (0, 40)
    for first, second in zip(plan.gpus, plan.gpus[1:], strict=False):
        assert first.layers[1] == second.layers[0]
    for device, spec in zip(plan.gpus, case.machine.gpus, strict=True):
        assert device.reserve == spec.reserve
        assert spec.reserve >= (1 << 30 if spec.desktop else 500 << 20)


@pytest.mark.parametrize("case", [case for case in CASES if case.gpus], ids=str)
def test_no_gpu_ends_with_all_the_offloaded_layers(case: Case) -> None:
    """Every GPU holds about the same share of its layers' experts."""
    plan = place(DBRX, INT4, case.machine, MemoryRequest(8192))
    shares = [device.n_slots / (16 * (device.layers[1] - device.layers[0])) for device in plan.gpus]
    assert max(shares) - min(shares) <= 0.12  # a layer of 40 more or less
    bounds = speed_bounds(plan, case.machine, n_experts=16, top_k=4)
    assert 0 < bounds.lower <= bounds.expected * 1.0000001 <= bounds.upper * 1.0000002
    assert bounds.expected == pytest.approx(1 / sum(term.seconds for term in bounds.terms))


@pytest.mark.parametrize("case", [Case((24, 24), 64), Case((24, 12), 64), Case((24, -24), 128), Case((24, 24, 24), 32)], ids=str)
def test_the_split_is_the_best_of_all(case: Case) -> None:
    from itertools import combinations

    from dbrx_q.planning import placement

    request = MemoryRequest(8192)
    model = Footprint.of(DBRX, INT4, request)
    plans = [placement._on_gpus(model, case.machine, (*ends, 40)) for ends in combinations(range(1, 40), len(case.gpus) - 1)]
    least = min(placement._cost(model, case.machine, plan) for plan in plans)
    assert placement._cost(model, case.machine, place(DBRX, INT4, case.machine, request)) == least


def test_a_larger_machine_is_never_slower() -> None:
    def expected(machine: Machine, request: MemoryRequest) -> float:
        return speed_bounds(place(DBRX, INT4, machine, request), machine, n_experts=16, top_k=4).expected

    base, request = Case((24,), 32).machine, MemoryRequest(8192)
    now = expected(base, request)
    assert expected(replace(base, ram=64 * GIB), request) > now
    assert expected(replace(base, gpus=(*base.gpus, gpu(24))), request) > now
    assert expected(base, replace(request, kv_format="int4")) > now
    assert expected(base, replace(request, context=1024)) > now
    assert expected(replace(base, disk_bandwidth=1e10), request) > now
    assert expected(Case((-24,), 32).machine, request) < now


def test_a_shorter_context_that_fits_is_found() -> None:
    """For several sequences, and together with a smaller KV format."""
    machine, request = Machine(12 * GIB, (gpu(10),)), MemoryRequest(32768, batch=8)
    sentence = advice(DBRX, INT4, machine, request)
    options = re.findall(r"--context (\d+)(?: --kv (int\d))?", sentence)
    assert len(options) == 3
    for context, kv_format in options:
        fitting = replace(request, context=int(context), kv_format=kv_format or "plain")
        assert place(DBRX, INT4, machine, fitting).fits
        assert not place(DBRX, INT4, machine, replace(fitting, context=2 * int(context))).fits
    tiny = advice(DBRX, INT4, Machine(64 * GIB, (gpu(1),)), MemoryRequest(8192))
    assert "no smaller KV cache, shorter context or other GPU makes it fit" in tiny


def test_a_kind_that_only_gpus_hold_has_a_slot_in_host_memory() -> None:
    formats = {name: TensorFormat("int8", 64) if ".blocks.0.ffn" in name else fmt for name, fmt in INT4.items()}
    plan = place(DBRX, formats, Machine(32 * GIB, (gpu(24), gpu(48))), MemoryRequest(4096))
    assert len(plan.host.slots) == 2
    assert min(plan.host.slots.values()) >= 1
    assert plan.host.experts == sum(kind.nbytes * count for kind, count in plan.host.slots.items())
    assert plan.host.total <= 32 * GIB


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lower_bound_counts_every_byte_of_every_miss(case: Case) -> None:
    """The disk reads at most as many experts per token as are only on disk; the link carries the misses of the GPUs only."""
    plan = place(DBRX, INT4, case.machine, MemoryRequest(8192))
    bounds = speed_bounds(plan, case.machine, n_experts=16, top_k=4)
    moved = {path: sum(term.nbytes for term in bounds.lower_terms if path in term.path) for path in ("disk", "link")}
    slots = sum(gpu_plan.n_slots for gpu_plan in plan.gpus), plan.host.n_slots
    only_on_disk = 640 - max(slots) if plan.disk_experts else 0
    assert moved["disk"] == pytest.approx(min(160, only_on_disk) * EXPERT)
    off_gpus = sum(
        min(4 * (end - first), 16 * (end - first) - gpu_plan.n_slots) for gpu_plan in plan.gpus for first, end in [gpu_plan.layers]
    )
    assert moved["link"] == pytest.approx(off_gpus * EXPERT)
    assert bounds.lower == pytest.approx(1 / sum(term.seconds for term in bounds.lower_terms))
    assert bounds.lower <= bounds.expected * 1.0000001
    assert bounds.expected <= bounds.upper * 1.0000001
    assert bounds.upper >= 1 / sum(term.seconds for term in bounds.upper_terms)


def test_the_arithmetic_of_a_token() -> None:
    """For misses over a link of 25 GB/s, and from host memory at 60 GB/s."""
    machine = Machine(128 * GIB, (gpu(24),))
    bounds = speed_bounds(place(DBRX, INT4, machine, MemoryRequest(8192)), machine, n_experts=16, top_k=4)
    dense = next(term for term in bounds.terms if "every token" in term.data)
    assert bounds.lower == pytest.approx(1 / (dense.seconds + 160 * EXPERT / 25e9))
    n_slots = place(DBRX, INT4, machine, MemoryRequest(8192)).gpus[0].n_slots
    assert bounds.hit_rate == pytest.approx(n_slots / 640)
    missed = 160 * (1 - n_slots / 640) * EXPERT
    assert bounds.expected == pytest.approx(1 / (dense.seconds + 160 * n_slots / 640 * EXPERT / 900e9 + missed / 60e9))
    cpu = Machine(32 * GIB)
    plan = place(DBRX, INT4, cpu, MemoryRequest(8192))
    share = plan.host.n_slots / 640
    seconds = plan.host.dense_read / 60e9 + 160 * EXPERT * (1 / 60e9 + (1 - share) / 5e9)
    assert speed_bounds(plan, cpu, n_experts=16, top_k=4).expected == pytest.approx(1 / seconds)
    assert hit_rate(plan, 16) == pytest.approx(share)


def test_different_formats_share_the_memory_evenly() -> None:
    formats = dict(INT4)
    for name in formats:
        if ".blocks.7.ffn" in name:
            formats[name] = TensorFormat("int8", 64)
    plan = place(DBRX, formats, Machine(32 * GIB), MemoryRequest(4096))
    counts = sorted(plan.host.slots.values())
    assert len(counts) == 2
    assert abs(counts[0] / 16 - counts[1] / 624) < 0.07  # an expert of 16 more or less
    assert plan.host.total <= 32 * GIB
    assert 32 * GIB - plan.host.total < min(kind.nbytes for kind in plan.host.slots)


def test_more_gpus_than_layers(nano: Path) -> None:
    config = DbrxConfig.from_pretrained(nano)
    plan = place(config, {}, Machine(None, tuple(gpu(24) for _ in range(6))), MemoryRequest(64))
    assert [device.layers for device in plan.gpus] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4), (4, 4)]


def test_a_plan_that_does_not_fit_names_the_shortfall_and_what_fits() -> None:
    machine = Machine(64 * GIB, (gpu(8),))
    plan = place(DBRX, INT4, machine, MemoryRequest(32768))
    assert not plan.fits
    assert plan.short_device == "cuda:0"
    least = replace(machine, gpus=(Gpu(8 * GIB + plan.shortfall),))
    assert place(DBRX, INT4, least, MemoryRequest(32768)).fits
    assert not place(DBRX, INT4, replace(machine, gpus=(Gpu(8 * GIB + plan.shortfall - 1),)), MemoryRequest(32768)).fits
    sentence = advice(DBRX, INT4, machine, MemoryRequest(32768))
    assert f"{8 * GIB + plan.shortfall:,} bytes for cuda:0" in sentence
    assert "--kv int4" in sentence
    assert place(DBRX, INT4, machine, MemoryRequest(32768, kv_format="int4")).fits
    for kv_format, option in (("plain", ""), ("int8", " --kv int8"), ("int4", " --kv int4")):
        longest = next(c for c in (16384, 8192, 4096, 2048) if place(DBRX, INT4, machine, MemoryRequest(c, kv_format=kv_format)).fits)
        assert f"--context {longest}{option}{'.' if option == ' --kv int4' else ', '}" in sentence


@pytest.mark.parametrize(
    ("machine", "most"),
    [
        (Machine(32 * GIB, (gpu(24),)), "another GPU"),
        (Machine(16 * GIB), "34.36 GB more of RAM"),
        (Case((24, 24, 24, 24), 64).machine, "Neither"),
    ],
)
def test_advice_names_the_most_effective_change(machine: Machine, most: str) -> None:
    sentence = advice(DBRX, INT4, machine, MemoryRequest(8192))
    assert most in sentence
    if "instead of" in sentence:
        better, now = (float(part) for part in sentence.split("(")[1].replace(" tokens/s expected instead of", "").rstrip(").").split())
        assert better > now
        assert math.isclose(
            now, speed_bounds(place(DBRX, INT4, machine, MemoryRequest(8192)), machine, n_experts=16, top_k=4).expected, abs_tol=0.06
        )


def test_the_command_shows_the_plan(nano: Path, quantized_nano: Path, cli: Callable[..., Any]) -> None:
    of_plain = json.loads(cli("plan", nano, "--format", "int4", "--context", 2048, "--json").out)
    of_quantized = json.loads(cli("plan", quantized_nano, "--json", "--context", 2048).out)
    assert of_plain == of_quantized
    assert (of_quantized["fits"], of_quantized["disk_experts"], of_quantized["devices"][0]["device"]) == (True, 0, "cpu")
    tight = json.loads(cli("plan", quantized_nano, "--ram", "10MB", "--context", 512, "--json").out)
    assert tight["fits"]
    assert tight["devices"][0]["total"] <= 10_000_000
    assert 0 < tight["disk_experts"] < 64
    assert tight["hit_rate"] == (64 - tight["disk_experts"]) / 64
    shown = cli("plan", quantized_nano, "--ram", "10MB", "--context", 512).out
    assert f"{tight['disk_experts']} are on disk alone" in shown
    assert "ms a token" in shown
    assert tight["advice"] in shown
    short = cli("plan", quantized_nano, "--ram", "1MB", "--context", 512)
    missing = json.loads(cli("plan", quantized_nano, "--ram", "1MB", "--context", 512, "--json").out)["shortfall"]
    assert f"does not fit: {missing:,} bytes more are needed on cpu" in short.out
    assert f"The least that works is {1_000_000 + missing:,} bytes for cpu" in short.out


def test_the_command_accepts_gpus(nano: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = cli("plan", nano, "--gpu", "24GiB", "--gpu", "12GiB,desktop,link=16GB,bandwidth=500GB", "--json")
    devices = json.loads(outcome.out)["devices"]
    assert [device["device"] for device in devices] == ["cuda:0", "cuda:1", "cpu"]
    assert devices[1]["reserve"] > devices[0]["reserve"]
    for bad, message in (
        (("--gpu", "24GiB,fast"), "found 'fast'"),
        (("--gpu", "24GiB,link=0"), "must be more than nothing"),
        (("--gpu", "big"), "a size must be a number with a unit"),
        (("--gpu", "auto", "--gpu", "24GiB"), "excludes every other --gpu"),
        (("--gpu", "auto"), "--gpu auto takes the GPUs that torch sees; it sees none"),
        (("--disk-bandwidth", "0"), "must be more than nothing"),
        (("--context", "9999"), "--context must be from 1 to the model's 2048 tokens"),
        (("--batch", "0"), "--batch must be at least 1"),
    ):
        refused = cli("plan", nano, *bad)
        assert (refused.code, refused.out) == (2, "")
        assert message in refused.err


def test_planning_is_fast() -> None:
    """Four GPUs have 9,139 splits; few of them are evaluated."""
    from dbrx_q.planning import placement

    seen: list[tuple[int, ...]] = []
    real = placement._on_gpus

    def counted(model: Any, machine: Machine, ends: Any) -> Placement:
        seen.append(tuple(ends))
        return real(model, machine, ends)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placement, "_on_gpus", counted)
        place(DBRX, INT4, Case((24, 24, 24, 24), 64).machine, MemoryRequest(8192))
    assert len(seen) < 1500


def test_a_fallback_copy_replaces_the_disk_in_the_expected_speed() -> None:
    for gpus in ((), (gpu(24), gpu(24))):
        machine = Machine(80 * GIB, gpus)
        plans = [place(DBRX, INT8, machine, MemoryRequest(4096, fallback=copy)) for copy in (None, INT4)]
        without, with_copy = (speed_bounds(plan, machine, n_experts=16, top_k=4) for plan in plans)
        assert any(term.path == "disk" for term in without.terms)
        assert not any(term.path == "disk" for term in with_copy.terms)
        assert with_copy.lower <= with_copy.expected <= with_copy.upper
        assert with_copy.expected > 1.5 * without.expected
        [copies] = [term for term in with_copy.terms if "fallback" in term.data][:1]
        assert copies.nbytes > 0
        assert plans[1].host.fallback == pytest.approx(640 * EXPERT)
        assert plans[1].host.total <= 80 * GIB


@pytest.mark.parametrize("memory", [(24, 1, 24), (12, 0.5, 12, 24), (1, 24), (24, 0.6, 0.6, 24)])
def test_a_gpu_too_small_for_a_layer_is_named(memory: tuple[float, ...]) -> None:
    plan = place(DBRX, INT4, Machine(64 * GIB, tuple(Gpu(int(size * GIB)) for size in memory)), MemoryRequest(4096))
    assert all(device_plan.layers[1] > device_plan.layers[0] for device_plan in plan.gpus)
    assert [device_plan.layers[0] for device_plan in plan.gpus[1:]] == [device_plan.layers[1] for device_plan in plan.gpus[:-1]]
    assert {device_plan.device for device_plan in plan.over_budget} == {f"cuda:{c}" for c, size in enumerate(memory) if size <= 1}


@pytest.mark.parametrize(("memory", "ram"), [((2, 2), 1.0), ((6,), 0.3), ((24, 24), 0.2), ((1, 1, 1), 0.1), ((24, 1, 24), 64)])
def test_the_smallest_budget_in_an_error_works(memory: tuple[float, ...], ram: float) -> None:
    machine = Machine(int(ram * GIB), tuple(Gpu(int(size * GIB)) for size in memory))
    plan, request = place(DBRX, INT4, machine, MemoryRequest(4096)), MemoryRequest(4096)
    sentence = advice(DBRX, INT4, machine, request)
    least = {device_plan.device: device_plan.total for device_plan in plan.over_budget}
    assert all(f"{size:,} bytes for {device}" in sentence for device, size in least.items())
    gpus = tuple(replace(gpu, memory=least.get(f"cuda:{c}", gpu.memory)) for c, gpu in enumerate(machine.gpus))
    assert place(DBRX, INT4, Machine(least.get("cpu", machine.ram), gpus), request).fits


def test_gpus_without_layers_hold_nothing() -> None:
    config = DbrxConfig.from_dict(DBRX.to_dict() | {"n_layers": 2})
    plan = place(config, {}, Machine(None, (gpu(24),) * 4), MemoryRequest(64))
    without_limit = place(config, {}, Machine(), MemoryRequest(64))
    assert [device_plan.dense > 0 for device_plan in plan.gpus] == [True, True, False, False]
    assert sum(device_plan.dense for device_plan in plan.gpus) == without_limit.host.dense


def test_a_host_that_computes_for_gpus_reserves_memory_for_their_steps() -> None:
    """The pairs of the 2,048 tokens of a GPU's step take 201 MB, one row for each."""
    plan = place(DBRX, INT4, Machine(64 * GIB, (gpu(24),)), MemoryRequest(8192))
    one_token = place(DBRX, INT4, Machine(64 * GIB, (gpu(24),)), MemoryRequest(8192, step_tokens=1))
    assert plan.host.workspace - one_token.host.workspace > 2 * 2048 * 4 * 6144 * 4
