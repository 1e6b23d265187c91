"""The parcel for a GPU machine: what is in it, and that its size is bounded. `tests/peers/parcel.py` installs one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dbrx_q.errors import RequestError
from dbrx_q.eval.gpu_run import parcel
from dbrx_q.eval.gpu_run.parcel import FOLDER, LEFT_OUT, MACHINES, NEEDED, pack

ROOT = Path(__file__).parents[3]


def test_every_dependency_is_in_the_parcel_or_on_the_machine() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([\w-]+)[><=~]', text.partition("\ndependencies = [")[2].partition("\n]")[0], re.M)
    assert len(listed) > 8
    assert set(listed) - set(MACHINES) == {*NEEDED, "bitsandbytes"} - {"pytest"}
    assert "bitsandbytes" in LEFT_OUT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "kernels").mkdir(parents=True)
    (root / "dbrx_q").mkdir()
    (root / "kernels" / "ops.py").write_text("", encoding="utf-8")
    (root / "dbrx_q" / "kernels").symlink_to("../kernels")
    (root / "untracked").write_text("", encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run(["git", "add", "kernels", "dbrx_q"], cwd=root, check=True)
    wheels = root / FOLDER / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "typer-1-py3-none-any.whl").write_bytes(bytes(1000))
    return root


def test_a_parcel_holds_tracked_files_wheels_and_the_script(checkout: Path) -> None:
    with tarfile.open(pack(checkout, "3.12")) as archive:
        names = {member.name: member for member in archive.getmembers()}
    packed = {"kernels/ops.py", "dbrx_q/kernels", "parcel/run.sh", "parcel/dbrx-q.py", "parcel/wheels/typer-1-py3-none-any.whl"}
    assert names.keys() == {f"dbrx_q/{name}" for name in packed}
    assert names["dbrx_q/dbrx_q/kernels"].linkname == "../kernels"
    assert subprocess.run(["sh", "-n", str(checkout / FOLDER / "run.sh")], check=False).returncode == 0


def test_another_python_is_refused_before_anything_is_installed(checkout: Path) -> None:
    pack(checkout, "3.2")
    script = ["sh", str(checkout / FOLDER / "run.sh"), "bench"]
    ended = subprocess.run(script, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"must be Python 3.2, which the wheels are for; found {found}." in ended.stderr
    assert f"make parcel VERSION={found}" in ended.stderr
    assert not (checkout / FOLDER / "site").exists()


def test_a_parcel_that_is_too_large_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "LARGEST", 100)
    with pytest.raises(RequestError, match=r"at most 0 MB; found .* Leave wheels or data out"):
        pack(checkout, "3.12")


def test_a_tree_without_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"packed from a git checkout.*Run it in a clone"):
        pack(tmp_path, "3.12")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["", "3", "3.12 --dry-run"])
def test_a_version_of_python_is_needed(version: str) -> None:
    with pytest.raises(RequestError, match=r"--python must be a version such as 3\.12"):
        parcel.main(["--python", version])


def test_an_error_of_make_parcel_is_a_message() -> None:
    command = [sys.executable, "-m", "dbrx_q.eval.gpu_run.parcel", "--python", "abc"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "parcel: error: --python must be a version such as 3.12; found 'abc'. Name the machine's\n"
