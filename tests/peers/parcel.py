"""Installs the parcel into an empty virtual environment without a network, and runs `bench gpu --device meta` from it.

    .venv/bin/python tests/peers/parcel.py

The wheels are fetched for this Python, since the machine's own packages (torch, Triton, numpy, numba and what these import) are links to
the ones that this Python has. A minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dbrx_q.eval.gpu_run.journal import DONE, read_records
from dbrx_q.eval.gpu_run.parcel import MACHINES, download, pack
from dbrx_q.eval.gpu_run.plan import plan
from dbrx_q.eval.gpu_run.settings import Settings

ROOT = Path(__file__).parents[2]
_OF_TORCH = ("llvmlite", "sympy", "mpmath", "networkx", "setuptools")  # the machine's too; torch's other dependencies are in the parcel


def stand_in(folder: Path) -> None:
    """Links to the packages that a machine has, and to nothing else."""
    for name in (*MACHINES, *_OF_TORCH):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        tops = {Path(file.parts[0]) for file in files if not file.parts[0].startswith((".", "__"))}
        for top in tops:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


def main() -> None:
    """Print what was installed and done; an exit code other than 0 where anything was not."""
    with tempfile.TemporaryDirectory(prefix="dbrx_q-parcel-") as temporary:
        work = Path(temporary)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        download(work / "wheels", ROOT / ".ci" / "constraints.txt", version)
        archive = pack(ROOT, version, work / "wheels")
        with tarfile.open(archive) as file:
            file.extractall(work, filter="data")
        venv.create(work / "empty", with_pip=True)
        python = work / "empty" / "bin" / "python"
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
        ).stdout.strip()
        stand_in(Path(packages))
        alone = ["unshare", "--net", "--"] if shutil.which("unshare") and os.geteuid() == 0 else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PIP"))}
        environment |= {"PYTHON": str(python), "PIP_NO_INDEX": "1", "TRITON_CACHE_DIR": str(work / "triton")}
        run = [*alone, "sh", str(work / "dbrx_q" / "parcel" / "run.sh"), "bench", "gpu", "--device", "meta", "--out", str(work / "run")]
        subprocess.run(run, check=True, cwd=work, env=environment)
        records = read_records(work / "run")
        missing = records[0].value["missing"]
        print(f"{archive.stat().st_size / 1e6:.1f} MB; no network: {bool(alone)}; packages that the machine and the parcel lack: {missing}")
        assert {record.item for record in records if record.status == DONE} == {item.key for item in plan(Settings("meta", work))}


if __name__ == "__main__":
    main()
