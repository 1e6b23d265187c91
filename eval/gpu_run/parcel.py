"""Packs the tree and the wheels that a GPU machine without a network lacks: `make parcel`.

On the machine, which has Python, torch, Triton, numpy and numba: `sh parcel/run.sh bench gpu --minutes 12 --out run`, in the unpacked tree.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dbrx_q.errors import DbrxError, RequestError

from .settings import tree

__all__ = ["FOLDER", "LARGEST", "LEFT_OUT", "MACHINES", "NEEDED", "RUN", "download", "main", "pack"]

FOLDER = "parcel"
"""In the tree; holds wheels and the script that installs them. Git ignores it."""
ARCHIVE = "dbrx_q-parcel.tar.gz"
"""The tree and `FOLDER`, in the tree; git ignores it."""
LARGEST = 60_000_000
"""Bytes of the archive."""
NEEDED = ("huggingface_hub", "jinja2", "rich", "safetensors", "tiktoken", "typer", "pytest")
"""What the wheels are of, with what these depend on."""
MACHINES = ("numba", "numpy", "torch", "triton")
"""What the machine has."""
LEFT_OUT = ("bitsandbytes", "hf_xet")
"""No command of the run needs them: a library of 60 MB that reads other programs' checkpoints, and downloads."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64")
RUN = """#!/bin/sh
# Installs the wheels beside this file, once and without a network, and runs dbrx-q from the tree around it with the given arguments.
set -eu
parcel=$(cd "$(dirname "$0")" && pwd)
site="$parcel/site"
python=${PYTHON:-python3}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != @PYTHON@ ]; then
    echo "parcel: $python must be Python @PYTHON@, which the wheels are for; found $found." >&2
    echo "Name one with PYTHON=python@PYTHON@, or pack again: make parcel VERSION=$found" >&2
    exit 2
fi
if [ ! -e "$site/installed" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$parcel"/wheels/*.whl
    ln -sfn "$(dirname "$parcel")/dbrx_q" "$site/dbrx_q"
    touch "$site/installed"
fi
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" "$parcel/dbrx-q.py" "$@"
"""
"""The script that a machine runs; @PYTHON@ stands for the version of its Python."""
_COMMAND = """from dbrx_q.cli import main

if __name__ == "__main__":  # worker processes import this file
    main()
"""


def download(folder: Path, constraints: Path, python: str, packages: Sequence[str] = NEEDED) -> list[Path]:
    """Fetch the wheels of `packages` and of what they depend on, for Linux on x86-64.

    Args:
        folder: for the wheels; others in it are deleted.
        constraints: pip's file of versions.
        python: version of the machine's Python, as "3.12".
        packages: names.

    Raises:
        DbrxError: pip could not fetch them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        path.unlink()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        python,
    ]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    ended = subprocess.run([*command, "--constraint", str(constraints), "--dest", str(folder), *packages], check=False)
    if ended.returncode:
        raise DbrxError(f"pip must fetch the wheels of {', '.join(packages)}; it ended with {ended.returncode}. Try again with a network")
    for path in folder.glob("*.whl"):
        if path.name.lower().startswith(tuple(f"{name}-" for name in LEFT_OUT)):
            path.unlink()
    return sorted(folder.glob("*.whl"))


def pack(root: Path, python: str, wheels: Path | None = None) -> Path:
    """Write the scripts beside the wheels and the archive of the tracked files with them.

    Args:
        root: of the tree.
        python: version of the machine's Python, as "3.12", that the wheels are for.
        wheels: of `download`; None for those in the tree's `FOLDER`.

    Raises:
        RequestError: the tree is no git checkout, or the archive is too large; an earlier archive is unchanged then.
    """
    names = _tracked(root)
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "run.sh").write_text(RUN.replace("@PYTHON@", python), encoding="utf-8")
    (folder / "dbrx-q.py").write_text(_COMMAND, encoding="utf-8")
    archive, partial = root / ARCHIVE, folder / f"{ARCHIVE}.partial"
    try:
        with tarfile.open(partial, "w:gz", compresslevel=6) as file:
            for name in names:
                if (root / name).is_symlink() or (root / name).exists():
                    file.add(root / name, f"dbrx_q/{name}")
            for name in ("run.sh", "dbrx-q.py"):
                file.add(folder / name, f"dbrx_q/{FOLDER}/{name}")
            for path in sorted((wheels or folder / "wheels").glob("*.whl")):
                file.add(path, f"dbrx_q/{FOLDER}/wheels/{path.name}")
        size = partial.stat().st_size
        if size > LARGEST:
            raise RequestError(
                f"{archive}: a parcel must have at most {LARGEST / 1e6:.0f} MB; found {size / 1e6:.1f}. Leave wheels or data out"
            )
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    return archive


def _tracked(root: Path) -> list[str]:
    """Names of the files that git has, in order."""
    try:
        ended = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.stderr.strip()
        raise RequestError(f"{root}: a parcel is packed from a git checkout, by git; {reason}. Run it in a clone") from None
    return sorted(filter(None, ended.stdout.split("\0")))


def main(arguments: Sequence[str] | None = None) -> None:
    """`make parcel`.

    Raises:
        DbrxError: as `download` and `pack` do.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python (default: %(default)s)")
    python = parser.parse_args(arguments).python
    if not re.fullmatch(r"3\.\d+", python):
        raise RequestError(f"--python must be a version such as 3.12; found {python!r}. Name the machine's")
    root = tree()
    if root is None:
        raise RequestError("a parcel holds the tree of the project; this package was installed without it. Run it from a checkout")
    wheels = download(root / FOLDER / "wheels", root / ".ci" / "constraints.txt", python)
    archive = pack(root, python)
    for path in wheels:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}")
    print(f"{sum(path.stat().st_size for path in wheels) / 1e6:6.2f} MB of wheels, {len(wheels)}")
    print(f"{archive.stat().st_size / 1e6:6.2f} MB  {archive}")


if __name__ == "__main__":
    try:
        main()
    except DbrxError as error:
        print(f"parcel: error: {error}", file=sys.stderr)
        sys.exit(2)
