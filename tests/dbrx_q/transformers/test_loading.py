"""Packed checkpoints in transformers: loading, logits, generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dbrx_q.transformers
from dbrx_q import DbrxForCausalLM

transformers = pytest.importorskip("transformers")

PROMPT = [[11, 280, 260, 396, 2174, 315, 279, 301], [995, 286, 260, 1244, 278, 260, 220, 802]]


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(quantized_nano: Path) -> Any:
    """The packed checkpoint in transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)


@pytest.fixture(scope="module")
def native(quantized_nano: Path) -> DbrxForCausalLM:
    """The same without transformers."""
    return DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)


def test_import_transformers_inside_the_room_is_the_library() -> None:
    assert dbrx_q.transformers.modeling.transformers.DbrxConfig is transformers.DbrxConfig


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_our_model(model: Any, native: DbrxForCausalLM, attention: str) -> None:
    ids = torch.tensor(PROMPT)
    expected = native(ids).logits
    model.set_attn_implementation(attention)
    with torch.no_grad():
        found = model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_forward_outside_generate_with_gradients_on(model: Any) -> None:
    assert torch.is_grad_enabled()
    assert torch.isfinite(model(torch.tensor(PROMPT)).logits).all()
