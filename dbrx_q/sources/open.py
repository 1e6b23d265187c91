"""Functions that open a checkpoint of any program: to measure it, to run it, or loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.devices import check_device
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.budget import Budget
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .base import Source

__all__ = ["load", "load_runnable", "open_runnable", "open_source", "tokenizer_at"]

_CACHE_OPTIONS = {"cache_policy": "--policy", "profile": "--profile", "prefetch": "--no-prefetch"}


def open_source(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """The checkpoint at a path or hub id.

    Args:
        path_or_hub_id: a folder in any layout that is read (docs/layouts.md); a GGUF file, or any part of a split one; or the name of one
            of these on the hub, as `resolve_location` takes it.
        fallback: whether the fallback copy in a hub repository is fetched too.

    Raises:
        CheckpointError: the path does not exist, or a file is damaged or of another model.
        UnsupportedError: a GGUF file, where the gguf package is not installed.
    """
    from .folder import open_folder

    return _open(path_or_hub_id, open_folder, fallback=fallback)


def open_runnable(path_or_hub_id: str | os.PathLike[str], *, fallback: bool = False) -> Source:
    """As `open_source`, for text generation: a plain checkpoint of the published layout is mapped, and its experts may be offloaded."""
    from .folder import ConvertedFolder, NativeFolder
    from .open_weights import is_of_another_program

    def open_folder(name: str, folder: Path) -> Source:
        return ConvertedFolder(name, folder) if is_of_another_program(folder) else NativeFolder(name, folder)

    return _open(path_or_hub_id, open_folder, fallback=fallback)


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[DbrxForCausalLM, DbrxTokenizer]:
    """The model and the tokenizer of a checkpoint of any program.

    Tensors that a format of ours holds exactly stay packed. Of other programs' checkpoints the rest is dequantized, and where that does not
    fit in memory the experts of one layer are read at a time, which is slow: `dbrx-q quantize` makes a copy that runs faster.

    Args:
        path_or_hub_id: as `open_source` takes it.
        budget: limits on memory; None for what the device has.
        device: "cpu", "cuda" or "cuda:N"; None for the CPU, or the GPUs of the budget.
        dtype: of activations; None for the checkpoint's own, and bfloat16 for one that another program quantized.

    Raises:
        CheckpointError, ConfigError, TokenizerError: a file is missing, damaged or of another model.
        RequestError: too little memory, or a budget that the checkpoint does not take.
        UnsupportedError: a GGUF file, where the gguf package is not installed.
    """
    source = open_runnable(path_or_hub_id, fallback=budget is not None and budget.fallback)
    source.budget = budget
    tokenizer = source.tokenizer()  # an error before minutes of loading
    return load_runnable(source, dtype=dtype, device=check_device(device)), tokenizer


def load_runnable(source: Source, *, dtype: torch.dtype | None, device: torch.device) -> DbrxForCausalLM:
    """The model of a checkpoint from `open_runnable`, within the budget that the source has; arguments and errors as for `load`."""
    from .streamed import ConvertedSource

    if isinstance(source, ConvertedSource):
        if source.budget is not None and source.budget.fallback:
            raise RequestError(
                f"{source.name}: a fallback copy is carried by checkpoints that dbrx_q quantized; this one is {source.format}. Leave "
                "--fallback out"
            )
        _check_no_cache(source)
        if dtype is None and source.is_quantized:
            dtype = torch.bfloat16
    return source.load(dtype=dtype, device=device)


def _check_no_cache(source: Source) -> None:
    """Refuse options of the expert cache, which files of other programs do not have."""
    if source.budget is None:
        return
    plain = Budget(source.budget.machine)
    for name, option in _CACHE_OPTIONS.items():
        value = getattr(source.budget, name)
        if value != getattr(plain, name):
            raise RequestError(
                f"{source.name}: {option} is for experts in a cache, which files of other programs do not have; found {name} {value}. "
                "Leave it out, or make a copy with `dbrx-q quantize`"
            )


def tokenizer_at(location: Path) -> DbrxTokenizer:
    """The tokenizer of a checkpoint's folder or GGUF file.

    Raises:
        TokenizerError: it cannot be read.
    """
    from .gguf_file import open_parts
    from .gguf_tokenizer import tokenizer_of

    return tokenizer_of(open_parts(location)) if location.is_file() else DbrxTokenizer.from_pretrained(location)


def _open(path_or_hub_id: str | os.PathLike[str], open_folder: Callable[[str, Path], Source], *, fallback: bool) -> Source:
    from .gguf import GgufSource
    from .locations import resolve_location

    name, location = os.fspath(path_or_hub_id), resolve_location(path_or_hub_id, fallback=fallback)
    return open_folder(name, location) if location.is_dir() else GgufSource(name, location)
