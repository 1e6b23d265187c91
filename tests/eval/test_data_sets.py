"""Data sets to calibrate with, read by `datasets` from folders with the layout of their repositories."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.errors import RequestError
from dbrx_q.eval import data_sets
from dbrx_q.eval.chats import Chats, load_source, save_sources
from dbrx_q.eval.data_sets import DATA_SETS, DEFAULT_MIX
from dbrx_q.eval.texts import Text, load_text

CHATS = [[{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "Answer"}] for number in range(3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories of the default mix with few rows, in place of those on the hub."""
    import datasets

    def write(repository: str, path: str, columns: dict[str, Any]) -> None:
        file = tmp_path / "hub" / repository.split("/")[1] / path
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns).to_parquet(str(file))

    books = [f"title {number} {'a' * 30_000} middle {number} {'b' * 30_000} end" for number in range(3)]
    write("sedthh/gutenberg_english", "data/train-00000-of-00001.parquet", {"TEXT": books, "SOURCE": ["gutenberg"] * 3})
    write("open-web-math/open-web-math", "data/train-00000-of-00001.parquet", {"text": ["x = 1", "y = 2"], "url": ["a", "b"]})
    write("HuggingFaceH4/ultrachat_200k", "data/train_sft-00000-of-00001.parquet", {"prompt": ["p"] * 3, "messages": CHATS})
    write("HuggingFaceH4/ultrachat_200k", "data/test_sft-00000-of-00001.parquet", {"prompt": ["p"], "messages": CHATS[:1]})
    entries = ""
    for language in ("en", "de", "es", "fr", "ja", "ru", "zh"):
        texts = [f"{language} {number}" for number in range(700)]
        write("wikimedia/wikipedia", f"20231101.{language}/train-00000-of-00001.parquet", {"title": texts, "text": texts})
        entries += f"- config_name: 20231101.{language}\n  data_files:\n  - split: train\n    path: 20231101.{language}/train-*\n"
    (tmp_path / "hub" / "wikipedia" / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    splits = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_sft", "test_sft"))
    (tmp_path / "hub" / "ultrachat_200k" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    code = tmp_path / "hub" / "stackv2_edu_filtered"
    code.mkdir()
    for file in (*DATA_SETS["stack-edu"].files, "stack-edu-0000.json.gz"):
        rows = [json.dumps({"text": f"{file} {number}", "metadata": {"language": "Python"}}) for number in range(200)]
        (code / file).write_bytes(gzip.compress("\n".join(rows).encode()))
    for name in DEFAULT_MIX:
        known = DATA_SETS[name]
        monkeypatch.setitem(DATA_SETS, name, replace(known, repository=str(tmp_path / "hub" / known.repository.split("/")[1])))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def test_long_documents_are_cut_to_their_middle(hub: Path) -> None:
    documents = load_text("gutenberg-en").text.split("\n\n")
    assert [len(document) for document in documents] == [20_000] * 3
    for number, document in enumerate(documents):
        assert f" middle {number} " in document
        assert "title" not in document


def test_the_first_documents_of_each_language_are_taken(hub: Path) -> None:
    assert load_text("wikipedia-en").text.split("\n\n") == [f"en {number}" for number in range(600)]
    expected = [f"{language} {number}" for language in ("de", "es", "fr", "ja", "ru", "zh") for number in range(100)]
    assert load_text("wikipedia-languages").text.split("\n\n") == expected


def test_code_is_of_several_languages(hub: Path) -> None:
    files = [document.split()[0] for document in load_text("stack-edu").text.split("\n\n")]
    assert {file: files.count(file) for file in files} == dict.fromkeys(DATA_SETS["stack-edu"].files, 150)
    assert len(DATA_SETS["stack-edu"].files) == 9


def test_chats_are_lists_of_messages(hub: Path) -> None:
    chats = load_source("ultrachat")
    assert isinstance(chats, Chats)
    assert list(chats.conversations) == CHATS
    assert chats.places[2] == "ultrachat: row 3"
    with pytest.raises(RequestError, match="ultrachat: a text to measure on must be documents; this data set has chats"):
        load_text("ultrachat")


def test_the_saved_mix_is_the_mix(hub: Path, tmp_path: Path) -> None:
    files = save_sources(DEFAULT_MIX, tmp_path / "mix")
    assert [file.name for file in files] == [
        "gutenberg-en.txt",
        "wikipedia-en.txt",
        "stack-edu.txt",
        "open-web-math.txt",
        "ultrachat.jsonl",
        "wikipedia-languages.txt",
    ]
    for name, file in zip(DEFAULT_MIX, files, strict=True):
        original, saved = load_source(name), load_source(str(file))
        assert type(original) is type(saved)
        assert original.sha256 == saved.sha256
    assert isinstance(load_source(str(files[0])), Text)


def test_a_revision_that_does_not_exist_is_refused(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setitem(DATA_SETS, "open-web-math", replace(DATA_SETS["open-web-math"], repository="open-web-math/open-web-math"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"open-web-math@v9: the hub must provide the data set .* says how to write one") as caught:
        load_source("open-web-math@v9")
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "wikipedia-en", replace(DATA_SETS["wikipedia-en"], column="body"))
    with pytest.raises(RequestError, match="wikipedia-en: the hub must provide the data set"):
        load_text("wikipedia-en")


def test_the_mix_has_licences_and_fixed_revisions() -> None:
    for name in DEFAULT_MIX:
        assert DATA_SETS[name].licence
        assert len(DATA_SETS[name].revision or "") == 40
    assert data_sets.data_set("ultrachat@main") == replace(DATA_SETS["ultrachat"], revision="main")
