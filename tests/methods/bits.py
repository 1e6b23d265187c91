"""Quantizes a model into the formats of every size, measures each, and writes the tables and the plot of divergence over bits.

    .venv/bin/python tests/methods/bits.py MODEL OUT --texts TEXTS --document docs/quantization.md --plot docs/bits.svg

Every row is one `dbrx-q quantize` and one `dbrx-q compare`, whose commands go to stderr. OUT keeps finished checkpoints and figures: the
same command continues an interrupted run. A checkpoint is used again while the code of `quantize/` and `kernels/`, the options and the text
are the same; with `--any-code`, whatever the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bits_tables import Figures, Result, plot, size_table, text_table
from ggml_types import TYPE_FILE
from protocol import code_digest

__all__ = ["ROWS", "Mix", "Row", "main", "size_at_dbrx"]

CONTEXT, WINDOWS = 512, 96
DBRX_QUANTIZE = str(Path(sys.executable).with_name("dbrx-q"))
WIKI, NOVEL = "wikitext-2", "novel"
CALIBRATIONS = {WIKI: "WikiText-2", NOVEL: "novel", "": ""}
"""Names of the texts in TEXTS/calibration and how tables name them; "" for none."""
TEXTS = {"wikitext-2": "WikiText-2", "pride-and-prejudice": "Pride and Prejudice", "python": "Python"}
"""Names of the texts in TEXTS/final and the headings of their columns. The first is that of the main table."""
_INT8_OTHERS = ("--tensor", "attention=int8:64", "--tensor", "embedding=int8:64", "--tensor", "head=int8:64")


@dataclass(frozen=True)
class Mix:
    """A row of `--target-bpw`: the checkpoint may take as many bits as lie between those of two uniform formats."""

    low: str
    """The smaller format of the experts."""
    high: str
    """The larger format of the experts."""
    share: float
    """0 for the bits of the smaller one, 1 for those of the larger one."""
    free: bool = False
    """Whether attention, embedding and head may have other formats than int8."""


@dataclass(frozen=True)
class Row:
    """One way to quantize the model."""

    series: str
    """The curve of the plot that the row is on; "" for rows that the plot leaves out."""
    method: str
    """As `--method` names it."""
    options: tuple[str, ...]
    """Of `dbrx-q quantize`, beside method, calibration and `--target-bpw`."""
    calibration: str = ""
    """A key of `CALIBRATIONS`."""
    mix: Mix | None = None
    """What sets `--target-bpw`; None without it."""
    texts: bool = False
    """Whether the row is in the table of texts and calibrations."""
    whole: bool = False
    """Whether the row is measured on the whole of the first text, too."""

    @property
    def name(self) -> str:
        """What tells rows apart, for `--only`."""
        mix = "" if self.mix is None else f" {self.mix.low}-{self.mix.high} {self.mix.share:g}{' free' if self.mix.free else ''}"
        return f"{self.method} {' '.join(self.options)}{mix} {CALIBRATIONS[self.calibration]}".strip()


def _sized(fmt: str, group: int | None = None) -> tuple[str, ...]:
    return ("--format", fmt, *(() if group is None else ("--group-size", str(group))))


_BOTH = (("int4", 64), ("int3", 64), ("int2", 32), ("trellis4", None), ("trellis3", None), ("trellis2", None))  # in the table of texts
ROWS = (
    Row("int, best", "best", _sized("int8", 64), WIKI),
    *(Row("int, best", "best", _sized("int4", group), WIKI, texts=group == 64, whole=group == 64) for group in (32, 64, 128)),
    Row("int, best", "best", _sized("int3", 64), WIKI, texts=True),
    Row("int, best", "best", _sized("int2", 32), WIKI, texts=True),
    *(Row("trellis, best", "best", _sized(f"trellis{k}"), WIKI, texts=True, whole=True) for k in (4, 3, 2)),
    *(Row("trellis-fast, best", "best", _sized(f"trellis{k}-fast"), WIKI) for k in (4, 3, 2)),
    *(Row("trellis, without data", "rtn", _sized(f"trellis{k}")) for k in (4, 3, 2)),
    Row("", "best", (*_sized("trellis2"), "--tensor", "w2=trellis3"), WIKI),
    *(Row("trellis, mixed", "best", _INT8_OTHERS, WIKI, Mix(f"trellis{k}", f"trellis{k + 1}", 0.5)) for k in (2, 3)),
    Row("", "best", (), WIKI, Mix("trellis3", "trellis4", 0.0, free=True)),
    *(Row("int, to nearest", "rtn", _sized("int4", group)) for group in (32, 64, 128)),
    Row("int, to nearest", "rtn", _sized("int3", 64)),
    Row("int, to nearest", "rtn", _sized("int2", 32)),
    Row("nf4 (as bitsandbytes)", "rtn", _sized("nf4")),
    Row("nf4 (as bitsandbytes)", "rtn", _sized("nf4-double")),
    *(Row("", "best", _sized(fmt, group), NOVEL, texts=True) for fmt, group in _BOTH),
)


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    model: Path
    """The plain checkpoint."""
    out: Path
    """Folder of finished checkpoints and figures."""
    texts: Path
    """Folder that `texts.py` wrote."""
    any_code: bool
    """Whether checkpoints are used again that other code has made."""
    measure_only: bool
    """Whether nothing is quantized."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a command failed."""
    options = _options(arguments)
    run = Run(options.model, options.out, options.texts, options.any_code, options.measure_only)
    for name in ("checkpoints", "measured"):
        (run.out / name).mkdir(parents=True, exist_ok=True)
    code, results = code_digest(), []
    for row in (row for row in ROWS if re.search(options.only, row.name)):
        result = Result(row.series, _shown(row), CALIBRATIONS[row.calibration], texts=row.texts, whole=row.whole)
        results.append(result)
        _quantize(run, row, code, result)
    results += [_of_another_program(path) for path in options.beside]
    finished = [result for result in results if result.path is not None]
    for result in finished:
        result.expert_bits, result.dbrx_bytes = size_at_dbrx(result.path)
    failed = not _measure_all(run, finished)
    _write(results, options)
    return 1 if failed or any(result.failure for result in results) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="plain checkpoint, such as tests/data/dbrx-nano")
    parser.add_argument("out", type=Path, help="folder that keeps finished checkpoints and figures")
    parser.add_argument("--texts", type=Path, required=True, help="folder that tests/methods/texts.py wrote")
    parser.add_argument("--only", default="", metavar="PATTERN", help='rows to run, such as "best.*trellis"')
    parser.add_argument("--beside", type=Path, nargs="*", default=[], metavar="PATH", help="the model as other programs quantized it")
    parser.add_argument("--any-code", action="store_true", help="use checkpoints again that other code has made")
    parser.add_argument("--measure-only", action="store_true", help="quantize nothing: measure the checkpoints that are finished")
    parser.add_argument("--document", type=Path, help="document in which to replace the tables; without it they are printed")
    parser.add_argument("--section", default="bits", help="marker lines of the main table; those of the other end in -texts (bits)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="plot to write")
    return parser.parse_args(arguments)


def _shown(row: Row) -> str:
    """The options of a row as the table shows them."""
    if row.mix is not None:
        mix = row.mix
        words = f"{mix.share:.0%} of the way from {mix.low} to {mix.high}" if mix.share else f"the bits of {mix.low}"
        return f"`--target-bpw`: {words}{'' if mix.free else ', the rest int8'}; `--method {row.method}`"
    return " ".join([*row.options, "--method", row.method])


def _arguments(run: Run, row: Row) -> list[str]:
    """The options of `dbrx-q quantize`."""
    options = [*row.options, "--method", row.method]
    if row.mix is not None:
        options += ["--target-bpw", f"{_target(run.model, row.mix):.4f}"]
    return [*options, *(["--calibration", str(_calibration(run, row))] if row.calibration else [])]


def _calibration(run: Run, row: Row) -> Path:
    return run.texts / "calibration" / f"{row.calibration}.txt"


def _target(model: Path, mix: Mix) -> float:
    """Bits per weight of the whole checkpoint, rounded up by less than 0.0001."""
    import math

    from dbrx_q.checkpoint.layout import TensorFormat, dense_tensors, parts_of
    from dbrx_q.config import DbrxConfig
    from dbrx_q.quantize.pipeline.format_assignment import default_formats

    config = DbrxConfig.from_pretrained(model)
    tensors = dense_tensors(config)
    sizes = []
    for name in (mix.low, mix.high):
        formats = default_formats(config, TensorFormat.parse(name))
        plain = sum(16 * math.prod(tensor.shape) for tensor in tensors if tensor.name not in formats)
        parts = [part for tensor in tensors if tensor.name in formats for part in parts_of(tensor, formats[tensor.name])]
        sizes.append(plain + sum(8 * part.nbytes for part in parts))
    bits = sizes[0] + mix.share * (sizes[1] - sizes[0])
    return math.ceil(1e4 * bits / sum(math.prod(tensor.shape) for tensor in tensors)) / 1e4


def _quantize(run: Run, row: Row, code: str, result: Result) -> None:
    """Make the checkpoint, unless it is there, and set the result's path and time; or its failure."""
    try:
        arguments = _arguments(run, row)
    except ValueError as error:  # of a format that this version does not have
        result.failure = str(error)
        return
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(run.model.glob("*.safetensors"))))
    key.update("\0".join(argument for argument in arguments if argument != str(_calibration(run, row))).encode())
    key.update(_calibration(run, row).read_bytes() if row.calibration else b"")
    words = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    folder = run.out / "checkpoints" / f"{words}-{key.hexdigest()[:12]}"
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists() and note.exists():
        record = json.loads(note.read_text(encoding="utf-8"))
        if run.any_code or run.measure_only or record["code"] == code:
            result.path, result.seconds = folder, record["processor_seconds"]
            return
    if run.measure_only:
        return
    for place in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(place, ignore_errors=True)
    command = [DBRX_QUANTIZE, "quantize", str(run.model), str(folder), *arguments]
    before = _children_seconds()
    failure = _execute(command)
    if isinstance(failure, bytes):
        result.path, result.seconds = folder, _children_seconds() - before
        record = {"code": code, "processor_seconds": result.seconds, "command": shlex.join(command)}
        note.write_text(json.dumps(record, indent=1), encoding="utf-8")
    else:
        result.failure = failure


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _execute(command: Sequence[str]) -> bytes | str:
    """The output of a command, or the last line of its errors if it failed."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    process = subprocess.run(command, check=False, capture_output=True)
    if process.returncode == 0:
        return process.stdout
    failure = (process.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    print(f"failed: {failure}", file=sys.stderr, flush=True)
    return failure


def _of_another_program(path: Path) -> Result:
    """The row of a GGUF file named MODEL.TYPE.gguf or MODEL.TYPE-imatrix.gguf, of a folder of `ggml_types.py`, or of another folder."""
    if (path / TYPE_FILE).exists():
        record = json.loads((path / TYPE_FILE).read_text(encoding="utf-8"))
        series = "llama.cpp, importance matrix" if record["imatrix"] else "llama.cpp"
        return Result(series, f"experts in llama.cpp's {record['type']}", "WikiText-2" if record["imatrix"] else "", path=path)
    if path.suffix == ".gguf":
        kind, imatrix, _ = path.stem.rpartition(".")[2].partition("-imatrix")
        series = "llama.cpp, importance matrix" if imatrix else "llama.cpp"
        return Result(series, f"llama.cpp's file in {kind}", "WikiText-2" if imatrix else "", path=path)
    return Result("bitsandbytes", path.name, "", path=path)


def size_at_dbrx(path: Path) -> tuple[float, float]:
    """Bits per expert weight and bytes of the whole model, were DBRX itself quantized as a checkpoint is.

    Formats of this package take what their records say at DBRX's dimensions, where a scale per row is shared by more weights than in a
    small model. Tensors of other programs take as many bits per weight as in the file. Several layers count with their mean.
    """
    import math
    from statistics import fmean

    from dbrx_q.checkpoint.layout import EXPERT_MATRICES, dense_tensors, parts_of, tensor_formats
    from dbrx_q.eval.bench.synthetic import dbrx_layer_config
    from dbrx_q.sources.open_weights import is_of_another_program, open_weights

    dbrx = dense_tensors(dbrx_layer_config(n_layers=40, vocab_size=100352))
    by_role = {tensor.role: tensor for tensor in dbrx}
    bits: dict[str, list[float]] = {}  # per weight at DBRX's dimensions, by role
    with open_weights(path) as weights:
        own = {} if path.is_file() or is_of_another_program(path) else tensor_formats(weights.config, str(path))
        fixed = json.loads((path / TYPE_FILE).read_text(encoding="utf-8"))["bits"] if (path / TYPE_FILE).exists() else {}
        for name, tensor in weights.tensors.items():
            large = by_role[tensor.role]
            if name in own:
                stored = sum(part.nbytes for part in parts_of(large, own[name])) / math.prod(large.shape)
            else:
                stored = weights.nbytes_of(name) / math.prod(tensor.shape)
            bits.setdefault(tensor.role, []).append(fixed.get(tensor.role, 8 * stored))
    mean = {role: fmean(values) for role, values in bits.items()}
    whole = sum(math.prod(tensor.shape) * mean[tensor.role] for tensor in dbrx) / 8
    return fmean(mean[role] for role in EXPERT_MATRICES), whole


def _measure_all(run: Run, results: Sequence[Result]) -> bool:
    """Set the figures of all results, measuring where that has not been done; False if a command failed."""
    complete = True
    for number, text in enumerate(TEXTS):
        rows = [result for result in results if number == 0 or result.texts]
        complete &= _measure(run, rows, text, WINDOWS)
    return complete & _measure(run, [result for result in results if result.whole], next(iter(TEXTS)), None)


def _measure(run: Run, results: Sequence[Result], text: str, windows: int | None) -> bool:
    from dbrx_q.sources.open import open_source

    file = run.texts / "final" / f"{text}.txt"
    reference, content = open_source(str(run.model)).sha256(), hashlib.sha256(file.read_bytes()).hexdigest()
    places = {}
    for result in results:
        settings = [reference, open_source(str(result.path)).sha256(), content, CONTEXT, windows]
        places[str(result.path)] = run.out / "measured" / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]}.json"
    lacking = [path for path, place in places.items() if not place.exists()]
    if lacking:
        limit = [] if windows is None else ["--limit", str(windows)]
        command = [DBRX_QUANTIZE, "compare", str(run.model), *lacking, "--text", str(file), "--context", str(CONTEXT), *limit, "--json"]
        output = _execute(command)
        if isinstance(output, str):
            return False
        comparison = json.loads(output)
        for path, measured in zip(lacking, comparison["results"], strict=True):
            _save(places[path], measured | {"reference_perplexity": comparison["reference_perplexity"]})
    for result in results:
        result.figures[text, windows] = Figures.of(json.loads(places[str(result.path)].read_text(encoding="utf-8")))
    return True


def _save(place: Path, measured: Mapping[str, Any]) -> None:
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps({name: value for name, value in measured.items() if name != "worst_tokens"}), encoding="utf-8")
    partial.replace(place)


def _write(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Write the tables and the plot."""
    from dbrx_q.eval.document import replace_section
    from dbrx_q.plots import render

    first = next(iter(TEXTS))
    tables = {options.section: size_table(results, first, WINDOWS), f"{options.section}-texts": text_table(results, TEXTS, WINDOWS)}
    if options.plot is not None:
        options.plot.write_bytes(render(plot(results, first, WINDOWS), options.plot.suffix.removeprefix(".")))
        if options.document is not None:
            image = os.path.relpath(options.plot, options.document.parent)
            tables[options.section] += f"\n\n![mean KL over bits per expert weight]({image})"
    for section, text in tables.items():
        if options.document is None:
            print(text, end="\n\n")
        else:
            replace_section(options.document, f"<!-- begin: {section} -->", f"<!-- end: {section} -->", text)


if __name__ == "__main__":
    sys.exit(main())
