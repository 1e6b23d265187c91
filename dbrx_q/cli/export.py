"""`dbrx-q export`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dbrx_q.planning.sizes import format_size, parse_size

from . import options, quantize_report, terminal
from .calibration import load_sequences, parse_sources
from .check_texts import check_unseen, load_checks
from .choices import DTYPES, GGUF_TYPES, LAYOUTS
from .help import example
from .options import CALIBRATION, FORMATS, HUB, MEMORY, METHOD, argument, option
from .quantization import check_method, open_location, run_requests
from .self_calibration import Sampling

if TYPE_CHECKING:
    from dbrx_q.checkpoint.stored_weights import StoredWeights
    from dbrx_q.quantize.export.record import ExportRecord
    from dbrx_q.quantize.export.target import ExportPlan, Target
    from dbrx_q.quantize.pipeline.records import RunRecord

__all__ = ["EXAMPLE", "command"]

EXAMPLE = example(
    "dbrx-q export databricks/dbrx-instruct dbrx-gguf --to gguf --type q4_0 --method best --calibration default",
    "dbrx-q export dbrx-int4 dbrx-plain --to transformers",
)

_FREE_SHARE = 4  # fifths of the free memory
_LAYOUTS_OF = {
    "--type": ("gguf",),
    "--split-size": ("gguf",),
    "--bits": ("mlx",),
    "--group-size": ("mlx",),
    "--dtype": ("transformers", "mlx"),
}
"""The layouts that have an option."""
_PART_AND_TYPE = re.compile(r"([-.](?i:i?q\d\w*|b?f16|f32|mxfp4\w*|nvfp4))?(-\d{5}-of-\d{5})?\.gguf$")
"""The end of the name of a GGUF file: its type, and the number of a part."""

_To = Annotated[str, option(FORMATS, "Layout to write: {}.", "--to", metavar="LAYOUT", one_of=LAYOUTS, default=False)]
_Type = Annotated[
    str | None,
    option(
        FORMATS,
        "For gguf, type of the matrices: {}; what SRC does not hold in it is rounded by --method.",
        metavar="TYPE",
        one_of=GGUF_TYPES,
        default="as SRC holds each, without rounding",
    ),
]
_Bits = Annotated[
    int | None,
    option(
        FORMATS,
        "For mlx, bits of a weight, 4 or 8; what SRC does not hold so is rounded by --method.",
        metavar="N",
        default="as SRC holds each, without rounding",
    ),
]
_Dtype = Annotated[
    str | None,
    option(
        FORMATS,
        "For transformers, dtype of the weights, for mlx of scales and plain weights: {}.",
        metavar="DTYPE",
        one_of=DTYPES,
        default="bfloat16; for mlx the model's",
    ),
]
_SplitSize = Annotated[
    str | None,
    option(FORMATS, "For gguf, begin another part after so many bytes, as 40GiB.", metavar="SIZE", default="one file"),
]


def command(
    source: Annotated[str, argument("SRC", "Checkpoint to export, of any program: a folder, a GGUF file or a hub id.")],
    destination: Annotated[Path, argument("DST", "Folder to write; new or empty.")],
    to: _To,
    type: _Type = None,
    bits: _Bits = None,
    group_size: options.GroupSize = None,
    dtype: _Dtype = None,
    split_size: _SplitSize = None,
    method: options.Method = "rtn",
    act_order: Annotated[bool, option(METHOD, "With gptq and best, quantize the columns with the largest inputs first.")] = True,
    calibration: options.Calibration = None,
    sequences: Annotated[int, option(CALIBRATION, "Sequences to draw from all sources together.", metavar="N")] = 256,
    length: Annotated[int, option(CALIBRATION, "Tokens of a sequence.", metavar="N")] = 512,
    seed: Annotated[int, option(CALIBRATION, "Seed of the draw and, for self, of the sampling.", metavar="N")] = 0,
    activations: options.Activations = "quantized",
    all_experts: options.AllExperts = False,
    check_text: options.CheckText = None,
    check_sequences: Annotated[int, option(CALIBRATION, "Most sequences of each check text.", metavar="N", least=1)] = 64,
    no_worse_than_rtn: options.NoWorse = False,
    memory: Annotated[str | None, option(MEMORY, "Host memory to use, as 24GiB.", metavar="SIZE", default="4/5 of what is free")] = None,
    device: options.RoundingDevice = "cpu",
    device_memory: Annotated[str | None, option(MEMORY, "GPU memory to use, as 20GiB.", metavar="SIZE", default="9/10 of it")] = None,
    revision: Annotated[str | None, option(HUB, "Branch, tag or commit of SRC.", metavar="NAME")] = None,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint in the layout of another program: GGUF for llama.cpp, MLX, or plain weights for transformers.

    What --type asks for and SRC does not hold is first rounded into DST.rounded, a checkpoint of dbrx-q, which is removed at the end.
    """
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.checkpoint.staging import check_destination, partial_of
    from dbrx_q.errors import RequestError
    from dbrx_q.planning.host_memory import available_bytes
    from dbrx_q.quantize.calibration.calibrated import CalibrationOptions
    from dbrx_q.quantize.pipeline.accelerator import open_accelerator
    from dbrx_q.quantize.pipeline.run import QuantizationRequest, check_places
    from dbrx_q.sources.open_weights import open_weights

    _check_options(to, {"--type": type, "--split-size": split_size, "--bits": bits, "--group-size": group_size, "--dtype": dtype})
    check_method(method, calibration or [], None, activations)
    budget = parse_size(memory) if memory is not None else _FREE_SHARE * available_bytes() // 5
    check_destination(destination)
    opened = open_location(source, revision, None)
    folder = opened if isinstance(opened, Path) else opened.folder
    target = _target(to, _name_of(source, folder), folder, type=type, split_size=split_size, bits=bits, group_size=group_size, dtype=dtype)
    rounded = _rounded_folder(destination)
    runs: dict[Path, RunRecord] = {}
    try:
        check_places(opened, destination)
        with open_weights(opened) as weights:
            plan = target.plan(weights)
            if not plan.to_round:
                if calibration:
                    raise RequestError(
                        f"--calibration is for weights that are rounded; found {', '.join(calibration)}, and nothing is rounded. Leave it "
                        "out, or give --type q4_0"
                    )
                _show(_written(target, weights, plan, destination, budget), destination, runs, json=json)
                return
            _check_not_ours(weights, plan)
            if rounded.exists() and not resume:
                raise RequestError(
                    f"{rounded}: must not exist, unless --resume takes what an earlier run has rounded there. Add --resume, or remove it"
                )
            _check_disk(destination, plan.nbytes(weights), rounded)
            formats = plan.formats(weights)
        accelerator = open_accelerator(device, None if device_memory is None else parse_size(device_memory))
        checks = load_checks(folder, check_text or [], count=check_sequences, length=length)
        sampling = Sampling(source, opened, rounded, budget, revision, accelerator, resume=resume, low_disk=False, dry_run=False)
        tokens, about = load_sequences(
            folder, parse_sources(calibration or []), count=sequences, length=length, seed=seed, sampling=sampling
        )
        check_unseen(checks, tokens, about)
        request = QuantizationRequest(
            lambda _: formats,
            method=method,
            source=source,
            keep=True,
            sequences=tokens,
            about=about,
            options=CalibrationOptions(activations=activations, all_experts=all_experts, act_order=act_order),
            checks=tuple(checks.values()),
            no_worse_than_rtn=no_worse_than_rtn,
            accelerator=accelerator,
        )
        runs = run_requests(opened, {rounded: request}, budget, resume=resume)
    finally:
        if not isinstance(opened, Path):
            opened.close(keep=partial_of(rounded).exists())
    with Checkpoint(rounded) as weights:
        record = _written(target, weights, target.plan(weights), destination, budget)
    shutil.rmtree(rounded)
    _show(record, destination, runs, json=json)
    quantize_report.check_no_worse(runs, None)


def _check_options(to: str, given: dict[str, str | int | None]) -> None:
    """Refuse options of another layout.

    Raises:
        RequestError: names the option and its layout.
    """
    from dbrx_q.errors import RequestError

    for name, value in given.items():
        if value is not None and to not in _LAYOUTS_OF[name]:
            layouts = " and ".join(f"--to {layout}" for layout in _LAYOUTS_OF[name])
            raise RequestError(f"{name} is an option of {layouts}; found {value} with --to {to}. Leave it out")


def _check_not_ours(weights: StoredWeights, plan: ExportPlan) -> None:
    """Refuse to round weights that dbrx_q has quantized.

    Raises:
        RequestError: names a tensor that would be rounded, and how it is stored.
    """
    from dbrx_q.checkpoint.folder import Checkpoint
    from dbrx_q.errors import RequestError

    if isinstance(weights, Checkpoint) and weights.formats:
        name, fmt = next(iter(plan.to_round.items()))
        raise RequestError(
            f"{weights.folder}: weights that dbrx-q has quantized are not rounded again; {name} is {weights.label_of(name)} and would "
            f"become {fmt}. Leave --type or --bits out, so that each tensor keeps its codes, or give the original"
        )


def _target(
    to: str,
    name: str,
    folder: Path,
    *,
    type: str | None,
    split_size: str | None,
    bits: int | None,
    group_size: int | None,
    dtype: str | None,
) -> Target:
    """The layout with the options of the command line.

    Raises:
        RequestError: bits or a group size that MLX does not get.
    """
    import torch

    from dbrx_q.errors import RequestError

    if to == "gguf":
        from dbrx_q.quantize.export.gguf import GgufTarget

        return GgufTarget(type, name, folder if folder.is_dir() else None, 0 if split_size is None else parse_size(split_size))
    chosen = None if dtype in (None, "auto") else getattr(torch, dtype)
    if to == "mlx":
        from dbrx_q.quantize.export.mlx import BITS, GROUP_SIZES, MlxTarget

        if bits is not None and bits not in BITS:
            raise RequestError(f"--bits must be one of {', '.join(map(str, BITS))}; found {bits}. Give one of them")
        if group_size is not None and (bits is None or group_size not in GROUP_SIZES):
            raise RequestError(
                f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, beside --bits; found {group_size}. "
                "Give both, or leave it out"
            )
        return MlxTarget(bits, group_size or MlxTarget.group_size, chosen)
    from dbrx_q.quantize.export.transformers import TransformersTarget

    return TransformersTarget(torch.bfloat16 if dtype is None else chosen)


def _name_of(source: str, folder: Path) -> str:
    """The model's name: the last part of a hub id, or of the path of a folder or file."""
    name = source.rsplit("/", 1)[-1] if not Path(source).exists() else folder.resolve().name
    return _PART_AND_TYPE.sub("", name)


def _rounded_folder(destination: Path) -> Path:
    target = destination.resolve()
    return target.with_name(target.name + ".rounded")


def _check_disk(destination: Path, nbytes: int, rounded: Path) -> None:
    """Refuse a disk that cannot hold the rounded weights and the export, which are there together.

    Raises:
        RequestError: with the bytes that both take and those that are free.
    """
    from dbrx_q.checkpoint.staging import partial_of
    from dbrx_q.errors import RequestError

    parent = next(folder for folder in destination.resolve().parents if folder.exists())
    there = sum(path.stat().st_size for folder in (rounded, partial_of(rounded)) for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + there
    if free < 2 * nbytes:
        raise RequestError(
            f"{parent}: the rounded weights and the export take {2 * nbytes:,} bytes and the disk has {free:,} free. Make room or choose "
            "another"
        )


def _written(target: Target, weights: StoredWeights, plan: ExportPlan, destination: Path, budget: int) -> ExportRecord:
    with terminal.progress("exporting", unit_bytes=True) as on_bytes:
        return target.write(weights, plan, destination, memory=budget, on_bytes=on_bytes)


def _show(record: ExportRecord, destination: Path, runs: dict[Path, RunRecord], *, json: bool) -> None:
    """Print what was rounded and what was written."""
    if json:
        rounding = [quantize_report.run_as_dict(run, folder) for folder, run in runs.items()]
        terminal.print_json({"destination": str(destination), **record.to_dict(), "rounding": rounding[0] if rounding else None})
        return
    quantize_report.show_runs(runs, json=False)
    sizes = ", ".join(f"{kind} {format_size(nbytes)}" for kind, nbytes in record.bytes_by_type.items())
    print(f"wrote   {format_size(record.nbytes):>10}  {record.bits_per_weight:6.3f} bits per weight  {destination}")
    print(f"{len(record.files)} file(s) in {record.seconds:.1f} s: {sizes}")
