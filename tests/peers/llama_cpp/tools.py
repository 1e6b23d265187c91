"""Builds llama.cpp's tools from the sources in an sdist of llama-cpp-python, with pip's cmake and ninja where the machine has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SDIST", "Tools", "built_tools"]

SDIST = "llama-cpp-python==0.3.36"
"""The release whose sdist holds llama.cpp's sources."""
_TARGETS = ("llama-bench", "llama-batched-bench", "llama-completion", "llama-quantize")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # all instructions of this machine
    "GGML_OPENMP": "ON",  # llama.cpp's default
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_BUILD_MTMD": "OFF",
}
_MUST_BE_ON = ("GGML_NATIVE", "GGML_OPENMP")


@dataclass(frozen=True)
class Tools:
    """Programs of one build of llama.cpp."""

    folder: Path
    """Folder of the programs and of their libraries."""
    compiler: str
    """First line of the compiler's --version."""

    def path(self, name: str) -> str:
        """The program `name`."""
        return str(self.folder / name)


def built_tools(work: Path, build: Path | None, *, more: Sequence[str] = ()) -> Tools:
    """The tools in `build`, a build folder of cmake; without it, those in `work`, which are built there once.

    Args:
        work: folder to write.
        build: a build that is there, or None.
        more: programs beside those that `_TARGETS` names.

    Raises:
        SystemExit: `build` lacks a tool, or does not use this machine's instructions.
        CalledProcessError: pip or cmake fails.
    """
    targets = (*_TARGETS, *more)
    if build is None:
        build = _sources(work) / "build"
        if not _is_complete(build, targets):
            _build(build, work, targets)
    if not _is_complete(build, targets):
        sys.exit(f"{build}: must hold bin/ with {', '.join(targets)}. Build them, or leave --build out")
    cache = (build / "CMakeCache.txt").read_text(encoding="utf-8")
    for option in _MUST_BE_ON:
        if f"{option}:BOOL=ON" not in cache:
            sys.exit(f"{build}: {option} must be ON, or llama.cpp is slower than it can be; found OFF. Configure with -D{option}=ON")
    return Tools(build / "bin", _compiler(cache))


def _is_complete(build: Path, targets: Sequence[str]) -> bool:
    return all((build / "bin" / name).exists() for name in targets)


def _sources(work: Path) -> Path:
    """llama.cpp's sources, downloaded and extracted once."""
    folder = work / "llama.cpp"
    if folder.exists():
        return folder
    downloads = work / "sdist"
    subprocess.run(
        [*_pip(), "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(downloads), SDIST],
        check=True,
        stdout=sys.stderr,
    )
    (archive_path,) = downloads.glob("*.tar.gz")
    with tarfile.open(archive_path) as archive:
        archive.extractall(downloads, filter="data")
    (root,) = (path for path in downloads.iterdir() if path.is_dir())
    (root / "vendor" / "llama.cpp").rename(folder)
    shutil.rmtree(downloads)
    return folder


def _build(build: Path, work: Path, targets: Sequence[str]) -> None:
    tools, environment = work / "cmake", dict(os.environ)
    environment.pop("SOURCE_DATE_EPOCH", None)  # with it, GGML_NATIVE is OFF by default
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        subprocess.run([*_pip(), "install", "--quiet", "--target", str(tools), "cmake", "ninja"], check=True, stdout=sys.stderr)
        environment["PATH"] = f"{tools / 'bin'}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = str(tools)
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    configure = ["cmake", "-S", str(build.parent), "-B", str(build), "-G", "Ninja", *options]
    _run(configure, environment)
    _run(["cmake", "--build", str(build), "--target", *targets], environment)


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _compiler(cache: str) -> str:
    """The compiler that a CMakeCache.txt names, with its version."""
    path = next(line.split("=", 1)[1] for line in cache.splitlines() if line.startswith("CMAKE_CXX_COMPILER:"))
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return version.splitlines()[0]
