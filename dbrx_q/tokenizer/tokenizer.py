"""DBRX's tokenizer, on tiktoken, with the interface of transformers' tokenizers.

Two generations of files are read: a tokenizer.json (byte-level BPE), or the files of DBRX's launch, which name an encoding of tiktoken
(cl100k_base). The pattern that splits a text into pieces is the file's. transformers 5 uses GPT-2's pattern where tokenizer_class is
GPT2Tokenizer, so its ids differ (".\\n", numbers); those of its PreTrainedTokenizerFast and of the `tokenizers` library do not.
"""

from __future__ import annotations

import codecs
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbrx_q.errors import RequestError, TokenizerError

from .bpe_file import FILE_ENCODING, AddedToken, TokenizerWarning, parse_tokenizer, pattern_notice, read_json, read_tokenizer_json, wrong
from .chat import ChatTokenizer
from .saving import write_tokenizer
from .tokenizer_config import (
    NAMED_TOKENS,
    Settings,
    named_encoding,
    read_added_tokens,
    read_chat_template,
    read_settings,
    read_token_names,
)
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import tiktoken

__all__ = ["DbrxTokenizer", "StreamDecoder"]

_DBRX_SPECIALS = [AddedToken("<|pad|>", 100277, True), AddedToken("<|im_start|>", 100278, True), AddedToken("<|im_end|>", 100279, True)]
# A character of every class that patterns distinguish. A character that the pattern leaves over would be lost silently.
_PROBE = "".join(map(chr, range(128))) + "é\u0301ǅʰ中١ⅷ½\u200d\u0085\u00a0\u2028\u3000€‿\U0001f600\ue000\u0378\U000e0001"
_SETTINGS = tuple(name for name in Settings.__dataclass_fields__)
# Arguments of transformers' from_pretrained that change nothing here.
_WITHOUT_EFFECT = ("use_fast", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "proxies", "tokenizer_type", "config")


class StreamDecoder:
    """Turns the ids of one sequence into text, one by one; made by `DbrxTokenizer.stream_decoder`.

    The results of all `push` calls and of `flush`, joined, equal the `decode` of these ids.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character still lacks bytes.

        Raises:
            TokenizerError: no token has this id.
        """
        return self._utf8.decode(self._vocabulary.token_bytes([token_id], skip_special_tokens=self._skip_special_tokens))

    def flush(self) -> str:
        """U+FFFD if the last character lacks bytes, else "". The next `push` starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class DbrxTokenizer(ChatTokenizer):
    """Text to ids and back. Made by `from_pretrained`.

        inputs = tokenizer(["One text", "and a longer one"], padding=True, padding_side="left", return_tensors="pt")
        model(**inputs).logits
        tokenizer.decode(ids, skip_special_tokens=True)
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt")

    Encoding, decoding and chat templates change nothing, so threads may share a tokenizer for them. Setting an attribute (`pad_token`,
    `padding_side`, `chat_template`) and adding tokens do change it: do so before other threads use it.
    """

    name_or_path: str
    """The folder or hub id that the tokenizer was read from; "" for none."""

    def __init__(
        self,
        encoding: tiktoken.Encoding | Vocabulary,
        *,
        added_tokens: Iterable[AddedToken] = (),
        token_names: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """
        Args:
            encoding: tiktoken's encoding of the ordinary tokens, or a vocabulary.
            added_tokens: tokens beside those of the encoding; a token that it has already may be repeated.
            token_names: spellings of named tokens, such as {"pad_token": "<|pad|>"}.
            chat_template: Jinja source, or several by name.
            settings: of calls.

        Raises:
            TokenizerError: two tokens have the same id or spelling, or a named token is not in the vocabulary.
        """
        vocabulary = encoding if isinstance(encoding, Vocabulary) else Vocabulary(encoding, added_tokens)
        settings = settings or Settings()
        super().__init__(vocabulary, token_names or {}, settings.extra_special_tokens)
        self.chat_template = chat_template
        self.name_or_path = ""
        self.padding_side, self.truncation_side = settings.padding_side, settings.truncation_side
        self.model_max_length = settings.model_max_length
        self.model_input_names = list(settings.model_input_names)
        self.split_special_tokens = settings.split_special_tokens
        self.clean_up_tokenization_spaces = settings.clean_up_tokenization_spaces
        self.trims_offsets = False
        self._config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        trust_remote_code: bool = False,
        **overrides: Any,
    ) -> DbrxTokenizer:
        """The tokenizer of a checkpoint.

        Named tokens, added tokens and the chat template are read from tokenizer_config.json; a file chat_template.jinja takes
        precedence over its template.

        Args:
            path: a folder with tokenizer.json, or with a tokenizer_config.json of DBRX's launch that names a tiktoken encoding; or
                owner/name on the hub, of which the small files are fetched.
            revision, token, cache_dir, local_files_only, force_download: of the hub, as in transformers.
            subfolder: a folder inside `path`.
            trust_remote_code: has no effect: no code of a checkpoint runs.
            overrides: named tokens and settings that replace those of the files, such as `padding_side="left"`.

        Raises:
            TokenizerError: a file is missing or malformed, or describes a tokenizer that tiktoken cannot represent.
            CheckpointError: the hub does not give the repository.
            TypeError: an unknown keyword argument.
        """
        from dbrx_q.checkpoint.hub import Download, is_on_hub, resolve_folder

        _check_overrides(overrides)
        if trust_remote_code:
            _say_that_no_code_runs()
        folder = Path(path)
        if isinstance(path, str) and not folder.exists() and path.count("/") == 1 and is_on_hub(path):
            download = Download(cache_dir, local_files_only, force_download)
            folder = resolve_folder(path, revision=revision, token=token, weights=False, download=download)
        tokenizer = _read(cls, folder / subfolder if subfolder else folder)
        tokenizer.name_or_path = os.fspath(path)
        for name, value in overrides.items():
            if name not in _WITHOUT_EFFECT:
                setattr(tokenizer, name, value)
        return tokenizer

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        *,
        source: Path,
        token_names: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> DbrxTokenizer:
        """The tokenizer of a tokenizer.json in memory, such as one built from the contents of another file.

        Args:
            data: the JSON object.
            source: the file that `data` is from, for errors.
            token_names, chat_template: as for the constructor.

        Raises:
            TokenizerError: as `from_pretrained`.
        """
        parsed = parse_tokenizer(source, data)
        encoding = _build_encoding(source, parsed.pattern, parsed.ranks)
        vocabulary = Vocabulary(encoding, parsed.added, ignores_merges=parsed.ignores_merges)
        return cls(vocabulary, token_names=token_names, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **arguments: Any) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat templates, which transformers reads too (`saving.py`).

        Args:
            save_directory: created where it is missing.
            push_to_hub: whether to upload the files as well; `arguments` are those of `push_to_hub` then, and `repo_id` is the folder's
                name unless given.

        Returns:
            The paths of the files.

        Raises:
            TokenizerError: the folder cannot be written.
            RequestError: the hub refuses the files.
        """
        folder = Path(save_directory)
        files = write_tokenizer(self, folder, self._config)
        if push_to_hub:
            self.push_to_hub(arguments.pop("repo_id", folder.name), **arguments)
        elif arguments.keys() - {"legacy_format", "filename_prefix", "save_jinja_files"}:
            raise TypeError(f"save_pretrained has no keyword argument {next(iter(arguments))!r}. Did you mean 'push_to_hub'?")
        return tuple(map(str, files))

    def push_to_hub(
        self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the files of `save_pretrained` to a repository, which is created unless it exists.

        Args:
            repo_id: owner/name; a name alone is one of the user's.
            token, private, commit_message: of the hub.

        Returns:
            The address of the commit.

        Raises:
            RequestError: the hub refuses it.
        """
        from dbrx_q.checkpoint.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(self, Path(folder), self._config)
            return upload(Path(folder), repo_id, token=token, private=private, message=commit_message)

    def has_token(self, token_id: int) -> bool:
        """Whether a token has this id; rows that pad the vocabulary are no tokens."""
        return self.vocabulary.has_token(token_id)

    def token_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of `ids`, joined.

        Raises:
            TokenizerError: no token has an id of `ids`.
        """
        return self.vocabulary.token_bytes(ids, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder that takes ids one by one and returns whole characters only."""
        return StreamDecoder(self.vocabulary, skip_special_tokens=skip_special_tokens)

    def __repr__(self) -> str:
        return (
            f"DbrxTokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, len={len(self)}, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens})"
        )


def _read(cls: type[DbrxTokenizer], folder: Path) -> DbrxTokenizer:
    """The tokenizer in a local folder; errors as for `from_pretrained`."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder; give a checkpoint's folder or a hub id such as owner/name")
    if not file.is_file() and not config_file.is_file():
        raise TokenizerError(
            f"{folder}: must be a folder with tokenizer.json or tokenizer_config.json; found neither. "
            "Copy the tokenizer files of the checkpoint there"
        )
    config = read_json(config_file) if config_file.is_file() else {}
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if config.get(name):
            raise wrong(config_file, name, "false or absent: DBRX adds nothing to a text", config[name])
    added = read_added_tokens(config_file, config)
    ignores_merges = trims_offsets = False
    if file.is_file():
        parsed = read_tokenizer_json(file)
        encoding = _build_encoding(file, parsed.pattern, parsed.ranks)
        added = parsed.added + added
        # transformers puts a post-processor of its own in place where the config has these keys
        replaced = "add_bos_token" in config or "add_eos_token" in config
        ignores_merges, trims_offsets = parsed.ignores_merges, parsed.trims_offsets and not replaced
        notice = pattern_notice(file, parsed.pattern)
        if notice is not None:
            warnings.warn(notice, TokenizerWarning, stacklevel=3)
    else:
        encoding = named_encoding(config_file, config)
        if not added and encoding.name == "cl100k_base":
            added = _DBRX_SPECIALS
    try:
        tokenizer = cls(
            Vocabulary(encoding, added, ignores_merges=ignores_merges),
            token_names=read_token_names(config_file, config),
            chat_template=read_chat_template(folder, config_file, config),
            settings=read_settings(config_file, config),
        )
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    tokenizer._config, tokenizer.trims_offsets = config, trims_offsets
    return tokenizer


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    known = (*NAMED_TOKENS, *_SETTINGS, "chat_template", *_WITHOUT_EFFECT)
    for name, value in overrides.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"DbrxTokenizer.from_pretrained() got an unexpected keyword argument {name!r}.{guess}")
        if name in ("add_prefix_space", "add_bos_token", "add_eos_token") and value:
            raise RequestError(f"{name} must be False: DBRX adds nothing to a text. Put the token's spelling into the text")
        if name in ("padding_side", "truncation_side") and value not in ("left", "right"):
            raise RequestError(f"{name} must be 'left' or 'right'; found {value!r}. Name a side")


@cache
def _say_that_no_code_runs() -> None:
    warnings.warn("trust_remote_code has no effect here: no code of a checkpoint runs", TokenizerWarning, stacklevel=3)


def _build_encoding(file: Path, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    import tiktoken

    try:
        encoding = tiktoken.Encoding(FILE_ENCODING, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise wrong(file, "pre_tokenizer: pattern", f"a regular expression that tiktoken reads ({error})", pattern) from None
    for text in (_PROBE, *_PROBE):
        if encoding.decode_bytes(encoding.encode_ordinary(text)) != text.encode():
            raise wrong(file, "pre_tokenizer: pattern", f"one that leaves no character over, as it does in {text!r}", pattern)
    return encoding
