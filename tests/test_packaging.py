"""The wheel installs one package, dbrx_q, with all four floors in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git would commit, so that stray files of the working tree cannot hide a missing one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listing.decode().split("\0")):
        origin, copy = ROOT / name, source / name
        if name.startswith("tests/") or not origin.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(origin.readlink())
        else:
            copy.write_bytes(origin.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True
    )
    [built] = out.glob("*.whl")
    return built


def test_the_wheel_holds_dbrx_q_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dbrx_q", next(top for top in tops if top.endswith(".dist-info"))}
    expected = {"dbrx_q/py.typed"}
    for folder, prefix in (("dbrx_q", "dbrx_q"), ("kernels", "dbrx_q/kernels"), ("quantize", "dbrx_q/quantize"), ("eval", "dbrx_q/eval")):
        files = [path for path in (ROOT / folder).rglob("*.py") if not any(p.is_symlink() for p in path.parents if p != ROOT)]
        expected |= {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in files}
    expected.add("dbrx_q/eval/compare/report_template.html")
    assert expected == {name for name in names if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_names_its_command_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "dbrx-q = dbrx_q.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        lines = archive.read(metadata).decode().splitlines()
        requires = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
        assert not any("transformers" in line for line in requires)


def test_the_floors_are_linked_into_the_package() -> None:
    for floor in ("kernels", "quantize", "eval"):
        link = ROOT / "dbrx_q" / floor
        assert link.is_symlink()
        assert link.readlink() == Path("..") / floor
