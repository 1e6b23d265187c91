"""Runs transformers' own tests of DBRX on transformers' classes, on the plug-in's modules and on this project's classes.

    .venv/bin/python tests/peers/run.py                    # the transformers that is installed
    .venv/bin/python tests/peers/run.py 5.15.0 5.24.0      # these, each installed into a folder of its own

README.md in this folder says what runs and what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "transformers": "transformers' classes as they are",
    "plugin": "transformers' classes, computing with our linears, embedding, router and experts",
    "packed": "the same with all but router and norms quantized to int8",
    "native": "dbrx_q's classes behind PreTrainedModel and GenerationMixin",
}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for and print counts and failures; 0 unless a variant misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="versions of transformers; without one, the installed version")
    parser.add_argument(
        "--sources", type=Path, help="an sdist, or a checkout of transformers' repository; without it, pip downloads the sdist"
    )
    parser.add_argument("--packages", type=Path, help="a folder with transformers of that version; without it, pip installs one")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="run this variant beside `transformers`; may be repeated")
    parser.add_argument("--tests", default="", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--out", type=Path, help="write the outcome of every test as JSON")
    options = parser.parse_args(arguments)
    variants = ["transformers", *(name for name in VARIANTS if name != "transformers" and name in (options.variant or VARIANTS))]
    outcomes: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    with tempfile.TemporaryDirectory(prefix="dbrx-peers-") as name:
        for version in options.versions or [installed_version("transformers")]:
            work = Path(name) / version
            work.mkdir()
            try:
                packages = options.packages or _packages(version, work, installed=not options.versions)
                sources = _sources(version, work, options.sources)
            except (subprocess.CalledProcessError, FileNotFoundError) as problem:
                print(f"transformers {version}: skipped, because pip could not fetch it or its sdist ({problem})")
                continue
            outcomes[version] = {variant: _run(variant, sources, packages, work, options.tests) for variant in variants}
            print(_summary(version, outcomes[version]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return 0 if outcomes else 77  # the code of a skipped test


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, stdout=sys.stderr)


def _packages(version: str, work: Path, *, installed: bool) -> Path:
    """A folder with `parameterized`, which transformers' tests import, and, unless the installed version is asked for, transformers."""
    folder = work / "packages"
    folder.mkdir()
    wanted = [] if installed else [f"transformers=={version}"]
    if find_spec("parameterized") is None:
        wanted.append("parameterized==0.9.0")
    if wanted:
        _pip("install", "--quiet", "--target", str(folder), *wanted)
    return folder


def _sources(version: str, work: Path, path: Path | None) -> Path:
    """The root of transformers' sources, which holds `tests`."""
    if path is not None and path.is_dir():
        return path.resolve()
    if path is None:
        _pip("download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(work), f"transformers=={version}")
        path = work / f"transformers-{version}.tar.gz"
    with tarfile.open(path) as archive:
        archive.extractall(work / "sources", filter="data")
    (root,) = (work / "sources").iterdir()
    (root / "tests" / "__init__.py").touch()  # which an sdist lacks and transformers' tests of configurations read
    return root


def _run(variant: str, sources: Path, packages: Path, work: Path, selected: str) -> dict[str, dict[str, object]]:
    """Outcome, reason and use of gradients for each test that pytest collects."""
    out = work / f"{variant}.json"
    log = work / f"{variant}.log"
    (work / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p variants -p no:cacheprovider -q\n", encoding="utf-8")
    upstream = sources / "tests" / "models" / "dbrx" / "test_modeling_dbrx.py"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (packages, sources, HERE) if path)
        + os.pathsep
        + os.environ.get("PYTHONPATH", ""),
        "DBRX_PEERS_VARIANT": variant,
        "DBRX_PEERS_OUT": str(out),
        "DBRX_PEERS_CLASSES": "DbrxForCausalLM" if variant == "packed" else "DbrxModel DbrxForCausalLM",
        "HF_HUB_OFFLINE": "1",
    }
    tests = upstream if upstream.exists() else HERE / "dbrx_tests.py"
    command = [sys.executable, "-m", "pytest", "-c", str(work / "pytest.ini"), "--rootdir", str(sources), str(tests), "-k", selected]
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(command, cwd=work, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if not out.exists():
        raise SystemExit(f"pytest could not run variant {variant!r}:\n{log.read_text(encoding='utf-8')[-4000:]}")
    outcomes: dict[str, dict[str, object]] = json.loads(out.read_text(encoding="utf-8"))
    return outcomes


def _summary(version: str, outcomes: dict[str, dict[str, dict[str, object]]]) -> str:
    """A table of counts, then the failures of each variant with their reasons."""
    plain = outcomes["transformers"]
    meaningful = {name for name, test in plain.items() if test["outcome"] == "passed"}
    gradients = {name for name in meaningful if plain[name]["backward"]}
    lines = [
        f"transformers {version}: {len(plain)} tests, of which {len(meaningful)} pass on transformers' own classes, "
        f"{len(meaningful - gradients)} of them without gradients"
    ]
    lines += [f"  {name}: {test['reason']}" for name, test in sorted(plain.items()) if test["outcome"] == "failed"]
    for variant, tests in outcomes.items():
        if variant == "transformers":
            continue
        passed = {name for name in meaningful if tests.get(name, {}).get("outcome") == "passed"}
        lines.append(
            f"{variant} ({VARIANTS[variant]}): {len(passed)} of {len(meaningful)}, "
            f"{len(passed - gradients)} of {len(meaningful - gradients)} without gradients"
        )
        for name in sorted(meaningful - passed):
            test = tests.get(name, {"outcome": "not collected", "reason": ""})
            needs = " (gradients)" if name in gradients else ""
            lines.append(f"  {name}{needs}: {test['outcome']}: {test['reason']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
