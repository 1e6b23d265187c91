"""Reads every layout of the bundled model as the tool that wrote it does: `run.py WORK`; writes the table of docs/layouts.md.

For each layout the tool writes the checkpoint and measures its perplexity, and `dbrx-q perplexity` measures the same windows.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "tests" / "models" / "layouts"
sys.path[:0] = [str(ROOT / "tests" / "peers" / "llama_cpp"), str(MODELS)]

from convert import KINS, convert  # noqa: E402
from environments import environment  # noqa: E402
from tools import built_tools  # noqa: E402

from dbrx_q.eval.document import check_section, replace_section  # noqa: E402
from dbrx_q.eval.texts import load_text  # noqa: E402
from dbrx_q.eval.windows import Protocol  # noqa: E402
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer  # noqa: E402

NANO = ROOT / "tests" / "data" / "dbrx-nano"
NANO_GGUF = ROOT / "tests" / "data" / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
TEXT = ROOT / "tests" / "data" / "wikitext2-test.txt"
DOCUMENT = ROOT / "docs" / "layouts.md"
BEGIN, END = "<!-- begin: layouts -->", "<!-- end: layouts -->"
REQUIRED = 1e-3
"""The greatest relative difference of two perplexities of one file."""
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q4_K_M", "Q6_K", "MXFP4_MOE", "NVFP4", "BF16", "F16")
"""Types of `llama-quantize`, and NVFP4, which it makes of single tensors. Rows of 128 have no blocks of 256: they get a larger type."""


@dataclass(frozen=True)
class Row:
    """One layout."""

    layout: str
    """What the file is."""
    tool: str
    """What wrote it, and what measured it."""
    theirs: float
    """The perplexity by the tool."""
    ours: float
    """The perplexity by `dbrx-q perplexity`."""

    @property
    def difference(self) -> float:
        """The relative difference of the two."""
        return self.ours / self.theirs - 1


class Comparison:
    """The files of a run, and how both sides measure them."""

    def __init__(self, work: Path, build: Path | None, context: int, limit: int) -> None:
        self.work, self.build, self.files = work, build, work / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.context, self.limit = context, limit
        ids = DbrxTokenizer.from_pretrained(str(NANO)).encode(load_text(str(TEXT)).text)
        protocol = Protocol.of(context, half_window=True, limit=limit)
        windows = [(ids[window.first : window.end], window.scored - window.first) for window in protocol.windows(len(ids))]
        self.windows, self.tokens = work / "windows.json", work / "tokens.json"
        self.windows.write_text(json.dumps(windows))
        self.tokens.write_text(json.dumps(ids[:32]))

    def ours(self, path: Path) -> float:
        """The perplexity by dbrx-q."""
        options = ["--text", str(TEXT), "--protocol", "half-window", "--context", str(self.context), "--limit", str(self.limit), "--json"]
        command = [str(Path(sys.executable).parent / "dbrx-q"), "perplexity", str(path), *options]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return float(json.loads(out)["perplexity"])

    def written_by(self, python: Path | str, script: str, *sources: Path) -> None:
        """Let a tool's script write its folders, each with the tool's perplexity."""
        options = ["--tokens", str(self.tokens), "--windows", str(self.windows)]
        command = [str(python), str(MODELS / script), *map(str, sources), str(self.files), *options]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=self.work)  # GPTQModel writes logs beside it

    def theirs(self, name: str) -> float:
        """The perplexity that a tool's script wrote."""
        return float(json.loads((self.files / name / "perplexity.json").read_text())["perplexity"])

    def rows(self, prefix: str, tool: str) -> Iterator[Row]:
        """Rows of the folders whose names begin so."""
        for folder in sorted(self.files.glob(f"{prefix}-*")):
            # transformers 5 saves DBRX's tokenizer with GPT-2's pattern, which gives other ids.
            shutil.copyfile(NANO / "tokenizer.json", folder / "tokenizer.json")
            yield Row(folder.name, tool, self.theirs(folder.name), self.ours(folder))

    def converted(self) -> Path:
        """The converted copy of the bundled model, with its classes for transformers."""
        folder = self.files / "converted"
        if not folder.exists():
            convert(NANO, folder, modeling=True)
        return folder


def plain(comparison: Comparison) -> Iterator[Row]:
    """The published layout and the converted ones, which all have the converted one's weights."""
    comparison.written_by(sys.executable, "plain_figures.py", NANO, comparison.converted())
    yield Row("published", "transformers 5.24.0", comparison.theirs("figures-published"), comparison.ours(NANO))
    for kin in KINS:
        folder = comparison.files / kin
        if not folder.exists():
            convert(NANO, folder, kin)
        yield Row(kin, "transformers 5.24.0", comparison.theirs("figures-converted"), comparison.ours(folder))


def mlx(comparison: Comparison) -> Iterator[Row]:
    """Folders of mlx-lm."""
    comparison.written_by(environment("mlx", comparison.work), "mlx_folders.py", NANO)
    yield from comparison.rows("mlx", "mlx-lm 0.32.2, mlx 0.32.4")


def gptq(comparison: Comparison) -> Iterator[Row]:
    """Folders of GPTQModel and AutoAWQ."""
    python = environment("gptq", comparison.work)
    for script in ("gptq_folders.py", "awq_folder.py"):
        comparison.written_by(python, script, comparison.converted())
    yield from comparison.rows("gptq", "GPTQModel 7.7.0")
    yield from comparison.rows("awq", "AutoAWQ 0.2.9")


def bitsandbytes(comparison: Comparison) -> Iterator[Row]:
    """Folders of transformers with bitsandbytes."""
    comparison.written_by(sys.executable, "bitsandbytes_folders.py", NANO, comparison.converted())
    yield from comparison.rows("bitsandbytes", "bitsandbytes 0.50.2")


def gguf(comparison: Comparison) -> Iterator[Row]:
    """GGUF files. llama.cpp dequantizes them to float32 itself, since it rounds activations to 8 bits beside packed weights."""
    tools = built_tools(comparison.work, comparison.build, more=("llama-perplexity", "llama-gguf-split"))
    files, theirs = comparison.files, {}
    source = files / "dbrx-nano.F32.gguf"
    if not source.exists():
        make = ROOT / "tests" / "dbrx_q" / "sources" / "make_gguf.py"
        _output(sys.executable, make, NANO, NANO_GGUF, source)
    for kind in GGUF_TYPES:
        path, dequantized = files / f"dbrx-nano.{kind}.gguf", files / "dequantized.gguf"
        experts = ["--tensor-type", "ffn_.*_exps=nvfp4"] if kind == "NVFP4" else []
        _output(tools.path("llama-quantize"), *experts, source, path, "Q8_0" if experts else kind, 2)
        _output(tools.path("llama-quantize"), "--allow-requantize", path, dequantized, "F32", 2)
        options = ["-c", comparison.context, "--chunks", comparison.limit, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 2]
        printed = _output(tools.path("llama-perplexity"), "-m", dequantized, "-f", TEXT, *options)
        perplexity = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
        if perplexity is None:
            sys.exit(f"llama-perplexity must print a final estimate; found {printed[-500:]!r}")
        theirs[kind] = float(perplexity[1])
        yield Row(f"GGUF {kind}", "llama.cpp 0c1e570", theirs[kind], comparison.ours(path))
    _output(tools.path("llama-gguf-split"), "--split-max-tensors", 16, files / "dbrx-nano.Q4_0.gguf", files / "parts")
    first = min(files.glob("parts-00001-of-*.gguf"))
    yield Row("GGUF Q4_0, split", "llama.cpp 0c1e570", theirs["Q4_0"], comparison.ours(first))


SECTIONS = {"plain": plain, "mlx": mlx, "gptq": gptq, "bitsandbytes": bitsandbytes, "gguf": gguf}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| layout | tool | perplexity by the tool | by dbrx-q | relative difference |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| `{row.layout}` | {row.tool} | {row.theirs:.4f} | {row.ours:.4f} | {row.difference:+.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write it if all sections ran, and fail where a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of environments, builds and checkpoints, kept for the next run")
    parser.add_argument("--only", help="sections, as mlx,gguf", default=",".join(SECTIONS))
    parser.add_argument("--build", type=Path, help="build folder of llama.cpp; else it is built in WORK")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="windows")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    check_section(arguments.document, BEGIN, END)
    comparison = Comparison(work, arguments.build, arguments.context, arguments.limit)
    rows: list[Row] = []
    for name in arguments.only.split(","):
        for row in SECTIONS[name](comparison):
            print(f"{row.layout}: {row.theirs:.4f} by the tool, {row.ours:.4f} by dbrx-q, {row.difference:+.1e}", flush=True)
            rows.append(row)
    if set(arguments.only.split(",")) == set(SECTIONS):
        replace_section(arguments.document, BEGIN, END, table(rows))
    wrong = [row.layout for row in rows if abs(row.difference) > REQUIRED]
    if wrong:
        sys.exit(f"differences must be at most {REQUIRED}; found more for {', '.join(wrong)}")


def _output(*command: object) -> str:
    """What a command prints, both streams together."""
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode:
        sys.exit(f"{command[0]} must succeed; found exit code {run.returncode}:\n{run.stdout[-2000:]}")
    return run.stdout


if __name__ == "__main__":
    main()
