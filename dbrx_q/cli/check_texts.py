"""`--check-text FILE`: texts on which `dbrx-q quantize` measures the result before it is complete."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import RequestError

from . import terminal

if TYPE_CHECKING:
    import torch

    from dbrx_q.quantize.calibration.held_out import CheckSequences
    from dbrx_q.quantize.calibration.sources import CalibrationSequences
    from dbrx_q.quantize.pipeline.run import QuantizationRequest

__all__ = ["check_unseen", "load_checks", "note_unmeasured"]

_RUN = 16  # tokens of a run that two texts share
_MOST_SHARED = 0.05  # of the runs of a check text; licences and headers of files are shared by texts that are different


def load_checks(folder: Path, names: Sequence[str], *, count: int, length: int) -> dict[str, CheckSequences]:
    """The sequences of check texts, by the SHA-256 of the text: windows at even distances from the first of a text to its last.

    Args:
        folder: of the checkpoint, or its file, whose tokenizer is used.
        names: files or data sets.
        count: the most sequences of each text.
        length: tokens of each.

    Raises:
        RequestError: as `load_text`; a text without one whole sequence, or one that is given twice.
        TokenizerError: the tokenizer cannot be read.
    """
    from dbrx_q.eval.texts import load_text
    from dbrx_q.quantize.calibration.held_out import CheckSequences
    from dbrx_q.sources.open import tokenizer_at

    texts = [load_text(name) for name in names]
    tokenizer = tokenizer_at(folder) if texts else None
    checks: dict[str, CheckSequences] = {}
    for text in texts:
        if text.sha256 in checks:
            raise RequestError(
                f"--check-text must name each text once; found {checks[text.sha256].name} and {text.name}, the same text. Leave one out"
            )
        assert tokenizer is not None
        ids = _windows(text.name, tokenizer.encode(text.text, split_special_tokens=True), count, length)
        checks[text.sha256] = CheckSequences(text.name, ids)
    return checks


def check_unseen(checks: Mapping[str, CheckSequences], calibration: CalibrationSequences | None, about: Mapping[str, Any] | None) -> None:
    """Refuse a check text that is a source of the calibration; warn of one that shares passages with what calibrates.

    Args:
        checks: as `load_checks` gives them.
        calibration: the sequences that calibrate.
        about: what config.json says of them.

    Raises:
        RequestError: names both.
    """
    if calibration is None or about is None:
        return
    taken = {source["sha256"]: source["name"] for source in about.get("sources", [])} | {about.get("text_sha256"): calibration.names[0]}
    for sha256, check in checks.items():
        if sha256 in taken:
            raise RequestError(
                f"--check-text must name a text that --calibration does not; found {check.name}, which is its source {taken[sha256]}. Give "
                "another text: the report has figures of what each source holds out"
            )
        _warn_of_overlap(check.name, check.ids, calibration.ids)


def note_unmeasured(folder: Path, request: QuantizationRequest) -> None:
    """Say of which check texts a result that was complete before has no figures."""
    from dbrx_q.quantize.pipeline.report import NAME

    try:
        report = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
        measured = {record["name"] for record in report.get("held_out", [])}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        measured = set()
    for check in request.checks:
        if not measured & {check.name, Path(check.name).name}:
            terminal.say(
                f"dbrx-q: note: {folder} was completed without the check text {check.name}; dbrx-q compare {request.source} {folder} "
                f"--text {check.name} measures it"
            )


def _windows(name: str, ids: Sequence[int], count: int, length: int) -> torch.Tensor:
    """int64 [n, length]."""
    import torch

    if length < 2:
        raise RequestError(f"a sequence of a check text must have at least 2 tokens; found {length}. Give a larger --length")
    windows = len(ids) // length
    if not windows:
        raise RequestError(
            f"--check-text {name}: must hold at least one sequence of {length} tokens; found {len(ids)}. Give a longer text, or a smaller "
            "--length"
        )
    chosen = torch.linspace(0, windows - 1, min(count, windows), dtype=torch.float64).round().long()
    return torch.tensor(ids[: windows * length]).view(windows, length)[chosen]


def _warn_of_overlap(name: str, ids: torch.Tensor, calibrating: torch.Tensor) -> None:
    """Say where a check text has passages of what calibrates."""
    import torch

    from dbrx_q.quantize.calibration.sources import CalibrationWarning

    if ids.shape[1] < _RUN:
        return
    shared = float(torch.isin(_hashes(ids), _hashes(calibrating)).double().mean())
    if shared > _MOST_SHARED:
        warnings.warn(
            f"{name}: {shared:.0%} of its sequences is also in the text that calibrates, so that they say little about other texts. Give a "
            "text that calibration has not seen",
            CalibrationWarning,
            stacklevel=3,
        )


def _hashes(ids: torch.Tensor) -> torch.Tensor:
    """int64 [n * (S - 15)]: a number for every run of 16 tokens of sequences [n, S]; equal runs have equal numbers."""
    import torch

    factors = torch.randint(-(1 << 62), 1 << 62, (_RUN,), generator=torch.Generator().manual_seed(0))
    runs = ids.shape[1] - _RUN + 1
    hashes = torch.zeros(len(ids), runs, dtype=torch.int64)
    for first, factor in enumerate(factors.tolist()):  # not by unfold: it would take 16 times the memory
        hashes += ids[:, first : first + runs] * factor
    return hashes.flatten()
