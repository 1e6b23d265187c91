"""`dbrx-q quantize`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output

if TYPE_CHECKING:
    import torch

__all__ = ["EXAMPLE", "command"]

EXAMPLE = output.example("dbrx-q quantize databricks/dbrx-instruct dbrx-int4 --format int4 --group-size 64")


class Format(str, Enum):
    """Formats for the experts."""

    int4 = "int4"
    int8 = "int8"
    nf4 = "nf4"


class Recipe(str, Enum):
    """How weights are rounded; the last three are calibrated with a text."""

    rtn = "rtn"
    clip = "clip"
    hqq = "hqq"
    weighted = "weighted"
    gptq = "gptq"
    best = "best"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint to quantize: a folder or a hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    format: Annotated[Format, typer.Option(help="Format of the experts; embedding, attention and head become int8.")] = Format.int4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128; nf4 has 64 alone.")] = 64,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="How weights are rounded: rtn to nearest, clip and hqq in searched ranges; weighted, gptq and best with --calibration."
        ),
    ] = Recipe.rtn,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to calibrate with: text, JSONL, either gzipped, or wikitext2 or c4.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate with; fewer where the text is shorter.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the draw of sequences from the text.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    json: Annotated[bool, typer.Option("--json", help=output.JSON_HELP)] = False,
) -> None:
    """Write a quantized copy of a checkpoint, in memory bounded by one tensor and its result, and by the calibration's activations."""
    import time

    from dbrx_q.errors import RequestError
    from dbrx_q.hub import resolve_folder
    from dbrx_q.layout import TensorFormat
    from dbrx_q.quantize.methods import METHODS
    from dbrx_q.quantize.pipeline import quantize_checkpoint
    from dbrx_q.quantize.recipe import default_recipe

    if calibration is not None and not METHODS[recipe.value].calibrated:
        raise RequestError(f"the recipe {recipe.value} takes no calibration; found {calibration!r}. Leave --calibration out, or name best")
    folder = resolve_folder(source, revision=revision)
    tokens, about = _calibration(folder, calibration, sequences, length, seed)
    experts = TensorFormat(format.value, group_size)
    started = time.perf_counter()
    with output.progress("quantizing", unit_bytes=True) as on_bytes:
        report = quantize_checkpoint(
            folder,
            destination,
            lambda c: default_recipe(c.config, experts),
            method=recipe.value,
            sequences=tokens,
            about=about,
            on_bytes=on_bytes,
        )
    seconds = time.perf_counter() - started
    before, after = (8 * n / report.parameters for n in (report.bytes_in, report.bytes_out))
    if json:
        output.print_json(
            {
                "source": str(folder),
                "destination": str(destination),
                "format": format.value,
                "group_size": group_size,
                "recipe": recipe.value,
                "calibration": about,
                "fallbacks": report.fallbacks,
                "parameters": report.parameters,
                "bytes_in": report.bytes_in,
                "bytes_out": report.bytes_out,
                "bits_per_weight_in": before,
                "bits_per_weight_out": after,
                "shards": report.shards,
                "seconds": seconds,
            }
        )
        return
    speed = output.size(report.bytes_in / seconds)
    print(f"before  {output.size(report.bytes_in):>10}  {before:6.3f} bits per weight  {folder}")
    print(f"after   {output.size(report.bytes_out):>10}  {after:6.3f} bits per weight  {destination}")
    if about is not None:
        print(f"calibrated with {about['sequences']} sequences of {length} tokens of {calibration}")
    if report.fallbacks:
        print(f"{len(report.fallbacks)} expert(s) were reached by too few tokens, and took all of their layer's, weighted by the router")
    print(f"{report.shards} shard(s) in {seconds:.1f} s, {speed}/s")


def _calibration(folder: Path, text: str | None, count: int, length: int, seed: int) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    """(the sequences, what is said of them in config.json) for a text; nothing without one."""
    if text is None:
        return None, None
    from dbrx_q.eval.texts import load_text
    from dbrx_q.quantize.sequences import sequences_of
    from dbrx_q.tokenizer import DbrxTokenizer

    loaded = load_text(text)
    found = sequences_of(DbrxTokenizer.from_pretrained(folder).encode(loaded.text), count=count, length=length, seed=seed)
    return found, {"text_sha256": loaded.sha256, "sequences": len(found), "length": length, "seed": seed}
