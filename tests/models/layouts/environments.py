"""Environments of the tools that write the layouts: pinned versions, each beside the packages of the running interpreter or alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["environment"]

_PACKAGES = {
    "mlx": ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
    "gptq": (
        *("gptqmodel==7.7.0", "autoawq==0.2.9", "threadpoolctl", "device-smi==0.5.7", "pypcre==0.6.4", "tokenicer==0.0.14"),
        *(
            "logbar==0.4.15",
            "dill",
            "defuser==0.0.28",
            "datasets",
            "pyarrow",
            "torchao==0.18.0",
            "pillow",
            "multiprocess",
            "xxhash",
            "pandas",
        ),
    ),
}
"""Name of an environment to what pip installs there."""
_SHARED = {"gptq"}
"""Those that take torch and transformers from this interpreter's packages: gptqmodel would fetch torch with CUDA."""


def environment(name: str, work: Path) -> Path:
    """The interpreter of an environment in `work`, which is made where it is missing.

    Raises:
        CalledProcessError: pip fails, without a network for example.
    """
    folder = work / f"environment-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        if name in _SHARED:
            packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
            Path(packages, "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
            pip.append("--no-deps")
        subprocess.run([*pip, *_PACKAGES[name]], check=True)
        (folder / "complete").touch()
    return python
