"""A weight format that is only a record: every command accepts it, without a kernel and without a change to another file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.format import Format, GridLevels, Part
from dbrx_q.kernels.formats.groups import check_group_size, check_scales, check_weight, grouped, steps_of
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import FORMATS, TensorFormat
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts

BOOK = Path(__file__).parent / "data" / "war-of-the-worlds.txt"


@dataclass(frozen=True)
class ToyWeight(QuantizedWeight):
    """A symmetric 3-bit weight with a float16 scale per group of 32; the three bits of each code are stored in three planes of 4 bytes."""

    format: ClassVar[str] = "toy3"
    part_names: ClassVar[tuple[str, ...]] = ("planes", "scales")

    planes: torch.Tensor
    """uint8 [..., N, K/32 * 12]."""
    scales: torch.Tensor
    """float16 [..., N, K/32]."""
    group_size: int
    """Always 32."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.planes.shape[:-1], self.planes.shape[-1] * 8 // 3))


BITS = 2 ** torch.arange(8)


def pack(u: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> ToyWeight:
    codes = grouped(u.int() + 3, 32)  # [..., K/32, 32]
    planes = torch.stack([codes >> bit & 1 for bit in range(3)], dim=-2).unflatten(-1, (4, 8))  # [..., K/32, 3, 4, 8]
    return ToyWeight((planes * BITS).sum(-1).to(torch.uint8).flatten(-3), scales, group_size)


def quantize(weight: torch.Tensor, group_size: int) -> ToyWeight:
    check_group_size(weight.shape[-1], group_size, (32,))
    groups = grouped(check_weight(weight), 32)
    scales = (groups.abs().amax(-1) / 3).half()
    check_scales(scales)
    u = (groups / steps_of(scales).unsqueeze(-1)).round().clamp(-3, 3)
    return pack(u.flatten(-2), scales, None, group_size)


def unpack(weight: ToyWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    planes = weight.planes.unflatten(-1, (-1, 3, 4)).int()
    bits = (planes.unsqueeze(-1) >> torch.arange(8) & 1).flatten(-2)  # [..., K/32, 3, 32]
    u = (bits * torch.tensor([1, 2, 4])[:, None]).sum(-2) - 3
    return (u * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


TOY = Format(
    name="toy3",
    bits=3,
    group_sizes=(32,),
    weight=ToyWeight,
    parts=lambda N, K, G: (Part("planes", torch.uint8, (N, K // 32 * 12)), Part("scales", torch.float16, (N, K // 32))),
    quantize=quantize,
    dequantize=unpack,
    grid=GridLevels(3, symmetric=True, pack=pack),
    embedding=True,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy3", TOY)


CALIBRATION = ("--calibration", BOOK, "--sequences", 8, "--length", 64)


@pytest.mark.parametrize("method", [("rtn",), ("best", *CALIBRATION)], ids=["rtn", "best"])
def test_every_command_accepts_the_format(nano: Path, tmp_path: Path, method: tuple[Any, ...], cli: Callable[..., Any]) -> None:
    folder = tmp_path / "toy"
    everywhere = [part for name in ("embedding", "attention", "head") for part in ("--tensor", f"{name}=toy3:32")]
    assert cli("quantize", nano, folder, "--format", "toy3", "--group-size", 32, "--method", *method, *everywhere).code == 0
    assert cli("verify", folder).code == 0

    kinds = json.loads(cli("inspect", folder, "--json").out)["kinds"]
    assert {kinds[kind]["format"] for kind in ("experts", "attention", "embedding", "head")} == {"toy3:32"}
    assert kinds["experts"]["bits_per_weight"] == 3.5

    text = ("--text", BOOK, "--context", 64, "--limit", 4)
    request = ("generate", folder, "--prompt", "The chances", "--max-new-tokens", 4, "--stats", "--json")
    resident, in_slots = (json.loads(cli(*request, *memory).out) for memory in ((), ("--ram", "2MiB")))
    assert resident["experts"]["misses"] == 0
    assert in_slots["experts"]["misses"] > 0
    assert resident["text"] == in_slots["text"]
    plain, toy = (json.loads(cli("perplexity", path, *text, "--json").out)["perplexity"] for path in (nano, folder))
    assert plain < toy < 3 * plain
    assert cli("compare", nano, folder, *text, "--out", tmp_path / "report").code == 0
    assert "toy3:32" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["toy:3", "toy 3", "toy=3", "", "plain"])
def test_a_name_that_a_rule_cannot_spell_is_refused(name: str) -> None:
    with pytest.raises(
        FormatError, match=re.escape(f"a format's name must be letters, digits, '_' and '-', and not 'plain'; found {name!r}")
    ):
        replace(TOY, name=name)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("backend", [Backend.CPU, Backend.TRITON], ids=["cpu", "triton"])
def test_a_product_dequantizes_the_weight(backend: Backend, T: int) -> None:
    weight, x = quantize(torch.randn(70, 96), 32), torch.randn(T, 96)
    assert torch.allclose(linear(x, weight, backend=backend), x @ unpack(weight).T, atol=1e-4)


def test_experts_are_dequantized() -> None:
    w1, v1, w2 = (TensorFormat("toy3", 32).record.quantize(torch.randn(4, *shape), 32) for shape in ((64, 32), (64, 32), (32, 64)))
    x, chosen, weights = torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    layer = ExpertWeights(w1, v1, w2)
    plain = ExpertWeights(dequantize(w1), dequantize(v1), dequantize(w2))
    expected = moe_experts(x, chosen, weights, plain, backend=Backend.REFERENCE)
    assert torch.allclose(moe_experts(x, chosen, weights, layer, backend=Backend.CPU), expected, rtol=1e-4, atol=1e-3)
