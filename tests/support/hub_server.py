"""A hub on loopback that takes what is pushed: the routes of the Hugging Face hub's HTTP API that
huggingface_hub 2 calls for a commit without xet, and nothing else. It keeps every byte, commit by commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    """Names of the files that came as large ones."""
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    """Their messages."""

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()

    def digest_of(self, name: str) -> str:
        """As the hub names a file's content: SHA-256 of a large one, git's own of another."""
        content = self.files[name]
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Use as a context manager, by `serve_hub`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: list[str] = []
        """Digests of the large files in the order that their bytes came."""
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Every request."""


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self) -> None:
        """Bytes of a large file."""
        self.server.asked.append(f"PUT {self.path}")
        content = self._read_body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.stored[digest] = content
        self.server.uploads.append(digest)
        self._send(200, {})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._send(200, {"objects": list(map(self._place_of, json.loads(body)["objects"]))})
        else:
            self._answer_of_model(path.removeprefix("/api/models/"), body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            self._send(403, {"error": "You have no right to write there"})
            return
        there = name in self.server.repositories
        if not there:
            self.server.repositories[name] = Repository(asked["visibility"] == "private")
        self._send(409 if there else 200, {"url": f"{self.server.url}/{name}"})

    def _place_of(self, large: dict[str, Any]) -> dict[str, Any]:
        """Where the bytes of a large file go; nowhere where they are here."""
        if large["oid"] in self.server.stored:
            return large
        return {**large, "actions": {"upload": {"href": f"{self.server.url}/large/{large['oid']}"}}}

    def _answer_of_model(self, path: str, body: bytes) -> None:
        owner, name, *action = path.split("/")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            self._send(404, {"error": "Repository not found"})
        elif not action or action[0] == "revision":
            siblings = [{"rfilename": file} for file in repository.files]
            info = {"id": f"{owner}/{name}", "sha": repository.head, "private": repository.private}
            self._send(200, {**info, "siblings": siblings})
        elif action == ["preupload", "main"]:
            files = [_mode_of(repository, asked["path"]) for asked in json.loads(body)["files"]]
            self._send(200, {"files": files})
        elif action == ["commit", "main"]:
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            url = f"{self.server.url}/{owner}/{name}/commit/{repository.head}"
            self._send(200, {"commitUrl": url, "commitOid": repository.head})
        else:
            self._send(404, {"error": f"no such route: {path}"})

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.stored[value["oid"]]
                repository.large.add(value["path"])
            else:
                assert line["key"] == "deletedFile"
                del repository.files[value["path"]]

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _mode_of(repository: Repository, path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    known = {"oid": repository.digest_of(path)} if path in repository.files else {}
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}
