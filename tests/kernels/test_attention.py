"""Attention against a float64 computation written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbrx_q.kernels.attention import IMPLEMENTATIONS, attention

H, G, C = 6, 2, 16


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    """[S, H, C], one query and one head at a time."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    S, L = len(queries), keys.shape[1]
    out = np.zeros((S, H, C))
    for s in range(S):
        for h in range(H):
            g = h // (H // G)
            seen = L - S + s + 1
            scores = keys[g, :seen] @ queries[s, h] / np.sqrt(C)
            weights = np.exp(scores - scores.max())
            out[s, h] = weights / weights.sum() @ values[g, :seen]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("S", "L"), [(1, 1), (1, 33), (5, 5), (5, 12), (64, 65), (130, 130)])
def test_attention_of_the_last_tokens(implementation: str, S: int, L: int) -> None:
    generator = torch.Generator().manual_seed(L)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((S, H, C), (G, L, C), (G, L, C)))
    np.testing.assert_allclose(attention(q, k, v, implementation=implementation).numpy(), truth(q, k, v), atol=2e-6)
