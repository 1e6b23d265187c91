"""The report of a quantization run, its plots, and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.inventory import take_inventory
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.quantize.calibration.calibrated import CalibrationOptions
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.methods.shrinkage import LEAST_DAMPING
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.report import NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

IDS = torch.arange(16 * 60).view(16, 60) % 500
PNG = b"\x89PNG\r\n\x1a\n"


def quantize(source: Path, out: Path, method: str = "best", ids: torch.Tensor | None = IDS, **options: Any) -> RunRecord:
    request = QuantizationRequest(
        lambda c: default_formats(c.config, TensorFormat("int4", 64)),
        method=method,
        sequences=None if ids is None else CalibrationSequences.single(ids),
        about={"sequences": 16, "length": 60, "seed": 0} if ids is not None else None,
        options=CalibrationOptions(**options),
    )
    return quantize_checkpoint(source, out, request)


def report_of(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / f"{NAME}.json").read_text()), (folder / f"{NAME}.md").read_text()


def test_the_report_agrees_with_the_files(small: Path, tmp_path: Path) -> None:
    run = quantize(small, tmp_path / "out")
    data, text = report_of(tmp_path / "out")
    with Checkpoint(tmp_path / "out") as checkpoint:
        inventory = take_inventory(checkpoint)
        names = {part.rsplit(".", 1)[0] for part in checkpoint.infos if part.endswith(".qweight")}
    assert data["bytes_out"] == inventory.total.bytes
    assert data["bits_per_weight"] == pytest.approx(inventory.total.bits_per_weight)
    assert data["bits_by_kind"] == {kind: pytest.approx(row.bits_per_weight) for kind, row in inventory.kinds.items() if row.parameters}
    assert {record.label for record in run.records if record.relative_error is not None} == names
    assert sum(record["parameters"] for record in data["records"]) == inventory.total.parameters
    assert data["peak_memory_bytes"] > 50 << 20
    assert data["seconds"] > 0
    for path in (tmp_path / "out").glob(f"{NAME}*.png"):
        assert path.read_bytes().startswith(PNG), path.name
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(images) == {f"{NAME}_{plot}.png" for plot in ("error", "bits", "outputs", "tokens")}
    assert all((tmp_path / "out" / name).exists() for name in images)


def test_reported_errors_and_tokens_equal_those_of_weights_and_router(small: Path, tmp_path: Path) -> None:
    from dbrx_q.checkpoint.layout import oriented, part_name, parts_of
    from dbrx_q.kernels.formats.weights import dequantize

    run = quantize(small, tmp_path / "out", "clip", None)
    data, _ = report_of(tmp_path / "out")
    with Checkpoint(small) as plain, Checkpoint(tmp_path / "out") as packed:
        name = "transformer.blocks.0.ffn.experts.mlp.w2"
        tensor, fmt = plain.tensors[name], packed.formats[name]
        original = oriented(plain.read(name), tensor).double()
        for expert in range(tensor.experts):
            parts = [part for part in parts_of(tensor, fmt) if part.name.startswith(f"{name}.{expert}.")]
            weight = dequantize(fmt.load({part_name(part): packed.read(part.name) for part in parts})).double()
            error = float((weight - original[expert]).norm() / original[expert].norm())
            assert run.relative_error[f"{name}.{expert}"] == pytest.approx(error, rel=1e-4)
    assert data["expert_tokens"] == {}
    calibrated = quantize(small, tmp_path / "gptq", "gptq")
    assert [sum(counts) for counts in calibrated.expert_tokens.values()] == [IDS.numel() * 2]  # two experts a token
    for record in calibrated.records:
        if record.expert >= 0 and record.calibrated_by == "tokens":
            assert record.tokens == calibrated.expert_tokens[0][record.expert]


@pytest.mark.parametrize(("tokens", "by"), [(16 * 60, "layer"), (60, "none")])
def test_undersampled_experts_are_listed(small: Path, tmp_path: Path, tokens: int, by: str) -> None:
    ids = IDS.flatten()[:tokens].view(-1, 60)
    run = quantize(small, tmp_path / "out", "gptq", ids, min_tokens=tokens if by == "layer" else tokens + 1)
    data, text = report_of(tmp_path / "out")
    assert {record.calibrated_by for record in run.records if record.expert >= 0} == {by}
    assert data["undersampled_experts"] == [[0, expert, by] for expert in range(4)]
    assert "4 expert(s) that too few tokens reach" in text
    assert "4 expert(s) were reached by too few" in (tmp_path / "out" / "README.md").read_text()
    errors = {record.label: record.relative_error for record in run.records if record.expert >= 0}
    if by == "none":  # as if there were no text
        assert errors == {
            name: error for name, error in quantize(small, tmp_path / "clip", "clip", None).relative_error.items() if name in errors
        }


def test_all_experts_see_all_tokens_on_request(small: Path, tmp_path: Path) -> None:
    run = quantize(small, tmp_path / "out", "gptq", all_experts=True)
    assert {record.tokens for record in run.records if record.expert >= 0} == {IDS.numel()}
    assert "all experts True" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("option", "value"), [("act_order", False), ("activations", "original"), ("all_experts", True)])
def test_calibration_options_change_the_codes(small: Path, tmp_path: Path, option: str, value: object) -> None:
    usual, changed = quantize(small, tmp_path / "a", "gptq"), quantize(small, tmp_path / "b", "gptq", **{option: value})
    experts = [record.label for record in usual.records if record.label.endswith((".w2.0", ".w2.3"))]
    assert all(usual.relative_error[name] != changed.relative_error[name] for name in experts)


def test_the_damping_of_every_matrix_is_reported(small: Path, tmp_path: Path) -> None:
    run = quantize(small, tmp_path / "out")
    damping = {record.label: record.damping for record in run.records if record.relative_error is not None and record.kind != "embedding"}
    assert min(value for value in damping.values() if value is not None) >= LEAST_DAMPING
    text = (tmp_path / "out" / f"{NAME}.md").read_text()
    values = sorted(value for label, value in damping.items() if label.endswith("Wqkv.weight") and value is not None)
    assert f"| Wqkv | {values[0]:.3g}, {values[len(values) // 2]:.3g}, {values[-1]:.3g} |" in text
    quantize(small, tmp_path / "gptq", "gptq")
    assert "## Damping" not in (tmp_path / "gptq" / f"{NAME}.md").read_text()


def test_the_model_card_fits_the_hub_and_is_the_same_for_every_run(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    for name in ("a", "b"):
        quantize(small, tmp_path / name / "out")
    card = (tmp_path / "a" / "out" / "README.md").read_text()
    assert card == (tmp_path / "b" / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dbrx_q\n")
    assert "base_model" not in card  # a folder's name is no hub id
    assert "Calibration: sequences 16, length 60, seed 0." in card
    assert re.search(r"\| w2 \| int4:64 \| 0\.\d{4} \| 0\.\d{4} \|", card)
    assert cli("verify", tmp_path / "a" / "out").code == 0


def test_a_report_without_matplotlib_names_the_missing_package(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    quantize(small, tmp_path / "out", "clip", None)
    assert not list((tmp_path / "out").glob("*.png"))
    assert "pip install 'dbrx_q[eval]'" in report_of(tmp_path / "out")[1]
