"""What a quantized checkpoint says to transformers, which knows the format of its weights only through `dbrx_q.transformers`.

transformers takes a quantization method that it does not know for none, and leaves the weights random. `guarded` therefore adds to
config.json a name of the weights' file that no version of transformers accepts and that its error prints: it says what to import. With
`trust_remote_code=True` transformers imports `CODE_NAME` from the folder, which imports `dbrx_q.transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CODE_NAME", "GUARD", "GUARDED_KEYS", "guarded", "write_code"]

CODE_NAME = "modeling_dbrx_q.py"
"""The file that transformers imports with `trust_remote_code=True`."""
GUARD = (
    "none of these, because dbrx_q packed the weights. Install it with `pip install 'dbrx_q[transformers]'`, and then "
    "`import dbrx_q.transformers` before the model is loaded, or load it by AutoModelForCausalLM with trust_remote_code=True"
)
"""The value of `transformers_weights` in config.json, which ends the error of transformers."""
GUARDED_KEYS = ("auto_map", "transformers_weights")
"""The keys that `guarded` adds."""
_CODE = '''"""Loads this checkpoint into transformers with trust_remote_code=True; needs `pip install 'dbrx_q[transformers]'`."""

from dbrx_q.transformers import DbrxForCausalLM, DbrxModel

__all__ = ["DbrxForCausalLM", "DbrxModel"]
'''
_CLASSES = {"AutoModel": "DbrxModel", "AutoModelForCausalLM": "DbrxForCausalLM"}


def guarded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of config.json, with what keeps transformers from loading random weights."""
    module = CODE_NAME.removesuffix(".py")
    return {**config, "auto_map": {auto: f"{module}.{name}" for auto, name in _CLASSES.items()}, "transformers_weights": GUARD}


def write_code(folder: Path) -> None:
    """Write the file that `auto_map` in config.json names."""
    (folder / CODE_NAME).write_text(_CODE, encoding="utf-8")
