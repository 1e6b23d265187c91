"""Ctrl-C interrupts a running command: exit code 2, one message, no traceback, nothing half-written.

Every test waits until the command does the work that is to be interrupted, never for a fixed time.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.staging import staged_folder
from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint

SCRIPT = Path(sys.executable).with_name("dbrx-q")
BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
MESSAGE = "dbrx-q: error: interrupted; nothing was left half-written"
LIMIT_SECONDS = 60  # only a command that hangs takes so long


@pytest.fixture(scope="module")
def large(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 170 MB, for which every command that computes takes seconds."""
    folder = tmp_path_factory.mktemp("large") / "dbrx-large"
    config = DbrxConfig(
        d_model=512,
        n_heads=8,
        n_layers=3,
        max_seq_len=4096,
        vocab_size=4096,
        attn_config={"kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": 1024, "moe_num_experts": 16, "moe_top_k": 4},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano / name, folder / name)
    yield folder
    shutil.rmtree(folder)


class Running:
    """A command in a separate process, with a terminal as stderr."""

    def __init__(self, *arguments: object) -> None:
        self.terminal, inner = pty.openpty()
        environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
        command = [str(SCRIPT), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inner, env=environment)
        os.close(inner)
        self.stderr = b""

    def wait_until(self, at_work: Callable[[], bool]) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while not at_work():
            assert self.process.poll() is None, f"ended before it was interrupted: {self._rest()}"
            assert time.monotonic() < until, "never began its work"
            time.sleep(0.001)

    def wait_for_stderr(self, words: bytes) -> None:
        while words not in self.stderr:
            self.stderr += os.read(self.terminal, 1 << 16)

    def has_mapped(self, library: str) -> bool:
        return library in Path(f"/proc/{self.process.pid}/maps").read_text()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> str:
        """What it prints to stderr, after checking that it was interrupted cleanly."""
        text = self._rest()
        assert self.process.wait(LIMIT_SECONDS) == 2, text
        assert text.count("dbrx-q: error: interrupted") == 1, text
        assert "Traceback" not in text
        assert "Exception ignored" not in text
        assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l"), "the cursor stays hidden"
        return text.replace("\r\n", "\n")

    def finish(self) -> str:
        """What it prints to stderr when it runs to its end; an unread terminal would block it."""
        text = self._rest()
        assert self.process.wait(LIMIT_SECONDS) == 0, text
        return text

    def check_clean_end(self) -> None:
        assert MESSAGE in self.end()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self.terminal)

    def _rest(self) -> str:
        with suppress(OSError):  # raised by Linux when the other side of a terminal is closed
            while piece := os.read(self.terminal, 1 << 16):
                self.stderr += piece
        return self.stderr.decode(errors="replace")


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*arguments: object) -> Running:
        started.append(Running(*arguments))
        return started[-1]

    yield begin
    for running in started:
        running.close()


@pytest.mark.parametrize(("phase", "presses"), [("destination made", 1), ("shard grows", 3)])
def test_quantize_keeps_what_is_finished(phase: str, presses: int, large: Path, tmp_path: Path, start: Callable[..., Running]) -> None:
    out, partial = tmp_path / "new" / "out", tmp_path / "new" / "out.partial"
    running = start("quantize", large, out)
    if phase == "destination made":
        running.wait_until(partial.exists)
    else:
        running.wait_until(lambda: any(shard.stat().st_size > 4 << 20 for shard in partial.glob("*.safetensors")))
    for _ in range(presses):
        running.interrupt()
        time.sleep(0.002)
    text = running.end()
    if partial.exists():
        assert f"interrupted; what is finished is kept in {partial}, and the same command with --resume continues from there" in text
        start("quantize", large, out, "--resume").finish()
        start("verify", out).finish()
    else:
        assert phase == "destination made"
        assert MESSAGE in text
        assert not list(tmp_path.iterdir())


def test_generate_can_be_interrupted(large: Path, start: Callable[..., Running]) -> None:
    running = start("generate", large, "--prompt", "The", "--max-new-tokens", 4000)
    assert running.process.stdout is not None
    assert running.process.stdout.read(1)
    running.interrupt()
    running.check_clean_end()


def test_an_interrupted_generate_prints_no_json(large: Path, start: Callable[..., Running]) -> None:
    running = start("generate", large, "--prompt", "The " * 2000, "--max-new-tokens", 2000, "--json")
    # Compiled kernels run: the first of them has been loaded.
    running.wait_until(lambda: running.has_mapped("libllvmlite"))
    running.interrupt()
    running.check_clean_end()
    assert running.process.stdout is not None
    assert running.process.stdout.read() == b""


def test_perplexity_can_be_interrupted(large: Path, start: Callable[..., Running]) -> None:
    running = start("perplexity", large, "--text", BOOK, "--context", 512, "--stride", 8, "--json")
    running.wait_for_stderr(b"windows")
    running.interrupt()
    running.check_clean_end()
    assert running.process.stdout is not None
    assert running.process.stdout.read() == b""


@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_partial_figures_are_printed_and_the_run_is_resumed(
    command: str, large: Path, tmp_path: Path, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = [large] if command == "perplexity" else [large, large]
    arguments = (command, *models, "--text", BOOK, "--context", 512, "--limit", 16, "--json")

    def figures_of(running: Running) -> dict[str, Any]:
        running._rest()  # an unread terminal would block the command
        assert running.process.stdout is not None
        return json.loads(running.process.stdout.read())

    running = start(*arguments)
    running.wait_for_stderr(b"8/16" if command == "perplexity" else b" 8/")  # a batch of windows is done
    running.interrupt()
    partial = figures_of(running)
    text = running.stderr.decode()
    assert running.process.wait(LIMIT_SECONDS) == 2
    assert f"interrupted after {partial['tokens']:,} of {16 * 511:,} tokens" in text
    assert "--resume continues" in text
    assert "Traceback" not in text
    assert not partial["complete"]
    assert partial["tokens"] == 8 * 511
    resumed = start(*arguments, "--resume")
    complete = figures_of(resumed)
    assert resumed.process.wait(LIMIT_SECONDS) == 0
    assert b" 0/16" not in resumed.stderr
    assert not list(tmp_path.rglob("*.npz"))
    assert (complete["complete"], complete["tokens"]) == (True, 16 * 511)
    if command == "perplexity":
        assert figures_of(start(*arguments)) == complete


def test_verify_can_be_interrupted(tmp_path: Path, start: Callable[..., Running]) -> None:
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.truncate(1 << 38)  # takes no disk space, and many minutes to hash
    entry = {"huge.safetensors": {"bytes": 1 << 38, "sha256": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": entry, "files": {}, "tensors": {}}))
    running = start("verify", tmp_path)
    running.wait_for_stderr(b"verifying")
    running.interrupt()
    running.check_clean_end()


@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_imports_can_be_interrupted_without_a_traceback(library: str, nano: Path, start: Callable[..., Running]) -> None:
    running = start("generate", nano, "--prompt", "The")
    running.wait_until(lambda: running.has_mapped(library))
    running.interrupt()
    running.check_clean_end()
    assert running.process.stdout is not None
    assert running.process.stdout.read() == b""


def test_cleaning_up_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def rmtree(path: Path, *, ignore_errors: bool = False) -> None:
        signal.raise_signal(signal.SIGINT)
        real(path, ignore_errors=ignore_errors)

    def fail() -> None:
        with staged_folder(tmp_path / "out", 10) as partial:
            (partial / "a").write_text("x")
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
