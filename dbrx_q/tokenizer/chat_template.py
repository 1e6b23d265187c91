"""Renders chat templates, and tells the special tokens that a template writes from text of a message that spells one.

A template writes special tokens around the messages; a message that spells one must stay text. The rendered string does not show who wrote
which part. So the messages are rendered a second time, masked: in their contents, each character that is punctuation in the spelling of a
special token is replaced by a private-use character that occurs nowhere else. A special token that the second rendering still spells was
written by the template. The pieces between are unmasked and are plain text whatever they spell, also where content and template touch and
where the template changes case or drops blanks. A template whose logic depends on the masked characters renders otherwise when they are
masked; a comparison of the two renderings detects this, and the template is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from dbrx_q.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

__all__ = ["Segment", "check_messages", "render_chat", "split_chat"]

_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Segment(NamedTuple):
    """A piece of a rendered chat."""

    text: str
    """The piece."""
    is_special: bool
    """True for a special token that the template wrote; False for plain text, whatever it spells."""


def check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A copy of `messages`, checked.

    Raises:
        TokenizerError: `messages` is not a non-empty list of {"role": str, "content": str}, or a role is no plain name.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(f'messages must be a non-empty list like [{{"role": "user", "content": "Hi"}}]; found {_short(messages)}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            keys = sorted(map(str, message)) if isinstance(message, Mapping) else _short(message)
            raise TokenizerError(f"messages[{index}] must be an object with the keys 'role' and 'content' and no other; found {keys}")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise TokenizerError(
                f"messages[{index}]['content'] must be a string; found {_short(content)}. Join its parts into one string first"
            )
        # Templates write the role beside their own punctuation, where "im_end|" could complete a special token.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise TokenizerError(
                f"messages[{index}]['role'] must be a plain name like 'system', 'user' or 'assistant'; found {_short(role)}"
            )
    return [dict(message) for message in messages]


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, token_names: Mapping[str, str]
) -> str:
    """The text that a Jinja chat template renders from `messages`, in Jinja's immutable sandbox, with the variables of transformers.

    Args:
        template: the template's source.
        messages: the result of `check_messages`.
        add_generation_prompt: whether the template opens the assistant's turn at the end.
        token_names: the variables for special tokens, such as {"eos_token": "<|endoftext|>"}.

    Raises:
        TokenizerError: the template is not valid Jinja, or it fails on these messages or refuses them.
    """
    try:
        compiled = _compile(template)
        return compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **token_names,
        )
    except Exception as error:  # a template is code of the checkpoint, which can fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"the chat template must render these messages; it stopped with {reason}. Change the messages or the template"
        ) from error


def split_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    token_names: Mapping[str, str],
    specials: Collection[str],
) -> list[Segment]:
    """The text of `render_chat`, split at the special tokens that the template wrote; those that a message spells are text.

    Args:
        template, messages, add_generation_prompt, token_names: as for `render_chat`.
        specials: the spellings of the special tokens.

    Raises:
        TokenizerError: as `render_chat`; or the template's logic depends on characters that special tokens are made of.
    """

    def render(chat: Sequence[Mapping[str, str]]) -> str:
        return render_chat(template, chat, add_generation_prompt=add_generation_prompt, token_names=token_names)

    plain = render(messages)
    guarded = sorted({c for special in specials for c in [c for c in special if not c.isalnum() and not c.isspace()] or special})
    used = set(template).union(plain, *specials, *(message["content"] for message in messages))
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    mask = dict(zip(guarded, unused, strict=False))
    if len(mask) < len(guarded):
        raise TokenizerError(f"messages must leave {len(guarded)} characters of {_PRIVATE_USE} unused; found fewer. Shorten them")
    masking = str.maketrans(mask)
    unmasking = str.maketrans({hidden: shown for shown, hidden in mask.items()})
    masked = render([{**message, "content": message["content"].translate(masking)} for message in messages])
    if masked.translate(unmasking) != plain:
        raise TokenizerError(
            f"the chat template's logic must not depend on the characters {''.join(guarded)!r} in a message, or its special tokens "
            "cannot be told from the message's; it does. Drop them from the messages, or pass another template"
        )
    if not specials:
        return [Segment(plain, False)]
    pattern = re.compile("(" + "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True)) + ")")
    pieces = enumerate(pattern.split(masked))
    return [Segment(piece.translate(unmasking), index % 2 == 1) for index, piece in pieces if piece]  # odd pieces are the matches


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which templates written for transformers do not expect.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
