"""Measured bandwidths, kept per machine, and threads within a container's quota."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dbrx_q.planning import bandwidths, cpu_quota
from dbrx_q.planning.bandwidths import known_bandwidths, measure_bandwidths
from dbrx_q.planning.machine import Gpu, Machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and small measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bandwidths, "_MOST_BYTES", 64 << 20)
    monkeypatch.setattr(bandwidths, "_BLOCK_BYTES", 1 << 16)


def test_plan_uses_what_was_measured_and_says_so(quantized_nano: Path, cli: Callable[..., Any]) -> None:
    assumed = cli("plan", quantized_nano, "--ram", "3MiB")
    assert "bandwidths are assumed where no option names them; --measure measures" in assumed.out
    before = json.loads(cli("plan", quantized_nano, "--ram", "3MiB", "--json").out)
    assert before["bandwidths"] == {"host": 60e9, "disk": 5e9, "measured": None}
    measured = json.loads(cli("plan", quantized_nano, "--ram", "3MiB", "--measure", "--json").out)
    assert 1e8 < measured["bandwidths"]["host"] < 2e12
    known = known_bandwidths()
    assert known is not None
    assert measured["bandwidths"] == {"host": known.host, "disk": known.disk or 5e9, "measured": known.date}
    assert measured["tokens_per_second"] != before["tokens_per_second"]
    later = cli("plan", quantized_nano, "--ram", "3MiB")
    assert f"bandwidths measured on this machine at {known.date}" in later.out
    named = json.loads(cli("plan", quantized_nano, "--ram", "3MiB", "--host-bandwidth", "60GB", "--disk-bandwidth", "5GB", "--json").out)
    assert named["tokens_per_second"] == before["tokens_per_second"]
    assert Machine.detect().host_bandwidth == known.host  # the loader's machine


def test_another_machine_keeps_its_own_bandwidths(nano: Path) -> None:
    measure_bandwidths(nano)
    assert Machine(1 << 20).as_measured().measured
    for other in (Machine(1 << 60), Machine(None, (Gpu(1 << 30),) * 99), Machine(None, (Gpu(1 << 30, link=1e9),))):
        assert other.as_measured() == other
        assert not other.as_measured().measured


def test_a_damaged_file_is_as_none(nano: Path, tmp_path: Path) -> None:
    measure_bandwidths(nano)
    [path] = (tmp_path / "cache").rglob("*.json")
    good = json.loads(path.read_text())
    for damaged in ("", "[]", "{}", json.dumps(good | {"host": -1}), json.dumps(good | {"gpus": [[1]]}), json.dumps(good | {"disk": "x"})):
        path.write_text(damaged)
        assert known_bandwidths() is None
        assert Machine.detect().host_bandwidth == 60e9


def test_without_a_checkpoint_the_figure_of_the_disk_stays(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidths, "_disk_bandwidth", lambda path: 1.5e9)
    assert measure_bandwidths(nano).disk == 1.5e9
    assert measure_bandwidths(None).disk == 1.5e9
    assert Machine.detect().disk_bandwidth == 1.5e9


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("lines", "groups", "expected"),
    [
        ("0::/a/b", {"a/b": {"cpu__max": "150000 100000\n"}}, 1.5),
        ("0::/a/b", {"a/b": {"cpu__max": "max 100000\n"}, "a": {"cpu__max": "400000 100000"}}, 4.0),
        ("0::/a/b", {"a/b": {"cpu__max": "800000 100000"}, "a": {"cpu__max": "50000 100000"}}, 0.5),
        ("0::/docker/1234", {"": {"cpu__max": "200000 100000"}}, 2.0),  # the host's path, while the group itself is mounted
        ("0::/", {"": {"cpu__max": "max 100000"}}, None),
        ("0::/", {"": {"cpu__max": "nonsense"}}, None),
        ("4:cpu,cpuacct:/x\n1:memory:/x", {"cpu,cpuacct/x": {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"}}, 3.0),
        ("4:cpuacct,cpu:/x", {"cpu/x": {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}}, 2.5),
        ("4:cpu:/x", {"cpu/x": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, None),
        ("1:memory:/x", {"memory/x": {"cpu__max": "100000 100000"}}, None),
    ],
)
def test_quotas_of_control_groups(lines: str, groups: dict[str, dict[str, str]], expected: float | None, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(lines + "\n")
    for name, files in groups.items():
        write(tmp_path / "mount" / name, **files)
    assert cpu_quota.cpu_quota(tmp_path / "cgroup", tmp_path / "mount") == expected


def test_no_file_of_groups_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota.cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, without a wish of the user."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu_quota.bound_threads.cache_clear()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
    cpu_quota.bound_threads.cache_clear()


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.3, 1), (1.5, 2), (2.0, 2), (64.0, 4)])
def test_threads_follow_the_quota(quota: float | None, expected: int, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: quota)
    cpu_quota.bound_threads()
    assert torch.get_num_threads() == expected


def test_a_number_of_threads_that_the_user_names_stays(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cpu_quota.bound_threads()
    assert torch.get_num_threads() == 4
    assert os.environ["OMP_NUM_THREADS"] == "3"
