"""Stored kernels are loaded without what only a compilation needs, and work beside kernels that are compiled."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from dbrx_q.kernels.cpu import compiled

KERNELS = """
import numpy as np
from numba import prange
from dbrx_q.kernels.cpu.compiled import compiled

@compiled(parallel=True)
def doubled(x):
    out = np.empty_like(x)
    for i in prange(len(x)):
        out[i] = 2 * x[i]
    return out

@compiled()
def checked(x):
    if x < 0:
        raise ValueError("negative")
    return x

@compiled()
def total(x):
    return doubled(x).sum()
"""
FIRST = """
import numpy as np
import own_kernels as own
own.doubled(np.ones(3)), own.checked(1)
"""
SECOND = """
import sys
import numpy as np
import own_kernels as own
assert own.doubled(np.arange(3.0)).tolist() == [0, 2, 4]
assert own.checked(1) == 1
try:
    own.checked(-1)
    raise AssertionError
except ValueError as error:
    assert str(error) == "negative"
assert sum(own.doubled.stats.cache_hits.values()) == sum(own.checked.stats.cache_hits.values()) == 1
compiling = {"scipy.linalg", "numba.np.linalg"}
assert not compiling & sys.modules.keys(), compiling & sys.modules.keys()
assert own.total(np.arange(3.0)) == 6  # is compiled, and calls one that was loaded
assert own.doubled(np.arange(3, dtype=np.int64)).tolist() == [0, 2, 4]  # other types of a loaded one are compiled
assert sum(own.doubled.stats.cache_misses.values()) == 1
"""


def test_stored_kernels_load_without_the_compiler_and_work_beside_compiled_ones(tmp_path: Path) -> None:
    (tmp_path / "own_kernels.py").write_text(KERNELS)
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    for script in (FIRST, SECOND):
        subprocess.run([sys.executable, "-c", script], env=env, check=True)


def test_a_change_of_a_constant_of_another_folder_makes_kernels_compile_again() -> None:
    """numba compiles constants in, and its own cache looks at the file of the function alone."""
    folder = Path(compiled.__file__).parent
    imports = (node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    modules = {
        str(node.module).rpartition(".")[2]
        for node in imports
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dbrx_q.kernels.formats.")
        if any(name.name.isupper() for name in node.names)
    }
    assert "trellis_codes" in modules
    stats = {name: (folder.parent / "formats" / f"{name}.py").stat() for name in modules}
    assert {(f"{name}.py", stat.st_mtime, stat.st_size) for name, stat in stats.items()} <= set(compiled._stamp(folder))
