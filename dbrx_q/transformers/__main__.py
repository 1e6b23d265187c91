"""Runs a program in which transformers loads packed checkpoints.

python -m dbrx_q.transformers lm_eval --model hf --model_args pretrained=dbrx-int4 --tasks lambada_openai
python -m dbrx_q.transformers transformers serve dbrx-int4
python -m dbrx_q.transformers script.py ARGUMENTS ...
"""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str]) -> object:
    """Run a Python file, or a command that an installed package defines, with the arguments that follow its name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    program = arguments[0]
    sys.argv = arguments
    if program.endswith(".py") and Path(program).is_file():
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
        return 0
    commands = list(entry_points(group="console_scripts", name=program))
    if not commands:
        print(
            f"the program must be a Python file or a command of an installed package; found {program!r}. "
            "Correct its path, or install its package",
            file=sys.stderr,
        )
        return 2
    return commands[0].load()()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # type: ignore[arg-type] # as a console script does with what its function returns
