"""Hub ids: the hub's own client against a small hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dbrx_q import DbrxConfig
from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.eval.bench.synthetic import write_checkpoint
from dbrx_q.experts.fallback import FALLBACK_FOLDER
from dbrx_q.quantize.pipeline.format_assignment import default_formats
from dbrx_q.quantize.pipeline.run import QuantizationRequest, quantize_checkpoint

BOOK = Path(__file__).parents[2] / "data" / "war-of-the-worlds.txt"
SCRIPT = Path(sys.executable).with_name("dbrx-q")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY, PUSHED, TOKEN = "acme/dbrx-nano", "acme/dbrx-nano-int4", "hf_good"
WEIGHTS = 1 << 20  # bytes that only the weights exceed


class Hub(BaseHTTPRequestHandler):
    """Serves a folder as a repository, and accepts uploads to another repository with the right token."""

    folder: Path
    """The files of the repository."""
    requested: list[str]
    """Paths of all requests."""
    sent_whole: list[str]
    """Names of the files that were sent from the first byte to the last."""
    uploaded: dict[str, bytes]
    """Files of the other repository, by name."""
    fails: str = ""
    """A file or an address for which the hub answers with an error."""
    address: str
    """The hub's URL."""
    sending: threading.Event
    """Set when the hub begins to send weights."""
    released: threading.Event
    """Set when it may send the rest of them."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.requested.append(path)
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/") and self.requested.count(path) == 1:
            self._reply(503, b"busy; ask again")
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": _sum(file)} for name, file in files.items()]
            self._json(entries)
        elif path == "/api/whoami-v2" and self.headers.get("Authorization") == f"Bearer {TOKEN}":
            self._json({"type": "user", "name": "acme", "orgs": [{"name": "acme-labs"}]})
        elif path == "/api/whoami-v2":
            self._reply(401, b'{"error":"Invalid username or password."}')
        elif path.startswith(f"/{REPOSITORY}/resolve/") and (file := files.get(path.split("/", 5)[5])):
            self._file(file)
        else:
            self._reply(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _file(self, file: Path) -> None:
        data, headers = file.read_bytes(), {"ETag": f'"{_sum(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, end = int(ranged[1]), int(ranged[2]) + 1 if ranged[2] else len(data)
            part = data[first:end]
            self._reply(206, part, **headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})
            return
        if self.command == "GET" and file.name == self.fails:
            self._reply(500, b"broken")
            return
        if self.command == "GET":
            self.sent_whole.append(file.relative_to(self.folder).as_posix())
        self._reply(200, data, **headers)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requested.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or self.fails == path:
            self._reply(403, b'{"error":"Forbidden"}')
        elif path == "/api/repos/create":
            self._json({"url": f"{self.address}/{PUSHED}", "name": PUSHED, "id": PUSHED})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == f"/api/models/{PUSHED}/preupload/main":
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in json.loads(body)["files"]}
            self._json({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})
        elif path == f"/{PUSHED}.git/info/lfs/objects/batch":
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.address}/upload/{entry['oid']}"}}} for entry in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{PUSHED}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.uploaded[line["value"]["path"]] = self.uploaded.pop(line["value"]["oid"])
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.address}/{PUSHED}/commit/{COMMIT}"})
        else:
            self._reply(404, b"{}")

    def do_PUT(self) -> None:
        self.uploaded[urlsplit(self.path).path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(200, b"")

    do_HEAD = do_GET  # noqa: N815 # http.server calls it so

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing to the tests' stderr."""

    def _json(self, data: object) -> None:
        self._reply(200, json.dumps(data).encode(), **{"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:WEIGHTS])
            if len(body) > WEIGHTS:
                self.sending.set()
                self.released.wait()
                with suppress(ConnectionError):
                    self.wfile.write(body[WEIGHTS:])


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(nano: Path) -> Iterator[type[Hub]]:
    class OneHub(Hub):
        folder = nano
        requested: list[str] = []  # noqa: RUF012 # of this class alone
        sent_whole: list[str] = []  # noqa: RUF012
        uploaded: dict[str, bytes] = {}  # noqa: RUF012
        sending, released = threading.Event(), threading.Event()

    OneHub.released.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), OneHub) as server:
        OneHub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield OneHub
        OneHub.released.set()
        server.shutdown()


def start(address: str, folder: Path, *arguments: object, token: str = "") -> subprocess.Popen[str]:
    """Start the script with the hub at `address` and an empty cache, in a folder without checkpoints."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": token,
    }
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def downloads(hub: type[Hub]) -> list[str]:
    return [path.rsplit("/", 1)[1] for path in hub.requested if "/resolve/" in path]


def test_commands_take_a_hub_id(hub: type[Hub], nano: Path, tmp_path: Path) -> None:
    code, out, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--json"))
    assert code == 0, err
    assert json.loads(out)["bits_per_weight_in"] == 16
    assert not any(word in err for word in ("503", "Retrying", "Warning"))  # a repeated request is not reported
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()
    fetched = downloads(hub)
    assert "model.safetensors" in fetched
    assert "TRAINING.md" not in fetched  # a checkpoint does not need this file
    code, out, err = finish(start(hub.address, tmp_path, "inspect", REPOSITORY, "--json"))
    assert code == 0, err
    assert json.loads(out)["bits_per_weight"] == 16
    assert downloads(hub) == fetched  # all files were in the cache


@pytest.mark.parametrize("place", ["unknown", "unreachable"])
def test_a_repository_that_cannot_be_reached(place: str, hub: type[Hub], tmp_path: Path) -> None:
    address = hub.address if place == "unknown" else "http://127.0.0.1:9"
    code, out, err = finish(start(address, tmp_path, "quantize", "acme/unknown", tmp_path / "out"))
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("dbrx-q: error: acme/unknown: no such folder here, and the hub did not give a repository of that name")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_download(hub: type[Hub], tmp_path: Path) -> None:
    hub.released.clear()
    running = start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out")
    assert hub.sending.wait(60)
    running.send_signal(signal.SIGINT)
    code, out, err = finish(running)
    assert (code, out) == (2, "")
    assert err.count("dbrx-q: error: interrupted") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def many(small: Path, hub: type[Hub], tmp_path: Path) -> list[str]:
    """The names of the shards that the hub serves: one with the embedding and the head, then a shard for each of five layers."""
    config = DbrxConfig(
        d_model=64,
        n_heads=2,
        n_layers=5,
        max_seq_len=128,
        vocab_size=4096,
        attn_config={"kv_n_heads": 1},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        torch_dtype="bfloat16",
    )
    hub.folder = tmp_path / "served" / "dbrx-nano"
    write_checkpoint(config, hub.folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small / name, hub.folder / name)
    names = sorted(path.name for path in hub.folder.glob("*.safetensors"))
    assert len(names) == 6
    return names


def test_a_fallback_copy_is_fetched_on_request(small: Path, hub: type[Hub], tmp_path: Path) -> None:
    hub.folder = tmp_path / "served" / "dbrx-nano"
    for folder, fmt in ((hub.folder, "int8"), (hub.folder / FALLBACK_FOLDER, "int4")):
        formats = default_formats(DbrxConfig.from_pretrained(small), TensorFormat(fmt, 64))
        quantize_checkpoint(small, folder, QuantizationRequest(lambda _, formats=formats: formats))  # type: ignore[misc]
    [shard] = hub.folder.glob("*.safetensors")
    prompt = ("generate", REPOSITORY, "--prompt", "The", "--max-new-tokens", 2)
    code, _, err = finish(start(hub.address, tmp_path, *prompt))
    assert code == 0, err
    assert weights_sent(hub) == [shard.name]
    code, _, err = finish(start(hub.address, tmp_path, *prompt, "--ram", "1GiB", "--fallback"))
    assert code == 0, err
    assert weights_sent(hub) == [shard.name, f"{FALLBACK_FOLDER}/{shard.name}"]


def weights(folder: Path) -> dict[str, str]:
    return {path.name: _sum(path) for path in folder.glob("*.safetensors")}


def weights_sent(hub: type[Hub]) -> list[str]:
    return [name for name in hub.sent_whole if name.endswith(".safetensors")]


def test_shards_are_fetched_in_order_and_none_for_the_plan(hub: type[Hub], many: list[str], tmp_path: Path) -> None:
    code, out, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--dry-run", "--json"))
    assert code == 0, err
    assert not weights_sent(hub)
    sizes = [(hub.folder / name).stat().st_size for name in many]
    assert json.loads(out)["fetch"] == sum(sizes)
    plan = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--dry-run", "--low-disk", "--json"))[1]
    assert max(sizes) < json.loads(plan)["fetch_disk"] < sum(sizes)
    code, _, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out"))
    assert code == 0, err
    assert weights_sent(hub) == many
    quantize_checkpoint(hub.folder, tmp_path / "local", QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64))))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert f"base_model: {REPOSITORY}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("options", [(), ("--method", "awq", "--calibration", BOOK, "--sequences", 2, "--length", 64)])
def test_low_disk_deletes_shards_after_use(hub: type[Hub], many: list[str], tmp_path: Path, options: tuple[object, ...]) -> None:
    storage, most = tmp_path / "out.source", 0
    running = start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk", *options)
    while running.poll() is None:
        most = max(most, len(list(storage.glob("*.safetensors"))))
        time.sleep(0.002)
    code, _, err = finish(running)
    assert code == 0, err
    assert 1 <= most <= 4  # the first shard, that of the layer being written, that of the layer being read, and one fetched ahead
    assert weights_sent(hub) == many
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "served"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    code, _, err = finish(start(hub.address, tmp_path, "quantize", hub.folder, tmp_path / "local", *options))
    assert code == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_low_disk_resumes_with_the_missing_shards(hub: type[Hub], many: list[str], tmp_path: Path) -> None:
    hub.fails = many[4]
    code, out, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk"))
    assert (code, out) == (2, "")
    assert f"the hub must give {many[4]}" in err
    assert "--resume continues" in err
    assert "Traceback" not in err
    hub.fails = ""
    before = len(weights_sent(hub))
    code, _, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk", "--resume"))
    assert code == 0, err
    assert weights_sent(hub)[before:] == many[4:]
    assert not (tmp_path / "out.source").exists()
    quantize_checkpoint(hub.folder, tmp_path / "local", QuantizationRequest(lambda c: default_formats(c.config, TensorFormat("int4", 64))))
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_low_disk_keeps_a_folder_of_another_program(hub: type[Hub], many: list[str], tmp_path: Path) -> None:
    foreign = tmp_path / "out.source" / many[0]
    foreign.parent.mkdir()
    foreign.write_text("mine")
    code, out, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--low-disk"))
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


def test_push_uploads_every_file(hub: type[Hub], nano: Path, tmp_path: Path) -> None:
    code, _, err = finish(start(hub.address, tmp_path, "quantize", nano, tmp_path / "out", "--push", PUSHED, token=TOKEN))
    assert code == 0, err
    assert f"{PUSHED}/commit/{COMMIT}" in err
    assert hub.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert f"# {PUSHED}" in (tmp_path / "out" / "README.md").read_text()
    code, _, err = finish(start(hub.address, tmp_path, "verify", tmp_path / "out"))
    assert code == 0, err


def test_a_failed_push_leaves_the_result_and_can_be_repeated(hub: type[Hub], nano: Path, tmp_path: Path) -> None:
    hub.fails = f"/api/models/{PUSHED}/commit/main"
    command = ("quantize", nano, tmp_path / "out", "--push", PUSHED)
    code, _, err = finish(start(hub.address, tmp_path, *command, token=TOKEN))
    assert code == 2
    assert f"complete, but pushing it to {PUSHED} failed" in err
    assert "Traceback" not in err
    hub.fails = ""
    code, _, err = finish(start(hub.address, tmp_path, *command, "--resume", token=TOKEN))
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
    hub: type[Hub], nano: Path, tmp_path: Path, repository: str, token: str, message: str
) -> None:
    code, out, err = finish(start(hub.address, tmp_path, "quantize", nano, tmp_path / "out", "--push", repository, token=token))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out*"))
