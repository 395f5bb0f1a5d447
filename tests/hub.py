"""A hub of models on this machine, for tests: the few answers that huggingface_hub needs, and what it asked for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the folders `models` by name, and `gated` names to nobody; `asked` has a line for each request."""

    def __init__(self, models: dict[str, Path], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.models, self.gated, self.asked = models, gated, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """The files whose content was sent."""
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET ") and "/resolve/" in line}


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {place}")
        parts = place.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.server.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
        elif name not in self.server.models:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif place.startswith("api/models/"):
            self._tell(name, rest)
        elif rest[:1] == ["resolve"] and (self.server.models[name] / "/".join(rest[2:])).is_file():
            content = (self.server.models[name] / "/".join(rest[2:])).read_bytes()
            self._send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self._refuse(404, "EntryNotFound", "Entry not found")

    def _tell(self, name: str, rest: list[str]) -> None:
        files = {file.name: file.stat().st_size for file in self.server.models[name].iterdir()}
        if rest[:1] == ["tree"]:
            inside = "/".join(rest[2:])
            told = [{"type": "file", "path": file, "size": size, "oid": COMMIT} for file, size in files.items()]
            self._send(200, json.dumps([] if inside else told).encode(), **{"Content-Type": "application/json"})
            return
        told = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": False, "tags": []}
        told["siblings"] = [{"rfilename": file} for file in files]
        self._send(200, json.dumps(told).encode(), **{"Content-Type": "application/json"})

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._send(code, b"", **{"X-Error-Code": kind, "X-Error-Message": message})

    def _send(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def hub(models: dict[str, Path], *, gated: set[str] = frozenset()) -> Iterator[Hub]:
    """A hub that is there as long as the block."""
    server = Hub(models, gated)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
