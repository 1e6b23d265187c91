"""Folders that appear when they are complete: files of other programs are kept, and two runs never share a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.staging import MARKER_NAME, staged_folder
from dbrx_q.cli import run
from dbrx_q.errors import RequestError


def test_the_folder_appears_at_the_end_and_nothing_else(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / "out", 10) as partial:
        (partial / "a").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["out", "a"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "new" / "out", 10) as partial:
            (partial / "a").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_program_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with (
        pytest.raises(RequestError, match=r"out\.partial: the result is built in this folder, but it was made by something else"),
        staged_folder(tmp_path / "out", 1),
    ):
        pass
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", 10) as partial:
        (partial / "a").write_text("x")
        with pytest.raises(RequestError, match="another run is writing here"), staged_folder(tmp_path / "out", 10):
            pass
        assert (partial / "a").read_text() == "x"
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("resume", [None, False, True])
def test_an_empty_folder_of_a_run_that_ended_before_its_marker_is_taken_over(resume: bool | None, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with staged_folder(tmp_path / "out", 10, resume=resume) as partial:
        (partial / "a").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_the_run_that_writes_the_marker_first_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        (self / MARKER_NAME).touch()  # by the other run

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RequestError, match="another run is writing here"), staged_folder(tmp_path / "out", 10):
        pass
    assert (tmp_path / "out.partial" / MARKER_NAME).exists()


def test_the_folder_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", 10) as partial:
        (partial / "old").write_text("x")
        shutil.copytree(partial, tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(tmp_path / "out.partial")
    with staged_folder(tmp_path / "out", 10) as partial:
        assert not (partial / "old").exists()


def test_a_source_with_a_manifest_of_its_own_gives_a_result_that_verifies(nano: Path, tmp_path: Path) -> None:
    source = shutil.copytree(nano, tmp_path / "source")
    (source / "manifest.json").write_text("{}")
    assert run(["quantize", str(source), str(tmp_path / "out")]) == 0
    assert run(["verify", str(tmp_path / "out")]) == 0


def test_verify_requires_a_manifest_of_a_quantized_checkpoint(
    quantized_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(quantized_nano, tmp_path / "model")
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / "model-00002-of-00002.safetensors")
    assert run(["verify", str(folder)]) == 2
    assert "must list every shard; model-00002-of-00002.safetensors" in capsys.readouterr().err
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "manifest.json").unlink()
    assert run(["verify", str(folder)]) == 2
    assert "must hold manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{model}", "--group-size", "64"], "--group-size needs --format"),
        (["plan", "{model}", "--ram", "lots"], "a size must be a number with a unit"),
        (["plan", "{model}", "--context", "9999"], "--context must be from 1 to the model's 2048"),
        (["plan", "{model}", "--batch", "0"], "--batch must be at least 1"),
        (["bench", "{model}", "--repeats", "0"], "--repeats must be at least 1"),
        (["bench", "synthetic", "{model}"], "the destination must be empty"),
        (["bench", "synthetic", "{model}-new", "--layers", "0"], "--layers must be at least 1"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_arguments_of_plan_and_bench(arguments: list[str], message: str, nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([argument.format(model=nano) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_end_tokens_that_are_no_ids_are_refused(nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(nano, tmp_path / "model")
    for bad in ("[[4092]]", '"4092"'):
        (folder / "generation_config.json").write_text('{"eos_token_id": ' + bad + "}")
        assert run(["generate", str(folder), "--prompt", "x"]) == 2
        assert "generation_config.json: eos_token_id must be a token id" in capsys.readouterr().err
