"""The options that several commands have, each written once, so that it reads and means the same in all of them.

An option is an annotated type: `device: Device = "cpu"` gives a command `--device`. `option` makes one, also for the options of a single
command. The panels of `--help` are named here; a command's usual options stand first in its signature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import ACTIVATIONS, CACHE_POLICIES, DTYPES, KV_FORMATS, METHODS, MISS_POLICIES, PROTOCOLS, Choice

__all__ = [
    "CALIBRATION",
    "FORMATS",
    "HUB",
    "MACHINE",
    "MEMORY",
    "METHOD",
    "MODEL",
    "OUTPUT",
    "SAMPLING",
    "TASKS",
    "TEXT",
    "TEXT_HELP",
    "WORK",
    "Activations",
    "AllExperts",
    "Calibration",
    "CheckText",
    "Checkpoint",
    "Device",
    "DiskBandwidth",
    "Dtype",
    "Fallback",
    "Folder",
    "GpuSizes",
    "GroupSize",
    "HostBandwidth",
    "Json",
    "Kv",
    "Limit",
    "MeasuredDtype",
    "Method",
    "MissPolicy",
    "Mmap",
    "NoWorse",
    "OutFile",
    "OutFolder",
    "PlannedContext",
    "PlannedGpus",
    "PlannedRam",
    "Policy",
    "Prefetch",
    "Profile",
    "Protocol",
    "Ram",
    "Resume",
    "RoundingDevice",
    "Stride",
    "Text",
    "Window",
    "argument",
    "option",
]

# The panels.
CALIBRATION = "Calibration"
FORMATS = "Formats"
HUB = "Hugging Face Hub"
MACHINE = "Machine"
MEMORY = "Memory"
METHOD = "Method"
MODEL = "Model"
OUTPUT = "Output"
SAMPLING = "Sampling"
TASKS = "Tasks"
TEXT = "Text"
WORK = "Work"


def argument(metavar: str, help: str) -> Any:
    """A required argument."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def option(
    panel: str,
    help: str,
    *names: str,
    metavar: str | None = None,
    default: str | bool = True,
    one_of: Choice | None = None,
    least: int | None = None,
) -> Any:
    """An option.

    Args:
        panel: where `--help` shows it.
        help: one sentence; `{}` in it stands for the values of `one_of`.
        names: `--name` and `-n`, where the parameter's name does not give them.
        metavar: what stands for the value, as SIZE; a flag has none.
        default: how the default is described where the parameter's own value does not say it; False for an option without one.
        one_of: the values that it accepts; the command gets one as `str`.
        least: the smallest number that it accepts.
    """
    text = help if one_of is None else help.replace("{}", str(one_of))
    if isinstance(default, str):
        text = f"{text}  [default: {default}]"
    parser = None if one_of is None else one_of.parse
    return typer.Option(*names, help=text, metavar=metavar, show_default=default is True, parser=parser, min=least, rich_help_panel=panel)


# What is loaded, and how.
Checkpoint = Annotated[str, argument("PATH", "Checkpoint of any program: a folder, a GGUF file or a hub id.")]
Folder = Annotated[str, argument("PATH", "Checkpoint: a folder or a hub id, plain or quantized by dbrx-q.")]
Device = Annotated[str, option(MODEL, "Where the model runs: cpu, or cuda or cuda:N for a GPU that holds all of it.", metavar="DEVICE")]
Dtype = Annotated[str, option(MODEL, "Dtype of the activations: {}; auto is the checkpoint's.", metavar="DTYPE", one_of=DTYPES)]
MeasuredDtype = Annotated[
    str | None,
    option(
        MODEL,
        "Dtype of the activations: {}; auto is the checkpoint's.",
        metavar="DTYPE",
        one_of=DTYPES,
        default="float32 on the CPU, auto on a GPU",
    ),
]
GroupSize = Annotated[
    int | None,
    option(
        FORMATS,
        "Weights that share a scale: 32, 64 or 128; nf4 and nf4-double have 64 alone, q4_0 has 32; "
        "trellis formats rotate 64 or 128 inputs.",
        metavar="N",
        default="64, trellis 128, or the only one",
    ),
]
Kv = Annotated[str, option(MODEL, "Format of the KV cache: {}; plain is the activations' dtype.", metavar="FORMAT", one_of=KV_FORMATS)]

# How much memory it may take.
Ram = Annotated[
    str | None,
    option(
        MEMORY, "Host memory for weights, KV cache and workspace, as 64GiB; Python takes 0.4 GB more.", metavar="SIZE", default="no limit"
    ),
]
GpuSizes = Annotated[
    list[str] | None,
    option(
        MEMORY,
        "Memory to use of a GPU, as 22GiB, once for each GPU, or auto; properties may follow as in `plan`.",
        metavar="SIZE",
        default=False,
    ),
]
Policy = Annotated[str, option(MEMORY, "Which expert the cache evicts: {}.", metavar="POLICY", one_of=CACHE_POLICIES)]
Profile = Annotated[
    Path | None,
    option(
        MEMORY,
        "Trace (`dbrx-q trace`) whose most used experts are loaded first, and pinned by --policy static.",
        metavar="FILE",
        default=False,
    ),
]
Mmap = Annotated[
    bool, option(MEMORY, "Without --ram and --gpu, map the checkpoint's files and use weights in place, instead of reading them.")
]
Prefetch = Annotated[bool, option(MEMORY, "Load the experts of the next layer ahead, as predicted.")]
MissPolicy = Annotated[
    str,
    option(MEMORY, "How an expert that is not on its GPU is served: {}.", metavar="POLICY", one_of=MISS_POLICIES),
]
Fallback = Annotated[
    bool,
    option(MEMORY, "Let the checkpoint's fallback copy answer for experts on disk: faster and less exact.", "--fallback"),
]

# The machine of a plan or a simulation, which need not be this one.
PlannedGpus = Annotated[
    list[str] | None,
    option(
        MACHINE,
        "Memory of a GPU, as 24GiB or 24GiB,desktop,link=16GB,bandwidth=900GB, once for each GPU, or auto for this machine's.",
        "--gpu",
        metavar="SIZE",
        default=False,
    ),
]
PlannedContext = Annotated[
    int | None, option(MODEL, "Tokens of a sequence.", "--context", metavar="N", default="4096, at most the model's")
]
PlannedRam = Annotated[str | None, option(MACHINE, "Host memory for the model, as 64GiB.", "--ram", metavar="SIZE", default="no limit")]
HostBandwidth = Annotated[
    str | None, option(MACHINE, "Bytes a second that host memory reads.", metavar="SIZE", default="as `plan --measure` found, or 60GB")
]
DiskBandwidth = Annotated[
    str | None, option(MACHINE, "Bytes a second that the disk reads.", metavar="SIZE", default="as `plan --measure` found, or 5GB")
]

# How weights are rounded.
Method = Annotated[
    str,
    option(
        METHOD,
        "Quantization method: {}; awq, gptq and best need --calibration.",
        "--method",
        "--recipe",
        metavar="METHOD",
        one_of=METHODS,
    ),
]
Calibration = Annotated[
    list[str] | None,
    option(
        CALIBRATION,
        "Source to calibrate with: a text, JSON lines with 'text' or, for chats, 'messages', a data set, default (a mix for DBRX), self "
        "(sampled from the model) or self=PATH (from a copy); may be given again, each with a weight as in wiki.txt:2, of which 0 only "
        "measures.",
        metavar="SOURCE[:WEIGHT]",
        default=False,
    ),
]
Activations = Annotated[
    str, option(CALIBRATION, "Model whose activations enter a calibrated layer: {}.", metavar="MODEL", one_of=ACTIVATIONS)
]
AllExperts = Annotated[bool, option(CALIBRATION, "Calibrate every expert with all tokens, not those routed to it.", "--all-experts")]
CheckText = Annotated[
    list[str] | None,
    option(
        CALIBRATION,
        "Text that decides nothing, on which KL from SRC is measured before DST is complete; may be given again.",
        metavar="FILE",
        default=False,
    ),
]
NoWorse = Annotated[
    bool,
    option(
        CALIBRATION,
        "Store a matrix as rtn rounds it where that errs less on held-out tokens; exit code 1 if the result is still worse than rtn.",
        "--no-worse-than-rtn",
    ),
]
RoundingDevice = Annotated[str, option(MEMORY, "cpu, or cuda or cuda:N to quantize on a GPU what fits into it.", metavar="DEVICE")]

# The text that is measured on, and how it is cut.
TEXT_HELP = "Text: a UTF-8 file, JSON lines with a field 'text' (either may be gzipped), or wikitext2, wikitext2-tokenized or c4."
Text = Annotated[str, option(TEXT, TEXT_HELP, metavar="FILE", default=False)]
Window = Annotated[
    int | None,
    option(
        TEXT,
        "Tokens of a window.",
        "--context",
        metavar="TOKENS",
        default="2048, half-window 512; at most the model's",
    ),
]
Stride = Annotated[int | None, option(TEXT, "Tokens between the starts of strided windows.", metavar="TOKENS", default=False)]
Protocol = Annotated[
    str | None,
    option(
        TEXT,
        "How the text is cut into windows: {}; half-window is llama.cpp's.",
        metavar="NAME",
        one_of=PROTOCOLS,
        default="non-overlapping; strided with --stride",
    ),
]
Limit = Annotated[int | None, option(TEXT, "Measure only so many windows from the start of the text.", metavar="WINDOWS", default=False)]

# What is written.
OutFolder = Annotated[Path | None, option(OUTPUT, "Folder for the report.", "--out", metavar="DIR", default=False)]
OutFile = Annotated[Path, option(OUTPUT, "File to write.", "--out", metavar="FILE", default=False)]
Resume = Annotated[bool, option(OUTPUT, "Continue an interrupted run of the same command.", "--resume")]
Json = Annotated[bool, option(OUTPUT, "Print one JSON object on stdout, nothing else.", "--json")]
