"""A whole comparison: from names of checkpoints and a text to the figures, with everything that makes them comparable checked first."""

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
from dbrx_q.sources.folder import PackedFolder
from dbrx_q.sources.open import open_source
from dbrx_q.sources.streamed import DequantizedSource, available_memory, resident_bytes
from dbrx_q.sources.tokenizers_agree import check_same_tokenizer

from .measure import Pair, check_same_shape, compare, summary
from .reference import ModelReference, Reference
from .reference_file import ReferenceFile, is_reference_file
from .result import Comparison

__all__ = ["compare_checkpoints", "groups", "open_reference"]


def open_reference(path_or_hub_id: str) -> Source | ReferenceFile:
    """What checkpoints are measured against: a checkpoint, or a file that `save_reference` wrote; errors as for the two of them."""
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
    kept: list[RunState] | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure `sources` against `reference` on `text`.

    Args:
        reference: what `open_reference` gave.
        sources: what `open_source` gave.
        text: what `load_text` gave.
        protocol: how the text is cut; a saved reference's own where that is the reference.
        dtype: of activations and of weights that are not packed; None for each checkpoint's own.
        device: where the models run; None for the CPU.
        kv_format: of the checkpoints' keys and values.
        resume: go on where the same comparison was interrupted.
        command: for the record.
        kept: filled with the places where figures are kept for `resume`, for a caller that clears them when it has written the figures;
            None to clear them as soon as all are there.
        on_window: called with (windows done, windows in all), over all checkpoints.

    Returns:
        The figures; of Ctrl-C those so far, with `complete` False.

    Raises:
        RequestError: another text, model or tokenizer than the reference's, or a text shorter than a window.
    """
    place = torch.device("cpu") if device is None else device
    tokenizer = (sources[0] if isinstance(reference, ReferenceFile) else reference).tokenizer()
    ids = tokenizer.encode(text.text)
    if isinstance(reference, ReferenceFile):
        reference.check_text(text, ids, protocol)
    named = sources[0].name if isinstance(reference, ReferenceFile) else reference.name
    for source in sources:
        check_same_shape(reference.name, reference.config, source)
        protocol.check(len(ids), source.config, source=text.name)
        if source is not sources[0] or not isinstance(reference, ReferenceFile):
            check_same_tokenizer(tokenizer, source.tokenizer(), text.text, names=(named, source.name))

    def load(source: Source) -> DbrxForCausalLM:
        return source.load(dtype=dtype, device=place)

    known = _identity(reference)
    pairs = []
    for source in sources:
        key = run_key("compare", known, source, source.sha256(), ids, protocol, dtype=dtype, kv_format=kv_format, device=place)
        state = RunState(key)
        if not resume:
            state.clear()
        pairs.append(Pair(source, state))
        if kept is not None:
            kept.append(state)
    with ExitStack() as stack:
        against: Reference
        if isinstance(reference, ReferenceFile):
            against = stack.enter_context(reference)
        else:
            against = stack.enter_context(nullcontext(ModelReference(reference, load(reference))))
        room = available_memory(place) // 2  # the other half is for activations, and for what other programs take meanwhile
        compare(
            against,
            pairs,
            ids,
            protocol,
            load=load,
            together=lambda waiting: groups(waiting, [_loaded_bytes(pair.source, dtype) for pair in waiting], room),
            kv_format=kv_format,
            on_window=on_window,
        )
        where = provenance(place, command) | {
            "text_sha256": text.sha256,
            "reference_sha256": against.sha256,
            "dtype": str(dtype).removeprefix("torch.") if dtype else "each checkpoint's own",
            "kv": kv_format,
            "limit": protocol.limit,
        }
        if isinstance(reference, ReferenceFile):
            where["reference_saved_with"] = {name: reference.settings[name] for name in ("dtype", "provenance")}
        found = summary(against, pairs, ids, protocol, tokenizer, text=text.name, provenance=where)
    if found.complete and kept is None:
        for pair in pairs:
            pair.forget()
    return found


def groups(pairs: Sequence[Pair], sizes: Sequence[int], room: int) -> list[list[Pair]]:
    """Pairs that are measured together: in their order, as many as fit `room` bytes, at least one.

    Args:
        pairs: what is to be measured.
        sizes: bytes that each one's model takes.
        room: bytes that may be taken.
    """
    found: list[list[Pair]] = []
    taken = 0
    for pair, size in zip(pairs, sizes, strict=True):
        if not found or taken + size > room:
            found.append([])
            taken = 0
        found[-1].append(pair)
        taken += size
    return found


def _identity(reference: Source | ReferenceFile) -> dict[str, Any]:
    """What decides a reference's predictions."""
    if isinstance(reference, ReferenceFile):
        return reference.settings | {"file": True}
    return {"sha256": reference.sha256(), "config": reference.config.to_dict()}


def _loaded_bytes(source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of a loaded model."""
    if isinstance(source, DequantizedSource):
        return resident_bytes(source.config, dtype or source.stored_dtype, stream=False)
    return source.loaded_bytes if isinstance(source, PackedFolder) else source.nbytes
