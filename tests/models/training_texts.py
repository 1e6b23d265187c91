"""Fetches the packages whose texts dbrx-micro is trained on and writes one JSON-lines file of documents per domain.

Usage: `python tests/models/training_texts.py OUT --wikitext FILE --leave-out FILE ...`. It calls apt-get (Debian 12), npm and pip. A
document that shares more than 2 % of its long lines with the texts of `--leave-out` is dropped: name there every text on
which the model will be measured.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SOURCES", "Source", "long_lines", "main", "overlaps"]

ALL = 10**9  # characters, more than any package has


@dataclass(frozen=True)
class Source:
    """Files of one package."""

    domain: str
    """The kind of text, by which training weighs it."""
    package: str
    """"deb:NAME=VERSION", "npm:NAME@VERSION" or "pypi:NAME==VERSION"."""
    pattern: str
    """Which files of the unpacked package, as a glob."""
    licence: str
    """As the package states it."""
    read: Callable[[Path], Iterator[str]]
    """Yields the documents of one file."""
    limit: int = 2_000_000
    """Take at most so many characters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of the packages and of the JSON-lines files")
    parser.add_argument("--leave-out", type=Path, nargs="*", default=[], help="texts that the model must not see")
    parser.add_argument("--wikitext", type=Path, nargs="*", default=[], help="WikiText-2's validation text, tokenised form")
    arguments = parser.parse_args()
    measured = {line for path in arguments.leave_out for line in long_lines(path.read_text(errors="replace"))}
    (arguments.out / "packages").mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[dict[str, str]]] = {source.domain: [] for source in SOURCES}
    documents["wikitext"] = [{"text": text, "source": "WikiText-2"} for path in arguments.wikitext for text in _articles(path)]
    for source in SOURCES:
        folder, taken = fetched(source.package, arguments.out / "packages"), 0
        texts = (text for path in sorted(folder.glob(source.pattern)) if not path.is_symlink() for text in source.read(path))
        for text in texts:
            if taken >= source.limit:
                break
            if len(text) >= 400:
                documents[source.domain].append({"text": text, "source": source.package})
                taken += len(text)
        print(f"{source.domain:14} {source.package:52} {taken / 1e6:6.2f} M characters")
    for domain, entries in documents.items():
        kept = [entry for entry in entries if not overlaps(entry["text"], measured)]
        (arguments.out / f"{domain}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        print(f"{domain:14} {len(kept)} documents, {len(entries) - len(kept)} left out")


def fetched(package: str, folder: Path) -> Path:
    """The unpacked package under `folder`; fetched unless it lies there."""
    registry, name = package.split(":", 1)
    target = folder / re.sub(r"[^\w.-]+", "-", name)
    if target.exists():
        return target
    target.mkdir()
    if registry == "deb":
        subprocess.run(["apt-get", "download", "-q", name], cwd=target, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["dpkg", "-x", *(path.name for path in target.glob("*.deb")), "."], cwd=target, check=True)
    elif registry == "npm":
        packed = subprocess.run(["npm", "pack", "-s", name], cwd=target, check=True, capture_output=True, text=True).stdout.split()[-1]
        subprocess.run(["tar", "xzf", packed], cwd=target, check=True)
    else:
        subprocess.run(["pip", "download", "-q", "--no-deps", "--only-binary", ":all:", name], cwd=target, check=True)
        subprocess.run(["unzip", "-qo", *(path.name for path in target.glob("*.whl"))], cwd=target, check=True)
    return target


def overlaps(text: str, measured: set[str]) -> bool:
    """Whether more than 2 % of the long lines of `text` are in `measured`."""
    lines = long_lines(text)
    return sum(line in measured for line in lines) > 0.02 * len(lines)


def long_lines(text: str) -> set[str]:
    """The lines of 40 and more characters, stripped."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def plain(path: Path) -> Iterator[str]:
    """A file of text."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="ignore").replace("\r\n", "\n")
    if not text or max(map(len, text.splitlines()), default=0) < 2000:  # minified files have longer lines
        yield text


def in_parts(path: Path) -> Iterator[str]:
    """A long file in documents of about 20,000 characters."""
    text = path.read_text(errors="ignore")
    for start in range(0, len(text), 20_000):
        yield text[start : start + 20_000]


def book(path: Path) -> Iterator[str]:
    """A Gutenberg book without its header and licence; a file that is given a second time in Latin-1 is passed over."""
    text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
    start, end = re.search(r"\*\*\* ?START OF .*\n", text), re.search(r"\n\*\*\* ?END OF |\nEnd of (the )?Project Gutenberg", text)
    if start and end and not path.stem.endswith(("-8", "-0")):
        yield text[start.end() : end.start()].strip()


def web_page(path: Path) -> Iterator[str]:
    """The text of an HTML page."""
    page = path.read_bytes().decode("utf-8", errors="ignore")
    page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)\s*<(br|/p|/div|/h\d|/li|/tr|/dt|/dd|/pre|p|div|ul|table)\b[^>]*>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    yield re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]*\n", "\n", text)).strip()


def manual_page(path: Path) -> Iterator[str]:
    """A compressed manual page without its troff requests."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    text = re.sub(r"(?m)^[.']\\\".*\n|^\.\w+ ?", "", text)
    for pattern, replacement in ((r"\\f(\[\w*\]|[A-Z])", ""), (r"\\[&|/^]", ""), (r"\\-", "-"), (r"\\\((lq|rq|dq)", '"'), (r"\\\(aq", "'")):
        text = re.sub(pattern, replacement, text)
    yield text


def austen(path: Path) -> Iterator[str]:
    """Three of Austen's novels: the package's data are chunks of R's serialization, one vector of lines for each novel. Pride and
    Prejudice, Emma and Persuasion are kept for measuring.
    """
    data, start = path.read_bytes(), 0
    while start < len(data):
        reader = zlib.decompressobj()
        chunk = reader.decompress(data[start + 4 :])
        start = len(data) - len(reader.unused_data)
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09(?=(.{4}))", chunk, flags=re.DOTALL):
            size = int.from_bytes(match[1], "big")
            lines.append(chunk[match.end() + 4 : match.end() + 4 + size].decode("utf-8", errors="ignore"))
        text = "\n".join(lines).strip()
        if text.startswith(("SENSE AND SENSIBILITY", "MANSFIELD PARK", "NORTHANGER ABBEY")):
            yield text


def dictionary(path: Path) -> Iterator[str]:
    """A dictionary of dictd (gzip with a table of chunks), in documents of about 20,000 characters."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    for start in range(0, len(text), 20_000):
        yield text[start : start + 20_000]


def metamath(path: Path) -> Iterator[str]:
    """The comments and the statements of a Metamath database, without the proofs; in documents of about 20,000 characters."""
    text = path.read_text(errors="ignore")
    entries, size = [], 0
    for match in re.finditer(r"\$\(\s(.*?)\s\$\)\s*(?:(\S+ \$[ap] .*?)\s*\$[=.])?", text, flags=re.DOTALL):
        comment, statement = (re.sub(r"\s+", " ", part or "") for part in match.groups())
        entries.append(f"{comment}\n{statement}\n" if statement else f"{comment}\n")
        size += len(entries[-1])
        if size > 20_000:
            yield "\n".join(entries)
            entries, size = [], 0


def _articles(path: Path) -> Iterator[str]:
    """The articles of WikiText-2 in its tokenised form."""
    yield from filter(str.strip, re.split(r"(?m)^(?= = [^=].*[^=] = $)", path.read_text()))


_HANDBOOK = ("deb:debian-handbook=11.20220922", "usr/share/doc/debian-handbook/html/{}/*.html", "GPL-2+ or CC-BY-SA-3.0")
SOURCES = (
    Source("prose", "deb:r-cran-janeaustenr=1.0.0-1", "usr/lib/R/**/Rdata.rdb", "public domain", austen, ALL),
    Source("prose", "npm:gutenberg@0.8.0", "package/test/samples/catalog/**/*.txt", "public domain", book, ALL),
    Source("prose", "deb:dict-devil=1.0-13.1", "usr/share/dictd/devil.dict.dz", "public domain", dictionary),
    Source("essays", "deb:anarchism=15.3-3", "usr/share/doc/anarchism/html/*.html", "GPL-2", web_page, 4_000_000),
    Source("encyclopedic", "deb:dict-foldoc=20230119-1", "usr/share/dictd/*.dz", "GFDL-1.1+", dictionary, ALL),
    Source("encyclopedic", "deb:dict-jargon=4.4.7-3.1", "usr/share/dictd/*.dz", "public domain", dictionary),
    Source("documentation", "deb:python3.11-doc=3.11.2-6+deb12u9", "usr/share/doc/**/*.rst.txt", "PSF-2.0", plain, 2_500_000),
    Source("documentation", "deb:git-doc=1:2.39.5-0+deb12u3", "usr/share/doc/git-doc/**/*.txt", "GPL-2", plain, 1_500_000),
    Source("documentation", "deb:vim-runtime=2:9.0.1378-2+deb12u2", "usr/share/vim/vim90/doc/*.txt", "Vim", plain),
    Source("documentation", "deb:perl-doc=5.36.0-7+deb12u4", "usr/share/perl/*/pod/*.pod", "Artistic or GPL-1+", plain, 2_500_000),
    Source("documentation", _HANDBOOK[0], _HANDBOOK[1].format("en-US"), _HANDBOOK[2], web_page),
    Source("code", "pypi:sqlalchemy==2.0.36", "sqlalchemy/**/*.py", "MIT", plain, 1_500_000),
    Source("code", "pypi:twisted==24.10.0", "twisted/**/*.py", "MIT", plain, 1_500_000),
    Source("code", "pypi:networkx==3.4.2", "networkx/**/*.py", "BSD-3-Clause", plain, 1_000_000),
    Source("code", "npm:three@0.170.0", "package/src/**/*.js", "MIT", plain, 1_000_000),
    Source("code", "npm:rxjs@7.8.1", "package/src/**/*.ts", "Apache-2.0", plain, 800_000),
    Source("code", "npm:react-native@0.76.3", "package/**/*.java", "MIT", plain, 800_000),
    Source("code", "npm:react-native@0.76.3", "package/ReactCommon/**/*.cpp", "MIT", plain, 800_000),
    Source("code", "npm:better-sqlite3@11.5.0", "package/deps/sqlite3/sqlite3.c", "public domain", in_parts, 1_200_000),
    Source("code", "deb:golang-1.19-src=1.19.8-2", "usr/share/go-1.19/src/[c-n]*/*.go", "BSD-3-Clause", plain, 1_500_000),
    Source("code", "deb:librust-tokio-dev=1.24.2-1", "usr/share/cargo/registry/*/src/**/*.rs", "MIT", plain, 1_000_000),
    Source("code", "deb:librust-regex-dev=1.7.1-1", "usr/share/cargo/registry/*/src/**/*.rs", "MIT or Apache-2.0", plain, 500_000),
    Source("code", "deb:ruby-activerecord=2:6.1.7.10+dfsg-1~deb12u4", "usr/share/rubygems-integration/**/*.rb", "MIT", plain, 800_000),
    Source("code", "deb:perl-modules-5.36=5.36.0-7+deb12u4", "usr/share/perl/*/[A-M]*/*.pm", "Artistic or GPL-1+", plain, 600_000),
    Source("mathematics", "deb:metamath-databases=0.0.0~20210101.git55fe226-2", "usr/**/set.mm", "CC0-1.0", metamath, 2_500_000),
    Source("mathematics", "deb:maxima-doc=5.46.0-11", "usr/share/doc/maxima-doc/html/*.html", "GPL-2+", web_page, 1_500_000),
    Source("mathematics", "pypi:sympy==1.13.3", "sympy/[a-p]*/*.py", "BSD-3-Clause", plain, 1_500_000),
    *(
        Source("languages", _HANDBOOK[0], _HANDBOOK[1].format(code), _HANDBOOK[2], web_page, 700_000)
        for code in ("de-DE", "fr-FR", "es-ES", "it-IT", "pt-BR", "ru-RU", "nl-NL", "pl-PL")
    ),
    Source("languages", "deb:manpages-de=4.18.1-1", "usr/share/man/de/man1/*.gz", "GPL-3+ and others", manual_page, 500_000),
    Source("languages", "deb:manpages-fr=4.18.1-1", "usr/share/man/fr/man[178]/*.gz", "GPL-3+ and others", manual_page, 500_000),
)
"""What dbrx-micro was trained on beside WikiText-2's validation text."""

if __name__ == "__main__":
    main()
