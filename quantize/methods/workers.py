"""Work in pieces that does not depend on how many threads do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["Workers"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """As many threads as torch has, each with one thread of torch; a context manager.

    torch cuts a product by its number of threads, which changes the last bits. Here the pieces that the caller makes decide them.
    """

    def __enter__(self) -> Workers:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads that begin from now on take it over
        self._pool = ThreadPoolExecutor(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """The results in the order of the items."""
        return list(self._pool.map(function, items))
