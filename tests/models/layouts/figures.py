"""What a tool computes with a folder: logits and weights for the tests, perplexity for the comparison with `dbrx-q`. numpy alone.

Dimension letters: `T` tokens, `V` vocabulary, `N` outputs, `K` inputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Figures", "figures_of_arguments"]

REFERENCE_ROWS = 16
Logits = Callable[[list[int]], np.ndarray]
"""The float32 logits [T, V] of token ids."""


@dataclass(frozen=True)
class Figures:
    """What to compute with every folder."""

    tokens: list[int]
    """Ids [T] whose logits are stored."""
    windows: list[tuple[list[int], int]]
    """Of the perplexity: token ids of a window, and the position of the first one that is predicted; empty for none."""

    def write(self, folder: Path, logits_of: Logits, weights: Mapping[str, np.ndarray]) -> None:
        """Write `reference.npz` and, if there are windows, `perplexity.json`.

        Args:
            folder: where to write.
            logits_of: the model.
            weights: some dequantized weights [N, K] by the name of their module, of which the first rows are stored.
        """
        rows = {name: np.ascontiguousarray(weight[:REFERENCE_ROWS], np.float32) for name, weight in weights.items()}
        if self.windows:
            (folder / "perplexity.json").write_text(json.dumps({"perplexity": self.perplexity(logits_of)}))
        np.savez_compressed(folder / "reference.npz", logits=logits_of(self.tokens), **rows)

    def perplexity(self, logits_of: Logits) -> float:
        """exp of the mean negative log-likelihood of the windows' predicted tokens."""
        total, count = 0.0, 0
        for ids, scored in self.windows:
            logits = logits_of(ids)[scored - 1 : -1].astype(np.float64)
            greatest = logits.max(axis=1, keepdims=True)
            log_sums = np.log(np.exp(logits - greatest).sum(axis=1)) + greatest[:, 0]
            total += float((log_sums - logits[np.arange(len(logits)), ids[scored:]]).sum())
            count += len(logits)
        return float(np.exp(total / count))


def figures_of_arguments(*names: str) -> tuple[list[Path], Figures, list[str] | None]:
    """(the paths of the arguments `names`, what to compute, the folders to make or None for all), from the command line."""
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON list of token ids whose logits are stored")
    parser.add_argument("--windows", type=Path, help="JSON list of windows whose perplexity is stored")
    parser.add_argument("--only", nargs="*", help="names of folders to make")
    arguments = parser.parse_args()
    windows = json.loads(arguments.windows.read_text()) if arguments.windows else []
    figures = Figures(json.loads(arguments.tokens.read_text()), windows)
    return [getattr(arguments, name) for name in names], figures, arguments.only
