"""A trace records which experts every token of a text chose, and which ones the router of the next layer predicted.

Dimension letters: `N` tokens, `L` layers, `A` active experts of a token, `E` experts.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError

__all__ = ["Trace"]

_VERSION = 2


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
        partial = path.with_name(f"{path.name}.partial")
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
            partial.unlink(missing_ok=True)
            raise RequestError(f"{path}: a trace must be written there; {error.strerror}. Choose another --out") from None

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a file that `write` wrote.

        Raises:
            RequestError: the file is missing, or is not a trace.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data["version"]) != _VERSION:
                    raise RequestError(f"{path}: a trace must be of version {_VERSION}; found {int(data['version'])}. Record it again")
                trace = cls(data["experts"], data["predicted"], data["steps"], json.loads(str(data["config"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            problem = error.strerror if isinstance(error, OSError) else "it has other contents"
            raise RequestError(f"{path}: must be a trace that `dbrx-q trace` wrote; {problem}. Record one with that command") from None
        shape = trace.experts.shape
        sound = len(shape) == 3 and trace.predicted.shape == shape and trace.steps.ndim == 1 and int(trace.steps.sum()) == shape[0]
        if not sound or max(int(trace.experts.max(initial=0)), int(trace.predicted.max(initial=0))) >= trace.n_experts:
            raise RequestError(f"{path}: must be a trace that `dbrx-q trace` wrote; its arrays do not fit together. Record it again")
        return trace.check(DbrxConfig.from_dict(trace.config, source=str(path)))

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
