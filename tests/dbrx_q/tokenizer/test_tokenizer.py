"""The tokenizer against the `tokenizers` library and tiktoken, token for token, and its refusals."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers

from dbrx_q.errors import TokenizerError
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CL100K_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HARD = {
    "empty": "",
    "emoji": "👩‍👩‍👧‍👦👍🏽 🏴‍☠️🇩🇪❤️ a👩‍🚀b",
    "combining": "e\u0301 a\u030a\u0323 \u0301start Z\u0351\u0363\u0369alg\u0334o नि क्षि 각",
    "crlf": "a\r\nb\r\n\r\n  c\r\rd\n\r\n \r\n",
    "spaces": " " * 10_000,
    "spaces then word": " " * 10_000 + "x",
    "tabs": "\tif x:\n\t\treturn\t\t\t1\n \t \t",
    "unicode spaces": "a\u0085b\u00a0c\u2028d\u3000e \u0085\u00a0\u2028\u3000\u2003\u200b\ufeff x\u1680y\u180e\x1c\x1d\x1e\x1f\x0b\x0c",
    "long s": "it'ſ 'ſ 'S 'Ll 'VE 'ſſ don'T we'rE I'M",
    "dotless i": "ısırık İstanbul 'İ 'ı I'ı",
    "kelvin": "'K \u212a 'ﬅ 'ß 'ﬂ",
    "cjk": "敏捷的棕色狐狸跳过了懒狗。いろはにほへとㇰ 한국어　テスト",
    "arabic": "السَّلامُ عَلَيْكُم ١٢٣٤٥ ۱۲۳ لا إله\u200f",
    "digits": "0123456789 1 12 1234 3.14159 1,000,000 ½ ⅷ ²³ 𝟙𝟚𝟛𝟜 ๑๒๓๔",
    "nul": "\0a\0\0 \0\n\x7f\x01",
    "special-like": "<|im_end <|im_end|<|>| <|unknown|> |> <|",
    "letters": "a" * 20_000,
    "punctuation": "^" * 5_000 + "\n" * 500 + "!?" * 500,
    "unassigned": "\u0378a\U000e0080 \ufffe\uffff\U0010ffff\ue000 1\u0378!",
    "quotes": "'" * 50 + "''s'''t \"'re\" ’s",
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*" \t\n\r'sSſtT1٣é\u0301中.!_\u0085\u3000\0", "'ll", "  ", "the", "<|im_end|>", "👍🏽", "\u0378"]), max_size=30
).map("".join)


def library(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


_NANO = DbrxTokenizer.from_pretrained(NANO)
_SPECIAL = library(NANO)
_PLAIN = library(NANO)
_PLAIN.encode_special_tokens = True


@pytest.fixture
def nano() -> DbrxTokenizer:
    return _NANO


@pytest.fixture
def special_reader() -> tokenizers.Tokenizer:
    return _SPECIAL


@pytest.fixture
def plain_reader() -> tokenizers.Tokenizer:
    """The library, set to read special tokens in a text as plain text."""
    return _PLAIN


@pytest.fixture(scope="module")
def book() -> str:
    return (DATA / "war-of-the-worlds.txt").read_bytes().decode()


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
        return tiktoken.get_encoding("cl100k_base")


def test_book_equals_tokenizers(nano: DbrxTokenizer, plain_reader: tokenizers.Tokenizer, book: str) -> None:
    ids = nano.encode(book)
    assert ids == plain_reader.encode(book).ids
    assert nano.decode(ids) == plain_reader.decode(ids, skip_special_tokens=False) == book


@pytest.mark.parametrize("name", HARD)
def test_hard_string_equals_tokenizers(name: str, nano: DbrxTokenizer, plain_reader: tokenizers.Tokenizer) -> None:
    ids = nano.encode(HARD[name])
    assert ids == plain_reader.encode(HARD[name]).ids
    assert nano.decode(ids) == plain_reader.decode(ids, skip_special_tokens=False) == HARD[name]


@settings(max_examples=600, deadline=None)
@given(text=TEXTS)
@example(text="it'ſ\u0085 <|im_end|>")
def test_any_text_equals_tokenizers(text: str) -> None:
    for reader, allow_special in ((_PLAIN, False), (_SPECIAL, True)):
        ids = _NANO.encode(text, allow_special=allow_special)
        assert ids == reader.encode(text).ids
        for skip in (False, True):
            assert _NANO.decode(ids, skip_special_tokens=skip) == reader.decode(ids, skip_special_tokens=skip)
        assert _NANO.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=30) | st.lists(st.integers(90, 260), max_size=12))
def test_any_ids_decode_as_in_tokenizers_and_stream(ids: list[int]) -> None:
    for skip in (False, True):
        whole = _NANO.decode(ids, skip_special_tokens=skip)
        stream = _NANO.stream_decoder(skip_special_tokens=skip)
        assert "".join([*map(stream.push, ids), stream.flush()]) == whole
    assert _NANO.decode(ids).encode() == _NANO.token_bytes(ids).decode(errors="replace").encode()
    if not any(i >= 4092 for i in ids):  # the library decodes the bytes before and after an added token separately
        assert _NANO.decode(ids) == _SPECIAL.decode(ids, skip_special_tokens=False)


def test_both_regex_engines_classify_characters_alike() -> None:
    """Which characters are letters, digits, blanks or contractions, for every 7th code point and all of Latin, in four contexts."""
    split = pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated")
    codes = [c for c in [*range(0x250), 0x1E9E, 0x2028, 0x212A, 0x3000, *range(0x250, 0x110000, 7)] if not 0xD800 <= c < 0xE000]
    texts = [form.format(chr(code)) for code in codes for form in ("t{}", "1{}", "{}!", "'{}")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for text in texts:  # a piece that is a token shows as one id
        ranks.setdefault(text.encode(), len(ranks))
    encoding = tiktoken.Encoding("classes", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={})
    differing = [
        text for text in texts if (len(split.pre_tokenize_str(text)) == 1) != (len(encoding.encode_ordinary(text)) == 1) and len(text) == 2
    ]
    assert differing == []


def test_specials_in_text_need_permission(nano: DbrxTokenizer, special_reader: tokenizers.Tokenizer) -> None:
    text = "a<|im_start|>user\n<|im_end|><|pad|><|im_end|"
    plain = nano.encode(text)
    assert not set(plain) & set(nano.special_tokens.values())
    assert nano.decode(plain) == text
    parsed = nano.encode(text, allow_special=True)
    assert parsed == special_reader.encode(text).ids
    assert [i for i in parsed if i >= 4092] == [nano.special_tokens[s] for s in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    assert nano.decode(parsed, skip_special_tokens=True) == "auser\n<|im_end|"


def test_named_tokens(nano: DbrxTokenizer, special_reader: tokenizers.Tokenizer) -> None:
    assert nano.special_tokens == {special: special_reader.token_to_id(special) for special in SPECIALS}
    assert nano.bos_token_id == nano.eos_token_id == nano.special_tokens["<|endoftext|>"]
    assert nano.pad_token_id == nano.special_tokens["<|pad|>"]
    assert nano.vocab_size == len(nano) == special_reader.get_vocab_size()


def test_long_runs_take_no_time(nano: DbrxTokenizer) -> None:
    start = time.perf_counter()
    for run in (" " * 10_000, "a" * 100_000, "\n" * 50_000, "é" * 50_000):
        assert nano.decode(nano.encode(run)) == run
    assert time.perf_counter() - start < 10  # quadratic engines take minutes


def test_a_run_of_blanks_that_overflows_tiktoken_is_a_tokenizer_error(nano: DbrxTokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TokenizerError, match="blanks in a row"):
        nano.encode(" " * 3_000_000)


@pytest.mark.parametrize("bad", [b"bytes", None, ["list"]])
def test_encode_takes_strings_only(bad: Any, nano: DbrxTokenizer) -> None:
    with pytest.raises(TokenizerError, match="must be a string"):
        nano.encode(bad)


def test_surrogates(nano: DbrxTokenizer) -> None:
    assert nano.decode(nano.encode("a\ud83db")) == "a\ufffdb"
    assert nano.decode(nano.encode("\ud83d\udc4d")) == "👍"


@pytest.mark.parametrize("bad", [-1, 4096, 10**12, "5", None])
def test_decode_refuses_ids_of_no_token(bad: Any, nano: DbrxTokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"found {bad!r}"):
        nano.decode([5, bad])
    with pytest.raises(TokenizerError, match=f"found {bad!r}"):
        nano.stream_decoder().push(bad)


def test_stream_holds_back_unfinished_characters(nano: DbrxTokenizer) -> None:
    ids = nano.encode("é👍z")
    assert all(nano.token_bytes([i]) != "👍".encode() for i in ids)
    stream = nano.stream_decoder()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "é👍z"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.push(ids[-2]) == "\ufffd" or stream.flush() == "\ufffd"
    assert stream.push(nano.encode("z")[0]) == "z"


def test_batch_pads_on_the_left(nano: DbrxTokenizer) -> None:
    texts = ["the war of the worlds", "", "Mars", "<|pad|>"]
    batch = nano.batch_encode(texts)
    rows = [nano.encode(text) for text in texts]
    width = max(map(len, rows))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.input_ids.tolist() == [[nano.pad_token_id] * (width - len(row)) + row for row in rows]
    assert batch.attention_mask.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    assert nano.batch_encode(["<|pad|>"], allow_special=True).input_ids.tolist() == [[nano.pad_token_id]]
    assert nano.batch_encode([]).input_ids.shape == (0, 0)
    with pytest.raises(TokenizerError, match="one string"):
        nano.batch_encode("text")


def test_batch_without_padding_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((NANO / "tokenizer.json").read_bytes())
    bare = DbrxTokenizer.from_pretrained(tmp_path)
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id, bare.chat_template) == (None, None, None, None)
    assert bare.batch_encode(["a", "b"]).attention_mask.tolist() == [[1], [1]]
    with pytest.raises(TokenizerError, match="padding token"):
        bare.batch_encode(["a", "a b c"])


def test_pickle_and_threads(nano: DbrxTokenizer, book: str) -> None:
    copy = pickle.loads(pickle.dumps(nano))
    parts = [book[start : start + 5_000] for start in range(0, 60_000, 5_000)]
    alone = [nano.encode(part) for part in parts]
    assert [copy.encode(part) for part in parts] == alone
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(nano.encode, parts)) == alone


def test_import_is_lean() -> None:
    code = "import sys, dbrx_q.tokenizer.tokenizer; print([m for m in ('torch', 'tiktoken', 'jinja2', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The real DBRX: cl100k_base, in both generations of files


def write_cl100k_json(folder: Path, cl100k: tiktoken.Encoding) -> None:
    """cl100k_base as a tokenizer.json, by the rule of transformers' converter: every split of a token into two tokens is a merge."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    ranks = {cl100k.decode_single_token_bytes(i): i for i in range(100256)}
    text = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = []
    for token in ranks:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[left], text[right]) for left, right in splits]
    model = models.BPE({text[token]: rank for token, rank in ranks.items()}, merges, fuse_unk=False)
    result = tokenizers.Tokenizer(model)
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    result.decoder = decoders.ByteLevel()
    result.save(str(folder / "tokenizer.json"), pretty=False)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [
        {"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for s, i in [("<|endoftext|>", 100257), ("<|pad|>", 100277), ("<|im_start|>", 100278), ("<|im_end|>", 100279)]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(data))


LAUNCH = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "encoding_name": None, "bos_token": "<|endoftext|>"}
LAUNCH |= {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|pad|>"}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(LAUNCH | changes))


def test_converted_cl100k_equals_tiktoken(cl100k: tiktoken.Encoding, book: str, tmp_path: Path) -> None:
    write_cl100k_json(tmp_path, cl100k)
    ours = DbrxTokenizer.from_pretrained(tmp_path)
    assert ours.encode(book) == cl100k.encode_ordinary(book)
    for text in HARD.values():
        ids = cl100k.encode_ordinary(text)
        assert ours.encode(text) == ids, text[:40]
        assert ours.decode(ids) == text
    assert ours.vocab_size == 100280
    # The library itself numbers added tokens from the end of the vocabulary, whatever the file says.
    assert ours.special_tokens["<|im_end|>"] == 100279
    with pytest.raises(TokenizerError, match="found 100256"):  # a gap in DBRX's ids
        ours.decode([100256])
    library_ids = library(tmp_path)
    assert ours.encode(book[:50_000]) == library_ids.encode(book[:50_000]).ids


def test_launch_files(cl100k: tiktoken.Encoding, book: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    ours = DbrxTokenizer.from_pretrained(tmp_path)
    assert ours.encode(book) == cl100k.encode_ordinary(book)
    for text in HARD.values():
        assert ours.encode(text) == cl100k.encode_ordinary(text)
    assert ours.special_tokens == {
        **{special: cl100k.encode_single_token(special) for special in cl100k.special_tokens_set},
        "<|pad|>": 100277,
        "<|im_start|>": 100278,
        "<|im_end|>": 100279,
    }
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (100257, 100257, 100277)
    assert ours.vocab_size == 100280
    assert ours.encode("<|im_start|>a", allow_special=True) == [100278, *cl100k.encode_ordinary("a")]
    for gap in (100256, 100270, 100280, 100351):
        with pytest.raises(TokenizerError, match=f"found {gap}"):
            ours.decode([gap])
    with pytest.raises(TokenizerError, match="chat_template"):
        ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert pickle.loads(pickle.dumps(ours)).encode("Mars <|pad|>") == ours.encode("Mars <|pad|>")


def test_launch_files_with_their_own_added_tokens(cl100k: tiktoken.Encoding, tmp_path: Path) -> None:
    decoder = {"100257": {"content": "<|endoftext|>"}, "100290": {"content": "<|pad|>"}, "100300": {"content": "word", "special": False}}
    write_config(tmp_path, added_tokens_decoder=decoder, model_name=None, encoding_name="cl100k_base")
    ours = DbrxTokenizer.from_pretrained(tmp_path)
    assert ours.pad_token_id == 100290
    assert "<|im_start|>" not in ours.special_tokens
    assert "word" not in ours.special_tokens
    assert ours.encode("a word", allow_special=True) == [*cl100k.encode_ordinary("a "), 100300]
    assert ours.encode("a word") == cl100k.encode_ordinary("a word")
    assert ours.decode([100300, 100290], skip_special_tokens=True) == "word"


def test_launch_files_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(address: str) -> bytes:
        raise ConnectionError(f"no route to {address}")

    write_config(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(TokenizerError, match=r"no route to .*TIKTOKEN_CACHE_DIR"):
        DbrxTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class must be 'TiktokenTokenizerWrapper'.*found 'LlamaTokenizer'"),
        ({"model_name": "dbrx"}, "model_name .* found 'dbrx'"),
        ({"model_name": None}, "one string and one null; found \\(None, None\\)"),
        ({"encoding_name": "cl100k_base"}, "one string and one null"),
        ({"model_name": None, "encoding_name": "latin"}, "encoding_name must be one of .*cl100k_base.*found 'latin'"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "<a>.* integer id .*found 'x'"),
        ({"added_tokens_decoder": {"5": {"content": "<a>"}}}, "5 is both '&' and '<a>'"),
        ({"added_tokens_decoder": {"100300": {"content": "<|endoftext|>"}}}, "'<|endoftext|>' has 100257 and 100300"),
        ({"added_tokens_decoder": {"100300": {"content": "<a>", "lstrip": True}}}, "lstrip must be false"),
        ({"pad_token": "<absent>"}, "pad_token must be a token .*found '<absent>'"),
        ({"pad_token": 5}, "pad_token must be a string.*found 5"),
        ({"add_bos_token": True}, "add_bos_token must be false"),
    ],
)
@pytest.mark.usefixtures("cl100k")
def test_config_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(TokenizerError, match=message) as caught:
        DbrxTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


# tokenizer.json files


def nano_json() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((NANO / "tokenizer.json").read_text())
    return data


def load(data: dict[str, Any], folder: Path) -> DbrxTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return DbrxTokenizer.from_pretrained(folder)


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def swap_merges(data: dict[str, Any]) -> None:
    merges = data["model"]["merges"]
    merges[100], merges[200] = merges[200], merges[100]


def drop_merge(data: dict[str, Any]) -> None:
    del data["model"]["merges"][300]


def drop_result(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["".join(data["model"]["merges"][-1])]


def drop_byte(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["ÿ"]


def unreachable_token(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["qzqzq"] = 5000


def other_merge(data: dict[str, Any]) -> None:
    """ "abc" as a + bc, where bytes alone would give ab + c."""
    data["model"]["vocab"] |= {"\x21ÿ\x22": 5002, "\x21ÿ": 5000, "ÿ\x22": 5001}
    data["model"]["merges"] += [["!", "ÿ"], ["ÿ", '"'], ["!", 'ÿ"']]


def duplicate_id(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["the"] = data["model"]["vocab"]["Ġ"]


PRE = ("pre_tokenizer", "pretokenizers")
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "not BPE": (put("model", "type", value="Unigram"), "model.type must be 'BPE'; found 'Unigram'"),
    "no model": (put("model", value=None), "model.type"),
    "normalizer": (put("normalizer", value={"type": "NFC"}), "normalizer must be null.*NFC"),
    "no pre_tokenizer": (put("pre_tokenizer", value=None), "pre_tokenizer must be Split then ByteLevel.*found None"),
    "other pre_tokenizer": (put(*PRE, 0, value={"type": "Whitespace"}), "pre_tokenizer must be Split then ByteLevel"),
    "pattern is a string": (put(*PRE, 0, "pattern", value={"String": " "}), "a string 'Regex'.*String"),
    "pattern broken": (put(*PRE, 0, "pattern", "Regex", value="(["), "regular expression that tiktoken reads"),
    "pattern leaves over": (put(*PRE, 0, "pattern", "Regex", value=r"\p{L}+|\s+"), "leaves no character over"),
    "pattern differs": (put(*PRE, 0, "pattern", "Regex", value=CL100K_PATTERN.replace("{1,3}", "{1,3}+")), "read differently"),
    "pattern anchored": (put(*PRE, 0, "pattern", "Regex", value=CL100K_PATTERN + r"|\s+$"), "read differently"),
    "behavior": (put(*PRE, 0, "behavior", value="MergedWithNext"), "Isolated with invert false.*MergedWithNext"),
    "invert": (put(*PRE, 0, "invert", value=True), "Isolated with invert false"),
    "prefix space": (put(*PRE, 1, "add_prefix_space", value=True), "add_prefix_space must be false; found True"),
    "two patterns": (put(*PRE, 1, "use_regex", value=True), "use_regex must be false"),
    "byte fallback": (put("model", "byte_fallback", value=True), "byte_fallback must be .*found True"),
    "dropout": (put("model", "dropout", value=0.1), "dropout must be .*found 0.1"),
    "suffix": (put("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix .*found '</w>'"),
    "decoder": (put("decoder", value={"type": "WordPiece"}), "decoder must be of type ByteLevel.*WordPiece"),
    "post_processor": (put("post_processor", value={"type": "TemplateProcessing"}), "post_processor must be .*TemplateProcessing"),
    "merge order": (swap_merges, r"merges\[101\] must be in non-decreasing order"),
    "merge missing": (drop_merge, "from which tiktoken builds .*no such merge"),
    "merge result missing": (drop_result, r"merges\[3835\] must be made of ordinary tokens"),
    "merge malformed": (put("model", "merges", 0, value="a b c"), r"merges\[0\] must be 'a b' or .*found 'a b c'"),
    "merges absent": (put("model", "merges", value=None), "merges must be a list; found None"),
    "merge of another split": (other_merge, "a list with .*'!ÿ', '\"'.*no such merge"),
    "byte missing": (drop_byte, r"none of the 256; found \['0xff'\]"),
    "token unreachable": (unreachable_token, "builds every token.*'qzqzq'"),
    "vocab absent": (put("model", "vocab", value=[]), "model.vocab must be a non-empty object"),
    "vocab alphabet": (put("model", "vocab", "a b", value=5000), "byte-level strings; found 'a b'"),
    "vocab id": (put("model", "vocab", "the", value="7"), "integer id .*found '7'"),
    "vocab id twice": (duplicate_id, "the id of one token; found .*the"),
    "added id taken": (put("added_tokens", 0, "id", value=5), "5 is both '&' and '<|endoftext|>'"),
    "added without id": (put("added_tokens", 0, "id", value=None), "endoftext.*integer id.*found None"),
    "added rstrip": (put("added_tokens", 1, "rstrip", value=True), "im_start.*rstrip must be false; found True"),
    "added empty": (put("added_tokens", 1, "content", value=""), "non-empty string 'content'"),
    "added is a merge's result": (put("added_tokens", 0, "content", value="the"), "added_tokens .the.: id must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_refusals(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    data = nano_json()
    change(data)
    with pytest.raises(TokenizerError, match=message) as caught:
        load(data, tmp_path)
    assert "tokenizer.json" in str(caught.value) or str(tmp_path) in str(caught.value)


def string_merges(data: dict[str, Any]) -> None:
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]


def all_splits(data: dict[str, Any]) -> None:
    vocab = data["model"]["vocab"]
    data["model"]["merges"] = [
        [token[:cut], token[cut:]]
        for token in sorted(vocab, key=vocab.get)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def inverted(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}


def gpt2(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def whole_pieces(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["qzqzq"] = 4092
    for token in data["added_tokens"]:
        token["id"] += 1
    data["model"]["ignore_merges"] = True


def added_not_special(data: dict[str, Any]) -> None:
    data["added_tokens"][0] |= {"special": False, "content": "Mars"}
    data["added_tokens"][1] |= {"content": "<|im_end|><|im_end|>"}


@pytest.mark.parametrize("change", [string_merges, all_splits, inverted, gpt2, whole_pieces, added_not_special], ids=lambda f: f.__name__)
def test_other_forms_of_the_file_equal_tokenizers(change: Callable[[dict[str, Any]], None], book: str, tmp_path: Path) -> None:
    data = nano_json()
    change(data)
    ours = load(data, tmp_path)
    reader = library(tmp_path)
    for text in [book[:40_000], *HARD.values(), "qzqzq qzqzqz 1234567's", "Mars Marsh <|im_end|><|im_end|><|im_end|>"]:
        ids = ours.encode(text, allow_special=True)
        assert ids == reader.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=True) == reader.decode(ids, skip_special_tokens=True)


def test_a_longer_special_wins(tmp_path: Path) -> None:
    data = nano_json()
    data["added_tokens"].append({**data["added_tokens"][0], "id": 4096, "content": "<|pad|>s"})
    ours = load(data, tmp_path)
    assert ours.encode("<|pad|>s<|pad|>", allow_special=True) == library(tmp_path).encode("<|pad|>s<|pad|>").ids == [4096, 4095]


@pytest.mark.parametrize("text", ["{", "[]", "\xff", ""])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_malformed_json_names_the_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(TokenizerError, match=name):
        DbrxTokenizer.from_pretrained(tmp_path)


def test_folder_without_files(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json or tokenizer_config\.json") as caught:
            DbrxTokenizer.from_pretrained(os.fspath(folder))
        assert str(folder) in str(caught.value)
