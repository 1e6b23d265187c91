"""Damaged checkpoints: an error that names the file and the rule, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.manifest import sha256_of

INDEX = "model.safetensors.index.json"
OUTER, BLOCK = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ROUTER = "transformer.blocks.0.ffn.router.layer.weight"
W1 = "transformer.blocks.0.ffn.experts.mlp.w1"
NORM = "transformer.norm_f.weight"
BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"


@dataclass(frozen=True)
class Case:
    """A damaged checkpoint."""

    id: str
    """Shown in the test's id."""
    damage: Callable[[Path], object]
    """Changes a copy of the small checkpoint."""
    message: tuple[str, ...]
    """What the error must hold."""


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_index(folder: Path, **entries: object) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(entries))


def edit_config(folder: Path, **entries: object) -> None:
    edit_json(folder / "config.json", lambda config: config.update(entries))


def split_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path: Path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object], more: bytes = b"") -> None:
    header, body = split_shard(path)
    edit(header)
    put_header(path, json.dumps(header).encode(), body + more)


def edit_entry(name: str, **values: object) -> Callable[[Path], None]:
    """Changes the entry of a tensor in the header of the block's shard."""
    return lambda folder: edit_header(folder / BLOCK, lambda header: header[name].update(values))


def drop_tensor(folder: Path, name: str) -> None:
    """Removes a tensor from a shard, which stays a valid file."""
    header, body = split_shard(folder / BLOCK)
    begin, end = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    put_header(folder / BLOCK, json.dumps(header).encode(), body[:begin] + body[end:])


def drop_from_shard_and_index(folder: Path) -> None:
    drop_tensor(folder, ROUTER)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(ROUTER))


def add_tensor(folder: Path, name: str = "lm_head.bias") -> None:
    size = len(split_shard(folder / BLOCK)[1])
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [size, size + 4]}
    edit_header(folder / BLOCK, lambda header: header.update({name: entry}), b"\0" * 4)


def replace_shard(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / BLOCK).unlink()
        make(folder / BLOCK)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / BLOCK, (folder / BLOCK).stat().st_size + size if size < 0 else size)


def move_out(folder: Path, name: str) -> None:
    """Moves the shard out of the folder and names its place in the index, so that only the rule can refuse it."""
    (folder / BLOCK).rename(folder.parent / "x.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({k: name for k, v in index["weight_map"].items() if v == BLOCK}))


def overlap(folder: Path) -> None:
    edit_header(folder / BLOCK, lambda header: header[W1].update(data_offsets=header[W1.replace("w1", "v1")]["data_offsets"]))


def shift(by: int) -> Callable[[Path], None]:
    """Leaves a hole of `by` bytes before the last tensor."""

    def edit(header: dict[str, Any]) -> None:
        last = max((e for k, e in header.items() if k != "__metadata__"), key=lambda entry: int(entry["data_offsets"][1]))
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    return lambda folder: edit_header(folder / BLOCK, edit, b"\0" * by)


def all_of(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


def drop_index(folder: Path) -> None:
    (folder / INDEX).unlink()


WHOLE = "must be a whole safetensors file"
NESTED = b"[" * 200_000 + b"]" * 200_000
DAMAGES = [
    Case("missing shard", lambda f: (f / BLOCK).unlink(), (BLOCK, "shard not found")),
    Case(
        "no weights",
        all_of(drop_index, lambda f: (f / OUTER).unlink(), lambda f: (f / BLOCK).unlink()),
        ("no weights found", "model.safetensors"),
    ),
    Case("no index", drop_index, ("no weights found", INDEX)),
    Case("shard is a folder", replace_shard(Path.mkdir), (BLOCK, "regular file")),
    Case("shard is a pipe", replace_shard(os.mkfifo), (BLOCK, "regular file")),
    Case("last byte cut", cut(-1), (BLOCK, "truncated")),
    Case("cut in half", cut(100_000), (BLOCK, "truncated")),
    Case("cut in the header", cut(100), (BLOCK, WHOLE, "in a file of 100")),
    Case("cut in the length", cut(5), (BLOCK, WHOLE, "in a file of 5")),
    Case("empty shard", cut(0), (BLOCK, WHOLE, "in a file of 0")),
    Case("index leads out", lambda f: move_out(f, "../x.safetensors"), (INDEX, "'../x.safetensors'", "own folder")),
    Case("index is absolute", lambda f: move_out(f, str(f.parent / "x.safetensors")), (INDEX, "x.safetensors'", "own folder")),
    Case("index names a folder", lambda f: edit_index(f, **{NORM: ".."}), (INDEX, "'..'", "own folder")),
    Case("index names no file", lambda f: edit_index(f, **{NORM: "a\0b"}), ("a\0b", "null byte")),
    Case("index without map", lambda f: (f / INDEX).write_text("{}"), (INDEX, "weight_map")),
    Case("index of numbers", lambda f: edit_index(f, **{NORM: 3}), (INDEX, "weight_map")),
    Case("index not JSON", lambda f: (f / INDEX).write_text("{"), (INDEX, "JSON")),
    Case("index too deep", lambda f: (f / INDEX).write_bytes(NESTED), (INDEX, "JSON")),
    Case("index misplaces", lambda f: edit_index(f, **{NORM: BLOCK}), (BLOCK, NORM, "missing")),
    Case("index leaves out", lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop(NORM)), (OUTER, NORM, "not placed here")),
    Case("tensor not in its shard", lambda f: drop_tensor(f, ROUTER), (BLOCK, ROUTER, "is missing")),
    Case("tensor missing", drop_from_shard_and_index, (ROUTER, "is missing", "config.json calls for it")),
    Case("tensor extra", all_of(add_tensor, lambda f: edit_index(f, **{"lm_head.bias": BLOCK})), (BLOCK, "lm_head.bias", "in no DBRX")),
    Case("tensor extra in shard", add_tensor, (BLOCK, "lm_head.bias", "not placed here")),
    Case("wrong shape", edit_entry(ROUTER, shape=[64, 4]), (BLOCK, ROUTER, "[4, 64]", "[64, 4]")),
    Case("8-bit dtype", edit_entry(ROUTER, dtype="F8_E4M3", shape=[4, 128]), (BLOCK, ROUTER, "[4, 64]", "[4, 128]")),
    Case("dtype of 4 bits", edit_entry(ROUTER, dtype="F4", shape=[8, 128]), (BLOCK, ROUTER, "[4, 64]", "[8, 128]")),
    Case("wrong dtype", edit_entry(ROUTER, dtype="I16"), (BLOCK, ROUTER, "bfloat16", "int16")),
    Case("unknown dtype", edit_entry(ROUTER, dtype="F128"), (BLOCK, WHOLE, "F128")),
    Case("shape of fractions", edit_entry(ROUTER, shape=[4.0, 64]), (BLOCK, WHOLE, "4.0")),
    Case("negative offset", edit_entry(ROUTER, data_offsets=[-512, 0]), (BLOCK, WHOLE, "-512")),
    Case("size and offsets differ", edit_entry(ROUTER, shape=[4, 65]), (BLOCK, WHOLE, "invalid shape")),
    Case("offsets past the end", edit_entry(ROUTER, data_offsets=[1 << 40, (1 << 40) + 512]), (BLOCK, WHOLE, "invalid offset")),
    Case("entry of nothing", lambda f: edit_header(f / BLOCK, lambda h: h.update({ROUTER: None})), (BLOCK, WHOLE)),
    Case("overlap", overlap, (BLOCK, WHOLE, "invalid offset", "experts.mlp")),
    Case("hole", shift(64), (BLOCK, WHOLE, "invalid offset")),
    Case("bytes after the end", lambda f: edit_header(f / BLOCK, lambda _: None, b"\0"), (BLOCK, WHOLE)),
    Case("header longer than file", lambda f: (f / BLOCK).write_bytes(struct.pack("<Q", 500) + b"{}"), (BLOCK, "500 bytes", "file of 10")),
    Case("absurd header length", lambda f: (f / BLOCK).write_bytes(b"\xff" * 100), (BLOCK, str(2**64 - 1))),
    Case("header not JSON", lambda f: put_header(f / BLOCK, b"model"), (BLOCK, WHOLE, "JSON")),
    Case("header not UTF-8", lambda f: put_header(f / BLOCK, b'{"\xff": 1}'), (BLOCK, WHOLE, "UTF-8")),
    Case("header is a list", lambda f: put_header(f / BLOCK, b"[1]"), (BLOCK, WHOLE)),
    Case("header too deep", lambda f: put_header(f / BLOCK, NESTED), (BLOCK, WHOLE)),
    Case("config missing", lambda f: (f / "config.json").unlink(), ("config.json", "not found")),
    Case("config not JSON", lambda f: (f / "config.json").write_text("model_type: dbrx"), ("config.json", "JSON")),
    Case("config not UTF-8", lambda f: (f / "config.json").write_bytes(b'{"\xff": 1}'), ("config.json", "utf-8")),
    Case("config is a list", lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object", "list")),
    Case(
        "config is a folder",
        all_of(lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").mkdir()),
        ("config.json", "regular file"),
    ),
    Case("another model", lambda f: edit_config(f, model_type="mixtral"), ("config.json", "model_type must be 'dbrx'", "'mixtral'")),
    Case("another width", lambda f: edit_config(f, vocab_size=4097), (OUTER, "transformer.wte.weight", "[4097, 64]", "[4096, 64]")),
    Case("more layers", lambda f: edit_config(f, n_layers=2), ("transformer.blocks.1", "is missing")),
    Case(
        "quantized by another",
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        ("config.json", "says that weights are quantized, so some must be", "found none", "Remove the quantization"),
    ),
    Case("quantization is a word", lambda f: edit_config(f, quantization_config="int4"), ("config.json", "must be an object", "'int4'")),
]


@pytest.fixture
def broken(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small, tmp_path / "broken")


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refuse(cli: Callable[..., Any], tmp_path: Path, message: tuple[str, ...], *arguments: object) -> None:
    """The command must fail with one clear message and change nothing below `tmp_path`."""
    before = listing(tmp_path)
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("dbrx-q: error: ") == 1
    assert "Traceback" not in outcome.err
    for words in message:
        assert words in outcome.err
    assert listing(tmp_path) == before


def arguments_of(command: str, folder: Path, tmp_path: Path) -> list[object]:
    more: dict[str, list[object]] = {
        "quantize": [tmp_path / "new" / "out"],
        "generate": ["--prompt", "The", "--max-new-tokens", 1, "--json"],
        "perplexity": ["--text", BOOK, "--json"],
    }
    return [command, folder, *more.get(command, [])]


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "generate"])
@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.id)
def test_a_damaged_checkpoint_is_refused_and_the_error_names_the_damage(
    case: Case, command: str, broken: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    case.damage(broken)
    refuse(cli, tmp_path, (str(broken), *case.message), *arguments_of(command, broken, tmp_path))


def poison(folder: Path, name: str, element: int, bits: int) -> Path:
    """Write a 16-bit value into a stored tensor; returns the shard."""
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    header, body = split_shard(shard)
    begin, end = header[name]["data_offsets"]
    position = begin + 2 * element if element >= 0 else end + 2 * element
    put_header(shard, json.dumps(header).encode(), body[:position] + bits.to_bytes(2, "little") + body[position + 2 :])
    return shard


@pytest.mark.parametrize("command", ["quantize", "generate"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("name", "element"),
    [("transformer.wte.weight", 0), (NORM, 3), (ROUTER, -1), (W1.replace("w1", "w2"), -1), (W1, 5000), ("lm_head.weight", -1)],
)
def test_weights_must_be_finite(
    name: str, element: int, bits: int, command: str, broken: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shard = poison(broken, name, element, bits)
    message = str(shard), name, "finite"
    if command == "generate" or name == "transformer.wte.weight":
        refuse(cli, tmp_path, message, *arguments_of(command, broken, tmp_path))
        return
    # Tensors finished before the damaged one are kept, and nothing else.
    outcome = cli(*arguments_of(command, broken, tmp_path))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("dbrx-q: error: ") == 1
    assert "Traceback" not in outcome.err
    for words in (*message, f"kept in {tmp_path}/new/out.partial: --resume continues"):
        assert words in outcome.err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.partial"]


def test_perplexity_refuses_weights_that_are_not_finite(broken: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    shard = poison(broken, W1, 7, 0x7FC0)
    refuse(cli, tmp_path, (str(shard), W1, "finite"), *arguments_of("perplexity", broken, tmp_path))


def test_weights_too_large_for_a_scale_are_refused(broken: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    shard = poison(broken, W1, 7, 0x7F00)  # 1.7e38
    refuse(cli, tmp_path, (str(shard), W1, "65504"), *arguments_of("quantize", broken, tmp_path))


@pytest.mark.parametrize("name", [f"{W1}.3.scales", "transformer.wte.weight.scales"])
def test_scales_must_be_finite(name: str, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = shutil.copytree(quantized_small, tmp_path / "broken")
    shard = poison(folder, name, -1, 0x7E00)
    edit_json(folder / "manifest.json", lambda manifest: manifest["shards"][shard.name].update(sha256=sha256_of(shard)))
    for command in ("generate", "perplexity"):
        refuse(cli, tmp_path, (str(shard), name, "finite"), *arguments_of(command, folder, tmp_path))


def edit_formats(folder: Path, name: str, entry: object) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"]["tensors"].update({name: entry}))


INT4 = {"format": "int4", "group_size": 64}
QUANTIZED_DAMAGES = [
    Case(
        "later version", lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(format_version=2)), ("found", "2")
    ),
    Case("no tensors", lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].pop("tensors")), ("'tensors'",)),
    Case(
        "unknown format",
        lambda f: edit_formats(f, W1, {"format": "int5", "group_size": 64}),
        (W1, "must be one of int4:32, int4:64", "'int5'"),
    ),
    Case(
        "group size 48", lambda f: edit_formats(f, W1, {"format": "int4", "group_size": 48}), (W1, "must be one of int4:32, int4:64", "48")
    ),
    Case(
        "nf4 in groups of 32",
        lambda f: edit_formats(f, W1, {"format": "nf4", "group_size": 32}),
        (W1, "nf4:64, nf4-double:64, affine4:32", "32"),
    ),
    Case(
        "nf4-double in groups of 32",
        lambda f: edit_formats(f, W1, {"format": "nf4-double", "group_size": 32}),
        (W1, "nf4:64, nf4-double:64, affine4:32", "32"),
    ),
    Case(
        "scales of another format", lambda f: edit_formats(f, W1, {"format": "nf4-double", "group_size": 64}), (f"{W1}.0.absmax", "missing")
    ),
    Case("another group size", lambda f: edit_formats(f, W1, {"format": "int4", "group_size": 32}), (f"{W1}.0.scales", "shape")),
    Case("format is a word", lambda f: edit_formats(f, W1, "int4"), (W1, "must be one of int4:32", "found 'int4'")),
    Case("unknown tensor", lambda f: edit_formats(f, "lm_head.bias", INT4), ("lm_head.bias", "packable matrices")),
    Case("router packed", lambda f: edit_formats(f, ROUTER, INT4), (ROUTER, "packable matrices")),
    Case(
        "embedding in nf4",
        lambda f: edit_formats(f, "transformer.wte.weight", {"format": "nf4", "group_size": 64}),
        ("transformer.wte.weight", "must be int4, int8"),
    ),
]


@pytest.mark.parametrize("case", QUANTIZED_DAMAGES, ids=lambda case: case.id)
def test_the_quantization_config_must_fit_the_checkpoint(
    case: Case, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    folder = shutil.copytree(quantized_small, tmp_path / "broken")
    case.damage(folder)
    for command in ("inspect", "generate"):
        refuse(cli, tmp_path, (str(folder), *case.message), *arguments_of(command, folder, tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"shards": 3}', '{"shards": {"a": 1}, "files": {}, "tensors": {}}', "\xff"]
    + [json.dumps({"shards": {name: {"bytes": 1, "sha256": "0"}}, "files": {}, "tensors": {}}) for name in ("../x", "/etc/passwd")]
    + [json.dumps({"shards": {"a": {"bytes": "1", "sha256": "0"}}, "files": {}, "tensors": {}})],
)
def test_the_manifest_must_be_complete(text: str, quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = shutil.copytree(quantized_small, tmp_path / "broken")
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    refuse(cli, tmp_path, (str(folder / "manifest.json"),), "verify", folder, "--json")


def test_an_undamaged_copy_is_accepted(broken: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """The helpers of this file write valid shards: an edit that changes nothing is accepted."""
    edit_header(broken / BLOCK, lambda _: None)
    poison(broken, W1, 0, 0x3C00)
    assert cli(*arguments_of("generate", broken, tmp_path)).code == 0
    assert cli("quantize", broken, tmp_path / "out").code == 0
