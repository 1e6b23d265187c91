"""What `quantize` and `export` share: the check of the method, the opened source, and the runs of the quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from . import terminal
from .check_texts import note_unmeasured

if TYPE_CHECKING:
    from dbrx_q.checkpoint.remote_shards import RemoteShards
    from dbrx_q.quantize.pipeline.records import RunRecord
    from dbrx_q.quantize.pipeline.run import QuantizationRequest

__all__ = ["check_method", "open_location", "run_requests"]


def check_method(method: str, calibration: Sequence[str], target_bpw: float | None, activations: str) -> None:
    """Refuse options that the method does not take."""
    from dbrx_q.errors import RequestError
    from dbrx_q.quantize.methods.choose import METHODS

    if calibration and not METHODS[method].calibrated and target_bpw is None:
        raise RequestError(
            f"the method {method} takes no calibration; found {', '.join(calibration)}. Leave --calibration out, or add --method best"
        )
    if METHODS[method].compares and activations == "original":
        raise RequestError(
            f"the method {method} must see the quantized model's activations; found --activations original. Leave it out, or give "
            "--method gptq"
        )


def open_location(source: str, revision: str | None, storage: Path | None, plan_alone: ExitStack | None = None) -> Path | RemoteShards:
    """The source's folder or GGUF file, or its repository on the hub, of which no weights have been fetched yet.

    A GGUF file on the hub is fetched into the hub's cache; for a plan its header alone, into a temporary file.

    Args:
        source: the argument SRC.
        revision: branch, tag or commit on the hub; None for the main branch.
        storage: with --low-disk, the folder that shards are fetched to; else None.
        plan_alone: removes the temporary file; None where weights are read.

    Raises:
        RequestError: --low-disk for a folder, whose files are not deleted, or for a GGUF file, which is read many times.
    """
    from dbrx_q.checkpoint.hub import is_on_hub
    from dbrx_q.checkpoint.hub_gguf import find_gguf
    from dbrx_q.checkpoint.remote_shards import RemoteShards
    from dbrx_q.errors import RequestError
    from dbrx_q.sources.locations import gguf_header, resolve_location

    model = find_gguf(source, revision=revision) if is_on_hub(source) else None
    if model is not None:
        if storage is not None:
            raise RequestError(f"--low-disk deletes each shard after use; found the GGUF file {model.files[0]}. Leave it out")
        if plan_alone is None:
            return model.fetch()
        if model.cached() is None:
            terminal.say(f"{source}: the header is fetched for the plan; a run fetches all of {', '.join(model.files)}")
        return plan_alone.enter_context(gguf_header(model))
    if is_on_hub(source):
        return RemoteShards(source, revision=revision, storage=storage)
    if storage is not None:
        raise RequestError(f"--low-disk deletes what was fetched from the hub; found the folder {source}, whose files stay. Leave it out")
    return resolve_location(source)


def run_requests(
    opened: Path | RemoteShards, requests: dict[Path, QuantizationRequest], budget: int, *, resume: bool
) -> dict[Path, RunRecord]:
    """Quantize into every folder that is not complete yet; folder to record of its run.

    Raises:
        typer.Exit: an interruption after which --resume can continue.
    """
    from dbrx_q.checkpoint.staging import partial_of
    from dbrx_q.quantize.pipeline.run import already_there, quantize_checkpoint

    runs: dict[Path, RunRecord] = {}
    try:
        for folder, request in requests.items():
            if resume and already_there(opened, folder, request):
                terminal.say(f"{folder} is complete already")
                note_unmeasured(folder, request)
                continue
            with terminal.progress("quantizing", unit_bytes=True) as on_bytes:
                runs[folder] = quantize_checkpoint(opened, folder, request, resume=resume, memory=budget, on_bytes=on_bytes)
    except KeyboardInterrupt:
        partial = [partial_of(folder) for folder in requests if partial_of(folder).exists()]
        if not partial:
            raise
        message = f"interrupted; what is finished is kept in {partial[0]}, and the same command with --resume continues from there"
        raise terminal.failed(message) from None
    return runs
