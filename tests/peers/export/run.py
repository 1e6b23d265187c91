"""Measures what `dbrx-q export` writes beside the files of llama.cpp and mlx-lm: `run.py WORK --calibration FILE`.

Every GGUF file is measured by llama.cpp's own protocol and program, every MLX folder by `dbrx-q compare`, and by mlx-lm itself to show
that it reads the folder alike. The tables are those of docs/export.md.
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
sys.path[:0] = [str(ROOT / "tests" / "peers" / "llama_cpp"), str(ROOT / "tests" / "models" / "layouts")]

from environments import environment  # noqa: E402
from gguf import GGUFReader  # noqa: E402
from tools import built_tools  # noqa: E402

from dbrx_q.eval.document import check_section, replace_section  # noqa: E402
from dbrx_q.eval.texts import load_text  # noqa: E402
from dbrx_q.eval.windows import Protocol  # noqa: E402
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer  # noqa: E402

NANO = ROOT / "tests" / "data" / "dbrx-nano"
TEXT = ROOT / "tests" / "data" / "wikitext2-test.txt"
DOCUMENT = ROOT / "docs" / "export.md"
PARAMETERS = 7_545_984
CONTEXT = 512
THEIRS = ("Q4_0", "Q4_1", "IQ4_NL", "Q8_0", "Q4_K_M")
"""Types that `llama-quantize` makes, all but Q8_0 also with an importance matrix."""
OURS = (("q4_0", "best"), ("q4_1", "best"), ("q4_0", "rtn"), ("q4_1", "rtn"), ("q8_0", "rtn"), ("bf16", "rtn"))
"""Types and methods of `dbrx-q export`."""
CALIBRATED = ("gptq", "best")
TOLERANCE = 1e-3
"""The greatest relative difference between mlx-lm's perplexity of an MLX folder and ours."""
MLX_WINDOWS = 8
"""Windows on which the two are compared: mlx-lm runs the tokens of a DBRX one by one."""

_TRIES = 3  # of a program whose log now and then ends before its statistics
_SUMMARY = re.compile(
    r"Mean\s+PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+).*Mean\s+KLD:\s*([-\d.]+).*99\.9%\s+KLD:\s*([\d.]+).*Same top p:\s*([\d.]+)", re.DOTALL
)
"""Ratio of perplexities, mean divergence, its 99.9th percentile and the share of equal tokens, as llama-perplexity prints them."""


@dataclass(frozen=True)
class GgufRow:
    """One GGUF file as llama.cpp measures it."""

    kind: str
    """Its type."""
    writer: str
    """What rounded it."""
    nbytes: int
    """Of the file."""
    bits: float
    """Bits per weight of its tensors."""
    ratio: float
    """Its perplexity, divided by that of the float32 file."""
    mean_kl: float
    """Mean divergence from the float32 file."""
    p999_kl: float
    """The divergence that a thousandth of the tokens exceed."""
    top: float
    """Share of tokens, in percent, of which the most likely next token is the same."""


class Files:
    """The files of a run, and how llama.cpp measures them."""

    def __init__(self, work: Path, build: Path | None, calibration: Path, limit: int) -> None:
        self.work, self.calibration, self.limit = work, calibration, limit
        self.tools = built_tools(work, build, more=("llama-perplexity", "llama-imatrix"))
        work.mkdir(parents=True, exist_ok=True)
        self.float32 = self.exported("gguf", "f32", "rtn")
        self.base = work / "float32.logits"

    def exported(self, to: str, kind: str, method: str) -> Path:
        """The folder of MLX, or the GGUF file, that dbrx-q exports; made where it is missing."""
        folder = self.work / f"{to}-{kind}-{method}"
        if not folder.exists():
            type_options = ["--type", kind] if to == "gguf" else ["--bits", kind]
            calibration = ["--calibration", str(self.calibration)] if method in CALIBRATED else []
            dbrx_q("export", NANO, folder, "--to", to, *type_options, "--method", method, *calibration, "--resume")
        return next(folder.glob("*.gguf")) if to == "gguf" else folder

    def quantized(self, kind: str, *, imatrix: bool) -> Path:
        """The file that `llama-quantize` makes."""
        path = self.work / f"llama-{kind}{'-imatrix' if imatrix else ''}.gguf"
        if not path.exists():
            matrix = self.work / "imatrix.gguf"
            if imatrix and not matrix.exists():
                options = ["-f", self.calibration, "-c", CONTEXT, "-o", matrix]
                output(self.tools.path("llama-imatrix"), "-m", self.float32, *options)
            output(self.tools.path("llama-quantize"), *(["--imatrix", matrix] if imatrix else []), self.float32, path, kind, 2)
        return path

    def measured(self, kind: str, writer: str, path: Path) -> GgufRow:
        """A row, by `llama-perplexity --kl-divergence`; kept for the next run of as many windows."""
        kept = self.work / f"measured-{path.stem if path.parent == self.work else path.parent.name}-{self.limit}.json"
        if not kept.exists():
            kept.write_text(json.dumps(self._figures(path)))
        bits = 8 * sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors) / PARAMETERS
        return GgufRow(kind, writer, path.stat().st_size, bits, *json.loads(kept.read_text()))

    def _figures(self, path: Path) -> list[float]:
        """The figures of a row."""
        program = self.tools.path("llama-perplexity")
        # The repacked CPU kernels of the measured build of llama.cpp crash on rows of 128.
        options = ["--no-repack", "-c", CONTEXT, "--chunks", self.limit, "-t", 2, "--kl-divergence-base", self.base]
        if not self.base.exists():
            output(program, "-m", self.float32, "-f", TEXT, *options)
        for _ in range(_TRIES):
            printed = output(program, "-m", path, *options, "--kl-divergence")
            summary = _SUMMARY.search(printed)
            if summary is not None:
                return [float(value) for value in summary.groups()]
        sys.exit(f"llama-perplexity must end with its statistics; found {printed[-500:]!r}")


def gguf(files: Files) -> Iterator[GgufRow]:
    """Ours, and files of llama.cpp."""
    for kind, method in OURS:
        yield files.measured(kind.upper(), f"dbrx-q, `{method}`", files.exported("gguf", kind, method))
    for kind in THEIRS:
        yield files.measured(kind, "llama.cpp", files.quantized(kind, imatrix=False))
        if kind != "Q8_0":
            yield files.measured(kind, "llama.cpp, importance matrix", files.quantized(kind, imatrix=True))


def gguf_table(rows: Sequence[GgufRow]) -> str:
    """Markdown, by type."""
    lines = ["| type | rounded by | bytes | bits per weight | perplexity / float32's | mean KL | 99.9 % KL | same top token |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row.kind, row.writer)):
        sizes = f"{row.nbytes:,} | {row.bits:.2f}"
        lines.append(f"| {row.kind} | {row.writer} | {sizes} | {row.ratio:.5f} | {row.mean_kl:.5f} | {row.p999_kl:.3f} | {row.top:.1f} % |")
    return "\n".join(lines)


def mlx_table(files: Files) -> str:
    """Markdown of MLX's folders: theirs, and ours by two methods.

    Raises:
        SystemExit: mlx-lm reads a folder otherwise than dbrx-q.
    """
    python = environment("mlx", files.work)
    theirs = files.work / "mlx-lm-4bit"
    if not theirs.exists():
        output(python, "-m", "mlx_lm", "convert", "--hf-path", NANO, "-q", "--mlx-path", theirs)
        # transformers 5 saves DBRX's tokenizer with GPT-2's pattern, which gives other ids.
        shutil.copyfile(NANO / "tokenizer.json", theirs / "tokenizer.json")
    writers = {theirs: "`mlx_lm.convert -q`"}
    writers |= {files.exported("mlx", "4", method): f"dbrx-q, `{method}`" for method in ("rtn", "best")}
    protocol = ["--text", TEXT, "--protocol", "half-window", "--context", CONTEXT, "--json", "--limit"]
    compared = json.loads(dbrx_q("compare", NANO, *writers, *protocol, files.limit))
    ids = DbrxTokenizer.from_pretrained(NANO).encode(load_text(str(TEXT)).text)
    windows = Protocol.of(CONTEXT, half_window=True, limit=MLX_WINDOWS).windows(len(ids))
    (files.work / "windows.json").write_text(json.dumps([(ids[w.first : w.end], w.scored - w.first) for w in windows]))
    script = Path(__file__).with_name("mlx_perplexity.py")
    by_mlx = json.loads(output(python, script, files.work / "windows.json", *writers).splitlines()[-1])
    lines = [f"| rounded by | bytes | perplexity / the model's | mean KL | perplexity of {MLX_WINDOWS} windows by mlx-lm | by dbrx-q |"]
    lines.append("|---|---|---|---|---|---|")
    wrong = []
    for (folder, writer), result in zip(writers.items(), compared["results"], strict=True):
        ours = json.loads(dbrx_q("perplexity", folder, *protocol, MLX_WINDOWS))["perplexity"]
        if abs(by_mlx[str(folder)] / ours - 1) > TOLERANCE:
            wrong.append(folder.name)
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        figures = f"{result['perplexity'] / compared['reference_perplexity']:.5f} | {result['mean_kl']:.5f}"
        lines.append(f"| {writer} | {nbytes:,} | {figures} | {by_mlx[str(folder)]:.4f} | {ours:.4f} |")
    if wrong:
        sys.exit(f"perplexities of mlx-lm and dbrx-q must agree to {TOLERANCE}; they do not for {', '.join(wrong)}:\n" + "\n".join(lines))
    return "\n".join(lines)


def dbrx_q(*arguments: object) -> str:
    """What a command of dbrx-q prints on stdout."""
    command = [str(Path(sys.executable).with_name("dbrx-q")), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def output(*command: object) -> str:
    """What a command prints, both streams together."""
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if run.returncode:
        sys.exit(f"{command[0]} must succeed; found exit code {run.returncode}:\n{run.stdout[-2000:]}")
    return run.stdout


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of builds, environments and files, kept for the next run")
    parser.add_argument("--calibration", type=Path, required=True, help="WikiText-2's validation text")
    parser.add_argument("--llama-cpp", type=Path, help="build folder of llama.cpp; else it is built in WORK")
    parser.add_argument("--only", choices=("gguf", "mlx"), help="one of the two tables")
    parser.add_argument("--limit", type=int, default=200, help="windows")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    files = Files(arguments.work.resolve(), arguments.llama_cpp, arguments.calibration.resolve(), arguments.limit)
    tables = {"gguf": lambda: gguf_table(list(gguf(files))), "mlx": lambda: mlx_table(files)}
    for name in tables:
        check_section(arguments.document, *markers(name))
    for name, table in tables.items():
        if arguments.only in (None, name):
            text = table()
            print(text, flush=True)
            replace_section(arguments.document, *markers(name), text)


def markers(name: str) -> tuple[str, str]:
    """The lines around a table."""
    return f"<!-- begin: export {name} -->", f"<!-- end: export {name} -->"


if __name__ == "__main__":
    main()
