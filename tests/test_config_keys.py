"""docs/config-keys.md names every key of the lists in the code, and gives each ignored key the reason that the code gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dbrx_q.config import DbrxConfig
from dbrx_q.config_keys import ALIASES, FOREIGN_KEYS, REFUSED_KEYS
from dbrx_q.config_sections import DbrxAttentionConfig, DbrxFFNConfig
from dbrx_q.sources import gguf_keys, gguf_tokenizer
from dbrx_q.tokenizer import saving
from dbrx_q.tokenizer.tokenizer_config import NAMED_TOKENS, Settings

TEXT = (Path(__file__).parents[1] / "docs" / "config-keys.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}

CONFIG = {*DbrxConfig._fields, *DbrxAttentionConfig._fields, *DbrxFFNConfig._fields, *ALIASES, *FOREIGN_KEYS, *REFUSED_KEYS}
GGUF = {*gguf_keys._READ, *gguf_keys._WITHOUT_EFFECT, *gguf_keys._OF_HEADS}
GGUF |= {f"tokenizer.ggml.{name}_token_id" for name in gguf_tokenizer._NAMED.values()}

TOKENIZER = {*NAMED_TOKENS, *Settings.__dataclass_fields__, *saving._DROPPED}


def named(section: str) -> set[str]:
    """The keys of a section, without the prefixes that its rows leave out."""
    return {name.rsplit(".", 1)[-1] for name in re.findall(r"`([\w.]+)`", SECTIONS[section])}


@pytest.mark.parametrize(
    ("section", "keys"),
    [("config.json", CONFIG), ("GGUF metadata", GGUF), ("tokenizer_config.json", TOKENIZER)],
    ids=["config.json", "GGUF", "tokenizer_config.json"],
)
def test_every_key_of_the_code_is_in_the_document(section: str, keys: set[str]) -> None:
    assert {key for key in keys if key.rsplit(".", 1)[-1] not in named(section)} == set()


def test_every_ignored_key_has_the_reason_of_the_code() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", SECTIONS["config.json"].split("why they may be ignored", 1)[1], flags=re.MULTILINE)
    assert {key: reason for keys, reason in rows for key in re.findall(r"`(\w+)`", keys)} == FOREIGN_KEYS


def test_no_ignored_key_is_read_or_refused() -> None:
    """Of those that the document calls ignored; defaults of outputs are read as such."""
    read = {*DbrxAttentionConfig._fields, *DbrxFFNConfig._fields, *ALIASES, *REFUSED_KEYS}
    assert read & FOREIGN_KEYS.keys() == set()
