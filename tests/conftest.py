"""Fixtures that tests of several rooms use, and the order of test files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
KERNELS = Path(__file__).parent.parent / "kernels"

# numba notices a change of the file that defines a kernel, but not of a file that it imports. New sources therefore get a new cache.
_sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KERNELS.rglob("*.py")))).hexdigest()
os.environ.setdefault("NUMBA_CACHE_DIR", str(KERNELS.parent / ".numba_cache" / _sources[:16]))


# Files that take half a minute or more. The first two compile the CPU kernels for this chip and for another, so that commands started by
# later tests load them from the cache.
FIRST = ["test_generate.py", "test_other_chips.py", "test_resume.py", "test_memory.py", "test_compare.py", "test_llama_cpp.py"]
FIRST += ["test_hub.py", "test_calibrated.py", "test_interrupt.py", "test_report.py", "test_command.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, so that parallel processes end at about the same time."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` imports the tests that need a GPU alone: a machine with one may lack the packages of others."""
    if config.option.markexpr != "gpu":
        return None
    folder = collection_path if collection_path.is_dir() else collection_path.parent
    wanted = folder.name == "gpu" or (collection_path.is_dir() and any(collection_path.glob("**/gpu")))
    return None if wanted or not collection_path.is_relative_to(Path(__file__).parent) else True


@pytest.fixture(scope="session")
def nano() -> Path:
    """The bundled model: trained, plain bfloat16."""
    return DATA / "dbrx-nano"


@pytest.fixture(scope="session")
def quantized_nano(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with int4 experts in groups of 64 and int8 for the rest."""
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.quantize.pipeline.format_assignment import default_formats
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

    folder = tmp_path_factory.mktemp("quantized") / "dbrx-nano-int4"
    quantize_checkpoint(nano, folder, QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int4", 64))))
    return folder


@dataclass(frozen=True)
class Outcome:
    """The exit code and the output of a command."""

    code: int
    """The exit code."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a `dbrx-q` command in this process."""
    from dbrx_q.cli import run

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def small(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint of 1 MB in two shards, with random weights and the tokenizer of the bundled model."""
    from dbrx_q.config import DbrxConfig
    from dbrx_q.eval.bench.synthetic import write_checkpoint

    folder = tmp_path_factory.mktemp("small") / "dbrx-small"
    config = DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=1,
        max_seq_len=64,
        vocab_size=4096,
        attn_config={"kv_n_heads": 1},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(nano / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def quantized_small(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` with int4 experts in groups of 64."""
    from dbrx_q.checkpoint.layout import TensorFormat
    from dbrx_q.quantize.pipeline.format_assignment import default_formats
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

    folder = tmp_path_factory.mktemp("small-quantized") / "dbrx-small-int4"
    quantize_checkpoint(small, folder, QuantizationRequest(lambda checkpoint: default_formats(checkpoint.config, TensorFormat("int4", 64))))
    return folder


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN (integers: 77), so that a result shows where a kernel reads what nobody wrote, or writes nothing.

    On a GPU a new tensor mostly holds what the same kernel left there in the call before, which hides both.
    """
    import torch

    def poison(out: torch.Tensor) -> torch.Tensor:
        if out.is_meta:
            return out
        return out.fill_(torch.nan if out.is_floating_point() else 77)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        real: Callable[..., torch.Tensor] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, _real=real, **options: poison(_real(*arguments, **options)))


@pytest.fixture
def transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' DbrxConfig as published: an earlier test of this process may have imported `dbrx_q.transformers`, which repairs it."""
    import transformers

    repaired = transformers.DbrxConfig.__post_init__
    monkeypatch.setattr(transformers.DbrxConfig, "__post_init__", getattr(repaired, "__wrapped__", repaired))
