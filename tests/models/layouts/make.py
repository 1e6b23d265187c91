"""Makes the folders of tests/data/layouts with the tools of their programs: `make.py WORK OUT --llama-cpp FOLDER`.

WORK keeps the tools' environments; FOLDER is llama.cpp's source folder, as `gguf_files.py` needs it. GPTQModel and AutoAWQ give other bytes
on another machine; nothing in the tests depends on the bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from convert import convert
from environments import environment
from source import make_source, make_tokens

HERE = Path(__file__).resolve().parent
COMMITTED = (
    *("mlx-4bit-g64", "mlx-3bit-g32", "mlx-6bit-g64-float16", "mlx-mixed", "mlx-mxfp4", "awq-4bit-g64"),
    *("gptq-4bit-g128", "gptq-4bit-g32-asym", "gptq-4bit-g64-act-order", "gptq-8bit-g128", "gptq-v2-4bit-g32-asym"),
    *("bitsandbytes-nf4-double-converted", "gguf-blocks-of-32", "gguf-blocks-of-256"),
)
"""The folders that the repository has; the others that the scripts know are made for `tests/peers/layouts`."""


def main() -> None:
    """Write `published`, `tokens.json` and the folders that are missing in OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    arguments = parser.parse_args()
    work, out = arguments.work.resolve(), arguments.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    published, converted, tokens = out / "published", work / "converted", out / "tokens.json"
    if not published.exists():
        make_source(published)
        tokens.write_text(json.dumps(make_tokens()) + "\n")
    if not converted.exists():
        convert(published, converted, modeling=True)
    options = ["--tokens", tokens, "--only", *COMMITTED]
    _run(environment("mlx", work), "mlx_folders.py", published, out, *options)
    for script in ("gptq_folders.py", "awq_folder.py"):
        _run(environment("gptq", work), script, converted, out, *options)
    _run(sys.executable, "bitsandbytes_folders.py", published, converted, out, *options)
    if not (out / "gguf-blocks-of-32").exists():
        _run(sys.executable, "gguf_files.py", arguments.llama_cpp.resolve(), out)
    for name in COMMITTED:
        _tidy(out / name)


def _run(python: Path | str, script: str, *arguments: object) -> None:
    with tempfile.TemporaryDirectory() as folder:  # GPTQModel writes logs into the working folder
        subprocess.run([str(python), str(HERE / script), *map(str, arguments)], check=True, cwd=folder)


def _tidy(folder: Path) -> None:
    """Leave out copies of our classes and GPTQModel's log, and paths of this machine."""
    for path in (*folder.glob("*.py"), folder / "quant_log.csv"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'"/[^"]*/gptqmodel_\w+"', "null", text), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
