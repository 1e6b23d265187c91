"""Searches shifts and trains levels of trellis codes, for `kernels/formats/trellis_codes.py`.

    .venv/bin/python tests/methods/trellis_codes.py --bits 2 --state-bits 14 --index-bits 6

Each candidate is a random choice of two or three shifts. Its levels begin as the quantiles of the normal distribution in random order and
are trained by Lloyd's iteration: the search encodes normal values, then each level becomes the mean of the values that were given to it.
The best candidates are trained on more values. Levels are whole numbers up to 127 throughout. The script prints the code of least mean
squared error on values that no training saw. `--check` prints the error of every code in the table instead.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import torch

from dbrx_q.kernels.formats.trellis import by_position
from dbrx_q.kernels.formats.trellis_codes import CODES, TrellisCode
from dbrx_q.kernels.formats.viterbi import ROWS
from dbrx_q.kernels.trellis import encode, stream_states

_SPREAD = {2: 1.0, 3: 1.06, 4: 1.08}  # standard deviation of the first levels, by bits per element


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print the error of every code in the table")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2, help="bits per element")
    parser.add_argument("--state-bits", type=int, default=14)
    parser.add_argument("--index-bits", type=int, default=6, help="6 for 64 levels, at most 8")
    parser.add_argument("--candidates", type=int, default=40, help="choices of shifts to try")
    parser.add_argument("--columns", type=int, default=1000, help="columns of 128 values for the last training and for the error")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    fresh = normal_values(options.columns, 10**6 + options.seed)
    if options.check:
        for name, code in CODES.items():
            print(f"{name}: mean squared error {mean_squared_error(code, fresh):.6f}")
        return
    code, error = best_code(options.bits, options.state_bits, options.index_bits, options.candidates, options.columns, options.seed)
    print(f"# mean squared error {error:.6f} on the values that chose it, {mean_squared_error(code, fresh):.6f} on fresh ones")
    print(replace(code, relative_error=mean_squared_error(code, fresh)))


def best_code(bits: int, state_bits: int, index_bits: int, candidates: int, columns: int, seed: int) -> tuple[TrellisCode, float]:
    """The best code of so many random choices of shifts and its mean squared error."""
    draw = random.Random(seed)
    shifts = [-4, -3, -2, -1, *range(2, state_bits - 1)]
    tried = []
    few = normal_values(columns // 4, seed + 1)
    while len(tried) < candidates:
        chosen = tuple(sorted(draw.sample(shifts, draw.choice((2, 3)))))
        code = first_code(bits, state_bits, index_bits, chosen, draw)
        if len(code.index_table(torch.device("cpu")).unique()) < 1 << index_bits:
            continue
        code = trained(code, normal_values(columns // 8, draw.randrange(2**31)), turns=5)
        tried.append((mean_squared_error(code, few), chosen, code))
        print(f"# {len(tried)}: shifts {chosen}, mean squared error {tried[-1][0]:.6f}", flush=True)
    tried.sort(key=lambda item: item[0])
    values, judging = normal_values(columns, seed + 2), normal_values(columns, seed + 3)
    final = [trained(code, values, turns=10) for _, _, code in tried[:5]]
    errors = [mean_squared_error(code, judging) for code in final]
    best = min(range(len(final)), key=errors.__getitem__)
    return final[best], errors[best]


def first_code(bits: int, state_bits: int, index_bits: int, shifts: tuple[int, ...], draw: random.Random) -> TrellisCode:
    """A code with the quantiles of the normal distribution in random order as its levels."""
    count = 1 << index_bits
    levels = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in draw.sample(range(count), count)])
    levels = levels / levels.square().mean().sqrt() * _SPREAD[bits]
    return with_levels(TrellisCode(bits, state_bits, index_bits, shifts, step=1.0, relative_error=1.0, levels=()), levels)


def trained(code: TrellisCode, values: torch.Tensor, turns: int) -> TrellisCode:
    """The code after so many turns of Lloyd's iteration on values [128, columns]; a level that no value was given stays."""
    count, wide = len(code.levels), by_position(values.T).double().flatten()
    for _ in range(turns):
        indices = encoded(code, values).flatten()
        counts = torch.bincount(indices, minlength=count)
        means = torch.bincount(indices, wide, minlength=count) / counts.clamp(min=1)
        code = with_levels(code, torch.where(counts > 0, means, torch.tensor(code.levels) * code.step))
    return code


def with_levels(code: TrellisCode, levels: torch.Tensor) -> TrellisCode:
    """The code with levels for values of mean square 1, as whole numbers of which the largest is 127."""
    step = float(levels.abs().max()) / 127
    return replace(code, step=step, levels=tuple((levels / step).round().int().tolist()))


def encoded(code: TrellisCode, values: torch.Tensor) -> torch.Tensor:
    """int64 [columns, 128]: by position, the indices of the levels that the search gives to values [128, columns]."""
    symbols = encode(values, torch.full((ROWS,), code.step).half(), code)[0]
    return code.index_of(stream_states(symbols, code))


def mean_squared_error(code: TrellisCode, values: torch.Tensor) -> float:
    """The mean squared error of values [128, columns]."""
    levels = torch.tensor(code.levels)[encoded(code, values)]
    return float((levels * code.step - by_position(values.T)).double().square().mean())


def normal_values(columns: int, seed: int) -> torch.Tensor:
    """float32 [128, columns]."""
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
