"""Checks where kernels read and write in Triton's interpreter, as compute-sanitizer does on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

__all__ = ["OutOfBoundsError", "checked_accesses"]


class OutOfBoundsError(AssertionError):
    """A program accessed memory of none of its kernel's arguments, or at an address that a GPU refuses."""


class _Checked:
    """Triton's functions that access memory, behind a check of every address that the mask allows."""

    def __init__(self, accesses: Any) -> None:
        self._accesses = accesses
        self.ranges = np.zeros((0, 2), np.uint64)  # first byte and end of each argument

    def load(self, places: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self._check(places, mask, np.dtype(dtype).itemsize)
        return self._accesses.load(places, mask, other, dtype)  # type: ignore[no-any-return]

    def store(self, places: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        self._check(places, mask, values.dtype.itemsize)
        return self._accesses.store(places, values, mask)

    def atomic_rmw(self, op: Any, places: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        self._check(places, mask, values.dtype.itemsize)
        return self._accesses.atomic_rmw(op, places, values, mask, order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accesses, name)

    def _check(self, places: np.ndarray, mask: np.ndarray, size: int) -> None:
        wanted = places[np.broadcast_to(mask, places.shape).astype(bool)].astype(np.uint64)
        if not wanted.size:
            return
        if (wanted % np.uint64(size)).any():
            raise OutOfBoundsError(f"an address of {size} bytes is no multiple of them")
        least, end = wanted.min(), wanted.max() + np.uint64(size)
        if ((self.ranges[:, 0] <= least) & (end <= self.ranges[:, 1])).any():  # all in one argument
            return
        inside = (self.ranges[:, 0] <= wanted[:, None]) & (wanted[:, None] + np.uint64(size) <= self.ranges[:, 1])
        if not inside.any(1).all():
            raise OutOfBoundsError(f"{int((~inside.any(1)).sum())} of {wanted.size} addresses are outside all arguments")


@contextmanager
def checked_accesses() -> Iterator[None]:
    """Kernels within fail with `OutOfBoundsError` where an element that is not masked is outside all arguments, or not aligned."""
    before: Any = interpreter._interpreter
    checked = _Checked(before)
    bind: Callable[..., Any] = interpreter.GridExecutor._init_args_hst

    def bound(self: Any, arguments: Any, options: Any) -> Any:
        result = bind(self, arguments, options)
        tensors = [value for value in (*result[0], *result[1].values()) if isinstance(value, torch.Tensor) and value.numel()]
        checked.ranges = np.array([_range(tensor) for tensor in tensors], np.uint64).reshape(-1, 2)
        return result

    interpreter._interpreter = checked
    interpreter.GridExecutor._init_args_hst = bound
    try:
        yield
    finally:
        interpreter._interpreter = before
        interpreter.GridExecutor._init_args_hst = bind


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
