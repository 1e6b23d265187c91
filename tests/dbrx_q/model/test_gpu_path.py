"""What runs on a GPU needs no numba, which takes a second to import and whose LLVM compiles for minutes on a new machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

import torch

from dbrx_q.eval.bench import kernels, offload, tune
from dbrx_q.experts import gpu_store
from dbrx_q.generation import decode_graph
from dbrx_q.generation.generate import generate
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.model.modeling import DbrxForCausalLM

assert pick(torch.device("cpu")) is Backend.TRITON
model = DbrxForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
[result] = generate(model, [[2, 3]], max_new_tokens=2)
assert len(result.token_ids) == 2
print([name for name in sys.modules if name.partition(".")[0] in ("numba", "llvmlite")])
"""


def test_loading_and_generation_by_triton_import_no_numba(quantized_small: Path) -> None:
    """In Triton's interpreter, which takes the same path as a GPU."""
    command = [sys.executable, "-c", SCRIPT, str(quantized_small)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
