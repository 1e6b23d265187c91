"""A trace: which experts every token of a text chose, and which were predicted.

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

_VERSION = 1


@dataclass(frozen=True)
class Trace:
    """experts: uint8 [N, L, A], ascending. predicted: uint8 [N, L, A], what the router of a layer chose from the input of the layer before,
    best first; the first layer's are its own experts, which nothing predicts. steps: int64, the tokens of every forward pass, in order;
    they add up to N. config: config.json of the checkpoint, which says how large its experts are."""

    experts: np.ndarray
    predicted: np.ndarray
    steps: np.ndarray
    config: dict[str, Any]

    @property
    def n_experts(self) -> int:
        """E."""
        return DbrxConfig.from_dict(self.config).ffn_config.moe_num_experts

    def write(self, path: Path) -> None:
        """As a compressed .npz.

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
        """What `write` wrote.

        Raises:
            RequestError: the file is missing, or no trace.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data["version"]) != _VERSION:
                    raise RequestError(f"{path}: a trace must be of version {_VERSION}; found {int(data['version'])}. Record it again")
                trace = cls(data["experts"], data["predicted"], data["steps"], json.loads(str(data["config"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            found = error.strerror if isinstance(error, OSError) else "its contents are other"
            raise RequestError(f"{path}: must be a trace that `dbrx-q trace` wrote; {found}. Record one with that command") from None
        shape = trace.experts.shape
        sound = len(shape) == 3 and trace.predicted.shape == shape and trace.steps.ndim == 1 and int(trace.steps.sum()) == shape[0]
        if not sound or max(int(trace.experts.max(initial=0)), int(trace.predicted.max(initial=0))) >= trace.n_experts:
            raise RequestError(f"{path}: must be a trace that `dbrx-q trace` wrote; its arrays do not belong together")
        return trace.check(DbrxConfig.from_dict(trace.config, source=str(path)))

    def check(self, config: DbrxConfig) -> Trace:
        """This trace, where it is of such a model.

        Raises:
            RequestError: it is of another.
        """
        ffn = config.ffn_config
        wanted = config.n_layers, ffn.moe_top_k, ffn.moe_num_experts
        found = (*self.experts.shape[1:], self.n_experts)
        if found != wanted:
            raise RequestError(
                "a trace must have the model's {} layers, {} active experts and {} experts; found {}, {} and {}. "
                "Record one of this model".format(*wanted, *found)
            )
        return self

    def counts(self) -> np.ndarray:
        """float64 [L, E]: how many tokens chose each expert."""
        L = self.experts.shape[1]
        return np.stack([np.bincount(self.experts[:, layer].ravel(), minlength=self.n_experts) for layer in range(L)]).astype(np.float64)

    def passes(self, *, one_by_one: bool) -> list[slice]:
        """The tokens of every forward pass: as recorded, or one token each."""
        if one_by_one:
            return [slice(i, i + 1) for i in range(len(self.experts))]
        ends = np.cumsum(self.steps).tolist()
        return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
