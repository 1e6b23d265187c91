"""A run continues with the checkpoint that it began with, and a complete result is of the checkpoint that is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.folder import Checkpoint
from dbrx_q.checkpoint.layout import EMBEDDING, HEAD, TensorFormat
from dbrx_q.checkpoint.manifest import MANIFEST_NAME, Manifest
from dbrx_q.checkpoint.safetensors_file import SafetensorsFile
from dbrx_q.checkpoint.staging import MARKER_NAME
from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, already_there, quantize_checkpoint

OTHER = "--resume continues with the checkpoint that the run began with; transformer"


def request(fmt: str = "int4") -> QuantizationRequest:
    return QuantizationRequest(lambda c: default_formats(c.config, TensorFormat(fmt, 64)), shard_bytes=100_000)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in three shards."""
    ffn = {"ffn_hidden_size": 64, "moe_num_experts": 3, "moe_top_k": 2}
    config = DbrxConfig(
        d_model=64, n_heads=2, n_layers=2, vocab_size=100, attn_config={"kv_n_heads": 1}, ffn_config=ffn, torch_dtype="bfloat16"
    )
    write_checkpoint(config, tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) == 3
    return tmp_path / "source"


def changed(source: Path, name: str, to: Path) -> Path:
    """A copy of a checkpoint with another value in one tensor."""
    shutil.copytree(source, to)
    for shard in to.glob("*.safetensors"):
        with SafetensorsFile(shard) as file:
            info = file.tensors.get(name)
        if info is not None:
            data = bytearray(shard.read_bytes())
            data[info.offset + info.nbytes - 2] ^= 1  # the lowest bit of the last value
            shard.write_bytes(data)
    return to


def begin(source: Path, out: Path, tensors: int) -> Path:
    """Run until a number of tensors is finished; returns the journal."""

    class StoppedError(Exception):
        pass

    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == tensors + 1:  # the last tensor is being written
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_checkpoint(source, out, request(), on_bytes=stop)
    return out.with_name(out.name + ".partial") / MARKER_NAME


def test_another_model_does_not_continue_a_run(source: Path, tmp_path: Path) -> None:
    journal = begin(source, tmp_path / "out", 15)
    before = journal.read_bytes()
    for name in (EMBEDDING, "transformer.blocks.0.ffn.experts.mlp.w2"):  # of expert 2, the last that is finished
        with pytest.raises(RequestError, match=OTHER):
            quantize_checkpoint(changed(source, name, tmp_path / name), tmp_path / "out", request(), resume=True)
    assert journal.read_bytes() == before
    quantize_checkpoint(source, tmp_path / "out", request(), resume=True)
    quantize_checkpoint(source, tmp_path / "at-once", request())
    assert (tmp_path / "out" / MANIFEST_NAME).read_bytes() == (tmp_path / "at-once" / MANIFEST_NAME).read_bytes()


def test_the_same_model_in_another_place_and_a_mended_shard_continue_a_run(source: Path, tmp_path: Path) -> None:
    begin(source, tmp_path / "out", 10)
    mended = changed(source, HEAD, tmp_path / "mended")  # a tensor that was not finished
    quantize_checkpoint(mended, tmp_path / "out", request(), resume=True)
    quantize_checkpoint(mended, tmp_path / "at-once", request())
    assert (tmp_path / "out" / MANIFEST_NAME).read_bytes() == (tmp_path / "at-once" / MANIFEST_NAME).read_bytes()


def test_untouched_files_are_not_read_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(source, tmp_path / "out", 10)
    read: list[str] = []
    read_rows, read_whole = Checkpoint.read_rows, Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read_rows", lambda self, name, *args: read.append(name) or read_rows(self, name, *args))
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *args: read.append(name) or read_whole(self, name, *args))
    quantize_checkpoint(source, tmp_path / "out", request(), resume=True)
    assert EMBEDDING not in read
    assert HEAD in read


def test_the_journal_of_an_earlier_version_continues(source: Path, tmp_path: Path) -> None:
    journal = begin(source, tmp_path / "out", 10)
    first, *entries = (json.loads(line) for line in journal.read_text().splitlines())
    del first["source_files"]
    for entry in entries:
        del entry["source"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (first, *entries)))
    quantize_checkpoint(source, tmp_path / "out", request(), resume=True)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.source == {}
    assert already_there(source, tmp_path / "out", request())


@pytest.mark.parametrize("cached", [True, False])
def test_a_complete_result_of_another_model_is_refused(cached: bool, source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", request())
    if not cached:
        shutil.rmtree(tmp_path / "cache")
    assert already_there(source, tmp_path / "out", request())
    assert not already_there(source, tmp_path / "out", request("int8"))
    shutil.copytree(source, tmp_path / "copy")
    assert already_there(tmp_path / "copy", tmp_path / "out", request())
    with pytest.raises(RequestError, match="finds a complete result, which must be of the checkpoint that is given; it was made"):
        already_there(changed(source, HEAD, tmp_path / "other"), tmp_path / "out", request())


def test_the_manifest_names_the_source_whatever_the_formats(source: Path, tmp_path: Path) -> None:
    manifests = []
    for fmt in ("int4", "int8"):
        quantize_checkpoint(source, tmp_path / fmt, request(fmt))
        manifests.append(Manifest.read(tmp_path / fmt))
    assert manifests[0].source == manifests[1].source
    assert len(manifests[0].source["sha256"]) == 64


def test_the_command_refuses_another_model(source: Path, tmp_path: Path, cli: Callable[..., object]) -> None:
    other = changed(source, EMBEDDING, tmp_path / "other")
    assert cli("quantize", source, tmp_path / "out").code == 0
    outcome = cli("quantize", other, tmp_path / "out", "--resume")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--resume finds a complete result, which must be of the checkpoint that is given" in outcome.err
