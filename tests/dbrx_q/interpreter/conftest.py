"""The model on Triton's kernels in its interpreter: the whole process runs with TRITON_INTERPRET=1 (`make interpreter`)."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
