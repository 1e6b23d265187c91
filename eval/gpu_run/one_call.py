"""Calls every op once at small sizes on the GPU: what compute-sanitizer watches."""

from __future__ import annotations

from pathlib import Path

from .measurements import one_call_of_each
from .settings import Settings

__all__: list[str] = []

if __name__ == "__main__":
    print(one_call_of_each(Settings("cuda", Path())))
