"""Triton's compiler without a GPU (`make compiled`): in the interpreter's process there is nothing to compile."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
