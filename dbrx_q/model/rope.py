"""Scaled rotary embeddings: the frequencies of contexts longer than the model was trained with, as transformers defines them for DBRX.

- linear: positions are divided by a factor (Chen et al. 2023, Extending Context Window of Large Language Models).
- dynamic: beyond the trained context the base grows with the longest position of the call ("NTK-aware" scaling, computed anew for each
  length). Keys in a cache keep the rotation of the call that made them.
- yarn: high frequencies stay, low ones are divided by the factor, with a ramp between (Peng et al. 2023, YaRN, eq. 16 to 23); cosines and
  sines are multiplied by the attention factor.

Dimension letters: `T` tokens, `C` channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dbrx_q.config import DbrxConfig

__all__ = ["scaled_frequencies"]


def scaled_frequencies(positions: torch.Tensor, config: DbrxConfig) -> tuple[torch.Tensor, float]:
    """(float32 angles per position [C / 2], the factor of cosines and sines).

    Args:
        positions: int32 [T], of which "dynamic" reads the longest.
        config: gives C, the base of the angles and the scaling.
    """
    C, base, settings = config.head_dim, config.rope_theta, config.rope_parameters
    exponents = torch.arange(0, C, 2, dtype=torch.float32, device=positions.device) / C
    if config.rope_type == "linear":
        return base**-exponents / settings["factor"], 1.0
    if config.rope_type == "dynamic":
        trained, factor = config.max_seq_len, settings["factor"]
        length = (positions.max() + 1).clamp(min=trained).float() if positions.numel() else positions.new_full((), trained).float()
        growth = (factor * length / trained - (factor - 1)) ** (C / (C - 2)) if C > 2 else torch.ones_like(length)
        return (base * growth) ** -exponents, 1.0  # stays on the device, so that a CUDA graph can capture it
    kept = 1 - _ramp(C, base, settings, positions.device)
    frequencies = base**-exponents
    return frequencies / settings["factor"] * (1 - kept) + frequencies * kept, _attention_factor(settings)


def _ramp(C: int, base: float, settings: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """float32 [C / 2]: 0 for channels that turn often within the trained context, 1 for those that turn seldom."""
    trained = settings["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        """The channel that turns so often."""
        return C * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = channel(settings.get("beta_fast") or 32.0), channel(settings.get("beta_slow") or 1.0)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, C - 1)
    width = last - first if last != first else 0.001
    return ((torch.arange(C // 2, dtype=torch.float32, device=device) - first) / width).clamp(0, 1)


def _attention_factor(settings: Mapping[str, Any]) -> float:
    factor, given = settings["factor"], settings.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = settings.get("mscale"), settings.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)
