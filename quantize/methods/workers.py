"""Threads that share work in pieces, with results that do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["Workers"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """A context manager: as many worker threads as torch has threads, each with one thread of torch.

    torch splits a product by its number of threads, which changes the last bits. Here the bits depend only on the caller's pieces.
    """

    def __enter__(self) -> Workers:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads that start from now on inherit it
        self._pool = ThreadPoolExecutor(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """The results in the order of the items."""
        return list(self._pool.map(function, items))
