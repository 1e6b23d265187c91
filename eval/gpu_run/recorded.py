"""The launches that later items make, recorded on tensors without memory, so that they are compiled before they run.

Tests are recorded by running their files on such tensors: a test ends where it reads a value, after the launches that come first.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.eval.bench.kernel_work import dbrx_works, step_work
from dbrx_q.eval.bench.tune import problem_calls
from dbrx_q.kernels.triton.launch import Chip, recording
from dbrx_q.kernels.triton.tiles import candidates, trying

from .compiling import CompileRequest, compile_requests
from .plan import TEST_FILES, tuned_problems
from .random_model import config_of, random_model
from .settings import SMALL, Settings, tree

__all__ = ["FEW", "record"]

FEW = 2
"""Kernels of each source that a run without a GPU compiles."""
_META = torch.device("meta")
_CONTEXT = 1024
_STEPS = (1, 2, 4)  # sequences of a decode step
_TOKENS = (1, 2, 3, 6, 16, 17, 40, 64, 80)  # of a prompt in the tests of whole models


def record(source: str, settings: Settings, chip: Chip, names: Collection[str] | None = None) -> list[CompileRequest]:
    """What Triton compiles for a stage, each kernel once.

    Args:
        source: one of `SOURCES`.
        settings: of the run.
        chip: whose tile choices are recorded.
        names: of the stage's items that are still to run; None for all.
    """
    with recording(chip) as launches:
        _RECORDERS[source](settings, chip, names)
    requests = compile_requests(launches)
    return requests[:FEW] if settings.dry else requests


def _rows(settings: Settings, chip: Chip, names: Collection[str] | None) -> None:
    for work in dbrx_works(_META, settings.shapes):
        if names is None or work.name in names:
            work.make().contenders["dbrx_q"]()[0]()
    if not settings.dry:
        for work in dbrx_works(_META, SMALL):  # for the memory checker
            work.make().contenders["dbrx_q"]()[0]()


def _model(settings: Settings, chip: Chip, names: Collection[str] | None) -> None:
    model = random_model(config_of(settings.shapes, 1), _META)
    step_work(model, context=min(_CONTEXT, settings.shapes.context)).contenders["dbrx_q"]()[0]()
    for tokens in (1, 2):
        model(torch.zeros(1, tokens, dtype=torch.int64))


def _tests(settings: Settings, chip: Chip, names: Collection[str] | None) -> None:
    root = tree()
    if root is None:
        return
    files = [root / name for name, _, _ in TEST_FILES if name.startswith("tests/kernels/") and (names is None or name in names)]
    if files:  # without one, pytest would run all tests
        _run_on_meta(root, files)
    if not settings.dry and any(not name.startswith("tests/kernels/") for name in names or ()):
        with suppress(Exception):  # the bundled model may be missing
            _bundled_model(DbrxConfig.from_pretrained(root / "tests" / "data" / "dbrx-nano"))


def _run_on_meta(root: Path, files: list[Path]) -> None:
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins of the machine
    options = ["-q", "-p", "no:cacheprovider", "--tb=no", "-W", "default", "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        pytest.main([*options, *map(str, files)])


def _bundled_model(config: DbrxConfig) -> None:
    """Prompts and decode steps of the lengths that tests of whole models have."""
    from dbrx_q.generation.decode_graph import DecodeStep
    from dbrx_q.model.kv_cache import KVCache

    model = random_model(config, _META)
    for tokens in _TOKENS:
        for rows in (1, 2):
            model(torch.zeros(rows, tokens, dtype=torch.int64))
    for kv_format in ("plain", "int8"):
        for size in _STEPS:
            step = DecodeStep(model, KVCache(config, size, 64, dtype=model.dtype, device=_META, format=kv_format), size)
            step([0] * size, [1] * size, list(range(size)))


def _tuning(settings: Settings, chip: Chip, names: Collection[str] | None) -> None:
    """The default tiles of each problem and those that differ in one respect, which a sweep measures first."""
    from dbrx_q.eval.bench.tune import differences

    from .plan import problem_name

    for problem in tuned_problems(settings, chip):
        if names is not None and problem_name(problem) not in names:
            continue
        default, *others = candidates(problem, chip)
        for tiles in (default, *(tiles for tiles in others if differences(tiles, default) <= 1)):
            with trying(problem, chip, tiles):
                problem_calls(problem, _META, settings.shapes)[0]()


_RECORDERS: dict[str, Callable[[Settings, Chip, Collection[str] | None], None]] = {
    "rows": _rows,
    "model": _model,
    "tests": _tests,
    "tuning": _tuning,
}
