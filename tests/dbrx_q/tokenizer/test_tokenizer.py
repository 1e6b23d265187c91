"""The tokenizer of the bundled model compared with the `tokenizers` library, token for token."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_q.errors import TokenizerError
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*" \t\n\r'sSſtT1٣é\u0301中.!_\u0085\u3000\0", "'ll", "  ", "the", "<|im_end|>", "👍🏽", "\u0378"]), max_size=30
).map("".join)


_NANO = DbrxTokenizer.from_pretrained(NANO)
_SPECIAL, _PLAIN = (tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json")) for _ in range(2))
_PLAIN.encode_special_tokens = True


@pytest.fixture
def nano() -> DbrxTokenizer:
    return _NANO


@pytest.fixture
def special_reader() -> tokenizers.Tokenizer:
    return _SPECIAL


@pytest.fixture
def plain_reader() -> tokenizers.Tokenizer:
    """The library, configured to read special tokens in a text as plain text."""
    return _PLAIN


def test_book_equals_tokenizers(nano: DbrxTokenizer, plain_reader: tokenizers.Tokenizer, book: str) -> None:
    ids = nano.encode(book, split_special_tokens=True)
    assert ids == plain_reader.encode(book).ids
    assert nano.decode(ids) == plain_reader.decode(ids, skip_special_tokens=False) == book


def test_a_hard_text_equals_tokenizers(hard_text: str, nano: DbrxTokenizer, plain_reader: tokenizers.Tokenizer) -> None:
    ids = nano.encode(hard_text, split_special_tokens=True)
    assert ids == plain_reader.encode(hard_text).ids
    assert nano.decode(ids) == plain_reader.decode(ids, skip_special_tokens=False) == hard_text


@settings(max_examples=600, deadline=None)
@given(text=TEXTS)
@example(text="it'ſ\u0085 <|im_end|>")
def test_any_text_equals_tokenizers(text: str) -> None:
    for reader, split in ((_PLAIN, True), (_SPECIAL, False)):
        ids = _NANO.encode(text, split_special_tokens=split)
        assert ids == reader.encode(text).ids
        for skip in (False, True):
            assert _NANO.decode(ids, skip_special_tokens=skip) == reader.decode(ids, skip_special_tokens=skip)
        assert _NANO.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=30) | st.lists(st.integers(90, 260), max_size=12))
def test_any_ids_decode_and_stream_like_tokenizers(ids: list[int]) -> None:
    for skip in (False, True):
        text = _NANO.decode(ids, skip_special_tokens=skip)
        stream = _NANO.stream_decoder(skip_special_tokens=skip)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert _NANO.decode(ids).encode() == _NANO.token_bytes(ids).decode(errors="replace").encode()
    if not any(i >= 4092 for i in ids):  # the library decodes the bytes before and after an added token separately
        assert _NANO.decode(ids) == _SPECIAL.decode(ids, skip_special_tokens=False)


def test_special_tokens_in_text_are_read_or_split(nano: DbrxTokenizer, special_reader: tokenizers.Tokenizer) -> None:
    text = "a<|im_start|>user\n<|im_end|><|pad|><|im_end|"
    plain = nano.encode(text, split_special_tokens=True)
    assert not set(plain) & set(nano.special_tokens.values())
    assert nano.decode(plain) == text
    parsed = nano.encode(text)
    assert parsed == special_reader.encode(text).ids
    assert [i for i in parsed if i >= 4092] == [nano.special_tokens[s] for s in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    assert nano.decode(parsed, skip_special_tokens=True) == "auser\n<|im_end|"


def test_special_tokens_have_their_ids(nano: DbrxTokenizer, special_reader: tokenizers.Tokenizer) -> None:
    assert nano.special_tokens == {special: special_reader.token_to_id(special) for special in SPECIALS}
    assert nano.bos_token_id == nano.eos_token_id == nano.special_tokens["<|endoftext|>"]
    assert nano.pad_token_id == nano.special_tokens["<|pad|>"]
    assert len(nano) == special_reader.get_vocab_size()
    assert nano.vocab_size == special_reader.get_vocab_size(with_added_tokens=False)


def test_long_runs_are_encoded_quickly(nano: DbrxTokenizer) -> None:
    start = time.perf_counter()
    for run in (" " * 10_000, "a" * 100_000, "\n" * 50_000, "é" * 50_000):
        assert nano.decode(nano.encode(run)) == run
    assert time.perf_counter() - start < 10  # quadratic engines take minutes


def test_a_run_of_blanks_that_tiktoken_cannot_encode_is_refused(nano: DbrxTokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    for text in (" " * 1_000_000, "a" + "\t" * 3_000_000 + "b"):
        with pytest.raises(TokenizerError, match="blanks or more in a row"):
            nano.encode(text)
    assert nano.decode(nano.encode("\n" * 1_000_000)) == "\n" * 1_000_000
    assert capfd.readouterr().err == ""  # the engine's panic would be printed


@pytest.mark.parametrize("bad", [b"bytes", 5, [b"bytes"]])
def test_encode_accepts_strings_only(bad: Any, nano: DbrxTokenizer) -> None:
    with pytest.raises(TokenizerError, match="must be a string"):
        nano.encode(bad)


def test_lone_surrogates_are_replaced(nano: DbrxTokenizer) -> None:
    assert nano.decode(nano.encode("a\ud83db")) == "a\ufffdb"
    assert nano.decode(nano.encode("\ud83d\udc4d")) == "👍"


@pytest.mark.parametrize("bad", [-1, 4096, 10**12, None])
def test_decode_refuses_unknown_ids(bad: Any, nano: DbrxTokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"found {bad!r}"):
        nano.decode([5, bad])
    with pytest.raises(TokenizerError, match=f"found {bad!r}"):
        nano.stream_decoder().push(bad)


def test_a_stream_holds_back_incomplete_characters(nano: DbrxTokenizer) -> None:
    ids = nano.encode("é👍z")
    assert all(nano.token_bytes([i]) != "👍".encode() for i in ids)
    stream = nano.stream_decoder()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "é👍z"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.push(ids[-2]) == "\ufffd" or stream.flush() == "\ufffd"
    assert stream.push(nano.encode("z")[0]) == "z"


def test_a_batch_is_padded_on_the_right_unless_asked(nano: DbrxTokenizer) -> None:
    texts = ["the war of the worlds", "", "Mars", "<|pad|>"]
    batch = nano.batch_encode(texts, padding_side="left", split_special_tokens=True)
    rows = [nano.encode(text, split_special_tokens=True) for text in texts]
    width = max(map(len, rows))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.input_ids.tolist() == [[nano.pad_token_id] * (width - len(row)) + row for row in rows]
    assert batch.attention_mask.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    right = nano.batch_encode(texts, split_special_tokens=True)
    assert right.input_ids.tolist() == [row + [nano.pad_token_id] * (width - len(row)) for row in rows]
    assert nano.batch_encode(["<|pad|>"]).input_ids.tolist() == [[nano.pad_token_id]]
    assert nano.batch_encode([]).input_ids.numel() == 0
    with pytest.raises(TokenizerError, match="one string"):
        nano.batch_encode("text")


def test_a_batch_without_a_padding_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    bare = DbrxTokenizer.from_pretrained(tmp_path)
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id, bare.chat_template) == (None, None, None, None)
    assert bare.batch_encode(["a", "b"], padding=False).attention_mask.tolist() == [[1], [1]]
    with pytest.raises(TokenizerError, match="padding token"):
        bare.batch_encode(["a", "a b c"])


def test_pickled_tokenizers_and_threads_give_the_same_ids(nano: DbrxTokenizer, book: str) -> None:
    copy = pickle.loads(pickle.dumps(nano))
    parts = [book[start : start + 5_000] for start in range(0, 60_000, 5_000)]
    alone = [nano.encode(part) for part in parts]
    assert [copy.encode(part) for part in parts] == alone
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(nano.encode, parts)) == alone


def test_importing_the_tokenizer_is_light() -> None:
    code = "import sys, dbrx_q.tokenizer.tokenizer; print([m for m in ('torch', 'tiktoken', 'jinja2', 'transformers') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
