"""One GPU of 24 GB that holds a part of DBRX's experts, the others in host memory: decoding by every miss policy, on fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dbrx_q.eval.bench.kernel_shapes import DBRX, Shapes
from dbrx_q.eval.bench.offload import bench_gpu
from dbrx_q.model.saving import save_model
from dbrx_q.planning.footprint import MemoryRequest
from dbrx_q.planning.machine import Gpu, Machine
from dbrx_q.planning.placement import place
from dbrx_q.planning.policy_names import DEFAULT_POLICY

from .random_model import config_of, formats_of, nbytes_of, random_model

__all__ = ["BUDGET", "offloaded_decoding", "share_within"]

BUDGET = 24 << 30
"""Bytes of the GPU."""
_LAYERS = 40
_MEASURED_LAYERS = 4  # 7 GB, which a machine writes and reads in seconds
_VOCABULARY = 4096  # the embedding and the head are no part of what is measured
_CONTEXT = 4096
_TOKENS = 24


def share_within(shapes: Shapes, nbytes: int) -> float:
    """The share of all experts of a model with 40 layers that a GPU of `nbytes` holds, with a context of 4096 tokens."""
    config = config_of(shapes, _LAYERS)
    gpu = place(config, formats_of(config), Machine(None, (Gpu(nbytes),)), MemoryRequest(_CONTEXT)).gpus[0]
    whole = place(config, formats_of(config), Machine(None, (Gpu(1 << 50),)), MemoryRequest(_CONTEXT)).gpus[0]
    return gpu.experts / whole.experts


def offloaded_decoding(shapes: Shapes, device: torch.device, work: Path) -> dict[str, Any]:
    """Speed of decoding with the share of the experts that 24 GB hold, for every miss policy.

    The layers are few, of DBRX's dimensions: a token of 40 layers takes 40 / `layers` times as long, embedding and head aside.

    Args:
        shapes: of the model.
        device: the GPU; on "meta" the share is computed, and nothing else.
        work: folder for the model, 7 GB; the run deletes it, since this process may be killed.
    """
    config = config_of(shapes, _MEASURED_LAYERS, vocabulary=min(_VOCABULARY, shapes.vocabulary))
    share = share_within(DBRX, BUDGET)
    result = {"budget": BUDGET, "layers": config.n_layers, "of_layers": _LAYERS, "bytes": nbytes_of(config), "share": share}
    if device.type == "meta":
        return result | {"rows": []}
    model = random_model(config, device)
    save_model(model, work / "model")
    del model  # frees its memory before the model is loaded within its budget
    torch.cuda.empty_cache()
    rows = bench_gpu(work / "model", [share], device, tokens=_TOKENS, policy=DEFAULT_POLICY.value, prefetch=(True,))
    return result | {"rows": [asdict(row) for row in rows]}
