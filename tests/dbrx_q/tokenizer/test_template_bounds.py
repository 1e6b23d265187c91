"""A chat template runs at most two seconds and makes no text of more than a megabyte, however it tries."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dbrx_q import DbrxTokenizer
from dbrx_q.errors import TokenizerError

NANO = Path(__file__).parents[2] / "data" / "dbrx-nano"
OURS = DbrxTokenizer.from_pretrained(NANO)
MESSAGES = [{"role": "user", "content": "Hi"}]
WORD = "'ninechars'"
LONG = {
    "output": "{% for i in range(100000) %}{{ 'ninechars ninechars' }}{% endfor %}",
    "multiplied": "{{ 'a' * 1000000000 }}",
    "multiplied list": "{{ ['a'] * 1000000000 }}",
    "multiplied in a filter": "{{ ('a' * 900000) | replace('a', 'aaaaaaaaaa') }}",
    "doubled with a tilde": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled with a plus": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled lists": "{% set n = namespace(s=['ab']) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled in a set block": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = x %}{% endfor %}",
    "macros": "{% macro f(s) %}{{ s }}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(s='ab') %}"
    "{% for i in range(60) %}{% set n.s = f(n.s) %}{% endfor %}",
    "centered": "{{ 'a' | center(1000000000) }}{{ 'a'.center(1000000000) }}",
    "a method": "{{ 'a'.ljust(1000000000) }}",
    "zeros": "{{ '1'.zfill(1000000000) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format filter": "{{ '%1000000000d' | format(1) }}",
    "a format method": "{{ '{:1000000000}'.format(1) }}",
    "a format's width": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "indents": "{{ ('\n' * 1000) | indent(100000) }}",
    "joined": "{{ range(100000) | join('ninechars ninechars') }}",
    "joined repeated": "{{ (['a' * 1000] * 900) | map('upper') | join('a' * 1000) }}",
    "replaced method": "{{ ('a' * 900000).replace('a', 'aaaaaaaaaa') }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "json": "{{ [[1]] | tojson(indent=1000000000) }}",
}
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops in a macro": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [[1, 2]] recursive %}{% for j in range(90000) %}{% endfor %}{{ loop(range(90000)) }}{% endfor %}",
    "filters": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "numbers": "{% set n = namespace(x=3) %}{% for i in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "powers": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_refused(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(TokenizerError, match="TemplateLimitError"):
        OURS.apply_chat_template(MESSAGES, chat_template=LONG[name], tokenize=False)
    assert time.perf_counter() - started < 30  # the bound, on any machine; without it memory or hours are gone


@pytest.mark.parametrize("name", SLOW)
def test_slow_templates_are_refused(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"TemplateLimitError|RecursionError"):
        OURS.apply_chat_template(MESSAGES, chat_template=SLOW[name], tokenize=False)
    assert time.perf_counter() - started < 30


def test_long_messages_are_no_long_templates() -> None:
    messages = [{"role": "user", "content": "word " * 400_000}]
    text = OURS.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(text) > 2_000_000
    assert len(OURS.apply_chat_template(messages, return_dict=False)) > 400_000
    with pytest.raises(TokenizerError, match="at most 1,000,000 characters; found 1,000,001"):
        OURS.apply_chat_template(MESSAGES, chat_template=" " * 1_000_001)


@pytest.mark.parametrize("template", ["{{ namespace(__class__=1) }}", "{% set n = namespace() %}{% set n._x = 1 %}", "{{ lipsum(1000) }}"])
def test_ways_out_of_the_sandbox_are_shut(template: str) -> None:
    with pytest.raises(TokenizerError, match=r"SecurityError|UndefinedError"):
        OURS.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)


def test_a_lone_surrogate_in_a_special_token_is_an_error_by_name(tmp_path: Path) -> None:
    data: dict[str, Any] = json.loads((NANO / "tokenizer.json").read_text())
    data["added_tokens"][1]["content"] = "<\ud83d>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=r"added_tokens: .*U\+D83D"):
        DbrxTokenizer.from_pretrained(tmp_path)
    shutil.copyfile(NANO / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((NANO / "tokenizer_config.json").read_text()) | {"pad_token": "\ud83d"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"pad_token must be a token of the vocabulary; found '\\ud83d'"):
        DbrxTokenizer.from_pretrained(tmp_path)
