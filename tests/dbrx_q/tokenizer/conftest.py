"""Texts that are hard to tokenize, and a book."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.fixture(params=HARD.values(), ids=HARD.keys())
def hard_text(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    return list(HARD.values())


@pytest.fixture(scope="session")
def book() -> str:
    return (Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt").read_bytes().decode()
