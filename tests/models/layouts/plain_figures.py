"""Writes what transformers computes with a published checkpoint and its converted copy: `plain_figures.py SRC CONVERTED OUT`."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes_folders import load
from figures import Figures, figures_of_arguments


def main(published: Path, converted: Path, out: Path, figures: Figures, only: list[str] | None) -> None:
    """Write `figures-published` and `figures-converted` in `out`."""
    for source, name in ((published, "figures-published"), (converted, "figures-converted")):
        folder = out / name
        if (only is not None and name not in only) or (folder / "reference.npz").exists():
            continue
        model = load(source, None).float()
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            figures.write(folder, lambda ids, model=model: model(torch.tensor([ids])).logits[0].numpy(), {})


if __name__ == "__main__":
    paths, wanted, names = figures_of_arguments("published", "converted", "out")
    main(*paths, wanted, names)
