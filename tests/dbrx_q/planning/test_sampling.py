"""The plan of sampling many sequences: steps, bytes from the disk, batches that fit, and what takes less."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dbrx_q import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.generation.sequence_sampler import TextTokens, sample_sequences
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.sampling import plan_sampling
from dbrx_q.quantize.pipeline.format_assignment import default_formats

SMALL_RIG = Machine(ram=64 << 30, disk_bandwidth=5e9)


@pytest.fixture(scope="module")
def dbrx() -> DbrxConfig:
    return DbrxConfig(
        d_model=6144,
        n_heads=48,
        n_layers=40,
        max_seq_len=32768,
        vocab_size=100352,
        attn_config={"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        torch_dtype="bfloat16",
    )


def test_dbrx_on_a_small_machine_reads_nearly_all_experts_in_every_step(dbrx: DbrxConfig) -> None:
    plan = plan_sampling(dbrx, {}, SMALL_RIG, sequences=272, length=512)
    experts = 40 * 16 * 3 * 6144 * 10752 * 2  # bytes
    assert (plan.batch, plan.batches, plan.steps) == (272, 1, 512)
    assert plan.placement.fits
    assert plan.memory <= 64 << 30
    held = plan.placement.host.experts
    assert plan.step_bytes == pytest.approx(experts - held, rel=0.001)
    assert 512 * (experts - held) / 5e9 < plan.seconds < 1.3 * 512 * (experts - held) / 5e9
    assert plan.seconds > 6 * 3600
    shorter = plan_sampling(dbrx, {}, SMALL_RIG, sequences=4 * 272, length=128)
    assert shorter.seconds < plan.seconds / 3  # the same tokens in fewer steps
    packed = plan_sampling(dbrx, default_formats(dbrx, TensorFormat("int4", 64)), SMALL_RIG, sequences=272, length=512)
    assert packed.seconds < plan.seconds / 4
    arithmetic = plan_sampling(dbrx, {}, SMALL_RIG, sequences=272, length=512, flops=1e12)
    active = 40 * (4 * 3 * 6144 * 10752 + 16 * 6144 + 6144 * 8192 + 6144 * 6144 + 2 * 6144) + 6144 + 100352 * 6144
    assert arithmetic.seconds - plan.seconds == pytest.approx(512 * 272 * 2 * active / 1e12, rel=1e-6)


def test_a_batch_is_as_large_as_memory_allows_where_experts_are_read_from_disk(dbrx: DbrxConfig) -> None:
    least = plan_sampling(dbrx, {}, Machine(ram=24 << 30), sequences=272, length=512)
    assert least.placement.fits
    assert least.batch < 272
    assert not plan_sampling(dbrx, {}, Machine(ram=8 << 30), sequences=272, length=512).placement.fits
    gpu = plan_sampling(dbrx, {}, Machine(ram=64 << 30, gpus=(Gpu(24 << 30),)), sequences=272, length=512)
    assert gpu.placement.fits
    assert 0 < gpu.step_bytes < 264e9
    assert gpu.steps == 512 * math.ceil(272 / gpu.batch)


def test_the_planned_bytes_are_about_those_that_are_read(nano: Path) -> None:
    config = DbrxConfig.from_pretrained(nano)
    machine = Machine(ram=14 << 20)
    plan = plan_sampling(config, {}, machine, sequences=16, length=12)
    budget = Budget(machine, context=12, batch=plan.batch, step_tokens=plan.batch, prefetch=False)
    model = DbrxForCausalLM.from_pretrained(nano, budget=budget)
    before = model.expert_store.stats().disk_bytes
    tokens = TextTokens.of(DbrxTokenizer.from_pretrained(nano), config.vocab_size)
    sample_sequences(model, tokens, count=16, length=12, seed=0, batch=plan.batch)
    read = (model.expert_store.stats().disk_bytes - before) / 11  # the last token is not run through the model
    model.close()
    assert (plan.batch, plan.steps) == (16, 12)
    assert plan.placement.disk_experts > 0
    assert plan.step_bytes < read < 1.5 * plan.step_bytes  # the layer that is computed keeps its slots, here a quarter of them
