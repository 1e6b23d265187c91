"""The table, the plots and the files of a sensitivity report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.eval.sensitivity.measure import Unit, units_of
from dbrx_q.eval.sensitivity.report import markdown, plot, short_name, table, write_report
from dbrx_q.eval.sensitivity.result import Sensitivity, UnitResult

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
BLOCK = "transformer.blocks.{}.{}"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
WQKV, W1, W2 = (
    BLOCK.format(n, m) for n, m in ((0, "norm_attn_norm.attn.Wqkv.weight"), (1, "ffn.experts.mlp.w1"), (2, "ffn.experts.mlp.w2"))
)


def alone(*names: str) -> list[Unit]:
    return [Unit(name, (name,)) for name in names]


@pytest.fixture(scope="module")
def by_tensor(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> Sensitivity:
    return measure(model, ids, alone(WTE, WQKV, W1, W2, HEAD), [TensorFormat("int4", 64), TensorFormat("int8", 64)])


def test_heat_map(by_tensor: Sensitivity) -> None:
    known = {(unit.name, unit.format): unit.mean_kl for unit in by_tensor.units}
    panels = plot(by_tensor).axes[:2]
    assert [panel.get_title(loc="left") for panel in panels] == ["int4, groups of 64", "int8, groups of 64"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["wte", "0", "1", "2", "head"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Wqkv", "out_proj", "w1", "v1", "w2"]
    for panel, fmt in zip(panels, ("int4", "int8"), strict=True):
        cells = np.ma.filled(panel.collections[0].get_array(), np.nan)
        expected = np.full((5, 5), np.nan)
        expected[:, 0], expected[:, 4] = known.get((WTE, fmt), np.nan), known[HEAD, fmt]
        expected[0, 1], expected[2, 2], expected[4, 3] = known[WQKV, fmt], known[W1, fmt], known[W2, fmt]
        np.testing.assert_array_equal(cells, expected)
        written = {text.get_text() for text in panel.texts}
        assert written == {f"{value:.1e}" for (_, name), value in known.items() if name == fmt}


def test_bars(model: DbrxForCausalLM, ids: list[int], measure: Callable[..., Sensitivity]) -> None:
    result = measure(model, ids, units_of(model.config, "layer")[:2], [TensorFormat("int4", 64), TensorFormat("int8", 64)], by="layer")
    nothing = replace(result, units=[*result.units[:3], replace(result.units[3], mean_kl=0.0, mean_kl_stderr=0.0)])
    for shown in (result, nothing):
        (axes,) = plot(shown).axes
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
        tops = [patch.get_y() + patch.get_height() for patch in axes.patches]
        expected = [shown.units[index].mean_kl for index in (0, 2, 1, 3)]
        shown_as_zero = [top < min(value for value in expected if value) / 1.5 for top in tops]
        assert shown_as_zero == [value == 0 for value in expected]
        assert [top for top, zero in zip(tops, shown_as_zero, strict=True) if not zero] == pytest.approx(
            [v for v in expected if v], rel=1e-9
        )


def test_a_model_that_overflows(ids: list[int], tmp_path: Path, measure: Callable[..., Sensitivity]) -> None:
    """Figures that are not finite are null in every JSON object."""
    model = DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    model.lm_head.weight.data.mul_(1e4)
    result = measure(model, ids, alone(W2), [TensorFormat("int4", 64)])
    assert result.perplexity == np.inf
    assert result.units[0].mean_kl > 1
    write_report(result, tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    data = json.loads((tmp_path / "sensitivity.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data == result.to_dict()
    assert data["perplexity"] is None
    assert np.isnan(Sensitivity.from_dict(data).perplexity)


def test_missing_figures_are_not_shown_as_zero(by_tensor: Sensitivity, tmp_path: Path) -> None:
    def lost(unit: UnitResult, kl: float) -> UnitResult:
        return replace(unit, mean_kl=kl, mean_kl_stderr=np.nan, delta_ln_ppl=np.nan, kl_per_saved_byte=kl)

    units = by_tensor.units
    result = replace(by_tensor, units=[lost(units[0], np.nan), *units[1:-1], lost(units[-1], np.inf)])
    written = [text.get_text() for panel in plot(result).axes[:2] for text in panel.texts]
    assert written.count("n/a") == 1
    assert written.count("inf") == 1
    assert "0" not in written
    rows = table(result)[1:]
    assert (rows[0][4], rows[-1][4]) == ("inf ± n/a", "n/a ± n/a")
    costs = [float(row[-1]) for row in rows[:-1]]
    assert costs == sorted(costs, reverse=True)
    kinds = [replace(unit, name=name) for unit, name in zip(result.units[-2:], ("experts", "head"), strict=True)]
    (axes,) = plot(replace(result, by="kind", units=kinds)).axes
    assert [text.get_text() for text in axes.texts] == ["inf"]
    assert len(axes.patches) == 1
    nothing = replace(result, units=[lost(units[0], np.nan)])
    for by in ("tensor", "kind"):
        write_report(replace(nothing, by=by), tmp_path / by)
        data = json.loads((tmp_path / by / "sensitivity.json").read_text(encoding="utf-8"))
        assert data["units"][0]["mean_kl"] is None


@pytest.mark.parametrize("kl", [0.0, 1e-3])
def test_plots_of_one_value(by_tensor: Sensitivity, tmp_path: Path, kl: float) -> None:
    single = replace(by_tensor, units=[replace(by_tensor.units[0], mean_kl=kl, kl_per_saved_byte=0.0)], complete=False)
    for by in ("tensor", "kind"):
        write_report(replace(single, by=by), tmp_path / by)
        assert (tmp_path / by / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "**Partial**" in (tmp_path / "kind" / "sensitivity.md").read_text(encoding="utf-8")


def test_markdown(by_tensor: Sensitivity) -> None:
    rows = [line.split(" | ") for line in markdown(by_tensor).splitlines() if ":64 | " in line]
    assert len(rows) == 10
    costs = [float(row[-1].rstrip(" |")) for row in rows]
    assert costs == sorted(costs, reverse=True)
    worst = max(by_tensor.units, key=lambda unit: unit.mean_kl / unit.saved_bytes)
    assert rows[0][:2] == [f"| {short_name(worst.name)}", f"{worst.format}:64"]
    assert costs[0] == pytest.approx(worst.mean_kl / worst.saved_bytes * 1e9, rel=1e-3)
    assert short_name(W1) == "blocks.1.w1"
    assert short_name(WTE) == "wte"
