"""Measures how long a matrix takes to become a trellis format, and what follows for the experts of DBRX.

    .venv/bin/python tests/methods/trellis_time.py

Some rows of w1 and of w2 at DBRX's dimensions, of normal values, are quantized by the quantizer's own method `best` with a random positive
definite Hessian: rotation, search with feedback, updates of later columns, scales. Rotation and factor of the Hessian are excluded: all
rows of a matrix share them. The time is the processor time of one thread, the least of `--repeats`, since other processes disturb it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.quantize.methods.moments import Moments
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.workers import Workers

_INPUTS = {"w1": 6144, "w2": 10752}
_EXPERT_WEIGHTS = 40 * 16 * 3 * 6144 * 10752
_SHARES = {"w1": 2 / 3, "w2": 1 / 3}  # of these weights; v1 has w1's dimensions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="rows of each matrix, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2, help="cores of the machine that hours are stated for")
    parser.add_argument("--formats", default=",".join(CODES), help="formats, separated by commas")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times: dict[str, dict[str, float]] = {name: {} for name in options.formats.split(",")}
    for matrix, inputs in _INPUTS.items():
        with Workers() as workers:
            moments = random_moments(inputs, workers)
            weight = torch.randn(options.rows, inputs, generator=torch.Generator().manual_seed(1))
            for name, by_matrix in times.items():
                fmt = TensorFormat.parse(name)
                moments.prepare(fmt.group_size)
                METHODS["best"].run(weight[:, : fmt.group_size], fmt, None)  # compiles the search
                by_matrix[matrix] = min(seconds(weight, fmt, moments) for _ in range(options.repeats)) / weight.numel() * 1e6
    print("| format | w1, us per weight and core | w2 | hours for DBRX's experts |\n|---|---|---|---|")
    for name, by_matrix in times.items():
        mean = sum(_SHARES[matrix] * figure for matrix, figure in by_matrix.items())
        hours = mean * 1e-6 * _EXPERT_WEIGHTS / options.cores / 3600
        print(f"| `{name}` | {by_matrix['w1']:.3f} | {by_matrix['w2']:.3f} | {hours:.1f} |")


def random_moments(inputs: int, workers: Workers) -> Moments:
    """Moments of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    return Moments(x.T @ x, None, Products(workers, bfloat16=False), damping=0.05)


def seconds(weight: torch.Tensor, fmt: TensorFormat, moments: Moments) -> float:
    """Processor time of `best` on this thread."""
    began = time.thread_time()
    METHODS["best"].run(weight, fmt, moments)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
