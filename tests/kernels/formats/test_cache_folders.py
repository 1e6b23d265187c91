"""Compiled kernels and results of the machine where the usual folders cannot be written."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

from dbrx_q.kernels.cpu.compiled import compiled
from dbrx_q.kernels.formats import cache_folders
from dbrx_q.kernels.formats.cache_folders import CacheWarning, temporary_cache
from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache
from dbrx_q.kernels.triton import launch

NOWHERE = "/proc/none"  # not even root can make this folder


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files; no folder or warning of an earlier test is remembered."""
    for function in (cache_folders.temporary_cache, cache_folders.warn_once, launch.find_cache):
        function.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    for function in (cache_folders.temporary_cache, cache_folders.warn_once, launch.find_cache):
        function.cache_clear()


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba can write neither its folder, nor one beside the source, nor one in the home folder."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", NOWHERE)
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")


def source(folder: Path) -> dict[str, object]:
    """The names of a module of its own with one function, as numba's cache needs it."""
    path = folder / "doubled.py"
    path.write_text("def doubled(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("doubled_of_test_cache_folders", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # by whose name numba stores the function
    spec.loader.exec_module(module)
    return vars(module)


def stored(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nbc"))


def test_compiled_code_goes_to_a_private_temporary_folder(scratch: Path, no_folder: None) -> None:
    with pytest.warns(CacheWarning, match=r"compiled kernels are kept in .*/dbrx_q-\d+\. .* set NUMBA_CACHE_DIR to a folder"):
        doubled = compiled()(source(scratch)["doubled"])
    assert doubled(21) == 42
    folder = scratch / f"dbrx_q-{os.getuid()}"
    assert (folder.stat().st_mode & 0o777, len(stored(folder))) == (0o700, 1)
    again = compiled()(source(scratch)["doubled"])  # warns no second time
    assert (again(21), again.stats.cache_hits) == (42, {again.signatures[0]: 1})
    assert numba.config.CACHE_DIR == NOWHERE


@pytest.mark.parametrize("problem", ["writable by all", "a link", "a file", "of another user"])
def test_a_folder_that_others_can_write_is_not_used(problem: str, scratch: Path, no_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scratch / f"dbrx_q-{os.getuid()}"
    if problem == "writable by all":
        folder.mkdir()
        folder.chmod(0o777)
    elif problem == "a link":
        (scratch / "theirs").mkdir()
        folder.symlink_to(scratch / "theirs")
    elif problem == "a file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
        (scratch / f"dbrx_q-{real + 1}").symlink_to(folder)
    with pytest.warns(CacheWarning, match="takes every command 10 seconds or more. To avoid it, set NUMBA_CACHE_DIR"):
        doubled = compiled()(source(scratch)["doubled"])
    assert doubled(21) == 42
    assert not stored(scratch)


def test_a_full_disk_and_a_damaged_cache_are_no_errors(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(scratch / "numba"))
    doubled = compiled()(source(scratch)["doubled"])
    assert doubled(21) == 42
    [code] = stored(scratch)
    for damaged in (code, next((scratch / "numba").rglob("*.nbi"))):
        damaged.write_bytes(damaged.read_bytes()[:40])
        again = compiled()(source(scratch)["doubled"])
        assert again(21) == 42
        assert not again.stats.cache_hits
        assert compiled()(source(scratch)["doubled"])(21) == 42  # and it was stored again
    (scratch / "numba").rename(scratch / "other")
    unstored = compiled()(source(scratch)["doubled"])
    shutil.rmtree(scratch / "numba")
    (scratch / "numba").touch()  # now no file can be written there
    with pytest.warns(CacheWarning, match="compiled kernels cannot be stored here"):
        assert unstored(21) == 42


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME", "no home"])
def test_results_go_to_the_temporary_folder(variable: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (scratch / "file").touch()
    monkeypatch.setenv(*(("HOME", "~") if variable == "no home" else (variable, str(scratch / "file" / "folder"))))
    with pytest.warns(CacheWarning, match="Set XDG_CACHE_HOME to a folder that you may write to"):
        folder = user_cache()
    assert folder == temporary_cache()
    assert write_to_cache(folder / "sha256" / "x.json", b"1")
    assert (folder / "sha256" / "x.json").read_bytes() == b"1"


def test_triton_gets_a_folder_where_its_own_cannot_be_written(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOME", str(scratch / "file" / "none"))
    (scratch / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    with pytest.warns(CacheWarning, match="set TRITON_CACHE_DIR to a folder"):
        launch.find_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(temporary_cache() / "triton")
