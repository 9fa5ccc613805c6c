"""The part of the Hugging Face hub's HTTP interface that uploads go through, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

WRITER, READER = "hf_writer", "hf_reader"
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    """A repository: whether it is private, its files by branch, and the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """What a hub holds, and how it fails.

    repositories: by id.
    stored: large files by digest.
    requests: the method and path of every request.
    refuse: a part of a path -> the status of every answer to such requests, and what it says.
    ignored: files that a .gitignore on the hub names.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and the content of the answer to a request."""
        self.requests.append(f"{method} {path}")
        for part, (status, said) in self.refuse.items():
            if part in path:
                return status, {"error": said}
        if path.startswith("/large/"):
            digest = path.removeprefix("/large/")
            assert hashlib.sha256(body).hexdigest() == digest
            self.stored[digest] = body
            return 200, {}
        if token not in (WRITER, READER):
            return 401, {"error": "Invalid username or password."}
        if token == READER and method != "GET" and "validate" not in path:
            return 403, {"error": "You don't have the rights to create a model here"}
        content = json.loads(body) if body and "/commit/" not in path else {}
        return self._route(method, path, content, body)

    def _route(self, method: str, path: str, content: Any, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(content)
        if path == "/api/validate-yaml":
            return _validated(content["content"])
        if path == "/verified":
            return 200, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self._large(each) for each in content["objects"]]}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/?]+))?", path)
        if match is None or match[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of_model(self.repositories[match[1]], match[1], match[2], match[3], content, body)

    def _create(self, content: Any) -> tuple[int, Any]:
        name = f"{content['organization']}/{content['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository(content.get("visibility") != "public")
        return 200, {"url": f"{self.url}/{name}"}

    def _large(self, wanted: Any) -> Any:
        upload = {"href": f"{self.url}/large/{wanted['oid']}"}
        return wanted | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verified"}}}

    def _of_model(
        self, repository: Repository, name: str, what: str | None, revision: str, content: Any, body: bytes
    ) -> tuple[int, Any]:
        if what is None:
            siblings = [{"rfilename": file} for file in repository.branches["main"]]
            return 200, {"id": name, "private": repository.private, "siblings": siblings, "tags": []}
        if what == "branch":
            taken = revision in repository.branches
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            return (409, {"error": "Reference already exists"}) if taken else (200, {})
        if what == "tree":
            files = repository.branches[repository.messages[-1].partition(": ")[0]]
            return 200, [{"type": "file", "path": file, "size": len(files[file]), "oid": "0"} for file in files]
        if revision not in repository.branches:
            return 404, {"error": "Invalid rev id"}
        if what == "preupload":
            return 200, {"files": [self._mode(each["path"]) for each in content["files"]]}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(f"{revision}: {value['summary']}")
            elif line["key"] == "file":
                repository.branches[revision][value["path"]] = base64.b64decode(value["content"])
            else:
                repository.branches[revision][value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40}

    def _mode(self, path: str) -> Any:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.ignored}


def _validated(card: str) -> tuple[int, Any]:
    front = yaml.safe_load(card.split("---\n")[1])
    wrong = [name for name in front.get("base_model", []) if not _MODEL_ID.fullmatch(name)]
    errors = [{"message": f'"base_model" with value "{name}" is not valid.'} for name in wrong]
    return (400 if errors else 200), {"errors": errors, "warnings": []}


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers while the block runs."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            size = self.headers.get("Content-Length")
            body = self.rfile.read(int(size)) if size else self._chunks()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, content = hub.answer(self.command, self.path.partition("?")[0], token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunks(self) -> bytes:
            body = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
