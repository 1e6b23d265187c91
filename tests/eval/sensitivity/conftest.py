"""A model, a text and a measurement that the tests of sensitivity share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxForCausalLM, DbrxTokenizer
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.sensitivity.measure import Unit, sensitivity
from dbrx_q.eval.sensitivity.result import Sensitivity
from dbrx_q.eval.texts import Text, load_text
from dbrx_q.eval.windows import Protocol

DATA = Path(__file__).parents[2] / "data"
NANO, BOOK = DATA / "dbrx-nano", DATA / "war-of-the-worlds.txt"
PROTOCOL = Protocol.of(48, limit=3)
TEXT = Text("a book", "words", "0" * 64)


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def model() -> DbrxForCausalLM:
    return DbrxForCausalLM.from_pretrained(NANO, dtype=torch.float32)


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return DbrxTokenizer.from_pretrained(NANO).encode(load_text(str(BOOK)).text[:3000])


@pytest.fixture(scope="session")
def measure() -> Callable[..., Sensitivity]:
    """`sensitivity` with the settings that these tests share."""

    def run(
        model: DbrxForCausalLM,
        ids: list[int],
        units: Sequence[Unit],
        formats: Sequence[TensorFormat],
        on_run: Callable[[int, int], None] = lambda done, total: None,
        by: str = "tensor",
        state: RunState | None = None,
    ) -> Sensitivity:
        record: dict[str, Any] = {"checkpoint": "nano", "sha256": "1" * 64, "text": TEXT, "by": by, "provenance": {"command": "dbrx-q"}}
        return sensitivity(model, ids, PROTOCOL, units, formats, state=state, on_run=on_run, **record)

    return run


@pytest.fixture
def interrupt_once() -> Callable[..., Callable[[int, int], None]]:
    """Makes a progress callback that raises an error once, when `stop` parts are measured."""

    def progress(stop: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
        interrupted: list[int] = []

        def on_run(done: int, total: int) -> None:
            if done == stop and not interrupted:
                interrupted.append(done)
                raise error("pressed")

        return on_run

    return progress
