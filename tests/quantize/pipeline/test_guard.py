"""Held-out tokens beside a calibration: what the report says of them, the fallback to rounding to nearest, and check texts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import EMBEDDING, TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.cli.quantize_report import check_no_worse
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.eval.divergence import Distribution, scores
from dbrx_q.quantize.calibration.held_out import CheckSequences
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.report import NAME
from dbrx_q.quantize.pipeline.report_held_out import hurt_line, still_worse
from dbrx_q.quantize.pipeline.run import QuantizationRequest, plan_checkpoint, quantize_checkpoint

HALF = 64  # channels, and tokens, of a domain


def domain(number: int, sequences: int, seed: int) -> torch.Tensor:
    """int64 [sequences, 32]: tokens of one half of the vocabulary."""
    return torch.randint(HALF, (sequences, 32), generator=torch.Generator().manual_seed(seed)) + HALF * number


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens below 64 have embeddings in the first 64 channels, the others in the last 64."""
    folder = tmp_path_factory.mktemp("toy") / "plain"
    config = DbrxConfig(
        d_model=2 * HALF,
        n_heads=4,
        n_layers=2,
        vocab_size=2 * HALF,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, folder)
    shard = min(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    embedding = tensors[EMBEDDING].clone()
    embedding[:HALF, HALF:] = 0
    embedding[HALF:, :HALF] = 0
    save_file(tensors | {EMBEDDING: embedding}, shard)
    return folder


SEQUENCES = CalibrationSequences(
    domain(0, 24, 0), (24, 0), ("first", "second"), (1.0, 0.0), torch.cat([domain(0, 8, 1), domain(1, 8, 2)]), (8, 8)
)
CHECKS = (CheckSequences("check", domain(1, 6, 3)),)


def request(method: str = "gptq", **options: Any) -> QuantizationRequest:
    calibration = {"sequences": SEQUENCES} if method in ("awq", "gptq", "best") else {}
    return QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)), method=method, **calibration | options)


class Result(NamedTuple):
    """A finished run."""

    run: RunRecord
    """Its record."""
    folder: Path
    """What it wrote."""


@pytest.fixture(scope="module")
def results(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The model quantized by `gptq`, which hurts other texts, the same with a fallback, and by `rtn`."""
    folder = tmp_path_factory.mktemp("results")
    requests = {
        "gptq": request(checks=CHECKS),
        "guarded": request(checks=CHECKS, no_worse_than_rtn=True),
        "rtn": request("rtn", checks=CHECKS),
    }
    return {name: Result(quantize_checkpoint(toy, folder / name, of), folder / name) for name, of in requests.items()}


def logits_and_layers(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """float64 logits [H, S, V] and the output [H, S, D] of every layer."""
    model = DbrxForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers: list[torch.Tensor] = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: layers.append(outputs.double().view(*ids.shape, -1)))
    return model(ids).logits.double(), layers


def test_figures_equal_those_of_the_finished_models(toy: Path, results: dict[str, Result]) -> None:
    texts = {"first": domain(0, 8, 1), "second": domain(1, 8, 2), "check": domain(1, 6, 3)}
    assert [record.name for record in results["gptq"].run.held_out] == list(texts)
    assert [record.kind for record in results["gptq"].run.held_out] == ["held out", "left out", "check text"]
    for record in results["gptq"].run.held_out:
        ids = texts[record.name]
        original, layers = logits_and_layers(toy, ids)
        found = []
        for name in ("gptq", "rtn"):
            logits, other_layers = logits_and_layers(results[name].folder, ids)
            targets = ids[:, 1:].flatten()
            pair = [Distribution.of(values[:, :-1].flatten(0, 1), targets) for values in (original, logits)]
            found.append(torch.from_numpy(scores(pair[0], pair[1]).kl).view(len(ids), -1).mean(1))
            for layer, (errors, before, after) in enumerate(zip(record.layer_errors.values(), layers, other_layers, strict=True)):
                expected = float((after - before).norm() / before.norm())
                assert errors[name == "rtn"] == pytest.approx(expected, rel=2e-3), (record.name, name, layer)
        for mean, kl in zip(
            (record.divergence.quantized, record.divergence.nearest, record.divergence.difference),
            (found[0], found[1], found[0] - found[1]),
            strict=True,
        ):
            assert mean.mean == pytest.approx(float(kl.mean()), rel=2e-3)
            assert mean.stderr == pytest.approx(float(kl.std()) / len(kl) ** 0.5, rel=2e-2)
        assert (record.sequences, record.tokens) == (len(ids), len(ids) * 31)


def test_the_report_says_where_calibration_hurt(results: dict[str, Result]) -> None:
    run, folder = results["gptq"]
    first, second, check = run.held_out
    assert not first.hurts
    assert second.hurts
    assert check.hurts
    line = hurt_line(run)
    assert line is not None
    assert line.startswith(f"Calibration hurt on second: mean KL {second.divergence.quantized.mean:.3g}, rounding to nearest ")
    assert "first" not in line
    data, text = json.loads((folder / f"{NAME}.json").read_text()), (folder / f"{NAME}.md").read_text()
    assert [record["hurts"] for record in data["held_out"]] == [False, True, True]
    assert data["held_out"][1]["divergence"]["quantized"]["mean"] == second.divergence.quantized.mean
    assert data["nearest_instead"] == []
    assert f"{line}." in text
    error, nearest = second.layer_errors[1]
    assert f"{error:.4f} ({error / nearest:.3f})" in text
    assert (folder / f"{NAME}_held_out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    card = (folder / "README.md").read_text()
    assert f"{line}." in card
    assert "| check | check text | 6 | 186 |" in card
    assert still_worse(run) is None  # it was not asked for


def test_what_held_out_tokens_prefer_is_rounded_to_nearest(toy: Path, results: dict[str, Result]) -> None:
    run, folder = results["guarded"]
    assert run.nearest_instead
    with Checkpoint(folder) as guarded, Checkpoint(results["rtn"].folder) as nearest, Checkpoint(results["gptq"].folder) as fitted:
        for record in run.records:
            if record.relative_error is None:
                continue
            names = [name for name in guarded.infos if name.startswith(f"{record.label}.")]
            same = [all(torch.equal(guarded.read(name), other.read(name)) for name in names) for other in (nearest, fitted)]
            if record.nearest_instead:
                assert same[0], record.label
                assert record.relative_error == results["rtn"].run.relative_error[record.label]
            else:
                assert not same[0] or same[1], record.label
    second = run.held_out[1]
    assert max(error / nearest for error, nearest in second.layer_errors.values()) <= 1.0
    assert second.divergence.quantized.mean < results["gptq"].run.held_out[1].divergence.quantized.mean
    text = (folder / f"{NAME}.md").read_text()
    assert f"{len(run.nearest_instead)} of 18 matrices are rounded to nearest, which errs less on held-out tokens: " in text


@pytest.mark.usefixtures("no_plots")
def test_check_texts_decide_nothing(toy: Path, results: dict[str, Result], tmp_path: Path) -> None:
    quantize_checkpoint(toy, tmp_path / "out", request(no_worse_than_rtn=True, checks=(CheckSequences("other", domain(0, 2, 9)),)))
    for path in results["guarded"].folder.glob("*.safetensors"):
        assert sha256_of(path) == sha256_of(tmp_path / "out" / path.name)
    without = replace(SEQUENCES, held_out=SEQUENCES.held_out[:0], held_out_counts=(0, 0))
    plain = quantize_checkpoint(toy, tmp_path / "plain", request(sequences=without))
    assert plain.held_out == []
    for path in results["gptq"].folder.glob("*.safetensors"):  # measuring changes no bytes
        assert sha256_of(path) == sha256_of(tmp_path / "plain" / path.name)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test draw none, which takes longer than the rest."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class StoppedError(Exception):
    """Stops a run before its end."""


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("tensors", [1, 9, 13, 20])
def test_a_resumed_run_measures_and_falls_back_as_an_undisturbed_one(
    toy: Path, results: dict[str, Result], tmp_path: Path, tensors: int
) -> None:
    remaining = tensors

    def stop(done: int, total: int) -> None:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            raise StoppedError

    guarded = request(checks=CHECKS, no_worse_than_rtn=True)
    with pytest.raises(StoppedError):
        quantize_checkpoint(toy, tmp_path / "out", guarded, on_bytes=stop)
    if tensors == 9:
        for other, message in (
            (replace(guarded, checks=()), "checks was "),
            (replace(guarded, no_worse_than_rtn=False), "no_worse_than_rtn was True, found None"),
        ):
            with pytest.raises(RequestError, match=message):
                quantize_checkpoint(toy, tmp_path / "out", other, resume=True)
    run = quantize_checkpoint(toy, tmp_path / "out", guarded, resume=True)
    assert run.held_out == results["guarded"].run.held_out
    assert run.nearest_instead == results["guarded"].run.nearest_instead
    for path in results["guarded"].folder.iterdir():
        if not path.name.startswith(NAME):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("no_plots")
def test_activations_in_files_and_matrices_in_blocks_give_the_same_figures(
    toy: Path, results: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbrx_q.quantize.pipeline.jobs.STEP_BYTES", 37 * 2 * 2 * HALF)  # 37 rows
    guarded = request(checks=CHECKS, no_worse_than_rtn=True)
    plan = plan_checkpoint(toy, guarded)
    assert plan.activations == (24 + 22 * 3) * 32 * 2 * HALF * 4 * 2
    assert (plan.held_out_tokens, plan.checked_tokens) == (16 * 32, 6 * 32)
    tight = plan.peak_memory - plan.activations // 2
    assert plan_checkpoint(toy, guarded, memory=tight).in_files
    run = quantize_checkpoint(toy, tmp_path / "out", guarded, memory=tight + (8 << 20))  # the process grows beside tensors
    assert run.nearest_instead == results["guarded"].run.nearest_instead
    for record, expected in zip(run.held_out, results["guarded"].run.held_out, strict=True):
        assert record.layer_errors == expected.layer_errors
        assert record.divergence.figures == pytest.approx(expected.divergence.figures, rel=1e-4)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("method", ["awq", "best", "clip"])
def test_other_methods_are_measured_and_guarded(toy: Path, results: dict[str, Result], tmp_path: Path, method: str) -> None:
    guarded = {"no_worse_than_rtn": True} if method != "clip" else {}
    run = quantize_checkpoint(toy, tmp_path / "out", request(method, checks=CHECKS, **guarded))
    nearest = results["rtn"].run.held_out
    assert [record.name for record in run.held_out] == (["check"] if method == "clip" else ["first", "second", "check"])
    assert run.held_out[-1].divergence.nearest.mean == pytest.approx(nearest[0].divergence.quantized.mean, rel=1e-4)
    if guarded:
        assert all(record.divergence.difference.mean < 2.5 * record.divergence.difference.stderr for record in run.held_out[:2])


@pytest.mark.usefixtures("no_plots")
def test_a_result_that_is_still_worse_is_an_error(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that is held out shows what the check text shows."""
    first = replace(SEQUENCES, held_out=SEQUENCES.held_out[:8], held_out_counts=(8, 0))
    run = quantize_checkpoint(toy, tmp_path / "out", request(sequences=first, checks=CHECKS, no_worse_than_rtn=True))
    assert [record.hurts for record in run.held_out] == [False, True]
    problem = still_worse(run)
    assert problem is not None
    assert "must be no worse than rounding to nearest; found it worse by more than two standard errors on check: mean KL " in problem
    with pytest.raises(typer.Exit) as ended:
        check_no_worse({tmp_path / "out": run}, "me/model")
    assert ended.value.exit_code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"dbrx-q: error: {tmp_path / 'out'}: the result must be no worse than rounding to nearest")
    assert message.endswith("It was not uploaded to me/model\n")
    check_no_worse({tmp_path / "out": replace(run, falls_back=False)}, None)  # it was not asked for


def test_a_guard_without_held_out_tokens_is_refused(toy: Path, tmp_path: Path) -> None:
    without = replace(SEQUENCES, held_out=SEQUENCES.held_out[:0], held_out_counts=(0, 0))
    for asked, message in (
        (request("clip", no_worse_than_rtn=True), "found none, as the method takes no calibration. Leave it out, or name gptq or best"),
        (request(sequences=without, no_worse_than_rtn=True), "none of the sources has tokens to spare. Give longer texts"),
        (request(checks=(CheckSequences("x", torch.full((1, 32), 500)),)), "the sequences of the check text x must fit the model"),
        (request(checks=(CheckSequences("x", torch.zeros(1, 16, dtype=torch.int64)),)), r"must have one length; found \[16, 32\]"),
    ):
        with pytest.raises(RequestError, match=message):
            quantize_checkpoint(toy, tmp_path / "out", asked)
    assert not list(tmp_path.iterdir())
