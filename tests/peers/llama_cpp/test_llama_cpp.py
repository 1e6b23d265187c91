"""The parts of the comparison with llama.cpp that need no llama.cpp: its ratios, by hand, and the weights that llama-quantize gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from figures import SectionResult, markdown
from gguf_copy import write_gguf

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import dense_tensors
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.sources.gguf_names import gguf_name


def section(unit: str, figures: dict[str, dict[int, float]]) -> SectionResult:
    kinds = {name: "dbrx_q" if name.startswith("dbrx_q") else "llama.cpp" for name in figures}
    return SectionResult(
        "decode", "Decode", "", unit, unit == "tokens/s", ("decode",), kinds, {}, {name: {"decode": by} for name, by in figures.items()}
    )


def test_a_ratio_is_the_median_over_turns_against_the_best_median() -> None:
    """The machine is half as fast in turn 1, and Q4_0 was left out of it: only turns that both ran are compared."""
    result = section(
        "tokens/s",
        {"dbrx_q": {0: 60.0, 1: 30.0, 2: 66.0}, "Q4_0": {0: 50.0, 2: 44.0}, "IQ4_XS": {0: 40.0, 1: 20.0, 2: 40.0}},
    )
    assert result.best_peer("decode") == "Q4_0"
    ratio = result.ratio("dbrx_q", "Q4_0", "decode")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.2, 1.35, 1.5))
    assert "| **dbrx_q to the best of llama.cpp** | **1.35 [1.2-1.5]** (Q4_0) | |" in markdown([result], {})


def test_of_seconds_the_least_is_the_best() -> None:
    result = section("s", {"dbrx_q": {0: 1.0, 1: 3.0}, "Q4_0": {0: 2.0, 1: 2.0}, "Q4_K_M": {0: 0.5, 1: 0.5}})
    assert result.best_peer("decode") == "Q4_K_M"
    ratio = result.ratio("dbrx_q", "Q4_K_M", "decode")
    assert (ratio.low, ratio.high) == pytest.approx((1 / 6, 1 / 2)), "half the speed is a ratio of 1/2"


def test_gguf_holds_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    """Bit for bit, with the reduction axis last: of an asymmetric model, so that no transposition passes."""
    from gguf import GGUFReader

    config = DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=48,
        attn_config={"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 3, "moe_top_k": 2},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, tmp_path / "plain")
    write_gguf(tmp_path / "plain", tmp_path / "copy.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "copy.gguf").tensors}
    with Checkpoint(tmp_path / "plain") as checkpoint:
        tensors = dense_tensors(config)
        assert stored.keys() == {gguf_name(tensor.name) for tensor in tensors}
        for tensor in tensors:
            weight, copy = checkpoint.read(tensor.name), stored[gguf_name(tensor.name)]
            if tensor.experts:
                weight = weight.view(tensor.experts, 32, 64)
                weight = weight.transpose(1, 2) if tensor.name.endswith("w2") else weight
            assert list(reversed(copy.shape.tolist())) == list(weight.shape), tensor.name
            expected = weight.float().numpy() if copy.data.dtype == np.float32 else weight.contiguous().view(torch.uint8).numpy()
            assert (copy.data == expected.reshape(copy.data.shape)).all(), tensor.name


def test_a_machine_that_does_other_work_shows() -> None:
    idle = section("tokens/s", {"dbrx_q": {0: 60.0}, "Q4_0": {0: 50.0}})
    idle.other_work = [0.01, 0.02]
    assert "other programs took 2% at most." in markdown([idle], {})
    idle.other_work = [0.01, 0.8]
    assert "other programs took 80% at most, **too much to compare**." in markdown([idle], {})
