"""Hub ids: the hub's own client against a small hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.checkpoint.manifest import sha256_of
from dbrx_q.experts.fallback import FALLBACK_FOLDER
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
SCRIPT = Path(sys.executable).with_name("dbrx-q")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY, PUSHED, TOKEN = "acme/dbrx-nano", "acme/dbrx-nano-int4", "hf_good"


def test_commands_take_a_hub_id(hub: Any, nano: Path, tmp_path: Path) -> None:
    code, out, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["bits_per_weight_in"] == 16
    assert not any(word in err for word in ("503", "Retrying", "Warning"))  # a repeated request is not reported
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()
    fetched = hub.downloads()
    assert "model.safetensors" in fetched
    assert "TRAINING.md" not in fetched  # a checkpoint does not need this file
    code, out, err = hub.run(tmp_path, "inspect", REPOSITORY, "--json")
    assert code == 0, err
    assert json.loads(out)["bits_per_weight"] == 16
    assert hub.downloads() == fetched  # all files were in the cache


def test_a_repository_that_the_hub_does_not_have(hub: Any, tmp_path: Path) -> None:
    code, out, err = hub.run(tmp_path, "quantize", "acme/unknown", tmp_path / "out")
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("dbrx-q: error: acme/unknown: no such folder here, and the hub did not give a repository of that name")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_download(hub: Any, tmp_path: Path) -> None:
    hub.released.clear()
    running = hub.start(tmp_path, "quantize", REPOSITORY, tmp_path / "out")
    assert hub.sending.wait(60)
    running.send_signal(signal.SIGINT)
    code, out, err = hub.output_of(running)
    assert (code, out) == (2, "")
    assert err.count("dbrx-q: error: interrupted") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out*"))


def test_a_fallback_copy_is_fetched_on_request(small: Path, hub: Any, tmp_path: Path) -> None:
    hub.folder = tmp_path / "served" / "dbrx-nano"
    for folder, fmt in ((hub.folder, "int8"), (hub.folder / FALLBACK_FOLDER, "int4")):
        formats = default_formats(DbrxConfig.from_pretrained(small), TensorFormat(fmt, 64))
        quantize_checkpoint(small, folder, QuantizationRequest(lambda _, formats=formats: formats))  # type: ignore[misc]
    [shard] = hub.folder.glob("*.safetensors")
    prompt = ("generate", REPOSITORY, "--prompt", "The", "--max-new-tokens", 2)
    code, _, err = hub.run(tmp_path, *prompt)
    assert code == 0, err
    assert hub.weights_sent() == [shard.name]
    code, _, err = hub.run(tmp_path, *prompt, "--ram", "1GiB", "--fallback")
    assert code == 0, err
    assert hub.weights_sent() == [shard.name, f"{FALLBACK_FOLDER}/{shard.name}"]


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}


def test_shards_are_fetched_in_order_and_none_for_the_plan(hub: Any, many: list[str], tmp_path: Path) -> None:
    code, out, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--dry-run", "--json")
    assert code == 0, err
    assert not hub.weights_sent()
    sizes = [(hub.folder / name).stat().st_size for name in many]
    assert json.loads(out)["fetch"] == sum(sizes)
    plan = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--dry-run", "--low-disk", "--json")[1]
    assert max(sizes) < json.loads(plan)["fetch_disk"] < sum(sizes)
    code, _, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out")
    assert code == 0, err
    assert hub.weights_sent() == many
    quantize_checkpoint(hub.folder, tmp_path / "local", QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64))))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert f"base_model: {REPOSITORY}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("options", [(), ("--method", "awq", "--calibration", BOOK, "--sequences", 2, "--length", 64)])
def test_low_disk_deletes_shards_after_use(hub: Any, many: list[str], tmp_path: Path, options: tuple[object, ...]) -> None:
    storage, most = tmp_path / "out.source", 0
    running = hub.start(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk", *options)
    while running.poll() is None:
        most = max(most, len(list(storage.glob("*.safetensors"))))
        time.sleep(0.002)
    code, _, err = hub.output_of(running)
    assert code == 0, err
    assert 1 <= most <= 4  # the first shard, that of the layer being written, that of the layer being read, and one fetched ahead
    assert hub.weights_sent() == many
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "served"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    code, _, err = hub.run(tmp_path, "quantize", hub.folder, tmp_path / "local", *options)
    assert code == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_low_disk_resumes_with_the_missing_shards(hub: Any, many: list[str], tmp_path: Path) -> None:
    hub.fails = many[4]
    code, out, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk")
    assert (code, out) == (2, "")
    assert f"the hub must give {many[4]}" in err
    assert "--resume continues" in err
    assert "Traceback" not in err
    hub.fails = ""
    before = len(hub.weights_sent())
    code, _, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk", "--resume")
    assert code == 0, err
    assert hub.weights_sent()[before:] == many[4:]
    assert not (tmp_path / "out.source").exists()
    quantize_checkpoint(hub.folder, tmp_path / "local", QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64))))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_low_disk_keeps_a_folder_of_another_program(hub: Any, many: list[str], tmp_path: Path) -> None:
    foreign = tmp_path / "out.source" / many[0]
    foreign.parent.mkdir()
    foreign.write_text("mine")
    code, out, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk")
    assert (code, out) == (2, "")
    assert "made by something else. Move it away" in err
    assert [path.name for path in foreign.parent.iterdir()] == [many[0]]
    assert foreign.read_text() == "mine"


def test_low_disk_refuses_folders(nano: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    outcome = cli("quantize", nano, tmp_path / "out", "--low-disk")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--low-disk deletes what was fetched from the hub; found the folder" in outcome.err
    outcome = cli("quantize", nano, tmp_path / "out", "--public")
    assert "found no --push" in outcome.err
    assert not list(tmp_path.iterdir())


def test_push_uploads_every_file(hub: Any, nano: Path, tmp_path: Path) -> None:
    code, _, err = hub.run(tmp_path, "quantize", nano, tmp_path / "out", "--push", PUSHED, token=TOKEN)
    assert code == 0, err
    assert f"{PUSHED}/commit/{COMMIT}" in err
    assert hub.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert f"# {PUSHED}" in (tmp_path / "out" / "README.md").read_text()
    code, _, err = hub.run(tmp_path, "verify", tmp_path / "out")
    assert code == 0, err


def test_a_failed_push_leaves_the_result_and_can_be_repeated(hub: Any, nano: Path, tmp_path: Path) -> None:
    hub.fails = f"/api/models/{PUSHED}/commit/main"
    command = ("quantize", nano, tmp_path / "out", "--push", PUSHED)
    code, _, err = hub.run(tmp_path, *command, token=TOKEN)
    assert code == 2
    assert f"complete, but pushing it to {PUSHED} failed" in err
    assert "Traceback" not in err
    hub.fails = ""
    code, _, err = hub.run(tmp_path, *command, "--resume", token=TOKEN)
    assert code == 0, err
    assert "is complete already" in err
    assert hub.uploaded.keys() >= {"config.json", "README.md", "model-00001-of-00001.safetensors"}


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        (PUSHED, "hf_bad", "pushing must be allowed before the work begins"),
        (PUSHED, "", "pushing must be allowed before the work begins"),
        ("others/dbrx", TOKEN, "the token must belong to its owner; found one of acme, acme-labs"),
        ("dbrx", TOKEN, "--push must name a repository as owner/name; found 'dbrx'"),
    ],
)
def test_a_push_without_permission_is_refused_at_once(
    hub: Any, nano: Path, tmp_path: Path, repository: str, token: str, message: str
) -> None:
    code, out, err = hub.run(tmp_path, "quantize", nano, tmp_path / "out", "--push", repository, token=token)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("call", ["model.push_to_hub('REPO')", "model.save_pretrained('saved', push_to_hub=True, repo_id='REPO')"])
def test_a_model_pushes_itself(call: str, hub: Any, small: Path, tmp_path: Path) -> None:
    code = f"from dbrx_q import DbrxForCausalLM; model = DbrxForCausalLM.from_pretrained({str(small)!r}); {call.replace('REPO', PUSHED)}"
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def run(token: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | settings | {"HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)

    refused = run("hf_bad")
    assert refused.returncode == 1
    assert f"dbrx_q.errors.RequestError: {PUSHED}: the hub must take" in refused.stderr
    done = run(TOKEN)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in small.iterdir() if path.suffix == ".safetensors"} | {"config.json", "generation_config.json"}
    assert hub.uploaded.keys() == names | {"model.safetensors.index.json"}
    shard = min(name for name in names if name.endswith(".safetensors"))
    assert hub.uploaded[shard] == (small / shard).read_bytes()


def test_a_checkpoint_of_another_program_is_kept_while_its_shards_are_fetched(hub: Any, tmp_path: Path) -> None:
    """The parts of a matrix lie in two shards, and both are deleted after their last use; plan and inspect fetch headers alone."""
    hub.folder = tmp_path / "served"
    shutil.copytree(LAYOUTS / "gptq-4bit-g32-asym", hub.folder)
    tensors = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    shard_of = {name: f"model-{1 + (not name.endswith('.qweight')):05}-of-00002.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        save_file({name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}, hub.folder / shard, {"format": "pt"})
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    for command in (["inspect"], ["plan", "--ram", "8GiB"]):
        code, out, err = hub.run(tmp_path, *command, REPOSITORY)
        assert code == 0, err
        assert "GPTQ int4:32" in out or "fits" in out
    assert not hub.weights_sent()
    code, out, err = hub.run(tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--keep", "--low-disk")
    assert code == 0, err
    assert "matrices repacked without rounding: GPTQ int4:32" in out
    assert sorted(hub.weights_sent()) == sorted(set(shard_of.values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "served"]
    code, _, err = hub.run(tmp_path, "quantize", hub.folder, tmp_path / "local", "--keep")
    assert code == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
