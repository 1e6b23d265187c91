"""Layers split over GPUs, here parts of host memory: the GPU code gives the bits of a model that is not split."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache, generate
from dbrx_q.errors import CheckpointError, DbrxError, RequestError
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.link import Link
from dbrx_q.experts.stats import ExpertStats
from dbrx_q.experts.sums import PartialSum
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.router import route
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Machine
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import MissPolicy
from dbrx_q.planning.sizes import format_size

CPU = torch.device("cpu")
TIMEOUT = 60
PROMPT = list(range(5, 45))

Gpus = Callable[..., Budget]


def logits_of(model: DbrxForCausalLM) -> list[torch.Tensor]:
    cache = KVCache(model.config, 1, 64, dtype=model.dtype, device=model.transformer.devices)
    logits = [model(torch.tensor([PROMPT]), past_key_values=cache).logits]
    for token in (7, 300, 7, 41, 9, 300):
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    return logits


@pytest.fixture(scope="module")
def expected(quantized_nano: Path) -> list[torch.Tensor]:
    return logits_of(load_model(quantized_nano))


# The model has 64 experts of 53 kB. Host memory holds all; GPUs and host together hold all, some twice; some are only on disk; the GPUs
# have few slots; one GPU; three GPUs of unequal size.
MACHINES = {
    "in memory": ((2.3, 2.0), 5.0),
    "once": ((2.3, 2.0), 2.6),
    "on disk": ((2.3, 2.0), 1.4),
    "few slots": ((1.4, 1.1), 1.4),
    "one GPU": ((3.2,), 1.6),
    "three": ((1.5, 2.2, 1.2), 1.5),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("miss_policy", list(MissPolicy))
def test_any_split_gives_the_same_bits(
    machine: str, miss_policy: MissPolicy, loaded: Callable[..., DbrxForCausalLM], expected: list[torch.Tensor], gpus: Gpus
) -> None:
    sizes, ram = MACHINES[machine]
    policies = [("least-stale", True), ("lru", True), ("lfu", False)]
    turn = (list(MACHINES).index(machine) + list(MissPolicy).index(miss_policy)) % len(policies)
    for policy, prefetch in policies if machine == "few slots" else policies[turn : turn + 1]:
        model = loaded(gpus(*sizes, ram=ram, cache_policy=policy, prefetch=prefetch, miss_policy=miss_policy))
        plan, store = model.placement, model.expert_store
        assert plan is not None
        assert isinstance(store, GpuExpertStore)
        assert [gpu.layers for gpu in store.gpus] == [device.layers for device in plan.gpus]
        assert (plan.disk_experts == 0) == (machine in ("in memory", "once"))
        assert [cache.evictable is None for gpu in store.gpus for _, cache in gpu._main_pool.pools.values()] == [machine != "once"] * len(
            sizes
        )
        before = store.stats()
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True)), (policy, prefetch)
        stats = store.stats() - before
        assert stats.cache.misses > 0
        assert stats.host.requests == stats.cache.misses
        assert (stats.disk_bytes == 0) == (machine in ("in memory", "once"))
        if miss_policy is MissPolicy.cpu:
            assert stats.computed_on_cpu == stats.cache.misses
        if miss_policy is MissPolicy.copy:
            assert stats.computed_on_cpu == 0
            assert stats.link_bytes >= stats.cache.misses * store.tier.kind(0).nbytes
        model.close()


def test_every_gpu_takes_the_planned_memory(loaded: Callable[..., DbrxForCausalLM], gpus: Gpus) -> None:
    model = loaded(gpus(2.3, 2.0, ram=1.4))
    plan, store = model.placement, model.expert_store
    assert plan is not None
    assert isinstance(store, GpuExpertStore)
    assert [gpu.nbytes for gpu in store.gpus] == [device.experts for device in plan.gpus]
    assert store.tier.nbytes == plan.host.experts
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta)
    assert held == sum(device.dense for device in plan.gpus)
    cache = KVCache(model.config, 1, 64, dtype=model.dtype, device=model.transformer.devices)
    assert cache.nbytes == sum(device.kv_cache for device in plan.gpus)


def test_gpus_for_all_experts_make_a_resident_store(
    loaded: Callable[..., DbrxForCausalLM], expected: list[torch.Tensor], gpus: Gpus
) -> None:
    model = loaded(gpus(9.0, 9.0, ram=1.0))
    assert not isinstance(model.expert_store, GpuExpertStore)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True))


def test_a_model_that_is_loaded_in_inference_mode(loaded: Callable[..., DbrxForCausalLM], expected: list[torch.Tensor], gpus: Gpus) -> None:
    with torch.inference_mode():
        model = loaded(gpus(1.4, 1.1, ram=1.4, miss_policy=MissPolicy.copy))
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True))


def test_generation_and_its_counters(loaded: Callable[..., DbrxForCausalLM], quantized_nano: Path, gpus: Gpus) -> None:
    model = loaded(gpus(2.3, 2.0, ram=1.4))
    prompts = [PROMPT[:7], PROMPT[3:20]]
    expected_ids = [result.token_ids for result in generate(load_model(quantized_nano), prompts, max_new_tokens=12)]
    assert [result.token_ids for result in generate(model, prompts, max_new_tokens=12)] == expected_ids
    shown = "\n".join(model.expert_store.stats().lines())
    assert "host memory:" in shown
    stats = model.expert_store.stats()
    assert [link.gpu for link in stats.links] == ["cuda:0", "cuda:1"]
    for link, link_json in zip(stats.links, stats.as_dict()["links"], strict=True):
        assert link.nbytes > 0
        assert link.seconds > 0
        assert f"link to {link.gpu}: {format_size(link.nbytes)} copied" in shown
        assert link_json == {"gpu": link.gpu, "nbytes": link.nbytes, "seconds": link.seconds}
    assert stats.link_bytes == sum(link.nbytes for link in stats.links) == stats.as_dict()["link_bytes"]
    doubled = stats + stats
    assert [link.nbytes for link in doubled.links] == [2 * link.nbytes for link in stats.links]
    assert (doubled - stats).links == stats.links
    assert (ExpertStats() + stats).links == stats.links


def test_a_reader_that_fails_under_gpus(
    quantized_nano: Path, tmp_path: Path, loaded: Callable[..., DbrxForCausalLM], expected: list[torch.Tensor], gpus: Gpus
) -> None:
    copy = Path(shutil.copytree(quantized_nano, tmp_path / "copy"))
    model = loaded(gpus(1.4, 1.1, ram=1.4), copy)
    [shard] = copy.glob("*.safetensors")
    contents = shard.read_bytes()
    os.truncate(shard, 100)
    error = ends(lambda: logits_of(model))
    assert isinstance(error, CheckpointError)
    assert "became shorter" in str(error)
    shard.write_bytes(contents)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True))


def test_a_link_that_fails_and_an_interruption(
    loaded: Callable[..., DbrxForCausalLM], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, gpus: Gpus
) -> None:
    model = loaded(gpus(2.3, 2.0, ram=1.4, miss_policy=MissPolicy.copy))
    store = model.expert_store
    assert isinstance(store, GpuExpertStore)
    real = Link.copy
    for problem in (RuntimeError("the bus is gone"), KeyboardInterrupt()):
        for good in (0, 3, 8):
            calls: list[int] = []

            def copy(*arguments: Any, calls: list[int] = calls, good: int = good, problem: Any = problem, **options: Any) -> Any:
                calls.append(1)
                if len(calls) > good:
                    raise problem
                return real(*arguments, **options)

            with monkeypatch.context() as patched:
                patched.setattr(Link, "copy", copy)
                assert ends(lambda: logits_of(model)) is problem
            assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True))


def test_a_closed_store_of_gpus_raises_an_error(loaded: Callable[..., DbrxForCausalLM], gpus: Gpus) -> None:
    model = loaded(gpus(1.4, 1.1, ram=1.4))
    model.close()
    error = ends(lambda: logits_of(model))
    assert isinstance(error, DbrxError)
    assert "closed" in str(error)


def ends(action: Callable[[], Any]) -> BaseException | None:
    """The exception that an action raises, or None; fails if the action hangs."""
    outcomes: list[BaseException | None] = []

    def run() -> None:
        try:
            action()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive(), "it hangs"
    return outcomes[0]


@pytest.mark.parametrize("T", [1, 70])
def test_parts_from_a_gpu_and_from_the_cpu_add_up(quantized_nano: Path, T: int) -> None:
    """The sum of a GPU, on the CPU: some experts are added as on the GPU, the others as from the host."""
    model = load_model(quantized_nano)
    layer = model.transformer.layers()[1].ffn.experts.mlp.weights()
    x = torch.randn(T, 128, generator=torch.Generator().manual_seed(T))
    routing = route(x, torch.randn(16, 128, generator=torch.Generator().manual_seed(1)), 4, 1.0)
    total = PartialSum(x, routing)
    chosen = list(total.counts)
    total.add_gpu(layer, {e: e for e in chosen[::2]})
    total.add_host(layer, {e: e for e in chosen[1::2][:2]})
    total.add_gpu(layer, {e: e for e in chosen[1::2][2:]})
    expected = moe_experts(x, routing.experts, routing.weights, layer)
    torch.testing.assert_close(total.result(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert total.counts == {e: int((routing.experts == e).sum()) for e in range(16) if (routing.experts == e).any()}


def test_a_model_that_does_not_fit_on_a_gpu_is_refused(quantized_nano: Path, gpus: Gpus) -> None:
    budget = gpus(0.3, 2.0, ram=4.0)
    with pytest.raises(RequestError, match=r"cuda:0 must hold [\d,]+ bytes .* at least"):
        load_model(quantized_nano, budget=budget)
    with pytest.raises(RequestError, match="the host must hold"):
        load_model(quantized_nano, budget=replace(budget, machine=replace(gpus(2.3, 2.0, ram=0.2).machine)))


def test_names_that_a_budget_does_not_know_are_refused() -> None:
    for name, choices in (
        ("miss_policy", "hybrid, cpu, copy"),
        ("cache_policy", "lru, lfu, least-stale, static"),
        ("kv_format", "plain, int8, int4"),
    ):
        with pytest.raises(RequestError, match=f"{name} of a budget must be one of {choices}; found 'gpu'"):
            Budget(Machine(), **{name: "gpu"})  # type: ignore[arg-type] # by name


def test_a_plan_leaves_slots_for_copies(quantized_nano: Path, gpus: Gpus) -> None:
    model = load_model(quantized_nano)
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.planning.footprint import MemoryRequest

    with Checkpoint(quantized_nano) as checkpoint:
        plan = place(model.config, checkpoint.formats, gpus(2.3, 2.0, ram=2.4).machine, MemoryRequest(64, step_tokens=40))
        roomy = place(model.config, checkpoint.formats, gpus(2.3, 2.0, ram=5.0).machine, MemoryRequest(64, step_tokens=40))
    assert [device.scratch for device in plan.gpus] == [2, 2]
    assert sum(device.n_slots for device in plan.gpus) < 64 < sum(device.n_slots for device in plan.devices)
    assert roomy.host.n_slots == 64
