"""A trace records which experts every token of a text chose, and which ones the router of the next layer predicted.

Dimension letters: `N` tokens, `L` layers, `A` active experts of a token, `E` experts.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import CheckpointError, RequestError
from dbrx_q.json_file import check_regular

__all__ = ["Trace"]

_VERSION = 2
# What numpy, zipfile, zlib and json raise for a file that is no trace or is damaged.
_DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Trace:
    """The experts that every token of a text chose in every layer. Commands store it as an .npz file."""

    experts: np.ndarray
    """uint8 [N, L, A], ascending."""
    predicted: np.ndarray
    """uint8 [N, L, A], what the router of a layer chose from the input of the layer before, best first. Nothing predicts the first layer:
    its entries are the experts that it chose."""
    steps: np.ndarray
    """int64, the number of tokens of every forward pass, in order; they add up to N."""
    config: dict[str, Any]
    """config.json of the checkpoint, from which the size of its experts follows."""

    @property
    def n_experts(self) -> int:
        """E."""
        return DbrxConfig.from_dict(self.config).ffn_config.moe_num_experts

    def write(self, path: Path) -> None:
        """Write a compressed .npz file.

        Raises:
            RequestError: the file cannot be written.
        """
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(
                    file,
                    version=_VERSION,
                    config=json.dumps(self.config),
                    experts=self.experts,
                    predicted=self.predicted,
                    steps=self.steps,
                )
            partial.replace(path)
        except OSError as error:
            raise RequestError(f"{path}: a trace must be written there; {error.strerror}. Choose another --out") from None
        finally:
            with suppress(OSError):  # in a folder that cannot be written, not even this can be tried
                partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a file that `write` wrote.

        Raises:
            RequestError: the file is missing, or is not a trace.
        """
        try:
            check_regular(path, path.stat())
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                if data["version"].shape != () or int(data["version"]) != _VERSION:
                    raise RequestError(f"{path}: a trace must be of version {_VERSION}; found {data['version']!s:.40}. Record it again")
                trace = cls(data["experts"], data["predicted"], data["steps"], _object(str(data["config"])))
        except _DAMAGED as error:
            problem = error.strerror if isinstance(error, OSError) else "it has other contents"
            raise RequestError(f"{path}: must be a trace that `dbrx-q trace` wrote; {problem}. Record one with that command") from None
        except CheckpointError as error:
            raise RequestError(str(error)) from None
        trace._check_arrays(path)
        return trace.check(DbrxConfig.from_dict(trace.config, source=str(path)))

    def _check_arrays(self, path: Path) -> None:
        """Refuse arrays that `record` does not make."""
        dtypes = [array.dtype.name for array in (self.experts, self.predicted, self.steps)]
        problem = ""
        if dtypes[:2] != ["uint8", "uint8"] or self.steps.dtype.kind != "i":
            problem = f"experts and predicted must be uint8, and steps integers; found {', '.join(dtypes)}"
        elif self.experts.ndim != 3 or self.predicted.shape != self.experts.shape:
            problem = f"experts and predicted must be [tokens, layers, active]; found {self.experts.shape} and {self.predicted.shape}"
        elif self.steps.ndim != 1 or (self.steps < 1).any() or int(self.steps.sum()) != len(self.experts):
            problem = f"steps must be counts of tokens that add up to {len(self.experts)}; found {self.steps!s:.60}"
        else:
            n_experts = DbrxConfig.from_dict(self.config, source=str(path)).ffn_config.moe_num_experts
            for name, chosen in (("experts", self.experts), ("predicted", np.sort(self.predicted, axis=-1))):
                if chosen.max(initial=0) >= n_experts or (chosen[..., 1:] <= chosen[..., :-1]).any():
                    problem = f"{name} must be different experts of {n_experts} for every token and layer"
        if problem:
            raise RequestError(
                f"{path}: must be a trace that `dbrx-q trace` wrote; its arrays do not fit together: {problem}. Record it again"
            )

    def check(self, config: DbrxConfig) -> Trace:
        """This trace, if it was recorded with a model of this configuration.

        Raises:
            RequestError: it was recorded with another model.
        """
        ffn = config.ffn_config
        of_model = config.n_layers, ffn.moe_top_k, ffn.moe_num_experts
        of_trace = (*self.experts.shape[1:], self.n_experts)
        if of_trace != of_model:
            raise RequestError(
                "a trace must have the model's {} layers, {} active experts and {} experts; found {}, {} and {}. "
                "Record one of this model".format(*of_model, *of_trace)
            )
        return self

    def counts(self) -> np.ndarray:
        """float64 [L, E]: how many tokens chose each expert."""
        L = self.experts.shape[1]
        return np.stack([np.bincount(self.experts[:, layer].ravel(), minlength=self.n_experts) for layer in range(L)]).astype(np.float64)

    def passes(self, *, token_by_token: bool) -> list[slice]:
        """The tokens of every forward pass: one token each, or as recorded."""
        if token_by_token:
            return [slice(i, i + 1) for i in range(len(self.experts))]
        ends = np.cumsum(self.steps).tolist()
        return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("config must be an object")
    return value
