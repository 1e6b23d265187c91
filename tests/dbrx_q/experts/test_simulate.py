"""Traces, and simulations whose counters equal those of a real store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache
from dbrx_q.checkpoint.layout import tensor_formats
from dbrx_q.errors import RequestError
from dbrx_q.experts.policies import make_policy
from dbrx_q.experts.predictor import ExpertPredictor, by_likelihood
from dbrx_q.experts.simulate import simulate
from dbrx_q.experts.simulated_speed import simulated_seconds
from dbrx_q.experts.stats import ExpertStats
from dbrx_q.experts.trace import Trace
from dbrx_q.generation.tracing import record
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.expert_kinds import expert_kinds
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import MissPolicy
from dbrx_q.planning.speed import speed_bounds

IDS = [(7 * i * i + 3) % 4000 for i in range(36)]


@pytest.fixture(scope="module")
def model(quantized_nano: Path) -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(quantized_nano)


@pytest.fixture(scope="module")
def saved(model: DbrxForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    record(model, IDS, context=24, step=1).write(path)
    return path


def run(model: DbrxForCausalLM, context: int, step: int) -> None:
    """Run the text of the trace in the same steps."""
    for first in range(0, len(IDS), context):
        window = IDS[first : first + context]
        cache = KVCache(model.config, 1, context, dtype=model.dtype)
        for start in range(0, len(window), step):
            model(torch.tensor([window[start : start + step]]), past_key_values=cache)


def counters(stats: ExpertStats) -> ExpertStats:
    """Without times, and without bytes, which include those of cancelled prefetches."""
    return replace(stats, compute_seconds=0, wait_seconds=0, read_seconds=0, links=(), disk_bytes=0)


def simulated(model: DbrxForCausalLM, trace: Trace, budget: Budget, policy: str, profile: np.ndarray | None) -> ExpertStats:
    """Simulate the trace with the plan that the model was loaded with."""
    assert model.placement is not None
    kinds = expert_kinds(model.config, tensor_formats(model.config, ""), model.dtype)
    return simulate(
        trace,
        trace.passes(token_by_token=False),
        kinds,
        model.placement,
        budget.machine,
        lambda layers, under: make_policy(policy, 4, 16, profile),
        prefetch=budget.prefetch,
        miss_policy=MissPolicy(budget.miss_policy),
        priority=profile,
    )


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("miss_policy", [MissPolicy.cpu, MissPolicy.copy])
@pytest.mark.parametrize("ram", [5.0, 2.6, 1.4], ids=["in memory", "once", "on disk"])
def test_a_simulation_of_gpus_counts_like_their_store(
    model: DbrxForCausalLM, quantized_nano: Path, miss_policy: MissPolicy, ram: float, step: int
) -> None:
    trace = record(model, IDS, context=24, step=step)
    machine = Machine(int(ram * 1e6) + 2 * pinned_bytes(Gpu.link), tuple(Gpu(int(size * 1e6) + Gpu(0).reserve) for size in (2.2, 1.9)))
    cpu = torch.device("cpu")
    budget = Budget(machine, context=24, step_tokens=16, devices=(cpu, cpu), miss_policy=miss_policy, direct=False)
    split = load_model(quantized_nano, budget=budget)
    before = split.expert_store.stats()
    run(split, 24, step)
    counted = split.expert_store.stats() - before
    split.close()
    expected = simulated(split, trace, budget, "least-stale", None)
    assert counters(counted) == counters(expected)
    assert [link.nbytes <= simulated_link.nbytes for link, simulated_link in zip(counted.links, expected.links, strict=True)] == [
        True,
        True,
    ]
    assert counted.cache.misses > 0
    assert (counted.disk_bytes > 0) == (ram < 2)


@pytest.mark.parametrize("policy", ["lru", "lfu", "least-stale"])
def test_gpus_follow_their_policy_where_host_memory_holds_all(model: DbrxForCausalLM, policy: str) -> None:
    """A text that uses the last experts of every layer, which are not on the GPUs at first, soon hits nearly always."""
    N, L = 40, 4
    chosen = np.tile(np.arange(12, 16, dtype=np.uint8), (N, L, 1))
    trace = Trace(chosen, chosen, np.array([1] * N), model.config.to_dict())
    kinds = expert_kinds(model.config, tensor_formats(model.config, ""), model.dtype)
    expert_bytes = kinds[0].nbytes

    def hits(ram: int) -> float:
        machine = Machine(ram, tuple(Gpu(size + Gpu(0).reserve) for size in (14 << 20, 14 << 20)))
        plan = place(model.config, tensor_formats(model.config, ""), machine, MemoryRequest(64, step_tokens=1))
        gpus = tuple(replace(gpu, slots=dict.fromkeys(gpu.slots, 12)) for gpu in plan.gpus)
        host = replace(plan.host, slots={kinds[0]: min(64, (ram - (8 << 20)) // expert_bytes)})
        passes = trace.passes(token_by_token=True)
        stats = simulate(
            trace,
            passes,
            kinds,
            replace(plan, gpus=gpus, host=host),
            machine,
            lambda layers, under: make_policy(policy, L, 16),
            prefetch=False,
            miss_policy=MissPolicy.copy,
        )
        assert stats.disk_bytes == 0
        return stats.cache.hit_rate

    assert hits((8 << 20) + 64 * expert_bytes) > 0.9
    assert hits((8 << 20) + 50 * expert_bytes) < 0.5  # a GPU may evict few of its experts


@pytest.mark.parametrize("policy", ["lru", "lfu", "least-stale"])
@pytest.mark.parametrize("gpus", [(), (2_400_000,)], ids=["host", "gpu"])
def test_nothing_is_slower_than_the_lower_bound(model: DbrxForCausalLM, gpus: tuple[int, ...], policy: str) -> None:
    """Even for tokens that each need other experts than the last one, so that as much as possible misses."""
    N = 60
    chosen = np.array([[[(4 * token + i) % 16 for i in range(4)]] * 4 for token in range(N)], np.uint8)
    trace = Trace(np.sort(chosen, -1), chosen, np.array([1] * N), model.config.to_dict())
    formats = tensor_formats(model.config, "")
    kinds = expert_kinds(model.config, formats, model.dtype)
    ram = 2_900_000 if not gpus else 2_000_000 + pinned_bytes(Gpu.link)
    machine = Machine(ram, tuple(Gpu(size + Gpu(0).reserve) for size in gpus))
    plan = place(model.config, formats, machine, MemoryRequest(64, step_tokens=1))
    assert plan.fits
    assert plan.disk_experts > 0
    bounds = speed_bounds(plan, machine, n_experts=16, top_k=4)
    stats = simulate(
        trace,
        trace.passes(token_by_token=True),
        kinds,
        plan,
        machine,
        lambda layers, under: make_policy(policy, 4, 16),
        prefetch=False,
        miss_policy=MissPolicy.copy,
    )
    assert stats.disk_bytes > N * 4 * kinds[0].nbytes  # it is hard
    assert N / simulated_seconds(stats, plan, machine, tokens=N) >= bounds.lower * 0.9999
    [disk] = [term.nbytes for term in bounds.lower_terms if term.path == "disk"]
    assert stats.disk_bytes / N <= disk * 1.0001


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("policy", ["lru", "lfu", "least-stale", "static"])
def test_a_simulation_counts_like_the_store(
    model: DbrxForCausalLM, quantized_nano: Path, tmp_path: Path, policy: str, prefetch: bool, step: int
) -> None:
    trace = record(model, IDS, context=24, step=step)
    profile = None
    if policy == "static":
        profile = tmp_path / "profile.npz"
        trace.write(profile)
    for ram in (2_150_000, 2_900_000) if policy == "least-stale" else (2_500_000,):
        budget = Budget(Machine(ram), context=24, step_tokens=16, cache_policy=policy, prefetch=prefetch, profile=profile)
        small = load_model(quantized_nano, budget=budget)
        assert small.placement is not None
        slots = small.placement.host.n_slots
        assert 0 < slots < 64
        before = small.expert_store.stats()
        run(small, 24, step)
        counts = None if profile is None else trace.counts()
        counted = small.expert_store.stats() - before
        expected = simulated(small, trace, budget, policy, counts)
        assert counters(counted) == counters(expected)
        assert counted.disk_bytes == expected.disk_bytes or (prefetch and counted.disk_bytes < expected.disk_bytes)
        assert counted.cache.misses > 0
        if slots > 10:
            assert (counted.cache.prefetches > 0) == prefetch
        small.close()


def test_a_trace_records_the_routing(model: DbrxForCausalLM, saved: Path) -> None:
    trace = Trace.read(saved)
    assert trace.experts.shape == trace.predicted.shape == (36, 4, 4)
    assert trace.steps.tolist() == [1] * 36
    assert trace.counts().sum() == 36 * 4 * 4
    assert [
        (step_tokens.start, step_tokens.stop) for step_tokens in replace(trace, steps=np.array([24, 12])).passes(token_by_token=False)
    ] == [
        (0, 24),
        (24, 36),
    ]
    assert len(replace(trace, steps=np.array([24, 12])).passes(token_by_token=True)) == 36
    in_windows = record(model, IDS, context=24, step=512)
    assert in_windows.steps.tolist() == [24, 12]
    cache = KVCache(model.config, 1, 24, dtype=model.dtype)
    logits = model(torch.tensor([IDS[:24]]), past_key_values=cache, output_router_logits=True).router_logits
    assert logits is not None
    for layer, scores in enumerate(logits):
        chosen = scores.sort(descending=True, stable=True).indices[:, :4].sort().values.numpy()
        assert (chosen == in_windows.experts[:24, layer]).all()
    assert (in_windows.predicted[:, 3, 0, None] == in_windows.experts[:, 3]).any(1).mean() > 0.8  # the first prediction of the last layer


def test_predictions_are_ordered_by_likelihood_and_used_while_they_are_right() -> None:
    assert by_likelihood(np.array([[3, 1, 0, 2]]), 5) == [3, 1, 0, 2]
    assert by_likelihood(np.array([[3, 1], [1, 4], [1, 0]]), 5) == [1, 3, 0, 4]
    predictor = ExpertPredictor(2, 4, least_precision=0.5)
    assert predictor.predict(1, np.array([[2, 0]])) == [2, 0]
    predictor.observe(1, [1, 2])
    assert predictor.predict(1, np.array([[2, 0]])) == [2, 0]  # the second was right in one of two
    predictor.observe(1, [1, 2])
    assert predictor.predict(1, np.array([[2, 0]])) == [2]
    assert predictor.predict(1, np.array([[2, 0], [2, 0]])) == [2, 0]  # several tokens are counted separately
    predictor.observe(0, [2])  # another layer's
    predictor.observe(1, [0, 2])
    assert (predictor.predicted, predictor.needed) == (4, 6)


def test_the_trace_and_simulate_commands(quantized_nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    text, trace, out = tmp_path / "text.txt", tmp_path / "trace.npz", tmp_path / "out"
    text.write_text("The old man looked at the sea, and the sea looked back at him. " * 10)
    outcome = cli("trace", quantized_nano, "--text", text, "--out", trace, "--tokens", 80, "--json")
    assert (outcome.code, json.loads(outcome.out)["tokens"]) == (0, 80)
    result = json.loads(cli("simulate", trace, "--ram", "3MiB", "--context", 64, "--tokens", 60, "--json").out)
    rates = {(row["policy"], row["prefetch"]): row["hit_rate"] for row in result["rows"]}
    assert len(rates) == 10
    assert max(rate for (_, prefetch), rate in rates.items() if not prefetch) == rates["belady", False]
    assert (
        result["slots"]
        == json.loads(cli("plan", quantized_nano, "--ram", "3MiB", "--context", 64, "--json").out)["devices"][0]["expert_slots"]
    )
    drawn = cli("simulate", trace, "--ram", "3MiB", "--context", 64, "--tokens", 20, "--out", out)
    assert drawn.code == 0
    assert "| least-stale | yes |" in drawn.out
    assert "| policy | 12.5% | 25.0% |" in (out / "simulation.md").read_text()
    curve = json.loads((out / "simulation.json").read_text())["curve"]
    for policy in ("least-stale", "belady"):  # the more slots, the faster
        by_share = [(point["hit_rate"], point["tokens_per_second"]) for point in curve if point["policy"] == policy]
        assert by_share == sorted(by_share)
        assert by_share[0] < by_share[-1]
    assert {path.name for path in out.iterdir()} == {"simulation.json", "simulation.md", "simulation.png", "simulation.svg"}
    gpus = json.loads(cli("simulate", trace, "--gpu", "1GiB", "--gpu", "1GiB", "--ram", "1GiB", "--tokens", 20, "--json").out)
    assert gpus["slots"] == 64
    used = cli(
        "generate", quantized_nano, "--prompt", "The old", "--max-new-tokens", 4, "--ram", "3MiB", "--profile", trace, "--policy", "static"
    )
    assert used.code == 0
    assert used.out == cli("generate", quantized_nano, "--prompt", "The old", "--max-new-tokens", 4).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trace", "MODEL", "--text", "TEXT", "--out", "x.txt"), "a trace is an .npz file; found the ending '.txt'"),
        (("trace", "MODEL", "--text", "TEXT", "--out", "no/where/x.npz"), "the folder of a trace must exist"),
        (("trace", "MODEL", "--text", "TEXT", "--out", "x.npz", "--step", "0"), "--step must be at least 1"),
        (("trace", "MODEL", "--text", "TEXT", "--out", "x.npz", "--context", "99999"), "--context must be from 1 to"),
        (("simulate", "TEXT", "--ram", "3MiB"), "must be a trace that `dbrx-q trace` wrote; it has other contents. Record one"),
        (("simulate", "nothing.npz", "--ram", "3MiB"), "must be a trace that `dbrx-q trace` wrote; No such file or directory"),
        (("simulate", "TRACE", "--ram", "1MB"), "bytes are missing on cpu"),
        (("simulate", "TRACE", "--ram", "3MiB", "--context", "64", "--tokens", "0"), "at least 1 token; found 0"),
        (("generate", "MODEL", "--prompt", "a", "--policy", "lru"), "need a cache of experts; add --ram or --gpu"),
        (("generate", "MODEL", "--prompt", "a", "--context", "100"), "Add --ram or --gpu"),
        (("generate", "MODEL", "--prompt", "a", "--ram", "3MiB", "--policy", "static"), "Record one with `dbrx-q trace`"),
        (("generate", "MODEL", "--prompt", "a", "--ram", "3MiB", "--profile", "TEXT"), "must be a trace"),
        (("generate", "MODEL", "--prompt", "a", "--gpu", "24GiB"), "GPU 0 must be one that torch sees"),
        (("generate", "MODEL", "--prompt", "a", "--gpu", "auto"), "it sees none"),
        (("perplexity", "MODEL", "--text", "TEXT", "--ram", "1MB", "--context", "64"), "must hold"),
    ],
)
def test_impossible_simulations_are_refused(
    arguments: tuple[str, ...],
    message: str,
    quantized_nano: Path,
    saved: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.txt").write_text("some words to measure on, " * 60)
    places = {"MODEL": quantized_nano, "TEXT": tmp_path / "text.txt", "TRACE": saved}
    outcome = cli(*(places.get(argument, argument) for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (tmp_path / "x.npz").exists()


def test_a_trace_of_another_model_is_refused(saved: Path, tmp_path: Path, quantized_small: Path, model: DbrxForCausalLM) -> None:
    with pytest.raises(RequestError, match="the model's 1 layers, 2 active experts and 4 experts; found 4, 4 and 16"):
        load_model(quantized_small, budget=Budget(Machine(1 << 20), context=8, step_tokens=4, profile=saved))
    trace = Trace.read(saved)
    for broken in (
        replace(trace, steps=np.array([3])),
        replace(trace, experts=trace.experts + 200),
        replace(trace, predicted=trace.predicted[:5]),
    ):
        broken.write(tmp_path / "broken.npz")
        with pytest.raises(RequestError, match="its arrays do not fit together"):
            Trace.read(tmp_path / "broken.npz")
    for arguments, message in (
        ({"context": 0, "step": 1}, "context"),
        ({"context": 8, "step": 0}, "a step must be"),
    ):
        with pytest.raises(RequestError, match=message):
            record(model, IDS, **arguments)
    with pytest.raises(RequestError, match="the text is empty"):
        record(model, [], context=8, step=1)
