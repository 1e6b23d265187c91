"""`--calibration SOURCE[:weight]`: the sources that a command line names, their tokens, and the sequences that are drawn of them."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import RequestError

from . import terminal
from .self_calibration import SELF, is_sampled

if TYPE_CHECKING:
    import torch

    from dbrx_q.eval.chats import Chats
    from dbrx_q.eval.texts import Text
    from dbrx_q.quantize.calibration.sequence_file import StoredSequences
    from dbrx_q.quantize.calibration.sources import CalibrationSequences
    from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

    from .self_calibration import Sampling

__all__ = ["DEFAULT", "NamedSource", "load_sequences", "parse_sources"]

DEFAULT = "default"
"""The default mix of data sets."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6  # beyond them a sum of weights may overflow, or a share vanish
# The least share of tokens that are single bytes of characters at which a notice is due. DBRX's tokenizer gives 0 on Article 1 of the
# Declaration of Human Rights in English and German, 1 % in Russian, 14 % in Japanese, 18 % in Chinese, 33 % in Hindi and 91 % in Amharic;
# that of the bundled model, which was trained on English, gives 5 % in German, 15 % in Polish and 91 % in Russian.
_MOST_BYTES = 0.25


@dataclass(frozen=True)
class NamedSource:
    """One source of a command line."""

    name: str
    """A file, a data set, `self` or `self=PATH`."""
    weight: float
    """0 or more, relative to the other sources."""
    by_default: bool = False
    """Whether the default mix names it."""

    @property
    def sampled(self) -> bool:
        """Whether the model itself samples it."""
        return is_sampled(self.name)


def parse_sources(values: Sequence[str]) -> list[NamedSource]:
    """The sources that the values of `--calibration` name, with the default mix taken apart.

    A value that is an existing path is that file, with the weight 1. Otherwise what follows its last colon is the weight where it is a
    number: `C:\\texts\\wiki.txt:0.5` and `wikitext2@b08601e:2` have weights, `C:\\texts\\wiki.txt` has none.

    Raises:
        RequestError: a weight that is negative, not finite or not a number, weights that are all 0, or a source that is given twice.
    """
    from dbrx_q.eval.data_sets import DEFAULT_MIX

    sources: list[NamedSource] = []
    for value in values:
        name, weight = _split(value)
        if name == DEFAULT and not os.path.exists(name):
            total = sum(DEFAULT_MIX.values())
            sources += [NamedSource(part, weight * share / total, True) for part, share in DEFAULT_MIX.items()]
        else:
            sources.append(NamedSource(name, weight))
    if sources and not any(source.weight for source in sources):
        raise RequestError(
            f"--calibration must name at least one source of positive weight; found {len(sources)} of weight 0, which are only measured. "
            "Give one of them a weight"
        )
    sampled = [source.name for source in sources if source.sampled]
    if len(sampled) > 1:
        raise RequestError(f"--calibration must name {SELF} once; found {' and '.join(sampled)}. Sample from one checkpoint")
    places: dict[str, NamedSource] = {}
    for source in sources:
        place = os.path.realpath(source.name) if os.path.exists(source.name) else source.name
        if place in places:
            part = f", once as a part of {DEFAULT}" if source.by_default != places[place].by_default else ""
            raise RequestError(f"--calibration must name each source once; found {source.name} twice{part}. Give it once, with its weight")
        places[place] = source
    return sources


def load_sequences(
    folder: Path, named: Sequence[NamedSource], *, count: int, length: int, seed: int, sampling: Sampling | None = None
) -> tuple[CalibrationSequences | None, dict[str, Any] | None]:
    """Draw the calibration sequences of the sources that `parse_sources` found.

    Args:
        folder: of the checkpoint, or its file, whose tokenizer and chat template are used.
        named: the sources; none of them gives (None, None).
        count: sequences to draw.
        length: tokens of each.
        seed: of the draw.
        sampling: samples the sequences of `self`, once everything else is checked; None where no source is sampled.

    Returns:
        (the sequences, what config.json says of them).

    Raises:
        RequestError: as `load_source`, `read_sequences`, `draw` and `Sampling`, or chats for a checkpoint without a chat template.
        TokenizerError: the tokenizer cannot be read, or the chat template fails on a chat.
    """
    from dbrx_q.eval.chats import Chats
    from dbrx_q.quantize.calibration.sequence_file import StoredSequences
    from dbrx_q.quantize.calibration.sources import CalibrationSource, draw
    from dbrx_q.sources.open import tokenizer_at

    if not named:
        return None, None
    loaded = {source.name: _loaded(source.name) for source in named if not source.sampled}
    _check_distinct(loaded)
    tokenizer = tokenizer_at(folder)
    if tokenizer.chat_template is None:
        named = _without_default_chats(named, loaded)
    ids: dict[str, Sequence[int] | torch.Tensor] = {}
    for name in (source.name for source in named if not source.sampled):
        content = loaded[name]
        if isinstance(content, StoredSequences):
            ids[name] = content.ids
            continue
        if isinstance(content, Chats):
            ids[name] = _encoded_chats(tokenizer, content)
        else:
            ids[name] = tokenizer.encode(content.text, split_special_tokens=True)
        _warn_of_bytes(tokenizer, name, ids[name])
    for source in named:
        if source.sampled:
            assert sampling is not None
            loaded[source.name] = stored = _sampled(source, named, ids, sampling, count, length, seed)
            ids[source.name] = stored.ids
    drawn = draw([CalibrationSource(s.name, s.weight, ids[s.name]) for s in named], count=count, length=length, seed=seed)
    return drawn, _description(drawn, loaded, length, seed)


def _loaded(name: str) -> Text | Chats | StoredSequences:
    """The content of a source: sequences of a safetensors file, or what `load_source` gives."""
    from dbrx_q.eval.chats import load_source
    from dbrx_q.quantize.calibration.sequence_file import SUFFIX, read_sequences

    return read_sequences(Path(name)) if name.endswith(SUFFIX) and os.path.isfile(name) else load_source(name)


def _split(value: str) -> tuple[str, float]:
    """(name, weight) of a value."""
    from dbrx_q.eval.data_sets import data_set

    if not value:
        raise RequestError("--calibration must name a file, a data set, default or self; found an empty name. Check the path")
    name, colon, last = value.rpartition(":")
    if os.path.exists(value) or not colon:
        if colon and _NUMBER.fullmatch(last) and os.path.exists(name):
            terminal.say(
                f"dbrx-q: note: --calibration {value} names the file {value}; to give {name} a weight, rename one of the two files"
            )
        return value, 1.0
    if not _NUMBER.fullmatch(last):
        if name and (os.path.exists(name) or name in (DEFAULT, SELF) or data_set(name)):
            raise RequestError(f"--calibration {value}: the weight after the colon must be a number; found {last!r}. Give one, as {name}:2")
        return value, 1.0
    if not name:
        raise RequestError(f"--calibration {value}: a source must stand before the weight; found none. Give one, as FILE{value}")
    weight = float(last)
    if not 0 <= weight < math.inf:
        raise RequestError(
            f"--calibration {value}: the weight of a source must be a finite number, 0 or more; found {last}. Give one such as 2 or 0.5"
        )
    if weight and not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise RequestError(
            f"--calibration {value}: a weight that is not 0 must be from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:,.0f}; found {last}. Give one "
            "such as 2 or 0.5"
        )
    return name, weight


def _check_distinct(loaded: Mapping[str, Text | Chats | StoredSequences]) -> None:
    """Refuse two sources of the same content, of which one could calibrate on what the other holds out."""
    names: dict[str, str] = {}
    for name, text in loaded.items():
        if text.sha256 in names:
            raise RequestError(
                f"--calibration must name each source once; found {names[text.sha256]} and {name}, which are the same text. Leave one out"
            )
        names[text.sha256] = name


def _without_default_chats(named: Sequence[NamedSource], loaded: Mapping[str, Text | Chats | StoredSequences]) -> list[NamedSource]:
    """The sources for a checkpoint without a chat template: the default mix then has no chats.

    Raises:
        RequestError: other chats.
    """
    from dbrx_q.eval.chats import Chats

    chats = [source for source in named if isinstance(loaded.get(source.name), Chats)]
    for source in chats:
        if not source.by_default:
            raise RequestError(
                f"{source.name}: chats need the checkpoint's chat template; found none in tokenizer_config.json or chat_template.jinja. "
                "Add the template, or give the conversations as plain text"
            )
        terminal.say(f"dbrx-q: note: {source.name} is left out: the checkpoint has no chat template")
    return [source for source in named if source not in chats]


def _encoded_chats(tokenizer: DbrxTokenizer, chats: Chats) -> list[int]:
    """The ids of all conversations, one after another."""
    from dbrx_q.errors import TokenizerError

    ids: list[int] = []
    for messages, where in zip(chats.conversations, chats.places, strict=True):
        try:
            ids += tokenizer.apply_chat_template(messages, return_dict=False)
        except TokenizerError as error:
            raise TokenizerError(f"{where}: {error}") from None
    return ids


def _warn_of_bytes(tokenizer: DbrxTokenizer, name: str, ids: Sequence[int] | torch.Tensor) -> None:
    """Say where the tokenizer writes characters as single bytes, of which a model has learned little."""
    import torch

    from dbrx_q.quantize.calibration.sources import CalibrationWarning

    counts = torch.as_tensor(ids, dtype=torch.int64).flatten().bincount()  # chats may give no token at all
    used = counts.nonzero().flatten().tolist()
    pieces = ((token_id, tokenizer.token_bytes([token_id])) for token_id in used)
    single = sum(int(counts[token_id]) for token_id, piece in pieces if len(piece) == 1 and piece[0] >= 0x80)
    if single >= _MOST_BYTES * len(ids) > 0:
        warnings.warn(
            f"{name}: {single / len(ids):.0%} of its tokens are single bytes of characters that the tokenizer has no token for, which the "
            "model has hardly seen. It may be in a language that the model does not know; leave it out, or give it a small weight",
            CalibrationWarning,
            stacklevel=3,
        )


def _sampled(
    source: NamedSource,
    named: Sequence[NamedSource],
    ids: Mapping[str, Sequence[int] | torch.Tensor],
    sampling: Sampling,
    count: int,
    length: int,
    seed: int,
) -> StoredSequences:
    """The sequences that the model samples, as many as the weight of `self` asks for; errors of the other sources come first."""
    import torch

    from dbrx_q.quantize.calibration.sources import CalibrationSource, draw, sequences_to_sample

    needed = sequences_to_sample(count, source.weight / math.fsum(other.weight for other in named))
    sampling.check_size(source.name, needed, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the draw of the sampled sequences gives them again
        tokens = {source.name: torch.zeros(needed, max(0, length), dtype=torch.int64), **ids}
        draw([CalibrationSource(s.name, s.weight, tokens[s.name]) for s in named], count=count, length=length, seed=seed)
    return sampling.sequences(source.name, count=needed, length=length, seed=seed)


def _description(
    drawn: CalibrationSequences, loaded: Mapping[str, Text | Chats | StoredSequences], length: int, seed: int
) -> dict[str, Any]:
    """What config.json says of the sequences; one source alone is described as by versions that took one text."""
    from dbrx_q.quantize.calibration.sequence_file import StoredSequences

    sizes = {"sequences": len(drawn.ids), "length": length, "seed": seed}
    only = loaded[drawn.names[0]] if len(drawn.names) == 1 else None
    if only is not None and not isinstance(only, StoredSequences):
        return {"text_sha256": only.sha256, **sizes}
    sources = [
        {
            "name": _public_name(name),
            "weight": round(weight, 6),
            "sequences": sequences,
            "held_out": held_out,
            "sha256": loaded[name].sha256,
        }
        for name, weight, sequences, held_out in zip(drawn.names, drawn.weights, drawn.counts, drawn.held_out_counts, strict=True)
    ]
    return {"sources": sources, **sizes}


def _public_name(name: str) -> str:
    """A source without the folders of this machine."""
    if is_sampled(name) and os.path.exists(name.removeprefix(f"{SELF}=")):
        return f"{SELF}={os.path.basename(os.path.realpath(name.removeprefix(f'{SELF}=')))}"
    return os.path.basename(name) if os.path.exists(name) else name
