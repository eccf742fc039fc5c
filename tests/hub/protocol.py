"""The Hub's answers, endpoint by endpoint, as huggingface_hub 2 uses them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlparse

from tests.hub.metadata import card_errors
from tests.hub.repos import Blob, Repo

if TYPE_CHECKING:
    from tests.hub.server import HubServer

DATE = "2026-01-01T00:00:00.000Z"
LARGE = 20_000
"""Bytes from which a file is stored apart (LFS), beside all weights."""

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self) -> None:
        """Route the request, after the fault that is due for it."""
        self.where = urlparse(self.path)
        path = unquote(self.where.path)
        self.server.requests.append((self.command, path))
        fault = self.server.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.drop_after is not None and not fault.after:
            self.count(path, len(self.rfile.read(min(length, fault.drop_after))))
            self.hang_up()
            return
        self.body = self.rfile.read(length)
        self.count(path, len(self.body))
        if fault and not fault.after:
            shown = fault.message.replace("{authorization}", self.headers.get("Authorization", ""))
            self.answer(fault.status, {"error": shown}, {"X-Error-Message": shown, **fault.headers})
            return
        status, content, *more = self.route(path)
        if fault:
            self.hang_up()
            return
        self.answer(status, content, more[0] if more else {})

    def count(self, path: str, size: int) -> None:
        with self.server.lock:
            self.server.sent[path] = self.server.sent.get(path, 0) + size

    def hang_up(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def route(self, path: str) -> Answer:
        """Find what serves a path. Everything runs under one lock."""
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("PUT", r"/store/([0-9a-f]{64})", self.put),
            ("POST", r"/store/([0-9a-f]{64})/complete", self.complete),
            ("GET HEAD", r"/store/([0-9a-f]{64})", self.fetch),
            ("GET HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.resolve),
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", self.validate),
            ("POST", r"/api/repos/create", self.create),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)", self.info),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)/revision/(.+)", self.info),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)/refs", self.refs),
            ("GET", r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)(?:/(.+))?", self.tree),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", self.preupload),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", self.commit),
            ("POST", r"/api/models/([\w.-]+/[\w.-]+)/tag/(.+)", self.tag),
            ("DELETE", r"/api/models/([\w.-]+/[\w.-]+)/tag/(.+)", self.untag),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            ("POST", r"/verify", self.verify),
            ("POST", r"/api/collections", self.collect),
            ("GET", r"/api/collections/(.+)", self.collection),
            ("POST", r"/api/collections/(.+)/items", self.add),
        ]
        for methods, pattern, serve in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                with self.server.lock:
                    return serve(*match.groups())
        return 404, {"error": f"no such endpoint: {path}"}

    def repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        return repo if repo and (not repo.private or self.allowed) else None

    def missing(self, what: str = "Repo") -> Answer:
        return 404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"}

    def denied(self, namespace: str) -> Answer | None:
        if not self.allowed:
            return 401, {"error": "Invalid username or password."}
        if namespace not in ("ada", "acme"):
            return 403, {"error": f"You don't have the rights to create a model under {namespace!r}"}
        return None

    # accounts and cards

    def whoami(self) -> Answer:
        if not self.allowed:
            return 401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
        token = {"displayName": "test", "role": self.server.role}
        return 200, {
            "type": "user",
            "name": "ada",
            "orgs": [{"name": "acme"}],
            "auth": {"accessToken": token},
        }

    def validate(self) -> Answer:
        asked = self.json()
        errors = card_errors(asked["content"])
        if errors:
            return 400, {"error": "; ".join(errors), "errors": [{"message": error} for error in errors]}
        return 200, {"errors": [], "warnings": []}

    # repositories

    def create(self) -> Answer:
        asked = self.json()
        name = f"{asked['organization']}/{asked['name']}"
        if denied := self.denied(asked["organization"]):
            return denied
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return 200, {"url": f"{self.server.url}/{name}", "name": name}

    def info(self, name: str, revision: str = "main") -> Answer:
        repo = self.repo(name)
        if repo is None:
            return self.missing()
        sha = repo.find(revision)
        if sha is None:
            return self.missing("Revision")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        facts = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings}
        return 200, {**facts, "tags": [], "lastModified": DATE, "createdAt": DATE, "downloads": 0}

    def refs(self, name: str) -> Answer:
        repo = self.repo(name)
        if repo is None:
            return self.missing()

        def listed(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in found.items()]

        return 200, {
            "branches": listed("heads", repo.branches),
            "tags": listed("tags", repo.tags),
            "converts": [],
        }

    def tree(self, name: str, revision: str, folder: str | None = None) -> Answer:
        repo = self.repo(name)
        sha = repo.find(revision) if repo else None
        if repo is None or sha is None:
            return self.missing("Revision" if repo else "Repo")
        entries = []
        for path, blob in sorted(repo.commits[sha].items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            if blob.large:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
            entries.append(entry)
        return 200, entries

    def preupload(self, name: str, revision: str) -> Answer:
        repo = self.repo(name)
        if repo is None:
            return self.missing()
        if not self.allowed:
            return 401, {"error": "Unauthorized"}
        there = repo.commits[repo.branches[revision]]
        files = []
        for file in self.json()["files"]:
            path = file["path"]
            large = path.endswith((".safetensors", ".png")) or file["size"] >= LARGE
            oid = there[path].oid if path in there else None
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def commit(self, name: str, revision: str) -> Answer:
        repo = self.repo(name)
        if repo is None:
            return self.missing()
        if not self.allowed:
            return 401, {"error": "Unauthorized"}
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, title = dict(repo.commits[repo.branches[revision]]), ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, repo.branches[revision]):
                        return 412, {"error": "A commit has happened since. Please refresh and try again."}
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.server.store:
                        return 400, {"error": f"{value['path']}: its content was never uploaded"}
                    files[value["path"]] = Blob(self.server.store[value["oid"]], True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return 404, {"error": "A file with this name doesn't exist"}
        sha = repo.commit(files, title, revision)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}

    def tag(self, name: str, revision: str) -> Answer:
        repo, tag = self.repo(name), self.json()["tag"]
        if repo is None:
            return self.missing()
        sha = repo.find(revision)
        if sha is None:
            return self.missing("Revision")
        if tag in repo.tags:
            return 409, {"error": "Tag reference exists already"}
        repo.tags[tag] = sha
        return 200, {}

    def untag(self, name: str, tag: str) -> Answer:
        repo = self.repo(name)
        if repo is None or repo.tags.pop(tag, None) is None:
            return self.missing("Revision")
        return 200, {}

    # contents

    def batch(self, name: str) -> Answer:
        if not self.allowed:
            return 401, {"error": "Unauthorized"}
        objects = []
        for wanted in self.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.store:
                href, header = f"{self.server.cdn}/store/{oid}?X-Amz-Signature=signed", {}
                if self.server.part and size > self.server.part:
                    count = -(-size // self.server.part)
                    header = {str(n + 1): f"{href}&part={n + 1}" for n in range(count)}
                    header["chunk_size"] = str(self.server.part)
                    href = f"{self.server.url}/store/{oid}/complete"
                upload = {"href": href, "header": header}
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}
            objects.append(found)
        return 200, {"transfer": "multipart" if self.server.part else "basic", "objects": objects}

    def put(self, oid: str) -> Answer:
        assert "Authorization" not in self.headers, "a token went to the store"
        part = parse_qs(self.where.query).get("part")
        if part:
            self.server.parts.setdefault(oid, {})[int(part[0])] = self.body
        elif hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "other content than announced"}
        else:
            self.server.store[oid] = self.body
        return 200, {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def complete(self, oid: str) -> Answer:
        parts = self.server.parts.pop(oid, {})
        data = b"".join(parts[part["partNumber"]] for part in self.json()["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            return 400, {"error": "other content than announced"}
        self.server.store[oid] = data
        return 200, {}

    def verify(self) -> Answer:
        asked = self.json()
        good = len(self.server.store.get(asked["oid"], b"")) == asked["size"]
        return (200, {}) if good else (404, {"error": "not there"})

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        repo = self.repo(name)
        if repo is None:
            return self.missing()
        sha = repo.find(revision)
        if sha is None:
            return self.missing("Revision")
        headers = {"X-Repo-Commit": sha}
        blob = repo.commits[sha].get(path)
        if blob is None:
            return 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
        if not blob.large:
            return self.ranged(blob.data, {**headers, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        return 302, b"", {**headers, **linked, "Location": f"{self.server.cdn}/store/{blob.oid}"}

    def fetch(self, oid: str) -> Answer:
        assert "Authorization" not in self.headers, "a token went to the store"
        if oid not in self.server.store:
            return 404, {"error": "not there"}
        return self.ranged(self.server.store[oid], {"ETag": f'"{oid}"'})

    def ranged(self, data: bytes, headers: dict[str, str]) -> Answer:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        if match is None:
            return 200, data, headers
        start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
        return 206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    # collections

    def collect(self) -> Answer:
        asked = self.json()
        if denied := self.denied(asked["namespace"]):
            return denied
        words = re.sub(r"\W+", "-", asked["title"].lower()).strip("-")
        slug = f"{asked['namespace']}/{words}-{hashlib.md5(words.encode()).hexdigest()[:24]}"
        if slug in self.server.collections:
            return 409, {"error": "a collection of that title exists already", "slug": slug}
        self.server.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"], "type": "org"},
            "items": [], "lastUpdated": DATE, "position": 0, "private": bool(asked.get("private")),
            "theme": "blue", "upvotes": 0, "gating": False, "shareUrl": "", "isUpvotedByUser": False,
        }  # fmt: skip
        return 200, self.server.collections[slug]

    def collection(self, slug: str) -> Answer:
        found = self.server.collections.get(slug)
        return (200, found) if found else self.missing()

    def add(self, slug: str) -> Answer:
        found, item = self.server.collections[slug], self.json()["item"]
        if any(there["id"] == item["id"] for there in found["items"]):
            return 409, {"error": "already in the collection"}
        entry = {"_id": str(len(found["items"])), "id": item["id"], "type": item["type"], "repoType": "model"}
        found["items"].append({**entry, "position": len(found["items"])})
        return 200, found
