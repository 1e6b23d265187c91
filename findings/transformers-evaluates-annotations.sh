#!/usr/bin/env bash
# Deriving a model class from PreTrainedModel evaluates the annotations of every base class, those for type checkers too.
#
# PreTrainedModel.__init_subclass__ calls typing.get_type_hints on the new class to find its `config`. That evaluates the
# annotations of all its bases, in the modules where they are written. A mixin of another package that annotates an
# attribute with a name imported under TYPE_CHECKING, as `from __future__ import annotations` allows, makes the class
# statement fail with a NameError that names neither transformers nor the mixin. A class attribute `config_class` does not
# prevent it. Putting the name into the mixin's module helps.
#
# Seen on 2026-11-28 (Python 3.11.7, Linux, 2 cores of an AMD EPYC):
#   transformers 5.24.0
#   class Model(Stored, nn.Module): is defined
#   class Model(Stored, PreTrainedModel): NameError: name 'Path' is not defined
#   the same with Path in the mixin's module: is defined
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > mixin.py <<'PYTHON'
from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pathlib import Path


class Stored(nn.Module):
    folder: Path
PYTHON
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import mixin
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

print("transformers", version("transformers"))


def derive(*bases):
    """What becomes of `class Model(*bases)`."""
    try:
        type("Model", bases, {"config_class": LlamaConfig})
    except NameError as error:
        return f"NameError: {error}"
    return "is defined"


results = derive(mixin.Stored, nn.Module), derive(mixin.Stored, PreTrainedModel)
print("class Model(Stored, nn.Module):", results[0])
print("class Model(Stored, PreTrainedModel):", results[1])
mixin.Path = Path
print("the same with Path in the mixin's module:", helped := derive(mixin.Stored, PreTrainedModel))
sys.exit(results != ("is defined", "NameError: name 'Path' is not defined") or helped != "is defined")
PYTHON
venv/bin/python finding.py
