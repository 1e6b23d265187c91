#!/usr/bin/env bash
# numba's cache (njit(cache=True)) does not notice a change in a function that the cached one imports.
#
# A cached function is compiled with all that it calls. numba looks at the date and size of the file that holds the function
# itself, not at those of the files that its callees come from. After an edit of an imported helper the next process runs the old
# machine code. A program that caches has to keep a kernel and its helpers in one file, or to make its own key of all files.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   numba 0.68.1
#   with step(x) = x + 1 a new process prints kernel(1) = 2
#   with step(x) = x + 100 a new process prints kernel(1) = 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numba==0.68.1 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

print("numba", version("numba"))
OUTER = """
from numba import njit
from helper import step


@njit(cache=True)
def kernel(x):
    return step(x)


print(kernel(1))
"""
Path("outer.py").write_text(OUTER)
results = []
for increment in (1, 100):
    Path("helper.py").write_text(f"from numba import njit\n\n\n@njit\ndef step(x):\n    return x + {increment}\n")
    results.append(int(subprocess.run([sys.executable, "-B", "outer.py"], capture_output=True, check=True, text=True).stdout))
    print(f"with step(x) = x + {increment} a new process prints kernel(1) = {results[-1]}")
sys.exit(results != [2, 2])
PYTHON
venv/bin/python finding.py
