"""`dbrx-q quantize`: formats by rule and by target bits, dry runs, limits, and refused options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.staging import partial_of
from dbrx_q.quantize.calibration import output_errors
from dbrx_q.quantize.methods.choose import METHODS

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
TEXT = ("--calibration", BOOK, "--sequences", 8, "--length", 64)
Cli = Callable[..., Any]


def bits_of(cli: Cli, folder: Path) -> dict[str, Any]:
    inventory = json.loads(cli("inspect", folder, "--json").out)
    return {kind: row["format"] for kind, row in inventory["kinds"].items()} | {"all": inventory["bits_per_weight"]}


def test_rules_choose_the_formats_of_tensors(small: Path, tmp_path: Path, cli: Cli) -> None:
    rules = ("--tensor", "w2=int8:32", "--tensor", "head=plain", "--tensor", "blocks.0.Wqkv=int4:32")
    assert cli("quantize", small, tmp_path / "out", *rules).code == 0
    formats = bits_of(cli, tmp_path / "out")
    assert formats["experts"] == "int4:64 + int8:32"
    assert (formats["head"], formats["attention"]) == ("bfloat16", "int4:32 + int8:64")
    assert cli("verify", tmp_path / "out").code == 0
    for rule, message in (("w9=int8", "w9"), ("w2=int5", "int5"), ("w2=plain", "plain"), ("embedding=nf4", "the embedding must be")):
        outcome = cli("quantize", small, tmp_path / "bad", "--tensor", rule)
        assert (outcome.code, outcome.out) == (2, ""), rule
        assert message in outcome.err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("target", [5, 6.5])
def test_a_target_number_of_bits_is_met(nano: Path, tmp_path: Path, cli: Cli, target: float) -> None:
    outcome = cli("quantize", nano, tmp_path / "out", "--target-bpw", target, *TEXT)
    assert outcome.code == 0, outcome.err
    assert target - 0.02 < bits_of(cli, tmp_path / "out")["all"] <= target


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.trellis])
def test_a_target_chooses_among_the_formats_that_the_method_makes(small: Path, tmp_path: Path, cli: Cli, method: str) -> None:
    outcome = cli("quantize", small, tmp_path / "out", "--target-bpw", 6.5, "--method", method, *TEXT, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert sum(json.loads(outcome.out)["bits"].values()) > 0


def test_fast_is_no_error_where_a_target_chooses_no_trellis_format(small: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("quantize", small, tmp_path / "out", "--target-bpw", 12, "--fast", *TEXT, "--dry-run").code == 0


def test_an_unreachable_target_is_refused_and_names_the_range(small: Path, tmp_path: Path, cli: Cli) -> None:
    for target in (3, 17):
        outcome = cli("quantize", small, tmp_path / "out", "--target-bpw", target, *TEXT)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"found {target}" in outcome.err
        assert "bits per weight" in outcome.err
    outcome = cli("quantize", small, tmp_path / "out", "--target-bpw", 5)
    assert outcome.code == 2
    assert "--target-bpw measures errors on a text; found none. Give --calibration SOURCE" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_does_not_measure_again(small: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("quantize", small, tmp_path / "out", "--target-bpw", 7, *TEXT)
    with monkeypatch.context() as patch:
        patch.setattr("dbrx_q.quantize.pipeline.run.finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        outcome = cli(*command)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert partial_of(tmp_path / "out").exists()
    measured: list[object] = []
    monkeypatch.setattr(output_errors, "output_errors", lambda *arguments, **_: measured.append(arguments))
    outcome = cli(*command, "--resume")
    assert outcome.code == 0, outcome.err
    assert not measured
    with pytest.raises(AttributeError):  # a new run measures; here it gets None
        cli("quantize", small, tmp_path / "other", "--target-bpw", 7, *TEXT)
    assert measured


def test_a_dry_run_shows_the_plan_and_writes_nothing(nano: Path, tmp_path: Path, cli: Cli) -> None:
    outcome = cli("quantize", nano, tmp_path / "out", "--method", "best", *TEXT, "--dry-run", "--json")
    plan = json.loads(outcome.out)
    assert not list(tmp_path.iterdir())
    assert cli("quantize", nano, tmp_path / "out", "--method", "best", *TEXT).code == 0
    with open(tmp_path / "out" / "quantization_report.json") as file:
        report = json.load(file)
    assert (plan["bytes_in"], plan["bytes_out"]) == (report["bytes_in"], report["bytes_out"])
    assert plan["bits"] == report["bits_by_kind"]
    assert plan["seconds"] > 0
    text = cli("quantize", nano, tmp_path / "other", "--recipe", "best", *TEXT, "--dry-run").out
    assert all(word in text for word in ("reads", "writes", "memory", "disk", "time", "experts"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "best", *TEXT, "--activations", "original"), "must see the quantized model's activations"),
        (("--memory", "many"), "a size must be a number with a unit, as 96GiB or 64GB; found 'many'"),
        (("--memory", "1MiB"), "--memory must be at least"),
        (("--device", "tpu"), "device must be 'cpu', 'cuda' or 'cuda:N'; found 'tpu'"),
        (("--device-memory", "20GiB"), "--device-memory limits a GPU's memory; found it with --device cpu"),
        (("--group-size", 48), "the group size must be one of"),
        (("--method", "gptq"), "must have a text to calibrate with"),
    ],
)
def test_bad_options_are_refused(small: Path, tmp_path: Path, cli: Cli, options: tuple[object, ...], message: str) -> None:
    outcome = cli("quantize", small, tmp_path / "out", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not list(tmp_path.iterdir())


def test_an_empty_text_is_refused(small: Path, tmp_path: Path, cli: Cli) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    outcome = cli("quantize", small, tmp_path / "out", "--method", "gptq", "--calibration", empty)
    assert (outcome.code, outcome.out) == (2, "")
    assert "empty.txt" in outcome.err
    assert not (tmp_path / "out").exists()
