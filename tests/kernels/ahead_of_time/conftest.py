"""Triton's compiler without a GPU (`make compiled`): with TRITON_INTERPRET=1 nothing is compiled, and these tests are not collected."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
