"""A Hub on loopback: the few endpoints that huggingface_hub calls to create, fill, list and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories in memory; `with FakeHub() as hub:` serves them at `hub.url`.

    Attributes:
        repos: repository -> {path: content}.
        versions: (repository, commit) -> what it held then.
        private: repositories that were made so.
        large: paths that went through git-lfs.
        log: (method, path) of every request.
        token: the one that may write.
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.versions: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.token = token
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit_of(self, repo: str) -> str:
        """A commit id that changes with the content."""
        digest = hashlib.sha1(repo.encode())
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(
        self, status: int, body: object = None, headers: dict[str, str] | None = None, head: bool = False
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        given = headers or {}
        for key, value in given.items():
            self.send_header(key, value)
        if "Content-Length" not in given:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _may_write(self) -> bool:
        given = self.headers.get("Authorization")
        if given == f"Bearer {self.hub.token}":
            return True
        status = 403 if given else 401
        self._answer(status, {"error": "Forbidden" if given else "Unauthorized"})
        return False

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(("POST", path))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._may_write():
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            self.hub.repos[repo] = {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.add(repo)
            return self._answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo})
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return self._answer(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                        for item in wanted
                    ],
                },
            )
        repo, _, verb = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if verb == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if verb == "commit":
            for line in body.splitlines():
                self._apply(repo, json.loads(line))
            commit = self.hub.commit_of(repo)
            self.hub.versions[repo, commit] = dict(self.hub.repos[repo])
            return self._answer(
                200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
            )
        return self._answer(404, {"error": f"no endpoint {path}"})

    def _apply(self, repo: str, item: dict) -> None:
        files, value = self.hub.repos[repo], item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = self.hub.objects[value["oid"]]
            self.hub.large.add(value["path"])
        elif item["key"] == "deletedFile":
            del files[value["path"]]

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.log.append(("PUT", self.path))
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "digest"})
        self.hub.objects[oid] = content
        return self._answer(200)

    def do_HEAD(self) -> None:
        self._get(head=True)

    def do_GET(self) -> None:
        self._get(head=False)

    def _get(self, head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(("HEAD" if head else "GET", path))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").removeprefix("/").split("/", 4)
        repo = "/".join(parts[:2])
        missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, missing, head)
        files, commit = self.hub.repos[repo], self.hub.commit_of(repo)
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", commit):
            if (repo, revision) not in self.hub.versions:
                lacks = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
                return self._answer(404, {"error": "Revision not found"}, lacks, head)
            files, commit = self.hub.versions[repo, revision], revision
        if api and (len(parts) == 2 or parts[2] == "revision"):
            listing = [{"rfilename": name} for name in files]
            return self._answer(200, {"id": repo, "sha": commit, "siblings": listing}, head=head)
        if api and parts[2] == "tree":
            return self._answer(200, [self._entry(name, files[name]) for name in sorted(files)], head=head)
        if not api and parts[2] == "resolve":
            name = "/".join(parts[4:])
            if name not in files:
                return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, head)
            content = files[name]
            about = {
                "ETag": f'"{self._entry(name, content)["oid"]}"',
                "X-Repo-Commit": commit,
                "Content-Length": str(len(content)),
            }
            return self._answer(200, content, about, head)
        return self._answer(404, {"error": f"no endpoint {path}"}, head=head)

    def _entry(self, name: str, content: bytes) -> dict:
        entry = {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        if name in self.hub.large:
            digest = hashlib.sha256(content).hexdigest()
            entry |= {"lfs": {"oid": digest, "size": len(content), "pointerSize": 100}}
        return entry
