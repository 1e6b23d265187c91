"""Renders chat templates, and tells the special tokens that a template writes from text of a message that spells one.

A template writes special tokens around the messages; a message that spells one must stay text. The rendered string does not show who wrote
which part. So the messages are rendered a second time, masked: in every string of the messages, tools, documents and variables, each
character that is punctuation in the spelling of a special token is replaced by a private-use character that occurs nowhere else. A special
token that the second rendering still spells was written by the template. The pieces between are unmasked and are plain text whatever they
spell, also where content and template touch and where the template changes case or drops blanks. A template whose logic depends on the
masked characters renders otherwise when they are masked; a comparison of the two renderings detects this, and the template is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dbrx_q.errors import TokenizerError

from .template_environment import GENERATION_MARKS, compiled_template, time_limit

__all__ = ["ChatInputs", "RenderedChat", "Segment", "render_chat", "split_chat"]

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_CONTINUATION_MARK = "\udc03"
"""Stands behind the message that the model continues; a lone surrogate, which messages have lost."""
_LONGEST_TEMPLATE = 1_000_000


class Segment(NamedTuple):
    """A piece of a rendered chat."""

    text: str
    """The piece."""
    is_special: bool
    """True for a special token that the template wrote; False for plain text, whatever it spells."""


@dataclass(frozen=True)
class ChatInputs:
    """What a template reads, in plain JSON types (`chat_messages.py`)."""

    messages: list[dict[str, Any]]
    """The messages."""
    tools: list[Any] | None = None
    """JSON schemas of functions."""
    documents: list[Any] | None = None
    """Documents to answer from."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Other variables, named tokens among them."""
    add_generation_prompt: bool = False
    """Whether the template opens the assistant's turn at the end."""
    continued: str | None = None
    """The key of the last message that the model continues, such as "content"; None for none."""


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat."""

    segments: list[Segment]
    """The text, split at the special tokens that the template wrote."""
    generated: list[tuple[int, int]]
    """(first character, last character + 1) of the text of every `{% generation %}` block; empty unless asked for."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(segment.text for segment in self.segments)


def render_chat(template: str, inputs: ChatInputs, *, generation_marks: bool = False) -> str:
    """The text that a Jinja chat template renders, in Jinja's immutable sandbox, with the variables of transformers.

    Args:
        template: the template's source.
        inputs: what it reads.
        generation_marks: whether `GENERATION_MARKS` stand around the text of every `{% generation %}` block.

    Raises:
        TokenizerError: the template is not valid Jinja, fails on these messages or refuses them, makes a text of more than a megabyte,
            takes more than two seconds, or drops the message that the model continues.
    """
    if len(template) > _LONGEST_TEMPLATE:
        raise TokenizerError(
            f"a chat template must have at most {_LONGEST_TEMPLATE:,} characters; found {len(template):,}. Pass another template"
        )
    messages = inputs.messages if inputs.continued is None else _marked(template, inputs.messages, inputs.continued)
    characters = sum(map(len, _strings([inputs.messages, inputs.tools, inputs.documents, inputs.variables])))
    variables = {
        "messages": messages,
        "tools": inputs.tools,
        "documents": inputs.documents,
        "add_generation_prompt": inputs.add_generation_prompt,
    }
    try:
        with time_limit(characters, generation_marks=generation_marks):
            text = str(compiled_template(template).render(**{**inputs.variables, **variables}))
    except Exception as error:  # a template is code of the checkpoint, which can fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"the chat template must render these messages; it stopped with {reason[:500]}. Change the messages or the template"
        ) from error
    return text if inputs.continued is None else _cut_at_mark(text)


def split_chat(
    template: str, inputs: ChatInputs, *, specials: Collection[str], separated: bool = True, generation_marks: bool = False
) -> RenderedChat:
    """The text of `render_chat`, split at the special tokens that the template wrote; those that a message spells are text.

    Args:
        template, inputs, generation_marks: as for `render_chat`.
        specials: the spellings of the special tokens.
        separated: False to split at every special token, also where a message spells it.

    Raises:
        TokenizerError: as `render_chat`; or the template's logic depends on characters that special tokens are made of.
    """
    plain = render_chat(template, inputs, generation_marks=generation_marks)
    masked, unmasking = plain, {}
    if separated and specials:
        mask = _mask(template, plain, inputs, specials)
        unmasking = {ord(hidden): shown for shown, hidden in mask.items()}
        masked = render_chat(template, _masked_inputs(inputs, str.maketrans(mask)), generation_marks=generation_marks)
        if masked.translate(unmasking) != plain:
            raise TokenizerError(
                f"the chat template's logic must not depend on the characters {''.join(mask)!r} in a message, or its special tokens "
                "cannot be told from the message's; it does. Drop them from the messages, pass another template, or, if the messages are "
                "your own, pass sanitize_control_tokens=False"
            )
    masked, generated = _without_generation_marks(masked) if generation_marks else (masked, [])
    if not specials:
        return RenderedChat([Segment(masked, False)] if masked else [], generated)
    pattern = re.compile("(" + "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True)) + ")")
    pieces = enumerate(pattern.split(masked))
    segments = [Segment(piece.translate(unmasking), index % 2 == 1) for index, piece in pieces if piece]  # odd pieces are the matches
    return RenderedChat(segments, generated)


def _mask(template: str, plain: str, inputs: ChatInputs, specials: Collection[str]) -> dict[str, str]:
    """A private-use character for every character that tells special tokens from text."""
    guarded = sorted({c for special in specials for c in [c for c in special if not c.isalnum() and not c.isspace()] or special})
    used = set(template).union(plain, *specials, *_strings([inputs.messages, inputs.tools, inputs.documents, inputs.variables]))
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    mask = dict(zip(guarded, unused, strict=False))
    if len(mask) < len(guarded):
        raise TokenizerError(f"messages must leave {len(guarded)} characters of {_PRIVATE_USE} unused; found fewer. Shorten them")
    return mask


def _masked_inputs(inputs: ChatInputs, masking: dict[int, str]) -> ChatInputs:
    named_tokens = {name: value for name, value in inputs.variables.items() if isinstance(value, NamedToken)}
    messages = [{key: value if key == "role" else _masked(value, masking) for key, value in message.items()} for message in inputs.messages]
    variables = {**_masked(inputs.variables, masking), **named_tokens}
    return ChatInputs(
        messages,
        _masked(inputs.tools, masking),
        _masked(inputs.documents, masking),
        variables,
        inputs.add_generation_prompt,
        inputs.continued,
    )


class NamedToken(str):
    """The spelling of a named token as a template's variable, which the template may write as that token."""


def _masked(value: Any, masking: dict[int, str]) -> Any:
    """`value`, masked in every string, and in keys that are no identifiers, which a template cannot mean by name."""
    if isinstance(value, str):
        return value.translate(masking)
    if isinstance(value, list):
        return [_masked(item, masking) for item in value]
    if isinstance(value, dict):
        return {
            key.translate(masking) if isinstance(key, str) and not key.isidentifier() else key: _masked(item, masking)
            for key, item in value.items()
        }
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in `value`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _marked(template: str, messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """`messages` with a mark behind the text of the last one that the model continues."""
    last = dict(messages[-1])
    content = last.get(key)
    if key not in template or content is None:
        raise TokenizerError(
            f"continue_final_message must name a field that the last message has and the template writes; found {key!r}. Name another"
        )
    if isinstance(content, list):
        texts = [index for index, part in enumerate(content) if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if not texts:
            raise TokenizerError("continue_final_message must have text to continue; the last message has no part with a text. Add one")
        content = list(content)
        content[texts[-1]] = {**content[texts[-1]], "text": content[texts[-1]]["text"] + _CONTINUATION_MARK + " "}
        last[key] = content
    elif isinstance(content, str):
        last[key] = content + _CONTINUATION_MARK + " "
    else:
        raise TokenizerError(f"continue_final_message must continue a string; found {type(content).__name__}. Name another field")
    return [*messages[:-1], last]


def _cut_at_mark(text: str) -> str:
    """`text` up to the end of the message that the model continues; without blanks there, where the template strips the message."""
    place = text.rfind(_CONTINUATION_MARK)
    if place < 0:
        raise TokenizerError("a chat that continues its last message must contain it; the template drops it. Use another template")
    return text[:place] if text[place + 1 : place + 2] == " " else text[:place].rstrip()


def _without_generation_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """(`text` without marks, where each marked part lies in it)."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for piece in re.split(f"([{''.join(GENERATION_MARKS)}])", text):
        if piece == GENERATION_MARKS[0]:
            starts.append(length)
        elif piece == GENERATION_MARKS[1]:
            spans.append((starts.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), sorted(spans)
