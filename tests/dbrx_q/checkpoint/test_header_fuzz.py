"""10,000 mutated safetensors headers: our reader accepts the headers that the safetensors package accepts, and reads the same bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from dbrx_q.checkpoint.safetensors_file import SafetensorsFile, TensorInfo, parse_header
from dbrx_q.errors import CheckpointError

HEADERS = 10_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F16": 16, "BF16": 16, "F32": 32,
    "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
OTHER_DTYPES = ['"F128"', '"f32"', '""', "null", "3", '{"F32":null}', '{"F32":1}', '["F32"]', "true"]
OTHER_SHAPES = ["[]", "[0]", "null", "[4.0]", "[-1]", "[true]", "{}", '"[4]"', "[4,]", "[1e1]", "[[4]]", "4", "[-0]", "[00]"]
LARGE = [str(2**31), str(2**32), str(2**53 + 1), str(2**63), str(2**64 - 1), str(2**64), str(10**30), "1e400", "9" * 5000]
NAMES = ['"\\u0061"', '"\\ud800"', '"\\ud83d\\ude00"', '"\x01"', '"\\u0000"', '""', '"__metadata__"', '"ä"', '"a\\/b"', "a", "1", "null"]
METADATA = [
    "null", "{}", '{"format":"pt"}', '{"a":1}', '{"a":null}', '{"a":"1","a":"2"}', '{"a":{}}', "[]", '"pt"', "3", '{"\\ud800":"a"}', "{",
]  # fmt: skip
VALUES = ["null", "1", "NaN", "Infinity", "1e999", '"x"', "[]", "{}", "[" * 120 + "]" * 120, "[" * 130 + "]" * 130, '{"a":[1,{"b":2}]}']
PADDING = [b" ", b"\n\t\r ", b"\0", b"\xef\xbb\xbf", b"\xff", b",", b"{}", b"//", b"\xc3", b"\xed\xa0\x80"]
LENGTHS = [0, 1, 7, 99_999_992, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


@dataclass
class Header:
    """A header whose parts are JSON text, so that mutations can make each of them invalid."""

    entries: list[tuple[str, list[tuple[str, str]]]]
    """(name, fields of the tensor), in the order in which they are written."""
    metadata: list[str]
    """Values of `__metadata__`; the key is written once for each value."""
    body: int
    """Bytes after the header."""

    def text(self) -> str:
        """The header's JSON."""
        members = [f'"__metadata__":{value}' for value in self.metadata]
        members += [f"{name}:{{{','.join(f'{key}:{value}' for key, value in fields)}}}" for name, fields in self.entries]
        return "{" + ",".join(members) + "}"


def valid_header(rng: random.Random) -> Header:
    """A header that the package accepts."""
    entries, end = [], 0
    for number in range(rng.randrange(5)):
        dtype = rng.choice(list(BITS))
        shape = [rng.choice([0, 1, 2, 3, 8]) for _ in range(rng.randrange(4))]
        if math.prod(shape) * BITS[dtype] % 8:
            shape.append(4)
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        fields = [('"dtype"', f'"{dtype}"'), ('"shape"', str(shape)), ('"data_offsets"', f"[{begin},{end}]")]
        entries.append((f'"tensor.{number}"', fields))
    rng.shuffle(entries)
    return Header(entries, rng.choice([[], ["null"], ["{}"], ['{"format":"pt"}']]), end)


def set_field(key: str, values: Callable[[random.Random], str]) -> Callable[[Header, random.Random], None]:
    """Gives a field of one tensor another value."""

    def mutate(header: Header, rng: random.Random) -> None:
        if header.entries:
            fields = rng.choice(header.entries)[1]
            fields[:] = [(name, values(rng) if name == f'"{key}"' else value) for name, value in fields]

    return mutate


def offsets(rng: random.Random) -> str:
    numbers = [str(rng.randrange(-2, 64)), str(rng.randrange(-2, 64)), rng.choice(LARGE), "1.0", "null"]
    return f"[{','.join(rng.choices(numbers, weights=[6, 6, 1, 1, 1], k=rng.choice([1, 2, 2, 2, 2, 3])))}]"


def duplicate_tensor(header: Header, rng: random.Random) -> None:
    if header.entries:
        name, fields = rng.choice(header.entries)
        header.entries.insert(rng.randrange(len(header.entries) + 1), (rng.choice([name, '"twin"']), list(fields)))


def rename(header: Header, rng: random.Random) -> None:
    if header.entries:
        place = rng.randrange(len(header.entries))
        header.entries[place] = (rng.choice(NAMES), header.entries[place][1])


def drop(header: Header, rng: random.Random) -> None:
    if header.entries:
        entry = rng.choice(header.entries)
        rng.choice([header.entries, entry[1]]).pop(0)


def add_field(header: Header, rng: random.Random) -> None:
    if header.entries:
        fields = rng.choice(header.entries)[1]
        fields.insert(0, rng.choice([('"more"', rng.choice(VALUES)), rng.choice(fields)] if fields else [('"more"', "1")]))


def swap_shape_and_offsets(header: Header, rng: random.Random) -> None:
    if header.entries:
        rng.shuffle(rng.choice(header.entries)[1])


def add_metadata(header: Header, rng: random.Random) -> None:
    header.metadata.append(rng.choice(METADATA))


def change_body(header: Header, rng: random.Random) -> None:
    header.body = max(0, header.body + rng.choice([-8, -1, 1, 8]))


STRUCTURAL = [
    set_field("dtype", lambda rng: rng.choice([f'"{rng.choice(list(BITS))}"', rng.choice(OTHER_DTYPES)])),
    set_field("shape", lambda rng: rng.choice([*OTHER_SHAPES, f"[{rng.choice(LARGE)},{rng.choice(['0', '1', *LARGE])}]"])),
    set_field("data_offsets", offsets),
    duplicate_tensor,
    rename,
    drop,
    add_field,
    swap_shape_and_offsets,
    add_metadata,
    change_body,
]


def as_sequence(text: bytes, rng: random.Random) -> bytes:
    """Replaces a tensor's object by the list of its values, a form that the package's JSON library accepts too."""
    parts = text.split(b'"dtype":')
    if len(parts) < 2:
        return text
    place = rng.randrange(len(parts) - 1)
    opened, rest = parts[place][: parts[place].rfind(b"{")], parts[place + 1]
    rest = rest.replace(b'"shape":', b"").replace(b'"data_offsets":', b"").replace(b"}", b"]", 1)
    return b'"dtype":'.join([*parts[:place], opened + b"[" + rest, *parts[place + 2 :]])


def pad(text: bytes, rng: random.Random) -> bytes:
    return rng.choice([lambda piece: text + piece, lambda piece: piece + text])(rng.choice(PADDING))


def noise(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text) + 1)
    piece = rng.choice([b"", bytes([rng.randrange(256)]), rng.choice([b" ", b",", b"0", b'"', b"}", b"]", b"\\"])])
    return text[:place] + piece + text[place + rng.randrange(2) :]


def mutated_file(rng: random.Random) -> bytes:
    """A file with up to three mutations of its header, its length field or its end."""
    header = valid_header(rng)
    for _ in range(rng.randrange(3)):
        rng.choice(STRUCTURAL)(header, rng)
    text = header.text().encode("utf-8")
    if rng.random() < 0.3:
        text = rng.choice([as_sequence, pad, noise, noise])(text, rng)
    length = len(text)
    if rng.random() < 0.05:
        length = rng.choice([*LENGTHS, max(0, length - 1), length + 1, length + header.body])
    data = length.to_bytes(8, "little") + text + rng.randbytes(header.body)
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.03 else data


def package_verdict(data: bytes) -> dict[str, Any] | None:
    """The tensors by name, as the package reads a file's bytes; None where it refuses them."""
    try:
        return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def our_verdict(data: bytes, tensors: Callable[[], dict[str, TensorInfo]]) -> dict[str, Any] | None:
    """The same by our reader; `tensors` opens the file."""
    try:
        infos = tensors()
    except CheckpointError:
        return None
    return {name: (info.dtype_name, info.shape, data[info.offset :][: info.nbytes]) for name, info in infos.items()}


def opened_tensors(path: Path) -> dict[str, TensorInfo]:
    with SafetensorsFile(path) as file:
        return file.tensors


def test_we_accept_the_headers_that_the_package_accepts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rng = random.Random(0)
    accepted = 0
    for number in range(HEADERS):
        data = mutated_file(rng)
        path.write_bytes(data)
        expected = package_verdict(data)
        local = our_verdict(data, lambda: opened_tensors(path))
        remote = our_verdict(data, lambda data=data: parse_header(path, len(data), lambda first, count: data[first : first + count])[0])
        assert local == expected, (number, data[:500])
        assert remote == expected, (number, data[:500])
        accepted += expected is not None
    assert HEADERS // 4 < accepted < 3 * HEADERS // 4  # or one verdict for all would pass
