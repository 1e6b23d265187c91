"""Hub ids without a network, and hubs that answer otherwise than the hub does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.hub import resolve_folder
from dbrx_q.checkpoint.hub_errors import hub_errors
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.errors import CheckpointError

REPOSITORY = "acme/dbrx-nano"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE, NO_NETWORK = "HF_HUB_OFFLINE", "no network"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(client: Callable[[str], None], cli: Callable[..., Any]) -> Command:
    """Runs a command in this process with that client: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        outcome = cli(*arguments)
        return outcome.code, outcome.out, outcome.err

    return run


@pytest.fixture
def cached(small: Path, hub: Any, client: Callable[[str], None]) -> list[str]:
    """Fills the hub's cache with the small checkpoint; the names of its shards."""
    hub.folder = small
    resolve_folder(REPOSITORY)
    hub.requested.clear()
    return sorted(path.name for path in small.glob("*.safetensors"))


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK])
@pytest.mark.parametrize("revision", [(), ("--revision", COMMIT)], ids=["main", "commit"])
def test_quantize_works_from_the_cache_alone(
    environment: str,
    revision: tuple[str, ...],
    cached: list[str],
    client: Callable[[str], None],
    command: Command,
    small: Path,
    hub: Any,
    tmp_path: Path,
) -> None:
    client(environment)
    code, _, err = command("quantize", REPOSITORY, tmp_path / "out", *revision)
    assert code == 0, err
    assert not hub.requested
    code, _, err = command("quantize", small, tmp_path / "local")
    assert code == 0, err
    shard = "model-00001-of-00001.safetensors"
    assert sha256_of(tmp_path / "out" / shard) == sha256_of(tmp_path / "local" / shard)


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK])
def test_a_shard_that_the_cache_lacks_is_named(
    environment: str, cached: list[str], client: Callable[[str], None], command: Command, tmp_path: Path
) -> None:
    [snapshot] = (tmp_path / "cache").rglob(COMMIT)
    (snapshot / cached[1]).unlink()
    client(environment)
    code, out, err = command("quantize", REPOSITORY, tmp_path / "out")
    assert (code, out) == (2, "")
    assert f"all files must be in the hub's cache where the hub cannot be reached; {cached[1]} of commit {COMMIT} is not" in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["quantize", "generate", "inspect"])
def test_without_network_and_cache_the_answer_comes_at_once(
    name: str, client: Callable[[str], None], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"quantize": (tmp_path / "out", "--revision", COMMIT), "generate": ("--prompt", "x"), "inspect": ()}[name]
    client(NO_NETWORK)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client repeats what cannot succeed"))
    code, out, err = command(name, REPOSITORY, *arguments)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith(f"dbrx-q: error: {REPOSITORY}: no such folder here, and the hub cannot be asked for a repository of that name: ")
    assert "Its cache holds no copy. Check the name and the network" in line


def test_a_configuration_is_read_from_the_cache_or_refused_at_once(
    small: Path, hub: Any, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folder = small
    stored = DbrxConfig.from_pretrained(REPOSITORY)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client repeats what cannot succeed"))
    for how in (NO_NETWORK, OFFLINE):
        client(how)
        assert DbrxConfig.from_pretrained(REPOSITORY) == DbrxConfig.from_pretrained(REPOSITORY, revision=COMMIT) == stored
        with pytest.raises(CheckpointError, match="cannot be asked for a repository of that name"):
            DbrxConfig.from_pretrained(REPOSITORY, revision=COMMIT[::-1])


def test_a_revision_that_does_not_exist_is_named(small: Path, hub: Any, command: Command, tmp_path: Path) -> None:
    hub.folder, hub.missing_revision = small, "v9"
    code, out, err = command("quantize", REPOSITORY, tmp_path / "out", "--revision", "v9")
    assert (code, out) == (2, "")
    assert "--revision must name a branch, tag or commit of the repository; found 'v9'" in err


@pytest.mark.parametrize("error", [TypeError("Client.get() got an unexpected argument"), AttributeError("x"), KeyError("sha")])
def test_an_error_of_the_program_is_not_called_a_missing_repository(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, hub_errors(REPOSITORY):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("ranges", ["ignored", "compressed"])
def test_a_server_that_ignores_ranges_is_refused_before_it_sends_a_shard(ranges: str, hub: Any, command: Command, tmp_path: Path) -> None:
    hub.ranges = ranges
    code, out, err = command("quantize", REPOSITORY, tmp_path / "out", "--dry-run")
    assert (code, out) == (2, "")
    assert (
        "model.safetensors: the hub, or the mirror or proxy in its place, must answer a request for bytes 0 to 99999 with status 206" in err
    )
    assert "Download the repository with `hf download` and give its folder" in err
    assert hub.encodings == {"identity"}


def test_a_server_that_sends_more_than_the_range_is_cut_short(hub: Any, command: Command, tmp_path: Path) -> None:
    hub.ranges = "endless"
    code, _, err = command("quantize", REPOSITORY, tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert hub.cut_short.wait(30)  # the client closed the connection, long before the end


def test_index_and_single_file_on_the_hub_are_refused_together(small: Path, hub: Any, command: Command, tmp_path: Path) -> None:
    hub.folder = tmp_path / "served"
    shutil.copytree(small, hub.folder)
    shutil.copyfile(small / "model-00001-of-00002.safetensors", hub.folder / "model.safetensors")
    code, out, err = command("quantize", REPOSITORY, tmp_path / "out")
    assert (code, out) == (2, "")
    assert "a checkpoint must hold its weights once; found model.safetensors and, by model.safetensors.index.json, model-00001" in err
