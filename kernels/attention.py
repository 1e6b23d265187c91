"""`attention`: causal attention of one sequence with grouped query heads.

Dimension letters: `S` new tokens, `L` tokens in the cache with the new ones, `H` query heads, `G` key/value heads,
`C` channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["IMPLEMENTATIONS", "attention", "attention_reference"]

IMPLEMENTATIONS = ("sdpa", "eager")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, implementation: str = "sdpa") -> torch.Tensor:
    """y [S, H, C] for the last S of L tokens of one sequence.

    Args:
        q: [S, H, C]. The first query is token L - S of the sequence; each sees itself and what came before.
        k, v: [G, L, C], G divides H.
        implementation: "sdpa", torch's fused attention, which serves prefill over an unquantized cache as well as a kernel of our
            own; or "eager", every step written out in float32.
    """
    if implementation == "eager":
        return attention_reference(q, k, v).to(q.dtype)
    (S, H, C), (G, L, _) = q.shape, k.shape
    if S == 1:  # the H/G query heads of a key/value head become the rows of one attention: keys and values are read once
        return F.scaled_dot_product_attention(q.view(1, G, H // G, C), k[None], v[None]).reshape(1, H, C)
    mask = torch.ones(S, L, dtype=torch.bool, device=q.device).tril(L - S) if S < L else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )  # [1, H, S, C]
    return out[0].transpose(0, 1)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float32 y [S, H, C]; arguments as for `attention`."""
    S, H, C = q.shape
    G, L, _ = k.shape
    grouped = q.float().view(S, G, H // G, C)
    scores = torch.einsum("sghc,glc->ghsl", grouped, k.float()) * C**-0.5
    future = torch.ones(S, L, dtype=torch.bool, device=q.device).triu(L - S + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("ghsl,glc->sghc", weights, v.float()).reshape(S, H, C)
