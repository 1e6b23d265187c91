"""A pytest plugin: puts the classes under test into transformers, and writes what became of each test as JSON.

`DBRX_PEERS_VARIANT` names the variant, as `VARIANTS` of `run.py` does; `DBRX_PEERS_OUT` the file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

__all__ = ["pytest_configure", "pytest_runtest_logreport", "pytest_runtest_protocol", "pytest_sessionfinish"]

# Modules that transformers' tests import and its sdist lacks, with what they import of them: tests of generation and of export are left
# out, and a configuration is tested with the arguments of its tester alone.
MISSING = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}

_outcomes: dict[str, dict[str, object]] = {}
_backward_calls = [0]


def pytest_configure() -> None:
    """Replace transformers' classes before a test module imports them, and count calls of `backward`."""
    for name, attributes in MISSING.items():
        if importlib.util.find_spec(name.rpartition(".")[0]) is None:
            package = types.ModuleType(name.rpartition(".")[0])
            module = types.ModuleType(name)
            vars(module).update(attributes)
            sys.modules |= {package.__name__: package, name: module}
    variant = os.environ["DBRX_PEERS_VARIANT"]
    if variant != "transformers":
        import classes

        classes.install(variant)
    backward = torch.autograd.backward

    def counted(*arguments: object, **keywords: object) -> None:
        _backward_calls[0] += 1
        backward(*arguments, **keywords)  # type: ignore[arg-type]

    torch.autograd.backward = counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Whether a test calls `backward` is in its outcome."""
    before = _backward_calls[0]
    result = yield
    _outcomes.setdefault(_name(item.nodeid), {"outcome": "passed", "reason": ""})["backward"] = _backward_calls[0] > before
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test fails with its first failure, that of a subtest included, and is skipped if it is skipped as a whole, as pytest counts."""
    test = _outcomes.setdefault(_name(report.nodeid), {"outcome": "passed", "reason": ""})
    if report.failed and test["outcome"] != "failed":
        lines = [line for line in str(report.longreprtext).splitlines() if line.startswith("E  ")]
        test |= {"outcome": "failed", "reason": lines[0].removeprefix("E").strip()[:300] if lines else "error"}
    elif report.skipped and hasattr(report, "context"):
        test["skipped_subtests"] = True
    elif report.skipped and test["outcome"] == "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        test |= {"outcome": "skipped", "reason": reason}


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    if _outcomes:
        Path(os.environ["DBRX_PEERS_OUT"]).write_text(json.dumps(_outcomes, indent=1), encoding="utf-8")


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]
