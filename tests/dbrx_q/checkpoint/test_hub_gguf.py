"""GGUF files in repositories of the hub: which one is meant, and what is fetched of it; GGUF files in folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.gguf_files import gguf_models, with_label
from dbrx_q.checkpoint.hub import is_on_hub, resolve_folder
from dbrx_q.checkpoint.hub_gguf import find_gguf
from dbrx_q.errors import CheckpointError
from dbrx_q.sources import locations
from dbrx_q.sources.gguf_weights import GgufWeights
from dbrx_q.sources.locations import open_gguf_header, resolve_location
from dbrx_q.sources.open import open_source

DATA = Path(__file__).parents[2] / "data"
Q4_0 = DATA / "dbrx-nano-gguf" / "dbrx-nano.Q4_0.gguf"
SPLIT = DATA / "layouts" / "gguf-blocks-of-32"
REPOSITORY = "acme/dbrx-nano"

Client = Callable[[str], None]


@pytest.fixture
def served(hub: Any, client: Client, tmp_path: Path) -> Path:
    """The folder that the hub serves, empty."""
    hub.folder = tmp_path / "served"
    hub.folder.mkdir()
    return hub.folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(Q4_0.read_bytes() + name.encode())  # the cache keeps one of equal files


def test_a_repository_with_one_model_is_that_model(served: Path, hub: Any, client: Client) -> None:
    put(served, "dbrx.Q4_0.gguf")
    (served / "imatrix.gguf").write_bytes(b"GGUF")
    (served / "config.json").write_text("{}")
    source = open_source(REPOSITORY)
    assert (source.name, source.format, source.path.name) == (REPOSITORY, "GGUF Q4_0", "dbrx.Q4_0.gguf")
    assert hub.sent_whole == ["dbrx.Q4_0.gguf"]
    for how in ("HF_HUB_OFFLINE", "no network"):
        client(how)
        assert resolve_location(REPOSITORY) == resolve_location(f"{REPOSITORY}/dbrx.Q4_0.gguf") == source.path
    assert hub.sent_whole == ["dbrx.Q4_0.gguf"]


def test_one_of_several_models_is_named_by_path_or_label(served: Path, hub: Any, client: Client) -> None:
    put(served, "dbrx.Q4_0.gguf", "dbrx.Q4_K.gguf", "UD-Q4_K_XL/dbrx.gguf")
    size = f"({Q4_0.stat().st_size / 1e9:.1f} GB)"
    listed = f"UD-Q4_K_XL/dbrx.gguf {size}; dbrx.Q4_0.gguf {size}; dbrx.Q4_K.gguf {size}"
    for name, rule in (
        (REPOSITORY, "one GGUF model must be named where there are several"),
        (f"{REPOSITORY}:Q8_0", "Q8_0 must name one GGUF model"),
        (f"{REPOSITORY}/other.gguf", r"other\.gguf must name one GGUF model"),
    ):
        with pytest.raises(CheckpointError, match=f"{REPOSITORY}: {rule}; found") as caught:
            resolve_location(name)
        assert listed in str(caught.value)
        assert f"Give {REPOSITORY}/UD-Q4_K_XL/dbrx.gguf, or {REPOSITORY}:LABEL" in str(caught.value)
    assert not hub.sent_whole
    assert resolve_location(f"{REPOSITORY}:q4_k").name == "dbrx.Q4_K.gguf"
    assert resolve_location(f"{REPOSITORY}/UD-Q4_K_XL/dbrx.gguf").parent.name == "UD-Q4_K_XL"
    assert hub.sent_whole == ["dbrx.Q4_K.gguf", "UD-Q4_K_XL/dbrx.gguf"]
    client("no network")
    with pytest.raises(
        CheckpointError, match=r"one GGUF model must be named where there are several; found UD-Q4_K_XL/dbrx\.gguf; dbrx\.Q4_K"
    ):
        resolve_location(REPOSITORY)
    with pytest.raises(CheckpointError, match="cannot be asked for a repository of that name"):
        resolve_location("acme/other:Q4_0")


def test_a_split_model_is_fetched_with_all_parts(served: Path, hub: Any) -> None:
    for part in SPLIT.glob("*.gguf"):
        shutil.copyfile(part, served / part.name)
    names = sorted(path.name for path in served.iterdir())
    with GgufWeights(resolve_location(f"{REPOSITORY}/{names[1]}")) as weights:
        assert [path.name for path in weights.shards] == names
    assert hub.sent_whole == names


@pytest.mark.parametrize("name", ["dbrx.Q4_0.gguf", "split"])
def test_the_header_alone_is_fetched_for_a_plan(name: str, served: Path, hub: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "_FIRST_PART_BYTES", 4000)  # less than the vocabulary takes
    monkeypatch.setattr(locations, "_OTHER_PART_BYTES", 100)
    originals = [Q4_0] if name != "split" else sorted(SPLIT.glob("*.gguf"))
    for original in originals:
        shutil.copyfile(original, served / original.name)
    model = find_gguf(REPOSITORY)
    assert model is not None
    assert model.cached() is None
    with open_gguf_header(model) as weights, GgufWeights(originals[0]) as expected:
        assert weights.raw_config == expected.raw_config
        assert weights.sizes == expected.sizes
        for tensor in expected.tensors:
            assert weights.label_of(tensor) == expected.label_of(tensor)
            assert weights.exact_format(tensor) == expected.exact_format(tensor)
        assert weights.tokenizer.encode("The war") == expected.tokenizer.encode("The war")
        with pytest.raises(AssertionError, match="is closed"):
            weights.read("lm_head.weight")
        folder = weights.folder
    assert not folder.exists()
    assert not hub.sent_whole
    first = resolve_location(REPOSITORY)
    hub.requested.clear()
    client("no network")
    model = find_gguf(REPOSITORY)
    assert model is not None
    with open_gguf_header(model) as weights:  # from the cache, whole
        assert weights.folder == first
        weights.read("lm_head.weight")
    assert not hub.requested


def test_a_repository_with_safetensors_files_is_a_folder(served: Path, nano: Path, hub: Any) -> None:
    for path in nano.iterdir():
        shutil.copyfile(path, served / path.name)
    put(served, "dbrx.Q4_0.gguf")
    assert find_gguf(REPOSITORY) is None
    assert resolve_location(REPOSITORY).is_dir()
    assert "dbrx.Q4_0.gguf" not in hub.sent_whole
    assert find_gguf(f"{REPOSITORY}:Q4_0") is not None


def test_names_of_gguf_files_are_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "a/b:Q4_K_M", "a/b/c.gguf", "a/b/c/d-00001-of-00002.gguf"):
        assert is_on_hub(name)
    for name in ("/a/b.gguf", "./a/b/c.gguf", "a/b/c.bin", "a.gguf", "a/b:"):
        with pytest.raises(CheckpointError, match="no such folder"):
            is_on_hub(name)
    with pytest.raises(CheckpointError, match=r"needs a checkpoint's folder or a hub id such as owner/name; found the name of a GGUF file"):
        resolve_folder("a/b:Q4_K_M")


def test_a_folder_with_one_model_is_that_model(tmp_path: Path) -> None:
    for part in SPLIT.glob("*.gguf"):
        shutil.copyfile(part, tmp_path / part.name)
    with GgufWeights(resolve_location(tmp_path)) as weights:
        assert len(weights.shards) == 3
    put(tmp_path, "dbrx.Q4_0.gguf")
    with pytest.raises(
        CheckpointError, match=r"must hold one checkpoint; found the GGUF models dbrx-tiny-00001-of-00003\.gguf, dbrx\.Q4_0\.gguf"
    ):
        resolve_location(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_location(tmp_path) == tmp_path


def test_models_by_their_names() -> None:
    files = [
        "b-00002-of-00002.gguf",
        "b-00001-of-00002.gguf",
        "c-00002-of-00003.gguf",
        "mmproj-a.gguf",
        "a.imatrix.gguf",
        "a.gguf",
        "a.bin",
    ]
    assert gguf_models(files) == {"a.gguf": ["a.gguf"], "b-00001-of-00002.gguf": ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]}
    models = gguf_models(["x-Q4_K_M.gguf", "x.Q4_K.gguf", "Q4_K_S/x-00001-of-00002.gguf", "Q4_K_S/x-00002-of-00002.gguf"])
    assert list(with_label(models, "q4_k")) == ["x.Q4_K.gguf"]
    assert list(with_label(models, "Q4_K_S")) == ["Q4_K_S/x-00001-of-00002.gguf"]


def test_commands_take_a_model_on_the_hub(
    served: Path, hub: Any, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "_FIRST_PART_BYTES", 4000)
    put(served, "dbrx.Q4_0.gguf", "dbrx.other.gguf")
    name = f"{REPOSITORY}:Q4_0"
    for command in ("inspect", "plan"):
        outcome, local = cli(command, name, "--json"), cli(command, served / "dbrx.Q4_0.gguf", "--json")
        assert (outcome.code, local.code) == (0, 0), outcome.err
        answers = [json.loads(text) for text in (outcome.out, local.out)]
        notes = [answer.pop("note", "") for answer in answers]  # names the path
        assert answers[0] == answers[1]
        assert notes[0].replace(name, "") == notes[1].replace(str(served / "dbrx.Q4_0.gguf"), "")
    outcome, local = (cli("quantize", source, tmp_path / "out", "--dry-run", "--json") for source in (name, served / "dbrx.Q4_0.gguf"))
    assert outcome.code == 0, outcome.err
    assert f"{name}: the header is fetched for the plan; a run fetches all of dbrx.Q4_0.gguf" in outcome.err
    plan, expected = json.loads(outcome.out), json.loads(local.out)
    assert [plan[key] for key in ("bytes_in", "bytes_out", "bits")] == [expected[key] for key in ("bytes_in", "bytes_out", "bits")]
    assert not hub.sent_whole
    outcome = cli("quantize", name, tmp_path / "out", "--low-disk")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--low-disk deletes each shard after use; found the GGUF file dbrx.Q4_0.gguf. Leave it out" in outcome.err
    outcome = cli("quantize", name, tmp_path / "out", "--keep", "--revision", "main")
    assert outcome.code == 0, outcome.err
    assert hub.sent_whole == ["dbrx.Q4_0.gguf"]
    outcome = cli("generate", name, "--prompt", "The war", "--max-new-tokens", 4)
    assert outcome.code == 0, outcome.err
    assert outcome.out == cli("generate", tmp_path / "out", "--prompt", "The war", "--max-new-tokens", 4).out
    outcome = cli("quantize", name, tmp_path / "other", "--method", "best", "--calibration", "self")
    assert outcome.code == 2
    assert "--calibration self samples from a checkpoint of the published layout" in outcome.err
    assert "dbrx.Q4_0.gguf" in outcome.err
