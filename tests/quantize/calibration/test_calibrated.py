"""Layer-by-layer calibration: its two activation streams equal those of the two models, and calibrated checkpoints diverge less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxConfig, DbrxForCausalLM
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.eval.compare.run import compare_checkpoints, open_reference
from dbrx_q.eval.texts import load_text
from dbrx_q.eval.windows import Protocol
from dbrx_q.quantize.calibration.calibrated import Calibration
from dbrx_q.quantize.calibration.sequences import sequences_of
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline import run as pipeline
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.records import RunRecord
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint
from dbrx_q.sources.open import open_source
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"


@pytest.fixture(scope="module")
def ids(nano: Path) -> list[int]:
    return DbrxTokenizer.from_pretrained(nano).encode(BOOK.read_text(encoding="utf-8"))


def quantize(source: Path, destination: Path, sequences: torch.Tensor | None, method: str, **options: Any) -> RunRecord:
    request = QuantizationRequest(
        lambda c: default_formats(c.config, TensorFormat("int4", 64)),
        method=method,
        sequences=None if sequences is None else CalibrationSequences.single(sequences),
        **options,
    )
    return quantize_checkpoint(source, destination, request)


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[Calibration]:
    """Every calibration that runs in the test. Its attribute `last` holds its last inputs."""
    calibrations: list[Calibration] = []

    class Recorded(Calibration):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            calibrations.append(self)

        def close(self) -> None:
            self.last = {name: state.inputs.read(0, state.inputs.tokens) for name, state in self._states.items()}
            super().close()

    monkeypatch.setattr(pipeline, "Calibration", Recorded)
    return calibrations


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_the_streams_equal_the_activations_of_the_models(
    nano: Path, ids: list[int], tmp_path: Path, calibrations: list[Calibration], method: str
) -> None:
    sequences = sequences_of(ids, count=12, length=96, seed=1)
    quantize(nano, tmp_path / "out", sequences, method)
    (calibration,) = calibrations
    streams = calibration.last  # type: ignore[attr-defined] # of the class above
    assert streams.keys() == ({"original", "quantized"} if method == "best" else {"quantized"})
    for name, stream in streams.items():
        folder = nano if name == "original" else tmp_path / "out"
        model = DbrxForCausalLM.from_pretrained(folder, dtype=torch.float32)
        hidden = model.transformer(sequences).last_hidden_state.flatten(0, 1)
        texts = stream[: len(hidden)]  # random tokens follow for best
        assert (texts - hidden).norm() < 1e-3 * hidden.norm(), folder
    assert [sum(counts) for counts in calibration.expert_tokens.values()] == [12 * 96 * 4] * 4


def test_calibrated_checkpoints_diverge_less(nano: Path, ids: list[int], tmp_path: Path) -> None:
    """Calibrated on the first half of a book, measured on the second."""
    sequences = sequences_of(ids[: len(ids) // 2], count=32, length=256, seed=0)
    for method in ("rtn", "best"):
        quantize(nano, tmp_path / method, sequences, method)
    text = BOOK.read_text(encoding="utf-8")
    second_half = tmp_path / "second_half.txt"
    second_half.write_text(text[len(text) // 2 + 1000 :], encoding="utf-8")
    sources = [open_source(tmp_path / method) for method in ("rtn", "best")]
    comparison = compare_checkpoints(open_reference(str(nano)), sources, load_text(str(second_half)), Protocol.of(256, limit=24))
    nearest, best = (row.mean_kl for row in comparison.results)
    assert best < 0.75 * nearest
    assert len({row.bits_per_weight for row in comparison.results}) == 1


def test_experts_that_few_tokens_reach_are_calibrated_on_all_tokens(
    nano: Path, ids: list[int], tmp_path: Path, calibrations: list[Calibration]
) -> None:
    report = quantize(nano, tmp_path / "out", sequences_of(ids, count=6, length=100, seed=0), "gptq")
    (calibration,) = calibrations
    undersampled = [(layer, e) for layer, counts in calibration.expert_tokens.items() for e, count in enumerate(counts) if count < 128]
    assert {(record.layer, record.expert) for record in report.undersampled} == set(undersampled)
    assert {record.calibrated_by for record in report.undersampled} == {"layer"}
    assert 0 < len(undersampled) < 64
    errors = report.relative_error
    with_layer, others = (
        [
            errors[f"transformer.blocks.{layer}.ffn.experts.mlp.w1.{e}"]
            for layer in range(4)
            for e in range(16)
            if ((layer, e) in undersampled) == is_undersampled
        ]
        for is_undersampled in (True, False)
    )
    assert max(with_layer) < 1.5 * max(others)  # too few tokens would give larger errors


def test_the_same_input_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    sequences = torch.arange(4 * 60).view(4, 60)
    for name in ("a", "b"):
        quantize(small, tmp_path / name, sequences, "best", about={"seed": 0})
    for path in (tmp_path / "a").iterdir():
        if not path.name.startswith(REPORT_NAME):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert (config["rounding"], config["calibration"]) == ("best", {"seed": 0})


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    config = DbrxConfig(
        d_model=256,
        n_heads=4,
        n_layers=1,
        vocab_size=500,
        attn_config={"kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": 384, "moe_num_experts": 2, "moe_top_k": 1},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, tmp_path / "plain")
    sequences = torch.randint(500, (5, 700), generator=torch.Generator().manual_seed(5))
    before, shards = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            quantize(tmp_path / "plain", tmp_path / str(n), sequences, "best")
            shards.append(sha256_of(tmp_path / str(n) / "model-00001-of-00001.safetensors"))
    finally:
        torch.set_num_threads(before)
    assert len(set(shards)) == 1


def test_kept_inputs_of_w2_are_those_of_its_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1152 inputs, 1024 columns of every token are compared before the sums of all."""
    ffn = {"ffn_hidden_size": 1152, "moe_num_experts": 3, "moe_top_k": 2}
    config = DbrxConfig(d_model=64, n_heads=2, n_layers=1, vocab_size=128, attn_config={"kv_n_heads": 1}, ffn_config=ffn)
    write_checkpoint(config, tmp_path / "plain")
    sequences = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(0))
    quantize(tmp_path / "plain", tmp_path / "kept", sequences, "best")
    monkeypatch.setattr(pipeline, "Calibration", lambda *given, **options: Calibration(*given, **options | {"kept_tokens": 0}))
    quantize(tmp_path / "plain", tmp_path / "computed", sequences, "best")
    for path in (tmp_path / "kept").glob("*.safetensors"):
        assert sha256_of(path) == sha256_of(tmp_path / "computed" / path.name)


def test_sequences_are_windows_of_the_text() -> None:
    ids = list(range(1003))
    sequences = sequences_of(ids, count=5, length=100, seed=3)
    assert sequences.shape == (5, 100)
    assert (sequences.diff() == 1).all()
    assert (sequences[:, 0] % 100 == 0).all()
    assert (sequences[:, 0].diff() > 0).all()
    assert torch.equal(sequences, sequences_of(ids, count=5, length=100, seed=3))
    assert not torch.equal(sequences, sequences_of(ids, count=5, length=100, seed=4))
    assert torch.equal(sequences_of(ids, count=50, length=100, seed=3), torch.arange(1000).view(10, 100))
    with pytest.raises(RequestError, match="at least one sequence of 2000 tokens; found 1003"):
        sequences_of(ids, count=5, length=2000, seed=3)
    with pytest.raises(RequestError, match="at least 1 sequence of at least 2 tokens; found 0 of 100"):
        sequences_of(ids, count=0, length=100, seed=3)


def test_unusable_calibration_sequences_and_methods_are_refused(small: Path, tmp_path: Path) -> None:
    for sequences, message in (
        (None, "must have a text to calibrate with; found none"),
        (torch.full((1, 8), 4096), "token ids below 4096 and at most 64 tokens; found 4096 and 8"),
        (torch.zeros(1, 65, dtype=torch.int64), "found 0 and 65"),
    ):
        with pytest.raises(RequestError, match=message):
            quantize(small, tmp_path / "out", sequences, "best")
    with pytest.raises(RequestError, match=r"the method must be one of rtn, .*; found 'awful'"):
        quantize(small, tmp_path / "out", None, "awful")
    tensor: Any = torch.zeros(2, 8, dtype=torch.int64)
    request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)), method="best", sequences=tensor)
    with pytest.raises(RequestError, match=r"must be CalibrationSequences; found a tensor of shape \[2, 8\]"):
        quantize_checkpoint(small, tmp_path / "out", request)
    assert not list(tmp_path.iterdir())


def test_the_quantize_command_calibrates(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    command = ("quantize", nano, out, "--calibration", BOOK, "--sequences", 6, "--length", 128)
    outcome = cli(*command, "--method", "awq", "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["method"] == "awq"
    assert summary["calibration"] == json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert summary["calibration"] | {"text_sha256": ""} == {"text_sha256": "", "sequences": 6, "length": 128, "seed": 0}
    assert cli("verify", out).code == 0
    short = tmp_path / "short.txt"
    short.write_text("The old man")
    for arguments, message in (
        (("quantize", nano, tmp_path / "x", "--method", "best"), "must have a text to calibrate with"),
        (("quantize", nano, tmp_path / "x", "--calibration", BOOK), "the method rtn takes no calibration"),
        (("quantize", nano, tmp_path / "x", "--method", "best", "--calibration", short), "at least one sequence of 512 tokens"),
        (("quantize", nano, tmp_path / "x", "--method", "best", *command[3:], "--format", "nf4"), "best makes int4, int8, "),
    ):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
        assert "Traceback" not in outcome.err
        assert not (tmp_path / "x").exists()
