"""The quantizer stays within the memory that it planned, for a model of any size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, plan_checkpoint, quantize_checkpoint

# Runs in a process whose data cannot grow past the limit: allocations beyond it fail (RLIMIT_DATA counts allocations, and 8 MB per thread).
MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from dbrx_q.planning.host_memory import peak_memory_bytes, resident_bytes
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.quantize.calibration.sources import CalibrationSequences
from dbrx_q.quantize.pipeline.run import QuantizationRequest, plan_checkpoint, quantize_checkpoint
from dbrx_q.quantize.pipeline.format_assignment import default_formats

warm, source, out, method, tokens = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])

def request(tokens):
    ids = torch.arange(tokens).view(-1, 256) % 500
    sequences = CalibrationSequences(ids, (len(ids),), ("text",), (1.0,), ids[-2:], (len(ids[-2:]),)) if tokens else None
    assign_formats = lambda c: default_formats(c.config, TensorFormat("int4", 64))
    return QuantizationRequest(assign_formats, method=method, sequences=sequences, no_worse_than_rtn=bool(tokens))

quantize_checkpoint(warm, out.with_name("warm"), request(min(tokens, 256)))  # compiled code is not the tensors' memory
plan = plan_checkpoint(source, request(tokens))
before = resident_bytes()
budget = plan.working + plan.activations // 2
budget += 2 << 20  # growth of the process beside tensors
plan = plan_checkpoint(source, request(tokens), memory=before + budget)
data = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
threads = 8 << 23
resource.setrlimit(resource.RLIMIT_DATA, (data + budget + threads, data + budget + threads))
Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which compiling may have raised
quantize_checkpoint(source, out, request(tokens), memory=before + budget)
print(json.dumps({"budget": budget, "grown": peak_memory_bytes() - before, "in_files": plan.in_files}))
"""


def config(width: int, hidden: int, layers: int, experts: int) -> DbrxConfig:
    return DbrxConfig(
        d_model=width,
        n_heads=8,
        n_layers=layers,
        vocab_size=512,
        attn_config={"kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": hidden, "moe_num_experts": experts, "moe_top_k": 2},
        torch_dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(a small checkpoint, a checkpoint of 690 MB)."""
    folder = tmp_path_factory.mktemp("memory")
    write_checkpoint(config(128, 128, 1, 2), folder / "small")
    write_checkpoint(config(512, 768, 18, 16), folder / "large")
    yield folder / "small", folder / "large"
    shutil.rmtree(folder)


@pytest.mark.parametrize(("method", "tokens"), [("rtn", 0), pytest.param("gptq", 2048, marks=pytest.mark.long)])
def test_a_model_several_times_larger_than_the_limit_is_quantized(
    large: tuple[Path, Path], tmp_path: Path, method: str, tokens: int
) -> None:
    command = [sys.executable, "-c", MEASURE, *large, tmp_path / "out", method, tokens]
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    model = sum(shard.stat().st_size for shard in large[1].glob("*.safetensors"))
    assert model > 3 * figures["budget"]
    assert figures["grown"] <= figures["budget"]
    assert figures["in_files"] == (tokens > 0)


def test_activations_in_files_and_in_memory_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    ids = CalibrationSequences.single(torch.arange(64 * 60).view(64, 60) % 500)
    request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)), method="best", sequences=ids)
    quantize_checkpoint(small, tmp_path / "memory", request)  # first: it compiles code and fills the allocator's reserves
    plan = plan_checkpoint(small, request)
    tight = plan.peak_memory - plan.activations // 2
    assert plan_checkpoint(small, request, memory=tight).in_files
    quantize_checkpoint(small, tmp_path / "files", request, memory=tight)
    for path in (tmp_path / "memory").glob("*.safetensors"):
        assert sha256_of(path) == sha256_of(tmp_path / "files" / path.name), path.name


def test_too_little_memory_is_refused(small: Path, tmp_path: Path) -> None:
    request = QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64)))
    with pytest.raises(RequestError, match=r"--memory must be at least [\d,]+ bytes here, of which .*; found 1,048,576"):
        quantize_checkpoint(small, tmp_path / "out", request, memory=1 << 20)
    assert not list(tmp_path.iterdir())
