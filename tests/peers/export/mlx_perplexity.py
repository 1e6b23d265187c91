"""Prints the perplexities that mlx-lm computes with folders in MLX's layout, as JSON: `mlx_perplexity.py WINDOWS FOLDER...`.

Runs in an environment with `mlx[cpu]` and `mlx-lm`. WINDOWS is a JSON list of (token ids, how many of them come before the scored ones).
Scales and activations are float32, so that only the stored weights decide.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model


def perplexity(folder: str, windows: list[tuple[list[int], int]]) -> float:
    """exp(mean negative log-likelihood) of the scored tokens."""
    model, _ = load_model(Path(folder))
    model.update(tree_map(lambda part: part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part, model.parameters()))
    total, count = 0.0, 0
    for ids, before in windows:
        logits = np.array(model(mx.array([ids]))[0]).astype(np.float64)[before - 1 : -1]
        logits -= logits.max(-1, keepdims=True)
        likely = logits[np.arange(len(logits)), ids[before:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - likely.sum(), count + len(likely)
    return float(np.exp(total / count))


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({folder: perplexity(folder, wanted) for folder in sys.argv[2:]}))
