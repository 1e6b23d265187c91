"""Chat templates: from messages to text, and to text whose special tokens are the template's own.

A template writes special tokens around the messages; a message that spells one must stay text. The rendered string no longer
says who wrote what, so it is rendered a second time from masked messages: each character that is punctuation in the spelling
of a special token is replaced, in the messages' contents, by a private-use character that occurs nowhere else. What still
spells a special token in that rendering is the template's; the pieces between are unmasked and are plain text, whatever they
spell, also where content and template touch and where the template changes case or drops blanks. A template whose logic looks
at these characters would render otherwise when they are masked; this is noticed, because the two renderings are compared, and
refused.
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
    """A piece of a rendered chat.

    Attributes:
        text: the piece.
        is_special: True for a special token of the template; False for text that no special token is read from.
    """

    text: str
    is_special: bool


def check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A copy of `messages`.

    Raises:
        TokenizerError: not a non-empty list of {"role": str, "content": str}, or a role that is no plain name.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(f'messages must be a non-empty list like [{{"role": "user", "content": "Hi"}}]; found {_short(messages)}')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            found = sorted(map(str, message)) if isinstance(message, Mapping) else _short(message)
            raise TokenizerError(f"messages[{place}] must be an object with the keys 'role' and 'content' and no other; found {found}")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise TokenizerError(f"messages[{place}]['content'] must be a string; found {_short(content)}. Join parts to one text first")
        # Templates put the role beside their own punctuation, where "im_end|" could complete a special token
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise TokenizerError(
                f"messages[{place}]['role'] must be a plain name like 'system', 'user' or 'assistant'; found {_short(role)}"
            )
    return [dict(message) for message in messages]


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, token_names: Mapping[str, str]
) -> str:
    """The text that a Jinja chat template makes of `messages`, as transformers renders it, in Jinja's immutable sandbox.

    Args:
        template: the template's source.
        messages: what `check_messages` returned.
        add_generation_prompt: whether the template is to open the assistant's turn.
        token_names: the variables for special tokens, such as {"eos_token": "<|endoftext|>"}.

    Raises:
        TokenizerError: the template is no Jinja, or it fails on or refuses these messages.
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
    except Exception as error:  # a template runs code of the checkpoint's, which can fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise TokenizerError(
            f"the chat template must render these messages; it stopped with {reason}. Change the messages or it"
        ) from error


def split_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    token_names: Mapping[str, str],
    specials: Collection[str],
) -> list[Segment]:
    """The text of `render_chat`, cut at the special tokens that the template wrote; a message's own are text.

    Args:
        template, messages, add_generation_prompt, token_names: as for `render_chat`.
        specials: the spellings of the special tokens.

    Raises:
        TokenizerError: as `render_chat`; or the template's logic depends on characters that special tokens are made of.
    """

    def render(these: Sequence[Mapping[str, str]]) -> str:
        return render_chat(template, these, add_generation_prompt=add_generation_prompt, token_names=token_names)

    plain = render(messages)
    guarded = sorted({c for special in specials for c in [c for c in special if not c.isalnum() and not c.isspace()] or special})
    used = set(template).union(plain, *specials, *(message["content"] for message in messages))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    mask = dict(zip(guarded, free, strict=False))
    if len(mask) < len(guarded):
        raise TokenizerError(f"messages must leave {len(guarded)} characters of {_PRIVATE_USE} unused; found fewer. Shorten them")
    table = str.maketrans(mask)
    back = str.maketrans({hidden: shown for shown, hidden in mask.items()})
    masked = render([{**message, "content": message["content"].translate(table)} for message in messages])
    if masked.translate(back) != plain:
        raise TokenizerError(
            f"the chat template's logic must not depend on the characters {''.join(guarded)!r} in a message, or its special tokens "
            "cannot be told from the message's; it does. Drop them from the messages, or pass another template"
        )
    if not specials:
        return [Segment(plain, False)]
    pattern = re.compile("(" + "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True)) + ")")
    pieces = enumerate(pattern.split(masked))
    return [Segment(piece.translate(back), place % 2 == 1) for place, piece in pieces if piece]


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
        # Jinja's own filter escapes HTML, which transformers' templates don't expect
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
