"""A small hub on this machine, for tests of hub ids with the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from dbrx_q import DbrxConfig
from dbrx_q.eval.bench.synthetic import write_checkpoint

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
    busy_once: bool = True
    """Whether the first request for the list of files is answered with an error that the client repeats after a second."""
    ranges: str = ""
    """How range requests are answered: "ignored" (the whole file), "compressed" (named so), "endless" (more than was asked for)."""
    encodings: set[str]
    """What range requests accepted as an encoding."""
    cut_short: threading.Event
    """Set when a client closes the connection of an endless answer."""
    missing_revision: str = ""
    """A revision that the repository does not have."""
    address: str
    """The hub's URL."""
    sending: threading.Event
    """Set when the hub begins to send weights."""
    released: threading.Event
    """Set when it may send the rest of them."""

    @classmethod
    def start(cls, folder: Path, *arguments: object, token: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start the script with this hub and a cache in `folder`, in which it runs and which holds no checkpoints."""
        settings = {
            "HF_ENDPOINT": cls.address,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "HF_TOKEN": token,
        }
        command = [str(SCRIPT), *map(str, arguments)]
        everything = os.environ | settings | environment
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=everything, cwd=folder)

    @staticmethod
    def output_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Wait for a started script: (exit code, stdout, stderr)."""
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, out, err

    @classmethod
    def run(cls, folder: Path, *arguments: object, **settings: str) -> tuple[int, str, str]:
        """`output_of` what `start` started."""
        return cls.output_of(cls.start(folder, *arguments, **settings))

    @classmethod
    def downloads(cls) -> list[str]:
        """Names of the files that were asked for."""
        return [path.rsplit("/", 1)[1] for path in cls.requested if "/resolve/" in path]

    @classmethod
    def weights_sent(cls) -> list[str]:
        """Names of the shards that were sent from the first byte to the last."""
        return [name for name in cls.sent_whole if name.endswith(".safetensors")]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.requested.append(path)
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path == f"/api/models/{REPOSITORY}/revision/{self.missing_revision}":
            self._reply(404, b"{}", **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/") and self.busy_once and self.requested.count(path) == 1:
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
            self.encodings.add(self.headers.get("Accept-Encoding", ""))
            if self.ranges == "ignored":
                self._reply(200, data, **headers)
                return
            if self.ranges == "compressed":
                self._reply(206, part, **headers | {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}", "Content-Encoding": "gzip"})
                return
            if self.ranges == "endless":
                self._endless(part, first)
                return
            self._reply(206, part, **headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})
            return
        if self.command == "GET" and file.name == self.fails:
            self._reply(500, b"broken")
            return
        if self.command == "GET":
            self.sent_whole.append(file.relative_to(self.folder).as_posix())
        self._reply(200, data, **headers)

    def _endless(self, part: bytes, first: int) -> None:
        """Answer a range request with its bytes and then with more, until the client closes the connection."""
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/*")
        self.end_headers()
        try:
            self.wfile.write(part)
            for _ in range(1 << 12):  # 4 GiB
                self.wfile.write(bytes(1 << 20))
        except ConnectionError:
            self.cut_short.set()

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
        encodings: set[str] = set()  # noqa: RUF012
        sending, released, cut_short = threading.Event(), threading.Event(), threading.Event()

    OneHub.released.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), OneHub) as server:
        OneHub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield OneHub
        OneHub.released.set()
        server.shutdown()


@pytest.fixture
def client(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point the hub's client of this process to the hub and an empty cache; returns a function that makes the hub unreachable."""

    def ask(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")

    def disconnect(how: str) -> None:
        ask("http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")

    hub.busy_once = False
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ask(hub.address)
    return disconnect


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
