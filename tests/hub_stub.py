"""A hub on 127.0.0.1 for tests: the requests that `huggingface_hub` makes to create, commit, list and download,
answered from memory.

    with serve(monkeypatch, tmp_path) as hub:        # HF_ENDPOINT, the cache and the token are set to it
        hub.add("someone/adapter", {"adapter_config.json": b"..."})

`hub.log` has every request as "METHOD path"; `hub.bodies` what was posted; `hub.fail["/api/repos/create"] = 500` fails
a path. Repositories that are private, and everything that writes, ask for the token. Files ending as .gitattributes has
them go through LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stub_token_of_someone"
LARGE = (".safetensors", ".gguf", ".bin", ".pt")


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    granted: bool = True  # access, to the token, if it is gated
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Hub:
    """What the server knows, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    log: list[str] = field(default_factory=list)
    bodies: list[tuple[str, bytes]] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)  # path's beginning -> status

    def add(self, name: str, files: dict[str, bytes], branch: str = "main", **options: bool) -> str:
        made = self.repositories.setdefault(name, Repository(**options))
        return made.commit(branch, files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[name].at(revision)
        assert found is not None
        return found[1]

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        return sorted(
            {
                line.split("/resolve/")[1].split("/", 1)[1]
                for line in self.log
                if line.startswith("GET") and "/resolve/" in line
            }
        )


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    # ------------------------------------------------------------------------------------------ answers

    def say(
        self, status: int, body: object = None, headers: dict[str, str] | None = None, content: bytes | None = None
    ) -> None:
        data = json.dumps(body).encode() if content is None else content
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.say(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code})

    # ------------------------------------------------------------------------------------------ requests

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        self.hub.log.append(f"{self.command} {unquote(path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if body:
            self.hub.bodies.append((path, body))
        status = next((status for start, status in self.hub.fail.items() if path.startswith(start)), None)
        if status is not None:
            return self.refuse(status, message="the stub was told to fail")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN) and not path.startswith("/lfs/"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path.startswith("/lfs/"):
            return self.lfs(path, body)
        if path == "/api/validate-yaml":
            return self.say(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body), token)
        if "/resolve/" in path:
            return self.resolve(path, token)
        if path.startswith("/api/models/"):
            return self.model(path.removeprefix("/api/models/").split("/"), body, token)
        return self.refuse(404, message=f"the stub knows no {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def repository(self, name: str, token: str | None) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and token != TOKEN):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated and (token is None or not found.granted):
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
            return None
        return found

    def create(self, asked: dict, token: str | None) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if token != TOKEN:
            return self.refuse(401, message="Invalid username or password.")
        if not name.startswith("someone/"):
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self.say(409, url | {"error": "You already created this model repo"})
        self.hub.add(
            name, {".gitattributes": b""}, private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        return self.say(200, url)

    def model(self, parts: list[str], body: bytes, token: str | None) -> None:
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repository(name, token)
        if repository is None:
            return None
        what, revision = (rest[0], unquote(rest[1])) if len(rest) > 1 else ("revision", "main")
        if what == "branch":
            if revision in repository.refs:
                return self.refuse(409, message="Reference already exists")
            repository.refs[revision] = repository.refs["main"]
            return self.say(200, {})
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if what == "revision":
            siblings = [
                {"rfilename": path, "size": len(content), "blobId": _oid(content)} for path, content in files.items()
            ]
            return self.say(
                200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
            )
        if what == "tree":
            return self.say(200, [self.entry(path, content) for path, content in files.items()])
        if what == "preupload":
            return self.preupload(json.loads(body), files, token)
        if what == "commit":
            return self.commit(name, repository, revision, body, token)
        return self.refuse(404, message=f"the stub knows no {what}")

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry | ({"lfs": large} if path.endswith(LARGE) else {})

    def preupload(self, asked: dict, files: dict[str, bytes], token: str | None) -> None:
        if token != TOKEN:
            return self.refuse(403, message="You have read access only")
        told = []
        for path in (f["path"] for f in asked["files"]):
            large = path.endswith(LARGE)
            now = files.get(path)
            oid = None if now is None else hashlib.sha256(now).hexdigest() if large else _oid(now)
            told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return self.say(200, {"files": told})

    def batch(self, asked: dict, token: str | None) -> None:
        if token != TOKEN:
            return self.refuse(403, message="You have read access only")
        objects = []
        for one in asked["objects"]:
            new = one["oid"] not in self.hub.large
            objects.append(one | ({"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} if new else {}))
        return self.say(200, {"transfer": "basic", "objects": objects})

    def lfs(self, path: str, body: bytes) -> None:
        oid = path.removeprefix("/lfs/")
        if self.headers.get("Authorization") is not None:
            return self.refuse(400, message="the token does not belong to the storage")
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, message="the content is not that of its hash")
        self.hub.large[oid] = body
        return self.say(200, {})

    def commit(self, name: str, repository: Repository, branch: str, body: bytes, token: str | None) -> None:
        if token != TOKEN:
            return self.refuse(403, message="You have read access only")
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        files = dict(repository.commits[repository.refs[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(branch, files)
        return self.say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, path: str, token: str | None) -> None:
        before, _, after = unquote(path).partition("/resolve/")
        revision, _, file = after.partition("/")
        repository = self.repository(before.strip("/"), token)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(files[file]).hexdigest() if file.endswith(LARGE) else _oid(files[file])
        return self.say(200, headers={"ETag": f'"{etag}"', "X-Repo-Commit": oid}, content=files[file])


@contextlib.contextmanager
def serve(monkeypatch, folder):
    """A running `Hub`; huggingface_hub's address, cache and token are set to it, and back."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_address[1]}")
    handler = type("Handler", (_Handler,), {"hub": hub})
    server.RequestHandlerClass = handler
    settings(monkeypatch, folder, hub.url)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def settings(monkeypatch, folder, url: str) -> None:
    """huggingface_hub as if it were installed afresh with this address and token; no proxy, no Xet."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    close_session()  # with its proxies and connections
