"""Makes what both programs measure: layers of DBRX's dimensions with random weights, quantized by dbrx-q and by llama-quantize."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import Tools

__all__ = ["NANO", "NANO_GGUF", "Checkpoints", "make_checkpoints"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
"""The root of the repository."""
NANO = ROOT / "tests" / "data" / "dbrx-nano"
"""The bundled model."""
NANO_GGUF = ROOT / "tests" / "data" / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
"""The bundled model as llama.cpp quantized it."""
_THREADS = "2"


@dataclass(frozen=True)
class Checkpoints:
    """The files of one comparison, in `work`."""

    work: Path
    """Folder of all files."""
    layers: int
    """Layers of DBRX's dimensions."""

    @property
    def plain(self) -> Path:
        """bfloat16, 6.6 GB a layer."""
        return self.work / f"layers-{self.layers}"

    def packed(self, format: str) -> Path:
        """What dbrx-q makes of `plain` with the experts in `format`."""
        return self.work / f"layers-{self.layers}-{format}"

    def gguf(self, kind: str) -> Path:
        """What llama-quantize makes of it, such as Q4_0."""
        return self.work / f"layers-{self.layers}.{kind}.gguf"

    @property
    def nano(self) -> Path:
        """The bundled model, quantized to int4."""
        return self.work / "dbrx-nano-int4"


def make_checkpoints(work: Path, layers: int, formats: Sequence[str], kinds: Sequence[str], tools: Tools, *, keep: bool) -> Checkpoints:
    """Make the files that are missing, and delete the bfloat16 ones that they were made of.

    Args:
        work: folder to write.
        layers: of DBRX's dimensions.
        formats: of dbrx-q's experts, such as int4.
        kinds: of llama.cpp, such as Q4_0.
        tools: llama.cpp's.
        keep: keep the bfloat16 checkpoint.
    """
    files = Checkpoints(work, layers)
    formats = [name for name in formats if not files.packed(name).exists()]
    kinds = [name for name in kinds if not files.gguf(name).exists()]
    if formats or (kinds and not files.gguf("BF16").exists()):
        _dbrx_q("bench", "synthetic", str(files.plain), "--layers", str(layers), unless=files.plain)
    for name in formats:
        _dbrx_q("quantize", str(files.plain), str(files.packed(name)), "--format", name)
    if kinds:
        if not files.gguf("BF16").exists():
            copy = [sys.executable, str(HERE / "gguf_copy.py"), str(files.plain), str(files.gguf("BF16"))]
            subprocess.run(copy, check=True)
        if not keep and files.plain.exists() and not files.plain.is_symlink():
            shutil.rmtree(files.plain)  # before llama-quantize needs the room
        for name in kinds:
            partial = files.gguf(name).with_suffix(".partial")
            command = [tools.path("llama-quantize"), str(files.gguf("BF16")), str(partial), name, _THREADS]
            print(*command, file=sys.stderr, flush=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            partial.rename(files.gguf(name))
        files.gguf("BF16").unlink()
    elif not keep and files.plain.exists() and not files.plain.is_symlink():
        shutil.rmtree(files.plain)
    _dbrx_q("quantize", str(NANO), str(files.nano), unless=files.nano)
    return files


def _dbrx_q(*arguments: str, unless: Path | None = None) -> None:
    """Run dbrx-q with this interpreter, unless a path exists."""
    if unless is not None and unless.exists():
        return
    print("dbrx-q", *arguments, file=sys.stderr, flush=True)
    subprocess.run([str(Path(sys.executable).parent / "dbrx-q"), *arguments], check=True, stdout=subprocess.DEVNULL)
