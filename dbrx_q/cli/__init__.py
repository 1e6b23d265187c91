"""The command line, `dbrx-q`.

Begin at `entry.py`: it runs one command, turns errors into messages and interruptions into an orderly end. Exit codes: 0 done, 1 `verify`
found a difference, or `quantize --no-worse-than-rtn` a result that is worse, 2 an error that the message explains, an interruption by
Ctrl-C included.

Each command has a file of its name with its options, an example and a function `command`. The function imports what it runs, so that
`--help` never imports torch. The files are `quantize.py` (its output is in `quantize_report.py`), `export.py`, `inspect.py`, `verify.py`,
`plan.py`, `generate.py`, `trace.py`, `simulate.py`, `perplexity.py`, `compare.py`, `reference.py`, `tasks.py`, `sensitivity.py` and
`bench.py`, which has commands of its own; two of them are in `bench_gpu.py`.

What the commands share:
`options.py`        the options that several commands have, and the panels of `--help`
`choices.py`        the values of an option, from the registry that defines them
`values.py`         plain values of options, converted without pydantic
`help.py`           how `--help` is laid out; a command's file is imported when the command runs
`memory_budget.py`  --ram, --gpu and the like as a `Budget` or a `Machine`
`quantization.py`   what `quantize` and `export` share: the method, the opened source, the runs of the quantizer
`calibration.py`    the sources of `--calibration`, and the sequences that are drawn of them
`self_calibration.py`  the sequences that the model samples, and the plan of that
`check_texts.py`    the sequences of `--check-text`
`measurement.py`    the protocol and the dtype of the commands that measure on a text
`running.py`        what the commands that run a model share: a checkpoint of any program is loaded
`limits.py`         the limits of the process (`ulimit`), and the words for a lack of memory or threads
`terminal.py`       JSON on stdout; messages and progress bars on stderr

A new command is a file here, a line in `entry.py` and a row in the README's table.
"""

from __future__ import annotations

from .entry import main, run

__all__ = ["main", "run"]
