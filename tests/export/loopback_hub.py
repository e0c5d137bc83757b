"""A Hub small enough to run in a test: repositories, LFS, commits, tokens, and failures on demand.

It answers the requests that huggingface_hub 2.4 makes for a push, and remembers them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE_BYTES = 4096
"""Files from this size on go through LFS, as on the Hub all safetensors do."""
TOKENS = {"hf_writer": 200, "hf_reader": 403}
"""Token → state of a request that writes."""


@dataclass
class Repository:
    """One model repository."""

    private: bool
    """Whether only its owner sees it."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path → content, as of the last commit."""
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    """Commit ids, oldest first."""
    ignored: tuple[str, ...] = ()
    """Paths that a .gitignore keeps out."""


@dataclass
class Failure:
    """A failure to come."""

    path: str
    """Regular expression of the request's method and path."""
    state: int | None
    """HTTP state; None cuts the connection."""
    times: int
    """How often."""
    after: bool = False
    """Whether the request is carried out before the failure, as when an answer is lost."""


class Hub:
    """The state of all repositories, and the server in front of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, path: str, state: int | None, times: int = 1, after: bool = False) -> None:
        """Makes the next requests that match fail."""
        self.failures.append(Failure(path, state, times, after))

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, counted, checked, perhaps failed, answered."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if handler.headers.get("Transfer-Encoding") == "chunked":
            body = read_chunks(handler)
        path = handler.path.partition("?")[0]
        request = f"{handler.command} {path}"
        self.requests.append(request)
        failure = next((one for one in self.failures if one.times and re.fullmatch(one.path, request)), None)
        if failure:
            failure.times -= 1
            if failure.after:
                self.route(handler, request, body)
            if failure.state is None:
                handler.connection.close()
            else:
                respond(handler, failure.state, {"error": "on demand"})
            return
        respond(handler, *self.route(handler, request, body))

    def route(self, handler: BaseHTTPRequestHandler, request: str, body: bytes) -> tuple[int, Any]:
        """State and JSON of the answer."""
        token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        upload = re.fullmatch(r"PUT /lfs/(\w+)", request)
        if upload:
            self.objects[upload[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == upload[1] else (400, {"error": "wrong hash"})
        if token not in TOKENS:
            return 401, {"error": "Invalid credentials in Authorization header"}
        routes: dict[str, Callable[..., tuple[int, Any]]] = {
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": lambda data: (200, {"errors": [], "warnings": []}),
            r"GET /api/models/([\w.-]+/[\w.-]+)": self.info,
            r"POST /api/models/([\w.-]+/[\w.-]+)/preupload/main": self.preupload,
            r"POST /([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch": self.batch,
            r"POST /api/models/([\w.-]+/[\w.-]+)/commit/main": self.commit,
        }
        for pattern, function in routes.items():
            match = re.fullmatch(pattern, request)
            if match and handler.command == "POST" and "validate" not in pattern and TOKENS[token] != 200:
                return TOKENS[token], {"error": "You don't have the rights"}
            if match:
                return function(*match.groups(), body)
        return 404, {"error": f"no route for {request}"}

    def create(self, body: bytes) -> tuple[int, Any]:
        """A new repository; 409 if it is there."""
        fields = json.loads(body)
        name = f"{fields['organization']}/{fields['name']}"
        url = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return 409, {**url, "error": "You already created this model repo"}
        self.repositories[name] = Repository(private=fields.get("visibility") == "private")
        return 200, url

    def info(self, name: str, body: bytes) -> tuple[int, Any]:
        """What `model_info(files_metadata=True)` reads."""
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        files = [describe(path, content) for path, content in repository.files.items()]
        return 200, {"id": name, "private": repository.private, "sha": repository.commits[-1], "siblings": files}

    def preupload(self, name: str, body: bytes) -> tuple[int, Any]:
        """Which files go through LFS."""
        repository = self.repositories[name]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular",
                "shouldIgnore": file["path"] in repository.ignored,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def batch(self, name: str, body: bytes) -> tuple[int, Any]:
        """Where to upload the objects that are not there yet."""
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.objects:
                one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        """All operations of one commit, or none."""
        repository = self.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit") not in (None, repository.commits[-1]):
            return 412, {"error": "A commit has happened since"}
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(hashlib.sha1(body).hexdigest())
        return 200, {"commitUrl": f"{self.url}/{name}/commit/x", "commitOid": repository.commits[-1]}


def describe(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
    if len(content) >= LARGE_BYTES:
        file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return file


def read_chunks(handler: BaseHTTPRequestHandler) -> bytes:
    """A body sent in chunks."""
    body = b""
    while size := int(handler.rfile.readline().strip(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def respond(handler: BaseHTTPRequestHandler, state: int, value: Any) -> None:
    """An answer in JSON."""
    data = json.dumps(value).encode()
    handler.send_response(state)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def running_hub():
    """A Hub on a free port of this machine."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
