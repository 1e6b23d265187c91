"""The weights that a model holds itself: read into memory, or on a CPU mapped where the files hold them as the kernels take them."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn

from dbrx_q.checkpoint.deferred_checks import DeferredChecks
from dbrx_q.checkpoint.folder import Checkpoint, converted
from dbrx_q.checkpoint.layout import DenseTensor, TensorFormat, expert_of, part_name, parts_of
from dbrx_q.checkpoint.mapping import MappedCheckpoint
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.planning.host_memory import empty_host

__all__ = ["MappedWeights", "read_packed", "read_plain"]

# Of all memory that torch allocates. At other addresses MKL's products of plain weights differ in their last bits.
_MATMUL_ALIGNMENT = 64


class MappedWeights:
    """Weights as views of a checkpoint's mapped files, which are checked for NaN and infinity at their first use.

    Args:
        checkpoint: must be open while weights are asked for.
        checks: gets the checks.
    """

    def __init__(self, checkpoint: Checkpoint, checks: DeferredChecks) -> None:
        self._checkpoint, self._checks = checkpoint, checks
        self._mapped = MappedCheckpoint(checkpoint)

    def plain(self, tensor: DenseTensor, dtype: torch.dtype) -> nn.Parameter | None:
        """A plain tensor; None where it must be read: the file has another dtype, or it is not aligned or cannot be mapped."""
        if not self._checkpoint.infos[tensor.name].has_dtype(dtype):
            return None
        stack = self._mapped.stack([tensor.name], alignment=_MATMUL_ALIGNMENT)
        if stack is None:
            return None
        view = stack[0]
        for expert, rows in enumerate(view.unflatten(0, (tensor.experts, -1)) if tensor.experts else [view]):
            self._check_later(rows, tensor.name, tensor, expert)
        return nn.Parameter(view, requires_grad=False)

    def packed(self, tensor: DenseTensor, fmt: TensorFormat) -> QuantizedWeight | None:
        """A packed tensor, or the stack of all experts'; None where it must be read.

        An expert's w1, v1 and w2 are adjacent in a file, so that the matrices of a stack are apart (`QuantizedWeight.contiguous_matrices`).
        """
        stacks: dict[str, torch.Tensor] = {}
        parts = sorted(parts_of(tensor, fmt), key=part_name)
        for last, group in groupby(parts, key=part_name):
            names = [part.name for part in group]
            stack = self._mapped.stack(names)
            if stack is None:
                return None
            stacks[last] = stack
            for expert, (name, part) in enumerate(zip(names, stack, strict=True)):
                self._check_later(part, name, tensor, expert)
        return fmt.load(stacks if tensor.experts else {last: stack[0] for last, stack in stacks.items()})

    def _check_later(self, values: torch.Tensor, name: str, tensor: DenseTensor, expert: int) -> None:
        path = self._checkpoint.path_of(name)
        self._checks.add(values, name, path, layer=tensor.layer, expert=expert if tensor.experts else None)


def read_plain(checkpoint: Checkpoint, tensor: DenseTensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A plain tensor in memory of its own.

    Raises:
        CheckpointError: a value is NaN or infinite, or `dtype` cannot hold it.
    """
    stored = checkpoint.infos[tensor.name].dtype
    values = checkpoint.read(tensor.name, empty_host(tensor.shape, stored))
    return nn.Parameter(converted(values, dtype, tensor.name, checkpoint.path_of(tensor.name)).to(device), requires_grad=False)


def read_packed(checkpoint: Checkpoint, tensor: DenseTensor, fmt: TensorFormat, device: torch.device) -> QuantizedWeight:
    """The parts of all experts are read into one stack each, so that kernels find expert e at a fixed distance.

    For a GPU each part passes through host memory by itself, which therefore never holds more than one matrix.
    """
    stacks: dict[str, torch.Tensor] = {}
    for part in parts_of(tensor, fmt):
        expert, last = expert_of(part) if tensor.experts else 0, part_name(part)
        shape = tensor.experts or 1, *part.shape
        if last not in stacks:
            on_host = device.type == "cpu"
            stacks[last] = empty_host(shape, part.dtype) if on_host else torch.empty(shape, dtype=part.dtype, device=device)
        if device.type == "cpu":
            checkpoint.read(part.name, stacks[last][expert])
        else:
            stacks[last][expert].copy_(checkpoint.read(part.name))
    if not tensor.experts:
        stacks = {last: stack[0] for last, stack in stacks.items()}
    return fmt.load(stacks)
