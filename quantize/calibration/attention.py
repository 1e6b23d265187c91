"""Attention of all calibration sequences, one sequence per task of the worker threads.

Dimension letters: `B` sequences, `S` tokens of one, `T` = B S tokens, `H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.model.block import Rotation, attend
from dbrx_q.quantize.methods.products import Products

__all__ = ["attention_heads"]


def attention_heads(qkv: torch.Tensor, rotation: Rotation, config: DbrxConfig, products: Products) -> torch.Tensor:
    """float32 [T, H C] on the CPU: the input of out_proj.

    Args:
        qkv: float32 [T, (H + 2G) C], the output of Wqkv before it is clamped, for whole sequences.
        rotation: [S, C / 2], of the positions in one sequence.
        config: of the model.
        products: its workers share the sequences; on a GPU they run one after the other.
    """
    cos, sin = (angles.to(qkv.device) for angles in rotation)

    def heads_of(sequence: torch.Tensor) -> torch.Tensor:
        return attend(sequence, (cos, sin), heads=config.n_heads, clip=config.attn_config.clip_qkv).flatten(1).cpu()

    sequences = qkv.split(len(cos))
    on_gpu = qkv.device.type != "cpu"
    return torch.cat([heads_of(sequence) for sequence in sequences] if on_gpu else products.workers.map(heads_of, sequences))
