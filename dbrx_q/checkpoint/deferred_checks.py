"""Checks for NaN and infinity that are made when a mapped tensor is first used, so that loading does not read the whole file."""

from __future__ import annotations

from pathlib import Path

import torch

from .folder import check_finite

__all__ = ["DeferredChecks"]

_EVERY_TOKEN = -1  # in place of an expert, for tensors that every token uses


class DeferredChecks:
    """Tensors that are still to be checked, by the layer and the expert that use them.

    Several threads may check at once: at worst two of them check the same tensor. There is no lock, so that models can be copied.
    """

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, list[tuple[torch.Tensor, str, Path]]]] = {}

    def add(self, tensor: torch.Tensor, name: str, path: Path, *, layer: int, expert: int | None = None) -> None:
        """Check a tensor later.

        Args:
            tensor: is not read now.
            name: of the stored tensor, in messages.
            path: the file that holds it, in messages.
            layer: that uses it; -1 for a tensor outside the layers, which is checked with the first layer that is used.
            expert: that uses it; None where every token does.
        """
        if tensor.dtype.is_floating_point:
            experts = self._pending.setdefault(layer, {})
            experts.setdefault(_EVERY_TOKEN if expert is None else expert, []).append((tensor, name, path))

    @property
    def done(self) -> bool:
        """Whether no tensor is left to check."""
        return not self._pending

    def before_use(self, layer: int, experts: torch.Tensor) -> None:
        """Check what a layer uses for these experts, int64 of any shape, unless that was done before.

        Raises:
            CheckpointError: a tensor is not finite; it is checked again at the next use.
        """
        if layer in self._pending or -1 in self._pending:
            self._check(-1, {_EVERY_TOKEN})
            self._check(layer, {_EVERY_TOKEN, *experts.flatten().tolist()})

    def check_all(self) -> None:
        """Check all tensors that are left.

        Raises:
            CheckpointError: a tensor is not finite.
        """
        for layer, pending in list(self._pending.items()):
            self._check(layer, set(pending))

    def _check(self, layer: int, experts: set[int]) -> None:
        pending = self._pending.get(layer, {})
        for expert in sorted(experts):
            for tensor, name, path in pending.get(expert, ()):
                check_finite(tensor, name, path)
            pending.pop(expert, None)
        if not pending:
            self._pending.pop(layer, None)
