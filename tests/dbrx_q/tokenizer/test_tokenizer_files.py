"""Tokenizer files: every form that is read gives the tokens of tiktoken and `tokenizers`, and the others are refused."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from dbrx_q.errors import TokenizerError
from dbrx_q.tokenizer.bpe_file import TokenizerWarning
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
CL100K_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def library(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def cl100k() -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
        return tiktoken.get_encoding("cl100k_base")


def test_both_regex_engines_classify_characters_in_the_same_way() -> None:
    """Whether they agree on letters, digits, blanks and contractions, for all of Latin and every 7th code point, in four contexts."""
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


# cl100k_base, the encoding of the published DBRX, in both generations of its files


def write_cl100k_json(folder: Path, cl100k: tiktoken.Encoding) -> None:
    """Write cl100k_base as a tokenizer.json, as transformers' converter does: every split of a token into two tokens is a merge."""
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


def test_converted_cl100k_equals_tiktoken(cl100k: tiktoken.Encoding, book: str, hard_texts: list[str], tmp_path: Path) -> None:
    write_cl100k_json(tmp_path, cl100k)
    ours = DbrxTokenizer.from_pretrained(tmp_path)
    assert ours.encode(book, split_special_tokens=True) == cl100k.encode_ordinary(book)
    for text in hard_texts:
        ids = cl100k.encode_ordinary(text)
        assert ours.encode(text, split_special_tokens=True) == ids, text[:40]
        assert ours.decode(ids) == text
    assert (ours.vocab_size, len(ours)) == (100256, 100280)
    # The library numbers added tokens from the end of the vocabulary and ignores the ids in the file.
    assert ours.special_tokens["<|im_end|>"] == 100279
    with pytest.raises(TokenizerError, match="found 100256"):  # a gap in DBRX's ids
        ours.decode([100256])
    reader = library(tmp_path)
    assert ours.encode(book[:50_000], split_special_tokens=True) == reader.encode(book[:50_000]).ids


def test_launch_files_equal_tiktoken(cl100k: tiktoken.Encoding, book: str, hard_texts: list[str], tmp_path: Path) -> None:
    write_config(tmp_path)
    ours = DbrxTokenizer.from_pretrained(tmp_path)
    assert ours.encode(book, split_special_tokens=True) == cl100k.encode_ordinary(book)
    for text in hard_texts:
        assert ours.encode(text, split_special_tokens=True) == cl100k.encode_ordinary(text)
    assert ours.special_tokens == {
        **{special: cl100k.encode_single_token(special) for special in cl100k.special_tokens_set},
        "<|pad|>": 100277,
        "<|im_start|>": 100278,
        "<|im_end|>": 100279,
    }
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (100257, 100257, 100277)
    assert (ours.vocab_size, len(ours)) == (100256, 100280)
    assert ours.encode("<|im_start|>a") == [100278, *cl100k.encode_ordinary("a")]
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
    assert ours.encode("a word") == [*cl100k.encode_ordinary("a "), 100300]
    assert ours.encode("a word") == [*cl100k.encode_ordinary("a "), 100300]
    assert ours.decode([100300, 100290], skip_special_tokens=True) == "word"


def test_launch_files_without_a_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_tokenizer_configs_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
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


def set_value(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


def swap_two_merges(data: dict[str, Any]) -> None:
    merges = data["model"]["merges"]
    merges[100], merges[200] = merges[200], merges[100]


def drop_merge(data: dict[str, Any]) -> None:
    del data["model"]["merges"][300]


def drop_merge_result(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["".join(data["model"]["merges"][-1])]


def drop_byte(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["ÿ"]


def unreachable_token(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["qzqzq"] = 5000


def merge_of_another_split(data: dict[str, Any]) -> None:
    """Add "abc" as a + bc, where bytes alone would give ab + c."""
    data["model"]["vocab"] |= {"\x21ÿ\x22": 5002, "\x21ÿ": 5000, "ÿ\x22": 5001}
    data["model"]["merges"] += [["!", "ÿ"], ["ÿ", '"'], ["!", 'ÿ"']]


def duplicate_id(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["the"] = data["model"]["vocab"]["Ġ"]


PRE = ("pre_tokenizer", "pretokenizers")
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "not BPE": (set_value("model", "type", value="Unigram"), "model.type must be 'BPE'; found 'Unigram'"),
    "no model": (set_value("model", value=None), "model.type"),
    "normalizer": (set_value("normalizer", value={"type": "NFC"}), "normalizer must be null.*NFC"),
    "no pre_tokenizer": (set_value("pre_tokenizer", value=None), "pre_tokenizer must be Split then ByteLevel.*found None"),
    "other pre_tokenizer": (set_value(*PRE, 0, value={"type": "Whitespace"}), "pre_tokenizer must be Split then ByteLevel"),
    "pattern is a string": (set_value(*PRE, 0, "pattern", value={"String": " "}), "a string 'Regex'.*String"),
    "pattern broken": (set_value(*PRE, 0, "pattern", "Regex", value="(["), "regular expression that tiktoken reads"),
    "pattern leaves over": (set_value(*PRE, 0, "pattern", "Regex", value=r"\p{L}+|\s+"), "leaves no character over"),
    "pattern differs": (set_value(*PRE, 0, "pattern", "Regex", value=CL100K_PATTERN.replace("{1,3}", "{1,3}+")), "read differently"),
    "pattern anchored": (set_value(*PRE, 0, "pattern", "Regex", value=CL100K_PATTERN + r"|\s+$"), "read differently"),
    "behavior": (set_value(*PRE, 0, "behavior", value="MergedWithNext"), "Isolated with invert false.*MergedWithNext"),
    "invert": (set_value(*PRE, 0, "invert", value=True), "Isolated with invert false"),
    "prefix space": (set_value(*PRE, 1, "add_prefix_space", value=True), "add_prefix_space must be false; found True"),
    "two patterns": (set_value(*PRE, 1, "use_regex", value=True), "use_regex must be false"),
    "byte fallback": (set_value("model", "byte_fallback", value=True), "byte_fallback must be .*found True"),
    "dropout": (set_value("model", "dropout", value=0.1), "dropout must be .*found 0.1"),
    "suffix": (set_value("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix .*found '</w>'"),
    "decoder": (set_value("decoder", value={"type": "WordPiece"}), "decoder must be of type ByteLevel.*WordPiece"),
    "post_processor": (set_value("post_processor", value={"type": "TemplateProcessing"}), "post_processor must be .*TemplateProcessing"),
    "merge order": (swap_two_merges, r"merges\[101\] must be in non-decreasing order"),
    "merge missing": (drop_merge, "from which tiktoken builds .*no such merge"),
    "merge result missing": (drop_merge_result, r"merges\[3835\] must be made of ordinary tokens"),
    "merge malformed": (set_value("model", "merges", 0, value="a b c"), r"merges\[0\] must be 'a b' or .*found 'a b c'"),
    "merges absent": (set_value("model", "merges", value=None), "merges must be a list; found None"),
    "merge of another split": (merge_of_another_split, "a list with .*'!ÿ', '\"'.*no such merge"),
    "byte missing": (drop_byte, r"none of the 256; found \['0xff'\]"),
    "token unreachable": (unreachable_token, "builds every token.*'qzqzq'"),
    "vocab absent": (set_value("model", "vocab", value=[]), "model.vocab must be a non-empty object"),
    "vocab alphabet": (set_value("model", "vocab", "a b", value=5000), "byte-level strings; found 'a b'"),
    "vocab id": (set_value("model", "vocab", "the", value="7"), "integer id .*found '7'"),
    "vocab id twice": (duplicate_id, "the id of one token; found .*the"),
    "added id taken": (set_value("added_tokens", 0, "id", value=5), "5 is both '&' and '<|endoftext|>'"),
    "added without id": (set_value("added_tokens", 0, "id", value=None), "endoftext.*integer id.*found None"),
    "added rstrip": (set_value("added_tokens", 1, "rstrip", value=True), "im_start.*rstrip must be false; found True"),
    "added empty": (set_value("added_tokens", 1, "content", value=""), "non-empty string 'content'"),
    "added is a merge's result": (set_value("added_tokens", 0, "content", value="the"), "added_tokens .the.: id must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tokenizer_files_are_refused(name: str, tmp_path: Path) -> None:
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


def inverted_pattern(data: dict[str, Any]) -> None:
    data["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}


def gpt2_pattern(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def ignored_merges(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["qzqzq"] = 4092
    for token in data["added_tokens"]:
        token["id"] += 1
    data["model"]["ignore_merges"] = True


def added_not_special(data: dict[str, Any]) -> None:
    data["added_tokens"][0] |= {"special": False, "content": "Mars"}
    data["added_tokens"][1] |= {"content": "<|im_end|><|im_end|>"}


@pytest.mark.parametrize(
    "change", [string_merges, all_splits, inverted_pattern, gpt2_pattern, ignored_merges, added_not_special], ids=lambda f: f.__name__
)
def test_other_forms_of_the_file_equal_tokenizers(
    change: Callable[[dict[str, Any]], None], book: str, hard_texts: list[str], tmp_path: Path
) -> None:
    data = nano_json()
    change(data)
    if change is gpt2_pattern:
        with pytest.warns(TokenizerWarning, match="GPT-2's pattern"):
            load(data, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)
        ours = load(data, tmp_path)
    reader = library(tmp_path)
    for text in [book[:40_000], *hard_texts, "qzqzq qzqzqz 1234567's", "Mars Marsh <|im_end|><|im_end|><|im_end|>"]:
        ids = ours.encode(text)
        assert ids == reader.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=True) == reader.decode(ids, skip_special_tokens=True)


def test_the_longer_of_two_special_tokens_matches(tmp_path: Path) -> None:
    data = nano_json()
    data["added_tokens"].append({**data["added_tokens"][0], "id": 4096, "content": "<|pad|>s"})
    ours = load(data, tmp_path)
    assert ours.encode("<|pad|>s<|pad|>") == library(tmp_path).encode("<|pad|>s<|pad|>").ids == [4096, 4095]


@pytest.mark.parametrize("text", ["{", "[]", "\xff", ""])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_malformed_json_is_refused_and_names_the_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(TokenizerError, match=name):
        DbrxTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    rules = {
        tmp_path: r"tokenizer\.json or tokenizer_config\.json; found neither",
        tmp_path / "absent": "no such folder; give a checkpoint's",
    }
    for folder, rule in rules.items():
        with pytest.raises(TokenizerError, match=rule) as caught:
            DbrxTokenizer.from_pretrained(os.fspath(folder))
        assert str(folder) in str(caught.value)
