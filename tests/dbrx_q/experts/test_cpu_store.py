"""Experts in host memory over disk: results have the same bits for every budget, and errors of reading are reported."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.experts import ResidentExpertStore
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.experts.host_tier import HostTier
from dbrx_q.experts.policies import make_policy
from dbrx_q.experts.reader import ExpertReader, reads_faster_directly, supports_direct
from dbrx_q.experts.slots import ExpertSlots
from dbrx_q.experts.tiered_store import NextRouter
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Machine
from dbrx_q.quantize.pipeline import run as pipeline
from dbrx_q.quantize.pipeline.format_assignment import default_formats

PROMPT = list(range(5, 95))
TIMEOUT = 60
# Slots of each kind, policy, prefetch.
SETTINGS = [(1, "least-stale", True), (1, "lru", False), (2, "lfu", True), (2, "lru", True), (2, "least-stale", False)]
SETTINGS += [(5, "least-stale", True), (5, "lru", True), (5, "lfu", False), (64, "least-stale", True)]


@pytest.fixture(scope="module")
def mixed_nano(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of four kinds: int8; nf4-double, which is converted while it is read; int4 with int8 w2; and int4."""

    def assign_formats(checkpoint: Checkpoint) -> dict[str, TensorFormat]:
        formats = default_formats(checkpoint.config, TensorFormat("int4", 64))
        for name in list(formats):
            if ".blocks.0.ffn" in name:
                formats[name] = TensorFormat("int8", 64)
            if ".blocks.1.ffn" in name:
                formats[name] = TensorFormat("nf4-double", 64)
            if ".blocks.2.ffn" in name and name.endswith(".w2"):
                formats[name] = TensorFormat("int8", 32)
        return formats

    folder = tmp_path_factory.mktemp("mixed") / "dbrx-nano-mixed"
    pipeline.quantize_checkpoint(nano, folder, pipeline.QuantizationRequest(assign_formats))
    return folder


@pytest.fixture(params=["int4", "mixed", "plain"])
def folder(request: pytest.FixtureRequest, nano: Path, quantized_nano: Path, mixed_nano: Path) -> Path:
    return {"int4": quantized_nano, "mixed": mixed_nano, "plain": nano}[request.param]


def store_over(
    folder: Path,
    model: DbrxForCausalLM,
    slots: int | Callable[[ExpertKind], int],
    *,
    policy: str = "least-stale",
    prefetch: bool = True,
    direct: bool = False,
) -> CpuExpertStore:
    """A store with `slots` slots of each kind; closing it ends the reader's threads."""
    with Checkpoint(folder) as checkpoint:
        files = ExpertFiles(checkpoint, model.dtype)
    config = model.config
    policies = {kind: make_policy(policy, config.n_layers, config.ffn_config.moe_num_experts) for kind in set(files.kinds)}
    routers = [NextRouter(block.ffn.router.layer.weight, config.ffn_config.moe_top_k) for block in model.transformer.layers()]
    counts = {kind: slots if isinstance(slots, int) else slots(kind) for kind in policies}
    tier = HostTier(files, ExpertReader(files, direct=direct), slots=counts, policies=policies)
    return CpuExpertStore(tier, prefetch=prefetch, routers=routers)


def logits_of(model: DbrxForCausalLM) -> list[torch.Tensor]:
    """The logits of a prompt and of single tokens after it."""
    cache = KVCache(model.config, 1, 128, dtype=model.dtype)
    logits = [model(torch.tensor([PROMPT]), past_key_values=cache).logits]
    for token in (7, 300, 7, 41):
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    return logits


@pytest.fixture
def replaced() -> Iterator[Callable[[DbrxForCausalLM, CpuExpertStore], None]]:
    """Gives a model another store until the test ends."""
    opened: list[tuple[DbrxForCausalLM, Any, CpuExpertStore]] = []

    def give(model: DbrxForCausalLM, store: CpuExpertStore) -> None:
        opened.append((model, model.transformer.expert_store, store))
        model.transformer.expert_store = store

    yield give
    for model, original, store in opened:
        model.transformer.expert_store = original
        store.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_any_budget_policy_and_prefetch_gives_the_same_bits(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype=dtype)
    assert isinstance(model.transformer.expert_store, ResidentExpertStore)
    expected = logits_of(model)
    for slots, policy, prefetch in SETTINGS if dtype == torch.bfloat16 else SETTINGS[::3]:
        store = store_over(folder, model, slots, policy=policy, prefetch=prefetch, direct=slots == 5 and supports_direct(folder))
        store.fill()
        model.transformer.expert_store = store
        logits = logits_of(model)
        store.close()
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True)), (slots, policy, prefetch)
        assert (store.stats().cache.misses == 0) == (slots == 64), (slots, policy, prefetch)


def test_a_model_is_loaded_as_planned_and_counts_reads_and_misses(quantized_nano: Path) -> None:
    expected = generate(DbrxForCausalLM.from_pretrained(quantized_nano), [PROMPT], max_new_tokens=8)[0].token_ids
    model = DbrxForCausalLM.from_pretrained(quantized_nano, budget=Budget(Machine.detect({"cpu": "4MiB"}), context=128))
    plan = model.placement
    assert plan is not None
    assert 0 < plan.host.n_slots < plan.experts == 64
    before = model.expert_store.stats()
    assert before.disk_bytes == plan.host.experts  # the slots were filled
    assert generate(model, [PROMPT], max_new_tokens=8)[0].token_ids == expected
    stats = model.expert_store.stats() - before
    assert stats.cache.requests >= 3 * 16 + 4 + 7 * 4 * 4  # the last layer computes one token of the prompt
    assert stats.cache.misses > 0
    expert_bytes = plan.expert_bytes // plan.experts
    assert stats.cache.misses * expert_bytes <= stats.disk_bytes <= (stats.cache.misses + stats.cache.prefetches) * expert_bytes
    assert stats.compute_seconds > 0
    model.close()


def test_a_budget_for_all_experts_makes_a_resident_store(quantized_nano: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(quantized_nano, device_map="auto", max_memory={"cpu": "1GiB"})
    assert isinstance(model.expert_store, ResidentExpertStore)
    assert model.expert_store.stats().cache.requests == 0


def test_an_expert_of_a_quantized_checkpoint_is_one_range(nano: Path, quantized_nano: Path, mixed_nano: Path) -> None:
    for folder, ranges in ((nano, 3), (quantized_nano, 1), (mixed_nano, 1)):
        with Checkpoint(folder) as checkpoint:
            files = ExpertFiles(checkpoint, torch.bfloat16)
            extents = [extent for layer in range(4) for e in range(16) for extent in files.extents(layer, e)]
            assert len(extents) == ranges * 64
            stored = [info for name, info in checkpoint.infos.items() if ".experts." in name]
            assert sum(extent.nbytes for extent in extents) == files.nbytes == sum(info.nbytes for info in stored)


@pytest.fixture
def copied(quantized_nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_nano, tmp_path / "copy"))


def bounded(action: Callable[[], Any]) -> BaseException | None:
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
    assert not thread.is_alive(), "the action hangs"
    return outcomes[0]


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_file_that_becomes_shorter_while_it_is_read(copied: Path, prefetch: bool) -> None:
    budget = Budget(Machine(2 << 20), context=100, step_tokens=8, prefetch=prefetch, direct=False)
    model = load_model(copied, budget=budget)
    expected = generate(model, [PROMPT[:5]], max_new_tokens=12)[0].token_ids
    [shard] = copied.glob("*.safetensors")
    contents = shard.read_bytes()
    os.truncate(shard, 100)
    error = bounded(lambda: generate(model, [PROMPT[:5]], max_new_tokens=12))
    assert isinstance(error, CheckpointError)
    assert "became shorter while it was read" in str(error)
    shard.write_bytes(contents)  # a partly read expert is not used
    assert generate(model, [PROMPT[:5]], max_new_tokens=12)[0].token_ids == expected
    model.close()


@pytest.mark.parametrize("problem", [OSError(5, "Input/output error"), RuntimeError("a bug in a thread")], ids=["disk", "thread"])
def test_a_reader_that_fails(copied: Path, problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(copied, budget=Budget(Machine(2 << 20), context=100, step_tokens=8, direct=False))
    expected = generate(model, [PROMPT[:5]], max_new_tokens=12)[0].token_ids
    real, calls = os.preadv, []

    def preadv(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) >= 3:
            raise problem
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", preadv)
        error = bounded(lambda: generate(model, [PROMPT[:5]], max_new_tokens=12))
    if isinstance(problem, OSError):
        assert isinstance(error, CheckpointError)
        assert "read failed at byte" in str(error)
        assert "Input/output error" in str(error)
    else:
        assert error is problem
    assert generate(model, [PROMPT[:5]], max_new_tokens=12)[0].token_ids == expected
    model.close()


@pytest.mark.parametrize("expert", [0, 15], ids=["read at once", "read later"])
def test_a_damaged_expert_is_refused_when_it_is_first_read(copied: Path, expert: int) -> None:
    with Checkpoint(copied) as checkpoint:
        name = f"transformer.blocks.3.ffn.experts.mlp.v1.{expert}.scales"
        path, offset = checkpoint.path_of(name), checkpoint.infos[name].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\x00\x7c")  # infinity

    def use() -> None:
        model = load_model(copied, budget=Budget(Machine(2_200_000), context=100, step_tokens=8))
        assert expert, "expert 0 is read when the model is loaded"
        for seed in range(300):
            generate(model, [[seed, 3, seed]], max_new_tokens=8)

    error = bounded(use)
    assert isinstance(error, CheckpointError)
    assert f"{name} must be finite" in str(error)


def test_an_interruption_frees_the_slots_of_experts_that_have_not_arrived(
    quantized_nano: Path, replaced: Callable[[DbrxForCausalLM, CpuExpertStore], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(quantized_nano)
    expected = logits_of(model)
    store = store_over(quantized_nano, model, 6)
    replaced(model, store)
    real, calls = ExpertReader.load, []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) % 13 == 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    for _ in range(8):
        with monkeypatch.context() as patched:
            patched.setattr(ExpertReader, "load", load)
            with pytest.raises(KeyboardInterrupt):
                logits_of(model)
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model), expected, strict=True))


def test_a_closed_store_raises_an_error_and_does_not_hang(quantized_nano: Path) -> None:
    model = load_model(quantized_nano, budget=Budget(Machine(2 << 20), context=100, step_tokens=8))
    model.close()
    model.close()
    error = bounded(lambda: generate(model, [PROMPT[:5]], max_new_tokens=12))
    assert isinstance(error, CheckpointError)
    assert "closed" in str(error)


def test_a_cancelled_load_frees_its_slot(quantized_nano: Path) -> None:
    """The next load into the slot gives it the right bytes."""
    model = load_model(quantized_nano)
    with Checkpoint(quantized_nano) as checkpoint:
        files = ExpertFiles(checkpoint, model.dtype)
    reader = ExpertReader(files, threads=1)
    slots = ExpertSlots(files.kinds[0], 1, torch.device("cpu"))
    for e in range(15):
        load = reader.load(0, e, slots, 0, urgent=False)
        reader.cancel(load)
        load.join()
        reader.load(0, e + 1, slots, 0, urgent=True).wait()
        assert torch.equal(slots.views(0)[0], model.transformer.layers()[0].ffn.experts.mlp.w1.get_buffer("qweight")[e + 1])
    reader.close()


def test_urgent_experts_are_read_before_predicted_ones(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint(quantized_nano) as checkpoint:
        files = ExpertFiles(checkpoint, torch.bfloat16)
    reader = ExpertReader(files, threads=1)
    slots = ExpertSlots(files.kinds[0], 4, torch.device("cpu"))
    gate, order = threading.Event(), []
    real = ExpertReader._read

    def read(self: ExpertReader, piece: Any, buffer: Any) -> None:
        gate.wait(TIMEOUT)
        order.append(piece.load)
        real(self, piece, buffer)

    monkeypatch.setattr(ExpertReader, "_read", read)
    first = reader.load(0, 0, slots, 0, urgent=True)
    early, later, needed = (reader.load(0, e, slots, e, urgent=e == 3) for e in (1, 2, 3))
    reader.prioritize(later)
    gate.set()
    for load in (first, early, later, needed):
        load.wait()
    assert order == [first, needed, later, early]
    reader.close()


def test_the_page_cache_is_used_if_it_can_hold_the_uncached_experts(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint(quantized_nano) as checkpoint:
        files = ExpertFiles(checkpoint, torch.bfloat16)
    assert not reads_faster_directly(files, uncached_bytes=1)
    if supports_direct(files.paths[0]):
        assert reads_faster_directly(files, uncached_bytes=1 << 60) in (True, False)  # measured, either way without an error


def test_the_layer_of_a_store_holds_the_requested_experts(quantized_nano: Path) -> None:
    model = load_model(quantized_nano)
    store = store_over(quantized_nano, model, 5)
    weights = store.layer(2, torch.tensor([[3, 9], [9, 1]]))
    assert weights.slots is not None
    assert [e for e, slot in enumerate(weights.slots.tolist()) if slot >= 0] == [1, 3, 9]
    with pytest.raises(RequestError, match="it uses 6 and the budget holds 5"):
        store.layer(2, torch.arange(6)[None])
    store.close()
