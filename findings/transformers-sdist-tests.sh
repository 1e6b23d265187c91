#!/usr/bin/env bash
# transformers' sdist has the tests that all of its models share, but not the modules that they import.
#
# Setuptools adds tests/test*.py to every sdist and no file of a subfolder. transformers' tests/test_modeling_common.py is
# therefore there and cannot be imported: tests.generation, tests.exporters and tests.utils are missing, and so is the
# test file of every model. A package that wants to hold its own classes to these tests must provide the missing names, or
# take the repository.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0
#   22 files in the sdist's tests, 0 of them in subfolders
#   import tests.test_modeling_common: No module named 'tests.exporters'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 pytest==9.2.0 parameterized==0.9.0
cd "$folder"
venv/bin/pip download --quiet --no-deps --no-binary transformers transformers==5.24.0
tar xzf transformers-5.24.0.tar.gz
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

print("transformers", version("transformers"))
root = Path("transformers-5.24.0")
files = list((root / "tests").rglob("*.py"))
deeper = [path for path in files if path.parent != root / "tests"]
print(f"{len(files)} files in the sdist's tests, {len(deeper)} of them in subfolders")
sys.path.insert(0, str(root))
try:
    import tests.test_modeling_common
    result = "imported"
except ModuleNotFoundError as error:
    result = str(error)
print("import tests.test_modeling_common:", result)
sys.exit(bool(deeper) or result != "No module named 'tests.exporters'")
PYTHON
venv/bin/python finding.py
