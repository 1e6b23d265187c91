"""Chats of a tokenizer: the prompt of a conversation, by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from dbrx_q.errors import RequestError, TokenizerError

from .batch_encoding import BatchEncoding
from .call import CallOptions, EncodedText, batch_of, call_options, pad_rows, padding_of, truncated
from .chat_messages import as_conversations, checked_messages, checked_tools, joined_parts, plain_data
from .chat_template import ChatInputs, NamedToken, RenderedChat, split_chat
from .text_calls import CallableTokenizer

__all__ = ["ChatTokenizer"]

_RESERVED = ("messages", "conversation")


class ChatTokenizer(CallableTokenizer):
    """The part of `DbrxTokenizer` that knows chat templates; names are those of transformers."""

    chat_template: str | dict[str, str] | None
    """The checkpoint's Jinja template, or several by name; None where there is none."""

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The prompt for a conversation. Only the template writes special tokens; one that a message or a tool spells stays text.

            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            model.generate(**inputs)

        Args:
            conversation: [{"role": "system" | "user" | "assistant", "content": text}, ...], or a list of such lists. A content may be a
                list of parts like {"type": "text", "text": ...}; where the template wants a string, the texts are joined by line ends.
                Other keys, such as tool_calls, are the template's.
            tools: JSON schemas of functions.
            documents: objects such as {"title": ..., "text": ...}.
            chat_template: Jinja source, or the name of one of the checkpoint's templates.
            add_generation_prompt: whether to open the assistant's turn.
            continue_final_message: whether the prompt ends inside the last message, which the model continues; a string names the key of
                the message that is continued.
            tokenize: True for ids; False for the text, in which special tokens and text that spells one cannot be told apart.
            sanitize_control_tokens: False to read the spelling of a special token in a message as that token, for templates whose logic
                depends on the characters of special tokens. transformers has False by default.
            padding, truncation, max_length, return_tensors: as for a call of the tokenizer.
            return_dict: False to return the ids alone.
            return_assistant_tokens_mask: whether to return "assistant_masks", 1 on tokens inside `{% generation %}` blocks.
            tokenizer_kwargs: other options of a call.
            variables: other variables of the template.

        Raises:
            TokenizerError: there is no template, the messages have another form, or the template fails on them.
            RequestError: arguments that exclude each other.
        """
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise RequestError(f"continue_final_message must be without {other}; found both. Leave one out")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise RequestError("return_assistant_tokens_mask must have tokenize and return_dict; found one False. Leave them True")
        _check_variables(variables)
        template = self.get_chat_template(chat_template, list(tools) if tools is not None else None)
        conversations, is_batch = as_conversations(conversation)
        continued = continue_final_message if isinstance(continue_final_message, str) else "content" if continue_final_message else None
        named = {name: NamedToken(spelling) for name, spelling in self.special_tokens_map.items()}
        inputs = ChatInputs(
            [],
            checked_tools("tools", tools),
            checked_tools("documents", documents),
            {**named, **plain_data(variables)},
            add_generation_prompt,
            continued,
        )
        separated = sanitize_control_tokens and tokenize  # the text alone does not tell special tokens from text
        chats = [
            self._rendered(template, replace(inputs, messages=checked_messages(messages)), separated, return_assistant_tokens_mask)
            for messages in conversations
        ]
        if not tokenize:
            return [chat.text for chat in chats] if is_batch else chats[0].text
        options = call_options(
            {
                **(tokenizer_kwargs or {}),
                "padding": padding,
                "truncation": truncation,
                "max_length": max_length,
                "return_tensors": return_tensors,
            }
        )
        encoding = self._encoded_chats(chats, options, is_batch, return_assistant_tokens_mask)
        return encoding if return_dict else encoding["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The Jinja source for a chat.

        Args:
            chat_template: Jinja source, which is returned, or the name of one of the checkpoint's templates.
            tools: with tools, a template named "tool_use" precedes the one named "default".

        Raises:
            TokenizerError: there is none, or none of that name.
        """
        templates = self.chat_template if isinstance(self.chat_template, dict) else {}
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name in templates:
            return templates[name]
        if templates:
            raise TokenizerError(
                f"a chat must have a template named 'default'; the checkpoint has {', '.join(templates)}. Pass chat_template= with a name"
            )
        raise TokenizerError(
            "a chat must have a template; the checkpoint's tokenizer_config.json has no chat_template. "
            "Pass chat_template=, add chat_template.jinja to the checkpoint, or write the prompt yourself and use encode"
        )

    def turn_end_ids(self, chat_template: str | None = None) -> tuple[int, ...]:
        """Ids of the special token that ends the assistant's turn in a chat template; () where no special token does.

        Args:
            chat_template: Jinja source or a name, as for `get_chat_template`.
        """
        probe = "Ninety-nine"
        messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": probe}]
        named = {name: NamedToken(spelling) for name, spelling in self.special_tokens_map.items()}
        try:
            template = self.get_chat_template(chat_template)
            segments = split_chat(template, ChatInputs(messages, variables=dict(named)), specials=self.vocabulary.special_ids).segments
        except TokenizerError:  # no template, or it wants other messages; generation_config.json and the end token remain
            return ()
        last = max((index for index, segment in enumerate(segments) if probe in segment.text), default=len(segments))
        ends = [self.vocabulary.special_ids[segment.text] for segment in segments[last + 1 :] if segment.is_special]
        return tuple(ends[:1])

    def _rendered(self, template: str, inputs: ChatInputs, separated: bool, generation_marks: bool) -> RenderedChat:
        """A rendered chat; where the template fails on lists of text parts, on their joined texts."""
        specials = self.vocabulary.added
        try:
            return split_chat(template, inputs, specials=specials, separated=separated, generation_marks=generation_marks)
        except TokenizerError as error:
            joined = joined_parts(inputs.messages)
            if joined is None or not isinstance(error.__cause__, TypeError):
                raise
        joined_inputs = replace(inputs, messages=joined)
        return split_chat(template, joined_inputs, specials=specials, separated=separated, generation_marks=generation_marks)

    def _encoded_chats(self, chats: Sequence[RenderedChat], options: CallOptions, is_batch: bool, has_mask: bool) -> BatchEncoding:
        wants_offsets = options.return_offsets_mapping or has_mask
        rows = [truncated(self, self._encoded_chat(chat, with_offsets=wants_offsets), options) for chat in chats]
        rows = pad_rows(rows, padding_of(self, options))
        encoding = batch_of(self, rows, options, is_batch=is_batch)
        if has_mask:
            masks = [_mask_of(row, chat.generated) for row, chat in zip(rows, chats, strict=True)]
            encoding["assistant_masks"] = masks if is_batch or options.return_tensors else masks[0]
            encoding.convert_to_tensors(options.return_tensors)
        return encoding

    def _encoded_chat(self, chat: RenderedChat, *, with_offsets: bool) -> EncodedText:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for segment in chat.segments:
            pieces = [self.vocabulary.added[segment.text]] if segment.is_special else self.vocabulary.encode_plain(segment.text)
            ids += pieces
            if with_offsets:
                offsets += [(start + first, start + last) for first, last in self.offsets_of(segment.text, pieces)]
            start += len(segment.text)
        return EncodedText(ids, [0] * len(ids), offsets)


def _check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse a misspelled argument of `apply_chat_template`, which would become a variable that no template reads."""
    code = ChatTokenizer.apply_chat_template.__code__
    names = code.co_varnames[1 : code.co_argcount]
    for name in variables:
        if name in _RESERVED:
            raise TypeError(f"apply_chat_template() has no variable {name!r}: the messages are its first argument")
        near = get_close_matches(name, names, n=1, cutoff=0.85)
        if near:
            raise TypeError(f"apply_chat_template() got an unexpected keyword argument {name!r}. Did you mean {near[0]!r}?")


def _mask_of(row: EncodedText, generated: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that shares a character with a generated part of the text."""
    return [
        int(seen and any(first < end and last > start for start, end in generated))
        for (first, last), seen in zip(row.offsets, row.attention, strict=True)
    ]
