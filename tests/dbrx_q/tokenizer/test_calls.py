"""Calls of the tokenizer return what those of transformers' PreTrainedTokenizerFast return, in every combination of options."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dbrx_q import DbrxTokenizer
from dbrx_q.errors import RequestError, TokenizerError, UnsupportedError
from dbrx_q.tokenizer.batch_encoding import BatchEncoding

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
OURS = DbrxTokenizer.from_pretrained(NANO)
THEIRS: Any = PreTrainedTokenizerFast.from_pretrained(NANO)
TEXTS = ["Hello <|im_end|> don'T 12345 é👍", "", "x", "a much longer text than the others, 中文 ok"]
INPUTS: dict[str, tuple[Any, ...]] = {
    "one": (TEXTS[0],),
    "empty": ("",),
    "several": (TEXTS,),
    "a pair": (TEXTS[0], TEXTS[3]),
    "pairs": (TEXTS, TEXTS[::-1]),
    "pairs in a list": ([(TEXTS[0], TEXTS[3]), (TEXTS[3], TEXTS[0])],),
}
RETURNS = ("length", "special_tokens_mask", "offsets_mapping", "token_type_ids", "attention_mask")


def listed(encoding: Any) -> dict[str, Any]:
    def nested(value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        return [nested(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {name: nested(value) for name, value in encoding.items()}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("padding", [False, True, "longest", "max_length"])
@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_options_equal_transformers(inputs: str, padding: bool | str) -> None:
    arguments = INPUTS[inputs]
    truncations = (None, False, True, "longest_first", "only_first", "only_second")
    compared = 0
    for truncation, length, side, multiple in product(truncations, (None, 7, 8, 40), (None, "left"), (None, 4)):
        options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": length, "padding_side": side}
        options |= {"pad_to_multiple_of": multiple} | {f"return_{name}": True for name in RETURNS}
        try:
            expected = THEIRS(*arguments, **options)
        except Exception:  # what transformers refuses is refused here, by rule and value
            with pytest.raises((RequestError, TokenizerError)):
                OURS(*arguments, **options)
            continue
        actual = OURS(*arguments, **options)
        assert listed(actual) == listed(expected), options
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("tensors", ["pt", "np"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_tensors_equal_transformers(inputs: str, tensors: str) -> None:
    actual = OURS(*INPUTS[inputs], padding=True, return_tensors=tensors)
    expected = THEIRS(*INPUTS[inputs], padding=True, return_tensors=tensors)
    assert list(actual) == list(expected) == ["input_ids", "attention_mask"]
    for name in actual:
        assert type(actual[name]) is type(expected[name])
        assert (actual[name].dtype, actual[name].shape) == (expected[name].dtype, expected[name].shape)
    assert listed(actual) == listed(expected)
    assert actual.tokens(0) == expected.tokens(0)


def test_truncation_sides_labels_and_ids_alone() -> None:
    ours, theirs = copy.deepcopy(OURS), copy.deepcopy(THEIRS)
    ours.truncation_side = theirs.truncation_side = "left"
    ours.padding_side = theirs.padding_side = "left"
    assert listed(ours(TEXTS, truncation=True, max_length=5, padding=True)) == listed(
        theirs(TEXTS, truncation=True, max_length=5, padding=True)
    )
    assert listed(ours("a", text_target="b c")) == listed(theirs("a", text_target="b c"))
    assert ours(text_target="b c")["input_ids"] == ours.encode("b c") == ours("b c", return_dict=False)
    assert ours.encode("b c", return_tensors="pt").tolist() == theirs.encode("b c", return_tensors="pt").tolist()
    assert ours.encode("a b c d e", max_length=2) == theirs.encode("a b c d e", max_length=2)
    assert OURS.padding_side == "right"


def test_an_encoding_is_a_mapping_of_keyword_arguments() -> None:
    encoding = OURS(TEXTS, padding=True, return_tensors="pt")

    def model(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[int, int]:
        return tuple(input_ids.shape)

    assert model(**encoding) == tuple(encoding.input_ids.shape)
    assert encoding.to("cpu") is encoding
    assert encoding.to("meta").input_ids.device.type == "meta"
    encoding = OURS(TEXTS, padding=True)
    assert len(encoding) == 2
    assert "labels" not in encoding
    assert encoding[:2]["input_ids"] == encoding.input_ids[:2]
    for copied in (pickle.loads(pickle.dumps(encoding)), copy.deepcopy(encoding), copy.copy(encoding)):
        assert isinstance(copied, BatchEncoding)
        assert copied.input_ids == encoding.input_ids
    with pytest.raises(AttributeError, match="it has input_ids, attention_mask"):
        _ = encoding.labels
    with pytest.raises(KeyError, match=r"a name .input_ids"):
        _ = encoding[0]
    with pytest.raises(TokenizerError, match="one length; input_ids has rows of 0 to"):
        OURS(TEXTS, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_equals_transformers(side: str) -> None:
    rows = [OURS(text) for text in TEXTS]
    for options in ({}, {"padding": "max_length", "max_length": 30}, {"pad_to_multiple_of": 8}, {"return_tensors": "pt"}):
        arguments: dict[str, Any] = {"padding_side": side, **options}
        expected = THEIRS.pad([THEIRS(text) for text in TEXTS], **arguments)
        assert listed(OURS.pad(rows, **arguments)) == listed(expected)
        assert listed(OURS.pad({"input_ids": [row.input_ids for row in rows]}, **arguments)) == listed(expected)
    single = OURS.pad({"input_ids": torch.tensor([1, 2])}, padding="max_length", max_length=4, padding_side=side, return_tensors="pt")
    assert single.input_ids.shape == (4,)


def test_decoding_equals_transformers() -> None:
    ids = [*OURS.encode("a<|im_end|> b ."), OURS.pad_token_id]
    forms: list[Any] = [ids, torch.tensor(ids), np.array(ids), tuple(ids), [ids, ids[:3]], torch.tensor([ids, ids]), 5, torch.tensor(5), []]
    for skip, form in product((False, True), forms):
        expected = THEIRS.decode(form, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert OURS.decode(form, skip_special_tokens=skip) == expected
    for batch in ([ids, [], ids[:2]], torch.tensor([ids]), np.array([ids, ids]), []):
        assert OURS.batch_decode(batch, skip_special_tokens=True) == THEIRS.batch_decode(
            batch, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert OURS.decode(OURS("a b")) == "a b"


def test_names_of_tokens_equal_transformers(book: str) -> None:
    words = [book[start : start + 40] for start in random.Random(0).sample(range(len(book) - 40), 200)]
    for text in [*TEXTS, *words]:
        tokens = THEIRS.tokenize(text)
        assert OURS.tokenize(text) == tokens
        ids = THEIRS.encode(text)
        assert OURS.encode(text) == ids
        assert OURS.convert_ids_to_tokens(ids) == tokens
        assert OURS.convert_tokens_to_ids(tokens) == ids
        assert OURS.convert_tokens_to_string(tokens) == THEIRS.convert_tokens_to_string(tokens) == text
    for name in ("vocab_size", "all_special_tokens", "all_special_ids", "special_tokens_map", "added_tokens_encoder", "model_max_length"):
        assert getattr(OURS, name) == getattr(THEIRS, name), name
    for name in ("padding_side", "truncation_side", "model_input_names", "is_fast", "pad_token_type_id", "split_special_tokens"):
        assert getattr(OURS, name) == getattr(THEIRS, name), name
    for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"):
        assert getattr(OURS, f"{name}_token") == getattr(THEIRS, f"{name}_token")
        assert getattr(OURS, f"{name}_token_id") == getattr(THEIRS, f"{name}_token_id")
    assert OURS.get_vocab() == OURS.vocab == THEIRS.get_vocab()
    assert OURS.get_added_vocab() == THEIRS.get_added_vocab()
    assert len(OURS) == len(THEIRS)
    assert {key: str(value) for key, value in OURS.added_tokens_decoder.items()} == {
        key: str(value) for key, value in THEIRS.added_tokens_decoder.items()
    }
    assert OURS.convert_tokens_to_ids("no such token") == THEIRS.convert_tokens_to_ids("no such token") == OURS.unk_token_id
    assert OURS.convert_ids_to_tokens(5) == THEIRS.convert_ids_to_tokens(5)
    assert OURS.convert_ids_to_tokens([4092, 5], skip_special_tokens=True) == THEIRS.convert_ids_to_tokens(
        [4092, 5], skip_special_tokens=True
    )


def test_named_tokens_are_set_and_tokens_added_as_in_transformers() -> None:
    ours, theirs = copy.deepcopy(OURS), copy.deepcopy(THEIRS)
    for tokenizer in (ours, theirs):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.bos_token_id = 4094
        assert tokenizer.add_tokens(["<new>", "the", "<new>"]) == 2
        assert tokenizer.add_special_tokens({"sep_token": "[SEP]", "additional_special_tokens": ["<x>", "<|im_end|>"]}) in (2, 3)
    assert (ours.pad_token_id, ours.bos_token) == (theirs.pad_token_id, theirs.bos_token) == (4092, "<|im_end|>")
    assert len(ours) == len(theirs) == 4099
    assert ours.all_special_tokens == theirs.all_special_tokens
    for text in ("a<new>b the [SEP]<x>", "other theory<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert "<new>" not in OURS.get_vocab()
    assert pickle.loads(pickle.dumps(ours)).encode("a<new>b") == ours.encode("a<new>b")
    ours.pad_token = None
    with pytest.raises(TokenizerError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        ours(TEXTS, padding=True)
    with pytest.raises(TokenizerError, match=r"pad_token must be a token of the vocabulary; found '\[PAD\]'.*add_special_tokens"):
        ours.pad_token = "[PAD]"
    with pytest.raises(TokenizerError, match="a named token must be one of"):
        ours.add_special_tokens({"padding": "[PAD]"})
    with pytest.raises(TokenizerError, match=r"U\+DC00"):
        ours.add_tokens("<\udc00>")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pading": True}, TypeError, "'pading'. Did you mean 'padding'"),
        ({"padding": "left"}, RequestError, "padding must be True, False or one of"),
        ({"truncation": "right"}, RequestError, "truncation must be"),
        ({"padding_side": "top"}, RequestError, "'left' or 'right'; found 'top'"),
        ({"max_length": -1}, RequestError, "max_length must be a whole number.*found -1"),
        ({"pad_to_multiple_of": 0}, RequestError, "pad_to_multiple_of must be.*found 0"),
        ({"return_tensors": "tf"}, RequestError, "'pt', 'np' or None; found 'tf'"),
        ({"return_overflowing_tokens": True}, UnsupportedError, "Split the ids"),
        ({"is_split_into_words": True}, UnsupportedError, "Join the words"),
        ({"truncation": "only_second", "max_length": 1}, RequestError, "must have a pair"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OURS("a b c d", **options)


def test_arguments_of_from_pretrained() -> None:
    tokenizer = DbrxTokenizer.from_pretrained(NANO, padding_side="left", pad_token="<|endoftext|>", model_max_length=9, use_fast=True)
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.model_max_length) == ("left", 4092, 9)
    assert tokenizer.name_or_path == str(NANO)
    with pytest.raises(TypeError, match="Did you mean 'padding_side'"):
        DbrxTokenizer.from_pretrained(NANO, paddin_side="left")
    with pytest.raises(RequestError, match="add_bos_token must be False"):
        DbrxTokenizer.from_pretrained(NANO, add_bos_token=True)
    with pytest.warns(UserWarning, match="no code of a checkpoint runs"):
        DbrxTokenizer.from_pretrained(NANO, trust_remote_code=True)
    with pytest.raises(TokenizerError, match="text or text_target"):
        OURS()
