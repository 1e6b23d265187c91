"""Models loaded within a budget: budgets that are refused, and generation that reaches a limit."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM, KVCache, generate
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.errors import RequestError
from dbrx_q.generation.generate import capacities_of
from dbrx_q.model.limits import Limits
from dbrx_q.model.loading import load_model, load_pretrained
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.placement import place

PROMPT = list(range(5, 95))


@pytest.mark.parametrize(
    ("ram", "message"),
    [(1 << 20, r"the host must hold ([\d,]+) bytes .* at least: .* the budget is 1,048,576 bytes"), (0, "the budget is 0 bytes")],
)
def test_a_budget_that_is_too_small_is_refused_and_names_the_smallest(quantized_nano: Path, ram: int, message: str) -> None:
    budget = Budget(Machine(ram), context=100, step_tokens=8)
    with pytest.raises(RequestError, match=message) as refused:
        load_model(quantized_nano, budget=budget)
    least = int(str(refused.value).split("must hold ")[1].split(" bytes")[0].replace(",", ""))
    load_model(quantized_nano, budget=replace(budget, machine=Machine(least))).close()
    with pytest.raises(RequestError):
        load_model(quantized_nano, budget=replace(budget, machine=Machine(least - 1)))


def test_memory_in_use_by_another_program_is_refused(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbrx_q.planning.budget.available_bytes", lambda: 1_900_000)
    with pytest.raises(RequestError, match=r"of host memory, of which 1\.90 MB are free now: .* at most 1,900,000 bytes"):
        load_model(quantized_nano, budget=Budget(Machine(2 << 20), context=100, step_tokens=8))
    load_model(quantized_nano, budget=Budget(Machine(1_900_000), context=10, step_tokens=8)).close()


def test_invalid_memory_limits_are_refused(quantized_nano: Path) -> None:
    load = DbrxForCausalLM.from_pretrained
    for max_memory, message in (
        ({"gpu": "3GiB"}, "must be the index of a GPU or 'cpu'; found 'gpu'"),
        ({"disk": "3GiB"}, "The disk has no limit"),
        ({True: 5}, "found True"),
        ({"cpu": "lots"}, "a size must be a number with a unit"),
        ({"cpu": -1}, "must be a number of bytes"),
        ({99: "3GiB"}, r"GPU 99 must be one that torch sees; it sees \d+"),
    ):
        with pytest.raises(RequestError, match=message):
            load(quantized_nano, device_map="auto", max_memory=max_memory)  # type: ignore[arg-type] # types are what is tested
    with pytest.raises(RequestError, match="max_memory needs device_map='auto'"):
        load(quantized_nano, max_memory={"cpu": "3GiB"})
    with pytest.raises(RequestError, match="device_map='auto' chooses the devices; found device 'cpu' beside it"):
        load(quantized_nano, device_map="auto", device="cpu")
    with pytest.raises(RequestError, match="a budget takes the place of device_map and max_memory"):
        load(quantized_nano, device_map="auto", budget=Budget(Machine(3 << 30)))


def test_generation_stops_when_the_kv_cache_is_full(quantized_nano: Path) -> None:
    model = load_pretrained(quantized_nano, budget=Budget(Machine(3 << 20), context=20, step_tokens=20))
    [result] = generate(model, [PROMPT[:10]], max_new_tokens=50)
    assert (result.finish_reason, len(result.token_ids)) == ("memory", 10)
    resident = load_model(quantized_nano)
    assert generate(resident, [PROMPT[:10]], max_new_tokens=10)[0].token_ids == result.token_ids
    short, long = generate(model, [PROMPT[:2], PROMPT[:7]], max_new_tokens=50)  # they share the memory
    assert (short.finish_reason, long.finish_reason) == ("memory", "memory")
    assert (len(short.token_ids), len(long.token_ids)) == (8, 3)
    with pytest.raises(RequestError, match="prompt 0 has 20 tokens and room for 20"):
        generate(model, [PROMPT[:20]], max_new_tokens=1)
    [smaller] = generate(model, [PROMPT[:10]], max_new_tokens=50, kv_format="int8")  # half the bytes, more tokens
    assert len(smaller.token_ids) > 10
    model.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", -1),
        ("context", 0),
        ("context", 10.5),
        ("context", 10**9),
        ("batch", 0),
        ("step_tokens", 0),
        ("step_tokens", -5),
        ("logit_rows", -1),
        ("logit_rows", "4"),
    ],
)
def test_counts_of_a_budget_out_of_range_are_refused(quantized_nano: Path, name: str, value: Any) -> None:
    rule = "from 1 to the model's 2,048 tokens" if name == "context" else "of at least 1"
    with pytest.raises(RequestError, match=f"{name} must be a whole number {rule}; found {value!r}"):
        DbrxForCausalLM.from_pretrained(quantized_nano, budget=Budget(Machine(3_000_000), **{name: value}))


def test_a_machine_has_whole_numbers_of_bytes() -> None:
    for memory in (-1, 1.5e9, float("nan"), "24GiB", True):
        with pytest.raises(RequestError, match=re.escape(f"ram of a machine must be a whole number of bytes or None; found {memory!r}")):
            Machine(memory)  # type: ignore[arg-type] # types are what is tested
        with pytest.raises(RequestError, match=re.escape(f"memory of a GPU must be a whole number of bytes; found {memory!r}")):
            Gpu(memory)  # type: ignore[arg-type] # types are what is tested


def test_a_budget_with_a_gpu_that_torch_does_not_see_is_refused(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="GPU 0 must be one that torch sees; it sees 0"):
        load_pretrained(quantized_nano, budget=Budget(Machine(3 << 30, (Gpu(24 << 30),))))


def test_a_budget_names_a_device_for_each_gpu(quantized_nano: Path) -> None:
    with pytest.raises(RequestError, match="devices of a budget must name one for each of its machine's 0 GPUs; found 1"):
        load_model(quantized_nano, budget=Budget(Machine(3 << 30), devices=(torch.device("cpu"),)))


def test_a_load_that_fails_leaves_no_thread(quantized_nano: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(RequestError, match="pins what a profile used most"):
            load_model(quantized_nano, budget=Budget(Machine(3_000_000), context=64, step_tokens=16, cache_policy="static"))
    assert threading.active_count() == before


def test_a_device_beside_a_budget_is_refused(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbrx_q.model.loading.check_device", lambda device: torch.device("cuda"))
    with pytest.raises(RequestError, match="a budget says which devices are used; found device 'cuda' beside it"):
        load_pretrained(quantized_nano, budget=Budget(Machine(3_000_000)), device="cuda")


def test_generate_needs_the_workspace_of_one_prefill_step(quantized_nano: Path, cli: Callable[..., Any]) -> None:
    """It does not need the workspace of the whole prompt."""
    with Checkpoint(quantized_nano) as checkpoint:
        least = place(checkpoint.config, checkpoint.formats, Machine(1), MemoryRequest(1100)).shortfall + 1
    ram = f"{-(-least // 1000)}KB"
    outcome = cli(
        "generate", quantized_nano, "--prompt", "a b c d " * 200, "--max-new-tokens", 2, "--ram", ram, "--context", 1100, "--json"
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["new_tokens"] == 2
    short = cli("generate", quantized_nano, "--prompt", "a b c d " * 200, "--ram", "9MB", "--context", 100)
    assert short.code == 2
    assert "--context must hold the prompt's" in short.err


def test_sequences_of_a_batched_step_share_the_memory_of_one_cache(quantized_nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(quantized_nano)
    model.transformer.limits = Limits(kv_bytes=200 * KVCache(model.config, 1, 1, dtype=model.dtype).nbytes)
    prompts = [[1] * 80, [1] * 3, [1] * 3]
    assert capacities_of(model, prompts, 20, "plain") == [100, 23, 23]
    monkeypatch.setattr(type(model.transformer), "steps_together", True)
    with pytest.raises(RequestError, match="prompt 0 has 80 tokens and room for 66"):  # three of the longest
        capacities_of(model, prompts, 20, "plain")
