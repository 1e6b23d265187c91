"""Runs a comparison, from the names of checkpoints and a text to the figures, after checking that the checkpoints can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from dbrx_q.eval.provenance import provenance, run_key
from dbrx_q.eval.resume import RunState
from dbrx_q.eval.texts import Text
from dbrx_q.eval.windows import Protocol
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.sources.base import Source
from dbrx_q.sources.folder import NativeFolder
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import ConvertedSource, available_memory, resident_bytes
from dbrx_q.sources.tokenizers_agree import check_same_tokenizer
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .measure import Pair, check_same_shape, compare
from .reference import ModelReference, Reference
from .reference_file import ReferenceFile, is_reference_file
from .result import Comparison
from .summary import summary

__all__ = ["compare_checkpoints", "groups", "open_reference"]


def open_reference(path_or_hub_id: str) -> Source | ReferenceFile:
    """Open a checkpoint or a file that `save_reference` wrote; raises what `open_source` and `ReferenceFile` raise."""
    path = Path(path_or_hub_id).expanduser()
    return ReferenceFile(path) if is_reference_file(path) else open_source(path_or_hub_id)


def compare_checkpoints(
    reference: Source | ReferenceFile,
    sources: Sequence[Source],
    text: Text,
    protocol: Protocol,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | None = None,
    kv_format: str = "plain",
    resume: bool = False,
    command: str = "",
    states: list[RunState] | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure `sources` against `reference` on `text`.

    Args:
        reference: opened by `open_reference`.
        sources: opened by `open_source`. If one has a budget, they are loaded one after the other.
        text: loaded by `load_text`.
        protocol: how the text is cut into windows; for a saved reference it must be the saved protocol.
        dtype: of activations and of plain weights; None for each checkpoint's own.
        device: where the models run; None for the CPU.
        kv_format: of the checkpoints' keys and values.
        resume: continue the same comparison where it was interrupted.
        command: recorded in the provenance.
        states: receives the run states of all checkpoints, which the caller clears after writing the figures; None to clear them when the
            run is complete.
        on_window: called with (windows done, total windows), over all checkpoints.

    Returns:
        The figures; after Ctrl-C those of the windows done so far, with `complete` False.

    Raises:
        RequestError: a checkpoint's model or tokenizer, or the text, is not the reference's, or the text is shorter than a window.
    """
    device = torch.device("cpu") if device is None else device
    tokenizer = (sources[0] if isinstance(reference, ReferenceFile) else reference).tokenizer()
    ids = tokenizer.encode(text.text, split_special_tokens=True)
    _check_comparable(reference, sources, text, protocol, tokenizer, ids)

    def load(source: Source) -> DbrxForCausalLM:
        return source.load(dtype=dtype, device=device)

    identity = _identity(reference)
    pairs = []
    for source in sources:
        key = run_key("compare", identity, source, source.sha256(), ids, protocol, dtype=dtype, kv_format=kv_format, device=device)
        state = RunState(key)
        if not resume:
            state.clear()
        pairs.append(Pair(source, state))
        if states is not None:
            states.append(state)
    with ExitStack() as stack:
        against: Reference
        if isinstance(reference, ReferenceFile):
            against = stack.enter_context(reference)
        else:
            against = stack.enter_context(nullcontext(ModelReference(reference, load(reference))))
        memory = available_memory(device) // 2  # the other half is for activations and for other programs
        compare(
            against,
            pairs,
            ids,
            protocol,
            load=load,
            together=lambda waiting: _together(waiting, dtype, memory),
            kv_format=kv_format,
            on_window=on_window,
        )
        record = provenance(device, command) | _settings(reference, against, text, protocol, dtype, kv_format)
        comparison = summary(against, pairs, ids, protocol, tokenizer, text=text.name, provenance=record)
    if comparison.complete and states is None:
        for pair in pairs:
            pair.forget()
    return comparison


def _together(pairs: Sequence[Pair], dtype: torch.dtype | None, memory: int) -> list[list[Pair]]:
    """`groups` of pairs by the sizes of their models; one pair each if a source has a budget, which is then that of one model."""
    if any(pair.source.budget is not None for pair in pairs):
        return [[pair] for pair in pairs]
    return groups(pairs, [_loaded_bytes(pair.source, dtype) for pair in pairs], memory)


def groups(pairs: Sequence[Pair], sizes: Sequence[int], memory: int) -> list[list[Pair]]:
    """Group pairs that are measured together: in their order, as many as fit into `memory` bytes, at least one.

    Args:
        pairs: to be measured.
        sizes: bytes of each pair's model.
        memory: bytes that the models of a group may take.
    """
    grouped: list[list[Pair]] = []
    used = 0
    for pair, size in zip(pairs, sizes, strict=True):
        if not grouped or used + size > memory:
            grouped.append([])
            used = 0
        grouped[-1].append(pair)
        used += size
    return grouped


def _check_comparable(
    reference: Source | ReferenceFile, sources: Sequence[Source], text: Text, protocol: Protocol, tokenizer: DbrxTokenizer, ids: list[int]
) -> None:
    """Refuse checkpoints and texts that do not belong to the reference.

    Args:
        reference: a checkpoint or a saved reference.
        sources: the checkpoints to measure against it.
        text: to measure on.
        protocol: how the text is cut into windows.
        tokenizer: the reference's; of a saved reference, the first checkpoint's.
        ids: the text's token ids.

    Raises:
        RequestError: as for `compare_checkpoints`.
    """
    if isinstance(reference, ReferenceFile):
        reference.check_text(text, ids, protocol)
    tokenizer_of = sources[0].name if isinstance(reference, ReferenceFile) else reference.name
    for source in sources:
        check_same_shape(reference.name, reference.config, source)
        protocol.check(len(ids), source.config, source=text.name)
        if source is not sources[0] or not isinstance(reference, ReferenceFile):
            check_same_tokenizer(tokenizer, source.tokenizer(), text.text, names=(tokenizer_of, source.name))


def _identity(reference: Source | ReferenceFile) -> dict[str, Any]:
    """What determines a reference's predictions, for the key of a run."""
    if isinstance(reference, ReferenceFile):
        return reference.settings | {"file": True}
    return {"sha256": reference.sha256(), "config": reference.config.to_dict()}


def _settings(
    reference: Source | ReferenceFile, against: Reference, text: Text, protocol: Protocol, dtype: torch.dtype | None, kv_format: str
) -> dict[str, Any]:
    """The settings of a comparison that its provenance records."""
    settings: dict[str, Any] = {
        "text_sha256": text.sha256,
        "reference_sha256": against.sha256,
        "dtype": str(dtype).removeprefix("torch.") if dtype else "each checkpoint's own",
        "kv": kv_format,
        "limit": protocol.limit,
    }
    if isinstance(reference, ReferenceFile):
        settings["reference_saved_with"] = {name: reference.settings[name] for name in ("dtype", "provenance")}
    return settings


def _loaded_bytes(source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of the model once it is loaded."""
    if isinstance(source, ConvertedSource):
        return resident_bytes(source.config, dtype or source.stored_dtype, stream=False)
    return source.loaded_bytes if isinstance(source, NativeFolder) else source.nbytes
