"""Several threads run one model whose experts move between memories: results have the bits of a single thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxForCausalLM, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import CheckpointError
from dbrx_q.experts.cpu_store import CpuExpertStore
from dbrx_q.experts.files import ExpertFiles
from dbrx_q.experts.host_tier import HostTier
from dbrx_q.experts.policies import make_policy
from dbrx_q.experts.predictor import ExpertPredictor
from dbrx_q.experts.reader import ExpertReader
from dbrx_q.experts.tiered_store import NextRouter
from dbrx_q.generation.decode_graph import BatchDecoder
from dbrx_q.model.loading import load_model
from dbrx_q.planning.budget import Budget
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource

THREADS = 6
PROMPTS = [[(17 * thread + 3 * i) % 4000 + 5 for i in range(9 + thread)] for thread in range(THREADS)]


@pytest.fixture(scope="module")
def model(quantized_nano: Path) -> DbrxForCausalLM:
    return load_model(quantized_nano)


@pytest.fixture
def with_slots(quantized_nano: Path, model: DbrxForCausalLM) -> Iterator[Callable[[int], CpuExpertStore]]:
    """Gives the model a store with so many slots for experts until the test ends."""
    resident, stores = model.transformer.expert_store, []

    def give(slots: int) -> CpuExpertStore:
        with Checkpoint(quantized_nano) as checkpoint:
            files = ExpertFiles(checkpoint, model.dtype)
        ffn, layers = model.config.ffn_config, model.config.n_layers
        policies = {kind: make_policy("least-stale", layers, ffn.moe_num_experts) for kind in set(files.kinds)}
        routers = [NextRouter(block.ffn.router.layer.weight, ffn.moe_top_k) for block in model.transformer.layers()]
        tier = HostTier(files, ExpertReader(files), slots=dict.fromkeys(policies, slots), policies=policies)
        stores.append(CpuExpertStore(tier, prefetch=True, routers=routers))
        model.transformer.expert_store = stores[-1]
        return stores[-1]

    yield give
    model.transformer.expert_store = resident
    for store in stores:
        store.close()


def tokens_of(model: DbrxForCausalLM, thread: int) -> list[int]:
    return generate(model, [PROMPTS[thread]], max_new_tokens=4, eos_token_ids=())[0].token_ids


@pytest.fixture(scope="module")
def expected(model: DbrxForCausalLM) -> list[list[int]]:
    """What one thread generates."""
    return [tokens_of(model, thread) for thread in range(THREADS)]


def from_threads(model: DbrxForCausalLM) -> list[list[int]]:
    """What six threads generate that begin together, each for its own prompt."""
    barrier = threading.Barrier(THREADS)

    def run(thread: int) -> list[int]:
        barrier.wait()
        return tokens_of(model, thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize("slots", [1, 3, None], ids=["one", "three", "resident"])
def test_six_threads_generate_what_one_does(
    model: DbrxForCausalLM, expected: list[list[int]], with_slots: Callable[[int], CpuExpertStore], slots: int | None
) -> None:
    store = with_slots(slots) if slots is not None else None
    assert from_threads(model) == expected
    if store is not None:
        stats = store.stats()
        assert stats.cache.requests > 0
        assert stats.predicted <= stats.predictable <= stats.cache.requests


def test_six_threads_on_gpus_generate_what_one_does(
    expected: list[list[int]], loaded: Callable[..., DbrxForCausalLM], gpus: Callable[..., Budget]
) -> None:
    assert from_threads(loaded(gpus(1.0, 2.0, ram=40))) == expected


def test_threads_take_turns_with_experts_that_are_dequantized_layer_by_layer(nano: Path) -> None:
    source = open_source(str(nano))
    assert isinstance(source, ConvertedSource)
    streamed = source.load(dtype=torch.float32, device=torch.device("cpu"), stream=True)
    ids = [torch.tensor([prompt]) for prompt in PROMPTS[:3]]
    expected = [streamed(row).logits for row in ids]
    with ThreadPoolExecutor(THREADS) as pool:
        for logits, alone in zip(pool.map(lambda row: streamed(row).logits, ids), expected, strict=True):
            assert torch.equal(logits, alone)


def test_counters_can_be_read_while_threads_run(model: DbrxForCausalLM, with_slots: Callable[[int], CpuExpertStore]) -> None:
    store, ended = with_slots(2), threading.Event()
    requests: list[int] = []

    def watch() -> None:
        while not ended.is_set():
            requests.append(store.stats().cache.requests)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        from_threads(model)
    finally:
        ended.set()
        watcher.join()
    assert requests == sorted(requests)


def test_a_store_that_is_closed_while_threads_run_ends_them_with_a_message(
    model: DbrxForCausalLM, with_slots: Callable[[int], CpuExpertStore]
) -> None:
    store = with_slots(1)

    def run(thread: int) -> str:
        try:
            for _ in range(50):
                tokens_of(model, thread)
        except CheckpointError as error:
            return str(error)
        return "not closed"

    with ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(run, thread) for thread in range(THREADS)]
        while store.stats().cache.requests < 50:
            pass
        store.close()
        store.close()  # again: nothing happens
        assert {future.result(timeout=120) for future in running} == {"the expert store was closed; load the model again"}


def test_a_prediction_is_compared_with_what_the_same_thread_needs() -> None:
    import numpy as np

    predictor = ExpertPredictor(3, 4)
    predictor.predict(1, np.array([[0, 1]]))
    other = threading.Thread(target=predictor.observe, args=(1, [2, 3]))
    other.start()
    other.join()
    assert (predictor.predicted, predictor.needed) == (0, 0)
    predictor.observe(1, [0, 1])
    assert (predictor.predicted, predictor.needed) == (2, 2)


def test_a_decoder_that_a_request_left_is_borrowed_by_one_thread(model: DbrxForCausalLM) -> None:
    kept = BatchDecoder(model, 1, 64, "plain")
    barrier, borrowed = threading.Barrier(THREADS), []

    def borrow() -> None:
        barrier.wait()
        with BatchDecoder.borrowed(model, 1, 64, "plain") as decoder:
            borrowed.append(decoder)
            barrier.wait()  # all threads hold one

    model.decoder = kept
    threads = [threading.Thread(target=borrow) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.decoder = None
    assert len({id(decoder) for decoder in borrowed}) == THREADS
