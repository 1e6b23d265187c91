"""Hub ids: the hub's own client against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

SCRIPT = Path(sys.executable).with_name("dbrx-q")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "acme/dbrx-nano"
WEIGHTS = 1 << 20  # bytes that only the weights exceed


class Hub(BaseHTTPRequestHandler):
    """Serves one folder as one repository."""

    folder: Path
    asked: list[str]
    address: str
    begun: threading.Event  # the weights are on their way
    released: threading.Event  # they may arrive

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        files = {file.name: file for file in self.folder.iterdir()}
        if path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/") and self.asked.count(path) == 1:
            self._reply(503, b"busy; ask again")
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": _sum(file)} for name, file in files.items()]
            self._json(entries)
        elif path.startswith(f"/{REPOSITORY}/resolve/") and (file := files.get(path.rsplit("/", 1)[1])):
            self._reply(200, file.read_bytes(), **{"ETag": f'"{_sum(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self._reply(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    do_HEAD = do_GET  # noqa: N815 # http.server calls it so

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on the tests' stderr."""

    def _json(self, data: object) -> None:
        self._reply(200, json.dumps(data).encode(), **{"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:WEIGHTS])
            if len(body) > WEIGHTS:
                self.begun.set()
                self.released.wait()
                with suppress(ConnectionError):
                    self.wfile.write(body[WEIGHTS:])


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(nano: Path) -> Iterator[type[Hub]]:
    class OneHub(Hub):
        folder = nano
        asked: list[str] = []  # noqa: RUF012 # of this class alone
        begun, released = threading.Event(), threading.Event()

    OneHub.released.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), OneHub) as server:
        OneHub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield OneHub
        OneHub.released.set()
        server.shutdown()


def start(address: str, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """The script with the hub at `address` and an empty cache, in a folder without checkpoints."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
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
    return [path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path]


def test_commands_take_a_hub_id(hub: type[Hub], nano: Path, tmp_path: Path) -> None:
    code, out, err = finish(start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out", "--json"))
    assert code == 0, err
    assert json.loads(out)["bits_per_weight_in"] == 16
    assert not any(word in err for word in ("503", "Retrying", "Warning"))  # that a request was repeated is nobody's business
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()
    fetched = downloads(hub)
    assert "model.safetensors" in fetched
    assert "TRAINING.md" not in fetched  # not a file that a checkpoint needs
    code, out, err = finish(start(hub.address, tmp_path, "inspect", REPOSITORY, "--json"))
    assert code == 0, err
    assert json.loads(out)["bits_per_weight"] == 16
    assert downloads(hub) == fetched  # the cache had it all


@pytest.mark.parametrize("place", ["unknown", "unreachable"])
def test_a_repository_that_is_not_there(place: str, hub: type[Hub], tmp_path: Path) -> None:
    address = hub.address if place == "unknown" else "http://127.0.0.1:9"
    code, out, err = finish(start(address, tmp_path, "quantize", "acme/unknown", tmp_path / "out"))
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("dbrx-q: error: acme/unknown: no such folder here, and the hub did not give a repository of that name")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_download(hub: type[Hub], tmp_path: Path) -> None:
    hub.released.clear()
    running = start(hub.address, tmp_path, "quantize", REPOSITORY, tmp_path / "out")
    assert hub.begun.wait(60)
    running.send_signal(signal.SIGINT)
    code, out, err = finish(running)
    assert (code, out) == (2, "")
    assert err.count("dbrx-q: error: interrupted") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.glob("out*"))
