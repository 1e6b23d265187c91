"""A fallback copy replaces experts on disk: which copy computed which expert, without waiting, and what it costs."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.eval.provenance import fallback_of
from dbrx_q.experts import ExpertStore
from dbrx_q.experts import tiered_store as tiered
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.fallback import FALLBACK_FOLDER
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.reader import ExpertReader
from dbrx_q.experts.sums import PairSum
from dbrx_q.kernels.cpu.moe import ExpertOutputs
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.offloading import pinned_bytes
from dbrx_q.planning.policy_names import MissPolicy
from dbrx_q.quantize.pipeline import run as pipeline
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.sources.open import open_source

CPU = torch.device("cpu")
TIMEOUT = 60
TEXT = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
PROMPT = list(range(5, 45))
EXPERT = {"int8": 101_376, "int4": 52_992}
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def carrying(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at int8, with a copy at int4."""
    folder = tmp_path_factory.mktemp("carrying") / "dbrx-nano-int8"
    for name, fmt in ((".", "int8"), (FALLBACK_FOLDER, "int4")):
        formats = default_formats(DbrxConfig.from_pretrained(nano), TensorFormat(fmt, 64))
        pipeline.quantize_checkpoint(nano, folder / name, pipeline.QuantizationRequest(lambda _, formats=formats: formats))  # type: ignore[misc]
    return folder


def on_host(slots: int, **options: Any) -> Budget:
    """A budget of host memory for so many experts beside the copy."""
    budget = Budget(Machine(1), context=64, step_tokens=40, direct=False, fallback=True, **options)
    return replace(budget, machine=Machine(6_163_712 + slots * EXPERT["int8"]))


def on_gpus(*megabytes: float, ram: float, **options: Any) -> Budget:
    """A budget of GPUs with so much memory beside the reserve of a real one."""
    machine = Machine(
        int(ram * 1e6) + len(megabytes) * pinned_bytes(Gpu.link), tuple(Gpu(int(size * 1e6) + Gpu(0).reserve) for size in megabytes)
    )
    return Budget(machine, context=64, step_tokens=40, devices=(CPU,) * len(megabytes), direct=False, fallback=True, **options)


@pytest.fixture
def loaded(carrying: Path) -> Iterator[Callable[..., DbrxForCausalLM]]:
    """Loads models, and closes them after the test."""
    opened: list[DbrxForCausalLM] = []

    def load(budget: Budget, folder: Path = carrying) -> DbrxForCausalLM:
        opened.append(load_model(folder, budget=budget))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def logits_of(model: DbrxForCausalLM, tokens: tuple[int, ...] = (7, 300, 7, 41, 9, 300)) -> list[torch.Tensor]:
    cache = KVCache(model.config, 1, 64, dtype=model.dtype, device=model.transformer.devices)
    logits = [model(torch.tensor([PROMPT]), past_key_values=cache).logits]
    for token in tokens:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    return logits


class Recorded(PairSum):
    """Records which experts were computed, and which of them from the fallback copy."""

    def __init__(self, x: torch.Tensor, routing: Routing) -> None:
        super().__init__(x, routing)
        self.fallback: set[int] = set()
        self.computed: list[int] = []

    def add_gpu(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        self._note(weights, slots)
        super().add_gpu(weights, slots)

    def add_host(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        self._note(weights, slots)
        super().add_host(weights, slots)

    def _note(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        self.computed += slots
        self.fallback |= set(slots) if isinstance(weights.w1, Int4Weight) else set()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The sums of every layer of every forward pass, in order."""
    sums: list[Recorded] = []

    def make(x: torch.Tensor, routing: Routing) -> Recorded:
        sums.append(Recorded(x, routing))
        return sums[-1]

    monkeypatch.setattr(tiered, "sum_for", make)
    return sums


class Replayed(ExpertStore):
    """Computes the recorded experts of every pass from the fallback model, the others from the full one, both whole in memory."""

    def __init__(self, full: DbrxForCausalLM, fallback: DbrxForCausalLM, recorded: list[Recorded]) -> None:
        self._layers = [[block.ffn.experts.mlp.weights() for block in model.transformer.layers()] for model in (full, fallback)]
        self._recorded = iter(recorded)

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        raise AssertionError("only whole passes are replayed")

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        outputs, chosen = ExpertOutputs(x, routing.experts), next(self._recorded).fallback
        outputs.add(self._layers[0][index], {e: e for e in outputs.counts if e not in chosen})
        outputs.add(self._layers[1][index], {e: e for e in outputs.counts if e in chosen})
        return outputs.total(routing.weights).to(x.dtype)


BUDGETS = {
    "one slot": on_host(1),
    "some slots": on_host(20, cache_policy="lru"),
    "no upgrades": on_host(20, upgrade=False),
    "GPUs, hybrid": on_gpus(1.9, 1.6, ram=6.0),
    "GPUs, cpu": on_gpus(1.9, 1.6, ram=6.0, miss_policy=MissPolicy.cpu),
    "GPUs, copy": on_gpus(1.9, 1.6, ram=6.0, miss_policy=MissPolicy.copy),
    "GPUs, copy, no prefetch": on_gpus(1.9, 1.6, ram=5.5, miss_policy=MissPolicy.copy, prefetch=False, upgrade=False),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
def test_every_expert_is_computed_once_from_one_of_the_copies(
    carrying: Path, budget: Budget, loaded: Callable[..., DbrxForCausalLM], recorded: list[Recorded]
) -> None:
    model = loaded(budget)
    before = model.expert_store.stats()
    logits = logits_of(model) + logits_of(model)
    stats = model.expert_store.stats() - before
    for layer_sum in recorded:
        assert sorted(layer_sum.computed) == sorted(layer_sum.counts)
    assert stats.fallback_hits == sum(len(layer_sum.fallback) for layer_sum in recorded)
    assert 0 < stats.fallback_hits < stats.cache.requests
    assert stats.fallback_hits <= stats.cache.misses
    assert stats.cache.requests == sum(len(layer_sum.counts) for layer_sum in recorded)
    assert stats.fallback_share == stats.as_dict()["fallback_share"] == stats.fallback_hits / stats.cache.requests
    assert any("fallback copy: served" in line for line in stats.lines())
    oracle = load_model(carrying)
    oracle.transformer.expert_store = Replayed(oracle, load_model(carrying / FALLBACK_FOLDER), recorded)
    assert all(torch.equal(a, b) for a, b in zip(logits, logits_of(oracle) + logits_of(oracle), strict=True))


STEADY = {
    "host": on_host(20, upgrade=False),
    "GPUs, copy": on_gpus(1.9, 1.6, ram=6.0, miss_policy=MissPolicy.copy, upgrade=False),
    "GPUs, hybrid": on_gpus(1.9, 1.6, ram=6.0, upgrade=False, prefetch=False),
}


@pytest.mark.parametrize("budget", STEADY.values(), ids=STEADY.keys())
def test_runs_without_upgrades_are_reproducible(budget: Budget, loaded: Callable[..., DbrxForCausalLM]) -> None:
    model = loaded(budget)
    before = model.expert_store.stats()
    first = logits_of(model)
    assert all(torch.equal(a, b) for a, b in zip(first, logits_of(model), strict=True))
    stats = model.expert_store.stats() - before
    assert stats.fallback_hits > 0
    assert stats.disk_bytes == stats.host.evictions == 0


def test_experts_are_upgraded_while_the_disk_is_idle(carrying: Path, loaded: Callable[..., DbrxForCausalLM]) -> None:
    model = loaded(on_host(20))
    store = model.expert_store
    assert isinstance(store, CpuExpertStore)
    full = load_model(carrying)

    def step(stepped: DbrxForCausalLM) -> torch.Tensor:
        return stepped(torch.tensor([[7]]), past_key_values=KVCache(stepped.config, 1, 8, dtype=stepped.dtype)).logits

    expected = step(full)
    assert not torch.equal(step(model), expected)
    for _ in range(100):
        before = store.stats()
        logits = step(model)
        if not (store.stats() - before).fallback_hits:
            break
        time.sleep(0.01)
    assert torch.equal(logits, expected)


def test_generation_does_not_wait_for_the_disk(loaded: Callable[..., DbrxForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(on_host(20))
    gate = threading.Event()
    real = ExpertReader._read

    def read(self: ExpertReader, piece: Any, buffer: Any) -> None:
        gate.wait(TIMEOUT)
        real(self, piece, buffer)

    monkeypatch.setattr(ExpertReader, "_read", read)
    generation = threading.Thread(target=lambda: generate(model, [PROMPT[:7]], max_new_tokens=12), daemon=True)
    generation.start()
    generation.join(TIMEOUT / 2)
    hangs = generation.is_alive()
    gate.set()
    assert not hangs


def test_a_disk_that_fails_during_an_upgrade(carrying: Path, tmp_path: Path, loaded: Callable[..., DbrxForCausalLM]) -> None:
    copy = Path(shutil.copytree(carrying, tmp_path / "copy"))
    model = loaded(on_host(20), copy)
    [shard] = copy.glob("*.safetensors")
    contents = shard.read_bytes()
    os.truncate(shard, 100)

    def use() -> None:
        for _ in range(50):
            generate(model, [PROMPT[:7]], max_new_tokens=12)

    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        use()
    shard.write_bytes(contents)
    generate(model, [PROMPT[:7]], max_new_tokens=12)


@pytest.mark.parametrize("budget", [on_host(10), on_gpus(1.9, 1.6, ram=6.0)], ids=["host", "gpus"])
def test_a_loaded_model_takes_the_planned_memory(carrying: Path, budget: Budget, loaded: Callable[..., DbrxForCausalLM]) -> None:
    model = loaded(budget)
    plan, store = model.placement, model.expert_store
    assert plan is not None
    assert isinstance(store, CpuExpertStore | GpuExpertStore)
    assert store.fallback is not None
    with Checkpoint(carrying / FALLBACK_FOLDER) as checkpoint:
        copy = sum(info.nbytes for name, info in checkpoint.infos.items() if ".experts." in name)
    assert plan.host.fallback == store.fallback.tier.nbytes == copy == 64 * EXPERT["int4"]
    assert plan.host.experts == store.tier.nbytes
    if isinstance(store, GpuExpertStore):
        assert [gpu.nbytes for gpu in store.gpus] == [device.experts + device.fallback for device in plan.gpus]
        assert [device.fallback for device in plan.gpus] == [2 * EXPERT["int4"]] * 2
    for device in plan.devices:
        assert device.budget is not None
        assert device.total <= device.budget


def test_all_experts_in_memory_need_no_copy(carrying: Path, loaded: Callable[..., DbrxForCausalLM]) -> None:
    for budget in (on_host(64 + 40), on_gpus(2.5, 2.4, ram=12.0)):
        model = loaded(budget)
        assert model.placement is not None
        assert model.placement.host.fallback == 0
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model), logits_of(load_model(carrying)), strict=True))


def test_resumed_figures_must_be_of_the_same_copy(carrying: Path, nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(carrying, folder)

    def key(slots: int) -> str:
        source = open_source(folder)
        source.budget = on_host(slots, upgrade=False)
        return fallback_of(source)

    first = key(20)
    assert first == key(20) != key(30)
    config = DbrxConfig.from_pretrained(folder / FALLBACK_FOLDER)
    shutil.rmtree(folder / FALLBACK_FOLDER)
    formats = default_formats(config, TensorFormat("int4", 32))
    pipeline.quantize_checkpoint(nano, folder / FALLBACK_FOLDER, pipeline.QuantizationRequest(lambda _: formats))
    assert first != key(20)


def test_the_cost_is_measured_and_repeats(carrying: Path, cli: Cli) -> None:
    command = ("--text", TEXT, "--context", 64, "--limit", 8, "--ram", "86.6MB", "--fallback", "--json")
    first, second = (json.loads(cli("perplexity", carrying, *command).out) for _ in range(2))
    assert first["nll"] == second["nll"]
    assert 0.2 < first["fallback_share"] == second["fallback_share"] < 0.99
    whole = [*command[:-4], "--ram", "173.2MB", *command[-2:]]  # each of the two models has half of it
    [row] = json.loads(cli("compare", carrying, carrying, *whole).out)["results"]
    assert row["fallback_share"] == first["fallback_share"]
    assert row["perplexity"] == pytest.approx(first["perplexity"], rel=1e-9)
    assert f"{row['fallback_share']:.1%} of requests answered by the fallback copy" in row["format"]
    [small] = json.loads(cli("compare", carrying, carrying / FALLBACK_FOLDER, *command[:6], "--json").out)["results"]
    assert 0 < row["mean_kl"] < small["mean_kl"]
    assert "answered" in cli("perplexity", carrying, *command[:-1]).out


@pytest.mark.parametrize("name", ["none", "plain", "larger", "other", "weights"])
def test_a_copy_that_does_not_match_is_refused(
    carrying: Path, quantized_nano: Path, quantized_small: Path, nano: Path, tmp_path: Path, cli: Cli, name: str
) -> None:
    folder = tmp_path / "model"
    inner = folder / FALLBACK_FOLDER
    shutil.copytree(carrying if name != "larger" else quantized_nano, folder, ignore=shutil.ignore_patterns(FALLBACK_FOLDER))
    if name in ("plain", "larger", "other"):
        shutil.copytree({"plain": nano, "larger": carrying, "other": quantized_small}[name], inner)
    if name == "weights":
        config = DbrxConfig.from_pretrained(nano)
        write_checkpoint(config, tmp_path / "random")
        formats = default_formats(config, TensorFormat("int4", 64))
        pipeline.quantize_checkpoint(tmp_path / "random", inner, pipeline.QuantizationRequest(lambda _: formats))
    message = {
        "none": "--fallback needs a fallback copy in the folder 'fallback'; there is none",
        "plain": "a fallback copy must be quantized; this one is plain",
        "larger": "the experts of a fallback copy must take fewer bytes than the checkpoint's; one of layer 0 takes 101,376, and 52,992",
        "other": "a fallback copy must be of the same model",
        "weights": "a fallback copy must be made from the same weights; its router of layer 0 differs",
    }[name]
    outcome = cli("generate", folder, "--prompt", "The", "--ram", "7MB", "--max-new-tokens", 2, "--fallback")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err.replace("\n", " ")
    if name != "weights":  # which a plan does not read
        assert message in cli("plan", folder, "--fallback").err.replace("\n", " ")


def test_fallback_options_that_cannot_work_are_refused(carrying: Path, nano: Path, cli: Cli) -> None:
    for arguments, message in (
        (("generate", carrying, "--prompt", "The"), "found no limit to memory. Add --ram or --gpu"),
        (("generate", carrying, "--prompt", "The", "--ram", "4MB"), "of a fallback copy"),
        (("perplexity", nano, "--text", TEXT, "--ram", "90MB"), "--fallback is for checkpoints that dbrx_q quantized"),
        (("plan", nano, "--fallback-format", "int4"), "--fallback-format needs --format and --fallback"),
        (("plan", nano, "--format", "int4", "--fallback-format", "int8"), "must take fewer bytes"),
    ):
        outcome = cli(*arguments, "--fallback")
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert message in outcome.err.replace("\n", " ")


def test_quantize_writes_a_fallback_copy_and_resumes_it(small: Path, tmp_path: Path, cli: Cli) -> None:
    plan = json.loads(cli("quantize", small, tmp_path / "out", "--format", "int8", "--fallback-format", "int4", "--dry-run", "--json").out)
    assert plan["fallback"]["bytes_out"] < plan["bytes_out"]
    refused = cli("quantize", small, tmp_path / "out", "--format", "int4", "--fallback-format", "int8")
    assert (refused.code, refused.out) == (2, "")
    assert "must take fewer bytes" in refused.err.replace("\n", " ")
    assert not list(tmp_path.iterdir())
    # A run that was killed between the two leaves this.
    assert cli("quantize", small, tmp_path / "out", "--format", "int8").code == 0
    resumed = cli("quantize", small, tmp_path / "out", "--format", "int8", "--fallback-format", "int4", "--resume")
    assert (resumed.code, resumed.err.count("is complete already")) == (0, 1)
    assert cli("quantize", small, tmp_path / "int4", "--format", "int4").code == 0
    for shard in (tmp_path / "int4").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / FALLBACK_FOLDER / shard.name).read_bytes()
    assert cli("verify", tmp_path / "out").code == 0
    again = cli("quantize", small, tmp_path / "out", "--format", "int8", "--fallback-format", "int4", "--resume")
    assert (again.code, again.err.count("is complete already")) == (0, 2)
    shard = next((tmp_path / "out" / FALLBACK_FOLDER).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    damaged = cli("verify", tmp_path / "out")
    assert damaged.code == 1
    assert f"{FALLBACK_FOLDER}/{shard.name}: differs" in damaged.err
    (tmp_path / "out" / FALLBACK_FOLDER / "manifest.json").unlink()
    assert cli("verify", tmp_path / "out").code == 2
