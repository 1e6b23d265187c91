"""What is saved and what `quantize` copies is read with the same ids here and by transformers, AutoTokenizer included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dbrx_q import DbrxTokenizer
from dbrx_q.errors import TokenizerError
from dbrx_q.tokenizer.copying import copy_tokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "dbrx-nano"
TEXTS = ["It's 1234567 worlds.\n\n  The <|im_end|> don'T  x", "é👍 \u3000\t中文", "<|im_start|>user\n<|pad|>", " " * 40 + "x"]
LAUNCH = {"tokenizer_class": "TiktokenTokenizerWrapper", "model_name": "gpt-4", "encoding_name": None, "eos_token": "<|endoftext|>"}
LAUNCH |= {"pad_token": "<|pad|>", "auto_map": {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]}, "model_max_length": 32768}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
        yield tiktoken.get_encoding("cl100k_base")


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    change(config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def assert_read_alike(folder: Path, original: DbrxTokenizer) -> None:
    shutil.copyfile(NANO / "config.json", folder / "config.json")
    ours = DbrxTokenizer.from_pretrained(folder)
    readers: list[Any] = [AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)]
    chat = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "1234567"}]
    for reader in [ours, *readers]:
        for text in TEXTS:
            assert reader.encode(text) == original.encode(text), (type(reader), text)
            assert reader.decode(original.encode(text)) == original.decode(original.encode(text))
        assert reader.special_tokens_map == original.special_tokens_map
        assert reader.model_max_length == original.model_max_length
        assert reader.padding_side == original.padding_side
        assert reader.chat_template == original.chat_template
        if original.chat_template is not None:
            assert reader.apply_chat_template(chat, return_dict=False) == original.apply_chat_template(chat, return_dict=False)
    assert ours.special_tokens == original.special_tokens
    assert ours.get_vocab() == original.get_vocab()


def test_a_saved_tokenizer_is_read_alike(tmp_path: Path) -> None:
    original = DbrxTokenizer.from_pretrained(NANO)
    names = original.save_pretrained(tmp_path / "a")
    assert {Path(name).name for name in names} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert_read_alike(tmp_path / "a", original)
    original.add_special_tokens({"sep_token": "[SEP]", "extra_special_tokens": ["<x>"]})
    original.padding_side = "left"
    original.pad_token = original.eos_token
    original.model_max_length = 77
    original.chat_template = None
    original.save_pretrained(tmp_path / "a")
    assert_read_alike(tmp_path / "a", original)
    assert DbrxTokenizer.from_pretrained(tmp_path / "a").all_special_tokens == original.all_special_tokens


def test_named_templates_are_saved(tmp_path: Path) -> None:
    original = DbrxTokenizer.from_pretrained(NANO)
    original.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "Té"}
    original.save_pretrained(tmp_path)
    assert_read_alike(tmp_path, original)
    original.chat_template = {"../x": "D"}
    with pytest.raises(TokenizerError, match="must be a file name"):
        original.save_pretrained(tmp_path)


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", None])
def test_a_copied_tokenizer_is_read_alike(tokenizer_class: str | None, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    shutil.copytree(NANO, source, ignore=shutil.ignore_patterns("*.safetensors"))
    changed(source, lambda config: config.update(tokenizer_class=tokenizer_class))
    folder.mkdir()
    copy_tokenizer(source, folder)
    assert_read_alike(folder, DbrxTokenizer.from_pretrained(source))
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_tokenizer_json_alone_gets_a_config(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "folder").mkdir()
    copy_tokenizer(tmp_path / "source", tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
    shutil.copyfile(NANO / "tokenizer.json", tmp_path / "source/tokenizer.json")
    copy_tokenizer(tmp_path / "source", tmp_path / "folder")
    assert_read_alike(tmp_path / "folder", DbrxTokenizer.from_pretrained(tmp_path / "source"))


def test_launch_files_become_a_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "tokenizer_config.json").write_text(json.dumps(LAUNCH))
    copy_tokenizer(source, folder)
    original = DbrxTokenizer.from_pretrained(source)
    assert (original.special_tokens["<|im_end|>"], len(original)) == (100279, 100280)
    assert_read_alike(folder, original)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", lambda address: (_ for _ in ()).throw(OSError("no route")))
    shutil.rmtree(folder)
    folder.mkdir()
    copy_tokenizer(source, folder)  # without the ranks the files stay as they are
    assert [path.name for path in folder.iterdir()] == ["tokenizer_config.json"]
    assert json.loads((folder / "tokenizer_config.json").read_text()) == LAUNCH


def test_a_tokenizer_that_transformers_saved_is_read(tmp_path: Path) -> None:
    reader: Any = PreTrainedTokenizerFast.from_pretrained(NANO)
    reader.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]["type"] == "TemplateProcessing"
    original = DbrxTokenizer.from_pretrained(NANO)
    assert_read_alike(tmp_path, original)
    tokenizer: Any = AutoTokenizer.from_pretrained(NANO)  # GPT2Tokenizer, whose pattern takes the file's place
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.warns(UserWarning, match=r"GPT-2's pattern.*original\s+checkpoint"):
        other = DbrxTokenizer.from_pretrained(tmp_path / "gpt2")
    assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert other.encode(TEXTS[0]) != original.encode(TEXTS[0])


@pytest.mark.parametrize(
    "post_processor",
    [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []},
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "BertProcessing"}]},
        {"type": "RobertaProcessing"},
    ],
)
def test_post_processors_that_add_tokens_are_refused(post_processor: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads((NANO / "tokenizer.json").read_text()) | {"post_processor": post_processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="post_processor must be null, of type ByteLevel, or"):
        DbrxTokenizer.from_pretrained(tmp_path)
    single = {"Sequence": {"id": "A", "type_id": 0}}
    nothing = {"type": "TemplateProcessing", "single": [single], "pair": [single, {"Sequence": {"id": "B", "type_id": 1}}]}
    data["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, nothing]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert DbrxTokenizer.from_pretrained(tmp_path).encode("a b") == DbrxTokenizer.from_pretrained(NANO).encode("a b")
