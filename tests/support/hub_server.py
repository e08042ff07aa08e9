"""A small server that speaks the endpoints of the Hub which huggingface_hub uses, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


if TYPE_CHECKING:
    from collections.abc import Iterator


WRITE, READ = "hf_write", "hf_read"
OWNER = "user"


@dataclass
class Repository:
    """Commits (files by path) and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit to a branch; return its hash."""
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode(), usedforsecurity=False).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch or a hash names."""
        revision = unquote(revision)
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds, what it was asked, and what it shall refuse."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    # Pattern of "METHOD path" -> statuses to answer with, one after the other.
    failures: dict[str, list[int]] = field(default_factory=dict)
    lfs_patterns: str = r".*\.safetensors"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Send an answer; anything but bytes as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        """Read the request's content, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        """Find the endpoint."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self.body()
        line = f"{self.command} {url.path}"
        self.hub.requests.append(line)
        for pattern, statuses in self.hub.failures.items():
            if statuses and re.search(pattern, line):
                return self.answer(statuses.pop(0), {"error": "as the test asked"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command not in ("GET", "HEAD") and not re.search(r"/lfs-store/", line):
            if token not in (WRITE, READ):
                return self.answer(401, {"error": "Invalid username or password."})
            if (
                token != WRITE
                and self.query.get("create_pr") != ["1"]
                and not re.search("preupload|validate-yaml|info/lfs", line)
            ):
                return self.answer(403, {"error": "You have read access but not write access."})
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return method(self, body, *found.groups())
        return self.answer(404, {"error": f"no endpoint {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repository(self, name: str) -> Repository | None:
        """Return a repository the sender may see, or answer 404."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.headers.get("Authorization")):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        made = self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        made.commit("main", {".gitattributes": b""}, "initial commit")
        return self.answer(200, url)

    def validate(self, body: bytes) -> None:
        wanted = json.loads(body)
        card = ModelCard(wanted["content"])
        errors = [] if card.data.to_dict() else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        found = self.repository(name)
        if found is None:
            return None
        if branch in found.branches:
            return self.answer(409, {"error": "Reference already exists"})
        found.branches[branch] = found.branches["main"]
        return self.answer(200, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self.repository(name)
        if found is None:
            return None
        oid = found.find(revision or "main")
        if oid is None:
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": path} for path in found.commits[oid]]
        return self.answer(200, {"id": name, "sha": oid, "private": found.private, "siblings": files, "tags": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if re.fullmatch(self.hub.lfs_patterns, path) else "regular"

        files = [
            {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs-store/{wanted['oid']}"}}
            objects.append({**wanted} if wanted["oid"] in self.hub.blobs else {**wanted, "actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong hash"})
        self.hub.blobs[oid] = body
        return self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        found = self.repository(name)
        if found is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        branch = unquote(revision)
        if header.get("parentCommit") not in (None, found.find(branch)):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(found.commits[found.find(branch) or ""])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del files[value["path"]]
        answer: dict[str, Any] = {}
        if self.query.get("create_pr") == ["1"]:
            found.pull_requests += 1
            branch = f"refs/pr/{found.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{found.pull_requests}"
        oid = found.commit(branch, files, header["summary"])
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **answer})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.repository(name)
        if found is not None:
            files = found.commits[found.find(revision) or ""]
            self.answer(
                200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
            )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.repository(name)
        if found is None:
            return None
        oid = found.find(revision)
        if oid is None:
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        content = found.commits[oid].get(unquote(path))
        headers = {"X-Repo-Commit": oid}
        if content is None:
            return self.answer(404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"})
        return self.answer(200, content, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"POST /api/(?:models|spaces)/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/(?:models|spaces)/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs-store/(\w+)", _Handler.store),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
