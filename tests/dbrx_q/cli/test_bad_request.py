"""Requests that cannot be served: an error that states the rule, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q import DbrxConfig, DbrxForCausalLM, generate
from dbrx_q.cli import limits
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.planning.sizes import format_size

SCRIPT = Path(sys.executable).with_name("dbrx-q")
BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
CONTEXT = 64  # of the small checkpoint


def check_refused(outcome: Any, *message: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("dbrx-q: error: ") == 1
    assert "Traceback" not in outcome.err
    for words in message:
        assert words in outcome.err


# Destinations


def test_the_group_size_must_divide_the_weights(tmp_path: Path, cli: Callable[..., Any]) -> None:
    config = DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=1,
        max_seq_len=64,
        vocab_size=64,
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 2},
        torch_dtype="bfloat16",
    )
    write_checkpoint(config, tmp_path / "source")
    outcome = cli("quantize", tmp_path / "source", tmp_path / "out", "--group-size", 64)
    check_refused(outcome, str(tmp_path / "source"), "transformer.blocks.0.ffn.experts.mlp.w2", "must divide", "64", "96")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert cli("quantize", tmp_path / "source", tmp_path / "out", "--group-size", 32).code == 0


@pytest.mark.parametrize("group_size", [48, 0, -64, 256])
def test_the_group_size_must_be_supported(group_size: int, small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    check_refused(cli("quantize", small, tmp_path / "out", "--group-size", group_size), "must be one of 32, 64, 128", f"found {group_size}")
    assert not list(tmp_path.iterdir())


def test_the_source_must_be_a_plain_checkpoint(quantized_small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    check_refused(cli("quantize", quantized_small, tmp_path / "out"), str(quantized_small), "plain", "is quantized")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "must be a folder"),
        ("file/out", "Not a directory"),
        ("file/deep/out", "Not a directory"),
        ("source", "must be empty"),
        ("source/out", "outside the source"),
        ("source/deep/out", "outside the source"),
        ("link/out", "outside the source"),
        ("other", "must not hold the source"),  # its source is other.partial, where the result would be built
        ("/proc/dbrx-q-out", "must be writable"),
        ("/dev/null/out", "Not a directory"),
        ("n" * 300, "name too long"),
    ],
)
def test_the_destination_must_be_usable(place: str, message: str, small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source = shutil.copytree(small, tmp_path / ("other.partial" if place == "other" else "source"))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("mine")
    before = sorted((path, path.lstat().st_size) for path in tmp_path.rglob("*"))
    check_refused(cli("quantize", source, tmp_path / place), str(tmp_path / place), message)
    assert sorted((path, path.lstat().st_size) for path in tmp_path.rglob("*")) == before


def test_free_disk_space_is_checked_first(small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, (1 << 40) - 1000, 1000))
    check_refused(cli("quantize", small, tmp_path / "deep" / "out"), str(tmp_path), "1,000 free")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sync", range(4), ids=["shard", "index", "config", "manifest"])
def test_a_full_disk_keeps_what_is_finished(
    sync: int, small: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], os.fsync

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) > sync:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = cli("quantize", small, tmp_path / "out")
    check_refused(outcome, str(tmp_path / "out"), "No space left on device", f"What is finished is kept in {tmp_path / 'out.partial'}")
    assert len(calls) == sync + 1
    assert not (tmp_path / "out").exists()
    assert cli("quantize", small, tmp_path / "out", "--resume").code == 0
    assert cli("verify", tmp_path / "out").code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_write_that_fails_leaves_nothing(small: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    process = subprocess.run(
        [SCRIPT, "quantize", small, tmp_path / "new" / "out", "--json"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert "Traceback" not in process.stderr
    assert f"{tmp_path}/new/out: the destination must be writable; File too large" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


# Sources


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "generate", "perplexity"])
@pytest.mark.parametrize(
    ("place", "message"),
    [("absent", "no such folder"), ("file", "must be a folder with config.json or a GGUF file; found another kind of file")],
)
def test_the_checkpoint_must_be_a_folder(place: str, message: str, command: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("mine")
    more: dict[str, list[object]] = {"quantize": [tmp_path / "out"], "generate": ["--prompt", "The"], "perplexity": ["--text", BOOK]}
    check_refused(cli(command, tmp_path / place, *more.get(command, [])), str(tmp_path / place), message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "--prompt must hold text"),
        (("--prompt", "word " * CONTEXT), f"context of {CONTEXT} tokens"),
        (("--prompt", "The", "--max-new-tokens", 0), "max_new_tokens must be at least 1; found 0"),
        (("--prompt", "The", "--max-new-tokens", -5), "found -5"),
        (("--prompt", "The", "--temperature", -1), "temperature must be 0 or more; found -1"),
        (("--prompt", "The", "--temperature", "nan"), "temperature must be 0 or more; found nan"),
        (("--prompt", "The", "--temperature", "inf"), "temperature must be 0 or more; found inf"),
        (("--prompt", "The", "--top-k", -1), "top_k must be 0 (keep all) or more; found -1"),
        (("--prompt", "The", "--top-p", 0), "top_p must be above 0 and at most 1; found 0"),
        (("--prompt", "The", "--top-p", 1.01), "found 1.01"),
        (("--prompt", "The", "--min-p", -0.1), "min_p must be from 0 to 1; found -0.1"),
        (("--prompt", "The", "--min-p", 2), "found 2"),
        (("--prompt", "The", "--repetition-penalty", 0), "repetition_penalty must be above 0"),
        (("--prompt", "The", "--stop", ""), "stop string must not be empty"),
        (("--prompt", "The", "--system", "Be brief."), "--system needs --chat"),
    ],
)
def test_generate_refuses_invalid_options(
    options: tuple[object, ...], message: str, quantized_small: Path, cli: Callable[..., Any]
) -> None:
    check_refused(cli("generate", quantized_small, *options), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", 1), "context must be at least 2 tokens"),
        (("--context", 0), "found 0"),
        (("--context", CONTEXT + 1), f"to the model's {CONTEXT} tokens; found {CONTEXT + 1}"),
        (("--context", 16, "--stride", 0), "stride must be from 1"),
        (("--context", 16, "--stride", 17), "context of 16 tokens; found 17"),
        (("--stride", CONTEXT + 1), f"context of {CONTEXT} tokens; found {CONTEXT + 1}"),
    ],
)
def test_perplexity_refuses_invalid_options(
    options: tuple[object, ...], message: str, quantized_small: Path, cli: Callable[..., Any]
) -> None:
    check_refused(cli("perplexity", quantized_small, "--text", BOOK, *options), message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A fine day\xff\xfe", "byte 10"),
        ("é".encode("latin-1"), "byte 0"),
        (b"\xed\xa0\x80", "byte 0"),  # half of a surrogate pair
        (b"", "must not be empty"),
        (b"Too short.", "must fill one window of 64 tokens"),
        (b"GGUF\x00\x01", "binary"),
        (None, "must be a file or the name of a data set"),
    ],
    ids=["not UTF-8", "latin-1", "surrogate", "empty", "short", "binary", "missing"],
)
def test_unusable_texts_are_refused(data: bytes | None, message: str, small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    check_refused(cli("perplexity", small, "--text", path), str(path), message)


def test_a_context_that_no_model_has_is_refused(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = shutil.copytree(small, tmp_path / "long")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_seq_len": 64', f'"max_seq_len": {1 << 50}'))
    check_refused(cli("generate", folder, "--prompt", "The", "--max-new-tokens", 1 << 49), "max_seq_len must be at most", str(1 << 50))


@pytest.mark.parametrize("token", [-1, 4096, 1 << 40])
def test_token_ids_must_be_in_range(token: int, small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(small)
    with pytest.raises(RequestError, match=f"from 0 to 4095.*{token}"):
        model(torch.tensor([[1, token]]))
    with pytest.raises(RequestError, match=f"from 0 to 4095.*{token}"):
        generate(model, [[1], [2, token]], max_new_tokens=1)


def test_the_library_refuses_prompts_that_leave_no_room(small: Path) -> None:
    model = DbrxForCausalLM.from_pretrained(small)
    with pytest.raises(RequestError, match="at least one token"):
        generate(model, [[1], []], max_new_tokens=1)
    with pytest.raises(RequestError, match=f"context of {CONTEXT} tokens; prompt 1 has {CONTEXT}"):
        generate(model, [[1], [1] * CONTEXT], max_new_tokens=1)
    with pytest.raises(RequestError, match=f"fit {CONTEXT} tokens.*{CONTEXT + 1}"):
        model(torch.ones(1, CONTEXT + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:77", "must be a GPU that torch sees"), ("tpu", "must be 'cpu', 'cuda' or 'cuda:N'")]
)
def test_missing_devices_are_refused(device: str, message: str, small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    text = tmp_path / "text"
    text.write_text("The old man looked at the sea")
    check_refused(cli("generate", small, "--prompt", "The", "--device", device), message, device)
    check_refused(cli("perplexity", small, "--text", text, "--device", device), message, device)


# Usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "a", "--nope"), "--nope"),
        (("nope",), "nope"),
        (("inspect",), "PATH"),
        (("inspect", "a", "b"), "b"),
        (("generate", "a"), "--prompt"),
        (("perplexity", "a"), "--text"),
        (("quantize", "a"), "DST"),
        (("quantize", "a", "b", "--format", "int5"), "int5"),
        (("quantize", "a", "b", "--group-size", "many"), "--group-size"),
        (("generate", "a", "--prompt", "b", "--dtype", "int8"), "int8"),
        (("generate", "a", "--prompt", "b", "--kv", "int2"), "int2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_explained(
    arguments: tuple[str, ...], message: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert "Usage: dbrx-q" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_script_explains_errors_and_exits_with_2(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["inspect", str(small), "--nope"], "--nope"),
        (["inspect", str(tmp_path / "file")], f"{tmp_path}/file: a checkpoint must be a folder with config.json or a GGUF file; found"),
    ):
        process = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
        assert (process.returncode, process.stdout) == (2, "")
        assert message in process.stderr
        assert "Traceback" not in process.stderr


def test_an_error_of_a_command_that_imports_triton_is_all_that_it_prints() -> None:
    pytest.importorskip("triton")
    process = subprocess.run([str(SCRIPT), "bench", "static", "--chip", "sm_91"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    message = process.stderr.strip()  # after the empty line of a progress bar
    assert message.startswith("dbrx-q: error: --chip must be one of")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory for this;"),
        (MemoryError("Unable to allocate 2.00 GiB for an array with shape (536870912,)"), "which asked for 2.00 GiB more;"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000 bytes."), "which asked for 4.10 MB more;"),
        (RuntimeError("could not create a primitive"), "not enough memory for this;"),
        (RuntimeError("std::bad_alloc"), "not enough memory for this;"),
        (OSError("libllvmlite.so: failed to map segment from shared object"), "not enough memory for this;"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (torch.OutOfMemoryError("CUDA out of memory"), "on the GPU"),
    ],
)
def test_running_out_of_memory_is_explained(
    error: Exception, message: str, small: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("dbrx_q.checkpoint.inventory.take_inventory", fails)
    check_refused(cli("inspect", small), message)


@pytest.mark.parametrize(("option", "kilobytes"), [("-d", 60_000), ("-d", 220_000), ("-d", 400_000), ("-v", 700_000)])
def test_limits_under_which_libraries_would_end_the_process_are_refused(option: str, kilobytes: int, small: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        ["bash", "-c", f'ulimit {option} {kilobytes}; exec "$@"', "bash", str(SCRIPT), "quantize", str(small), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert f"`ulimit {option}` must allow" in process.stderr
    assert f"found {format_size(1024 * kilobytes)}" in process.stderr
    assert not list(tmp_path.iterdir())


def test_a_limit_of_threads_is_noticed_before_a_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.active_count()
    assert limits.check_limits(["generate"]) is None
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100 if kind == resource.RLIMIT_NPROC else resource.RLIM_INFINITY, -1))
    assert limits.check_limits(["generate"]) is None
    assert threading.active_count() == started
    monkeypatch.setattr(limits, "_can_start_threads", lambda count: False)
    assert "ulimit -u" in str(limits.check_limits(["generate"]))
    assert limits.check_limits(["generate", "--help"]) is None
