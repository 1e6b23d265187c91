"""Quantizes a model by every method, measures it on texts that no choice saw, and writes the tables of docs/quantization.md.

    .venv/bin/python tests/methods/protocol.py MODEL OUT --texts TEXTS --set final --document docs/quantization.md --section methods

`--set validation` is for choices of a method or a constant, `--set final` for figures to quote; README.md in this folder lists the texts,
which `texts.py` writes. OUT keeps finished checkpoints and measurements: the same command continues an interrupted run, and takes a
checkpoint again only while the code of `quantize/` and `kernels/`, the options and the texts are the same. After every seed it writes the
tables, in which rows that are not finished say so.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tables import IMATRIX, Figures, Result, plot, tables

__all__ = ["ROWS", "Row", "code_digest", "main", "measure"]

ROOT = Path(__file__).resolve().parents[2]
WIKI, MIX, WIKI_MORE = "WikiText-2", "WikiText-2 + novel", "WikiText-2 (3) + novel (1)"
SELF, WIKI_SELF = "self", "WikiText-2 (7) + self (1)"
CALIBRATED_ON = {
    WIKI: ("wikitext-2",),
    MIX: ("wikitext-2", "novel"),
    WIKI_MORE: ("wikitext-2:3", "novel"),
    SELF: ("self",),
    WIKI_SELF: ("wikitext-2:7", "self:1"),
    "none": (),
}
TITLES = {
    "wikitext-2": "WikiText-2",
    "pride-and-prejudice": "Pride and Prejudice",
    "moby-dick": "Moby-Dick",
    "python": "Python",
    "emma": "Emma",
    "speeches": "speeches",
    "manual": "manual",
    "french": "French manual",
    "javascript": "JavaScript",
}
REPORTING = ("report.py", "report_held_out.py", "model_card.py")  # files of `quantize/` that decide no weights


@dataclass(frozen=True)
class Row:
    """One way to quantize the model."""

    method: str
    """As `--method` names it."""
    size: str
    """Formats, as the tables name them."""
    options: tuple[str, ...]
    """Of `dbrx-q quantize`, beside method, calibration and seed."""
    calibration: str = "none"
    """A key of `CALIBRATED_ON`."""
    every_seed: bool = False
    """Whether the row is run with every seed, and not with the first alone."""

    def seeds(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """The seeds to run, of those that the command line names."""
        return tuple(seeds if self.every_seed else seeds[:1])


_G64 = ("--group-size", "64")
ROWS = (
    *(Row(method, "int4 g64", _G64) for method in ("rtn", "clip", "hqq")),
    Row("awq", "int4 g64", _G64, WIKI),
    *(Row(method, "int4 g64", _G64, calibration, True) for calibration in (WIKI, MIX, SELF) for method in ("gptq", "best")),
    *(Row("best", "int4 g64", _G64, calibration, True) for calibration in (WIKI_MORE, WIKI_SELF)),
    Row("best", "int4 g64, 512 sequences", (*_G64, "--sequences", "512"), MIX),
    Row("rtn", "int4 g128", ("--group-size", "128")),
    Row("best", "int4 g128", ("--group-size", "128"), MIX),
    Row("rtn", "int4 g32", ("--group-size", "32")),
    *(Row("best", "int4 g32", ("--group-size", "32"), calibration) for calibration in (MIX, WIKI_MORE, WIKI_SELF)),
    Row("rtn", "nf4", ("--format", "nf4")),
    Row("rtn", "nf4-double", ("--format", "nf4-double")),
    Row("best", "5 bits", ("--target-bpw", "5"), MIX),
    Row("best", "6 bits", ("--target-bpw", "6"), MIX),
    Row("rtn", "int8", ("--format", "int8")),
    Row("best", "int8", ("--format", "int8"), MIX),
)


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    model: Path
    """The plain checkpoint."""
    out: Path
    """Folder of finished checkpoints and measurements."""
    texts: Path
    """Folder that `texts.py` wrote."""
    set: str
    """`validation` or `final`."""
    context: int
    """Tokens of a window."""
    windows: int
    """Windows of each text, from its start."""

    def calibration_files(self, calibration: str) -> list[str]:
        """The values of `--calibration`."""
        # The last fifth of WikiText-2's validation text is one of the texts that choices are made on.
        part = "-four-fifths" if self.set == "validation" else ""
        values = []
        for source in CALIBRATED_ON[calibration]:
            name, colon, weight = source.partition(":")
            file = self.texts / "calibration" / f"{name}{part if name == 'wikitext-2' else ''}.txt"
            values.append((SELF if name == SELF else str(file)) + colon + weight)
        return values

    def weights_digest(self) -> str:
        """A hash of the model's weights."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(self.model.glob("*.safetensors")))).hexdigest()

    def sampled_sequences(self, seed: int) -> Path:
        """Where the sequences are kept that the model has sampled with a seed, for the other rows with this calibration."""
        return self.out / "checkpoints" / f"self-seed-{seed}-{self.weights_digest()[:12]}.safetensors"

    def text_files(self) -> dict[str, Path]:
        """The texts of the set by name, in the order of `TITLES`."""
        files = {path.stem: path for path in (self.texts / self.set).glob("*.txt")}
        return {name: files[name] for name in (*TITLES, *sorted(files.keys() - TITLES.keys())) if name in files}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a quantization failed."""
    options = _options(arguments)
    run = Run(options.model, options.out, options.texts, options.set, options.context, options.windows)
    if not run.text_files():
        sys.exit(f"{run.texts}: must hold {run.set}/*.txt; found none. Run tests/methods/texts.py")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = [row for row in ROWS if re.search(options.only, f"{row.method}, {row.size}, {row.calibration}")]
    results = {row: Result(row.method, row.size, row.calibration, row.seeds(seeds)) for row in rows}
    others = {path: _gguf_result(path, seeds[0]) for path in options.gguf}
    code = code_digest()
    (run.out / "measured").mkdir(parents=True, exist_ok=True)
    try:
        for seed in seeds:
            finished = {}
            for row, result in results.items():
                if seed in result.seeds:
                    folder = _checkpoint(run, row, seed, code)
                    if folder.exists() or (not options.measure_only and _quantize(run, row, seed, folder, result)):
                        finished[folder] = (result, seed)
            if seed == seeds[0]:
                finished |= {path: (result, seed) for path, result in others.items()}
            _measure_all(run, finished)
            if options.document is not None or seed == seeds[-1]:
                _write([*results.values(), *others.values()], run, options)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 1 if any(result.failures for result in results.values()) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="plain checkpoint, such as tests/data/dbrx-nano")
    parser.add_argument("out", type=Path, help="folder that keeps finished checkpoints and measurements")
    parser.add_argument("--texts", type=Path, required=True, help="folder that tests/methods/texts.py wrote")
    parser.add_argument("--set", choices=("validation", "final"), required=True, help="validation to choose, final for figures to quote")
    parser.add_argument("--only", default="", metavar="PATTERN", help='rows to run: a pattern for "method, format, calibration"')
    parser.add_argument("--seeds", default="0,1", help="seeds of the draws of sequences (0,1); rows beside int4 g64 take the first")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (512)")
    parser.add_argument("--windows", type=int, default=96, help="windows of each text (96)")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], metavar="FILE", help="files that llama.cpp made of the model")
    parser.add_argument("--measure-only", action="store_true", help="quantize nothing: measure the checkpoints that are finished")
    parser.add_argument("--document", type=Path, help="document in which to replace the tables; without it they are printed")
    parser.add_argument("--section", default="methods", help="marker lines of the tables (methods)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the ratios to write")
    return parser.parse_args(arguments)


def _gguf_result(path: Path, seed: int) -> Result:
    """The row of a GGUF file named MODEL.TYPE.gguf or, with an importance matrix of WikiText-2, MODEL.TYPE-imatrix.gguf."""
    kind, imatrix, _ = path.stem.rpartition(".")[2].partition("-imatrix")
    return Result("GGUF", kind, WIKI + IMATRIX if imatrix else "none", (seed,))


def code_digest() -> str:
    """A hash of the code that decides the bytes of a checkpoint: that of `quantize/` and `kernels/` without comments and docstrings."""
    digest = hashlib.sha256()
    for floor in ("kernels", "quantize"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            if path.name not in REPORTING:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                digest.update(f"{path.relative_to(ROOT)}\n{ast.dump(_NoStrings().visit(tree))}\n".encode())
    return digest.hexdigest()


class _NoStrings(ast.NodeTransformer):
    """Removes statements that are a string alone: docstrings, and those of a dataclass's fields."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def _arguments(run: Run, row: Row, seed: int) -> list[str]:
    """The options of `dbrx-q quantize`."""
    files, sampled = run.calibration_files(row.calibration), run.sampled_sequences(seed)
    if row.calibration == SELF and sampled.exists():
        files = [str(sampled)]
    calibration = [part for file in files for part in ("--calibration", file)]
    return ["--method", row.method, *row.options, *calibration, *(["--seed", str(seed)] if calibration else [])]


def _checkpoint(run: Run, row: Row, seed: int, code: str) -> Path:
    """The folder of a checkpoint. Its name has a hash of all that decides its bytes."""
    key = hashlib.sha256((code + run.weights_digest()).encode())
    for file in run.calibration_files(row.calibration):
        path, _, weight = file.partition(":")
        key.update(weight.encode())
        if path != SELF:
            key.update(hashlib.sha256(Path(path).read_bytes()).digest())
    key.update("\0".join([row.method, *row.options, row.calibration, str(seed)]).encode())
    words = re.sub(r"[^a-z0-9]+", "-", f"{row.method} {row.size} {row.calibration} seed {seed}".lower())
    return run.out / "checkpoints" / f"{words}-{key.hexdigest()[:12]}"


def _quantize(run: Run, row: Row, seed: int, folder: Path, result: Result) -> bool:
    """Write the checkpoint, in a process of its own; False if that failed, which `result` records."""
    from dbrx_q.checkpoint.staging import partial_of

    print(f"quantizing {folder.name}", file=sys.stderr, flush=True)
    shutil.rmtree(partial_of(folder), ignore_errors=True)  # of a run that was killed; a new run takes about a minute
    command = [str(Path(sys.executable).with_name("dbrx-q")), "quantize", str(run.model), str(folder), *_arguments(run, row, seed)]
    process = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    sampled = folder.with_name(f"{folder.name}.self.safetensors")  # what `--calibration self` keeps beside the result
    if sampled.exists() and process.returncode == 0:
        if row.calibration == SELF:
            sampled.replace(run.sampled_sequences(seed))
        else:
            sampled.unlink()  # fewer sequences than the rows with that calibration alone take
    if process.returncode:
        result.failures[seed] = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        print(f"failed: {result.failures[seed]}", file=sys.stderr, flush=True)
    return process.returncode == 0


def _measure_all(run: Run, checkpoints: Mapping[Path, tuple[Result, int]]) -> None:
    """Add the figures of all checkpoints to their results, measuring where that has not been done: one pass of the reference per text."""
    from dbrx_q.sources.open import open_source

    sources = {path: open_source(str(path)) for path in checkpoints}
    for path, (result, _) in checkpoints.items():
        result.bits_per_weight = sources[path].bits_per_weight
        if sources[path].quantize_seconds is not None:
            result.seconds.append(sources[path].quantize_seconds)
    reference = open_source(str(run.model)).sha256()
    for name, text in run.text_files().items():
        places = {}
        for path in checkpoints:
            settings = [reference, sources[path].sha256(), hashlib.sha256(text.read_bytes()).hexdigest(), run.context, run.windows]
            places[path] = run.out / "measured" / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]}.json"
        lacking = [path for path in checkpoints if not places[path].exists()]
        if lacking:
            print(f"measuring {len(lacking)} checkpoints on {name}", file=sys.stderr, flush=True)
            for path, figures in zip(lacking, measure(run.model, lacking, text, run.context, run.windows), strict=True):
                figures.save(places[path])
        for path, (result, seed) in checkpoints.items():
            result.figures.setdefault(name, {})[seed] = Figures.load(places[path])


def measure(model: Path, checkpoints: Sequence[Path], text: Path, context: int, windows: int) -> list[Figures]:
    """Measure checkpoints against `model` on the first windows of a text, in one pass of the model.

    Args:
        model: the plain checkpoint.
        checkpoints: folders or GGUF files.
        text: a file of UTF-8 text.
        context: tokens of a window, all of which but the first are predicted.
        windows: how many windows at most.

    Raises:
        RequestError: the text is shorter than a window, or a checkpoint is of another model.
    """
    from dbrx_q.eval.compare.run import compare_checkpoints
    from dbrx_q.eval.resume import RunState
    from dbrx_q.eval.texts import load_text
    from dbrx_q.eval.windows import Protocol
    from dbrx_q.sources.open import open_source

    protocol = Protocol.of(context, limit=windows)
    states: list[RunState] = []
    sources = [open_source(str(path)) for path in checkpoints]
    comparison = compare_checkpoints(open_source(str(model)), sources, load_text(str(text)), protocol, resume=True, states=states)
    if not comparison.complete:
        raise KeyboardInterrupt  # which `compare_checkpoints` turns into figures of the windows that are done
    figures = []
    for state in states:
        scores = state.load()
        assert scores is not None
        by_window = {name: scores[name].reshape(-1, context - 1).mean(1) for name in ("kl", "nll", "nll_reference")}  # [W] each
        assert np.isclose(by_window["kl"].mean(), comparison.results[len(figures)].mean_kl)
        change, reference = by_window["nll"] - by_window["nll_reference"], by_window["nll_reference"]
        figures.append(Figures(by_window["kl"].tolist(), change.tolist(), reference.tolist()))
    for state in states:
        state.clear()
    return figures


def _write(results: Sequence[Result], run: Run, options: argparse.Namespace) -> None:
    """Write the tables and the plot."""
    from dbrx_q.eval.document import replace_section
    from dbrx_q.plots import render

    titles = {name: TITLES.get(name, name) for name in run.text_files()}
    text = tables(results, titles, _heading(run))
    if options.plot is not None and options.document is not None:
        image = os.path.relpath(options.plot, options.document.parent)
        text += f"\n\n![mean KL on each text, relative to rounding to nearest, by calibration and method]({image})"
    if options.document is None:
        print(text)
    else:
        replace_section(options.document, f"<!-- begin: {options.section} -->", f"<!-- end: {options.section} -->", text)
    if options.plot is not None:
        options.plot.write_bytes(render(plot(results, titles), "png"))


def _heading(run: Run) -> str:
    purpose = "which no choice saw" if run.set == "final" else "for choices, not for figures to quote"
    text = (
        f"`{run.model.name}` on the texts of `{run.set}`, {purpose}: the first {run.windows} windows of {run.context} tokens of each. Mean "
        "KL in nats with its standard error over windows; in brackets its ratio to `rtn, int4 g64` on the same text, bold where it is "
        "above 1. Seeds are averaged, but for the worst ratio: it is given for each seed, with the text of the worst."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
