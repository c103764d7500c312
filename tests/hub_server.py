"""A Hub on localhost: the part of its HTTP protocol that creating a repository, pushing, listing and downloading need, with faults on demand.

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", status=503, times=2)
        HfApi(endpoint=hub.url, token=hub.token).upload_folder(...)

It checks what the real Hub checks (token, scope, namespace, sha256 and size of uploads, base64 and paths of commits), stores everything in
memory, and writes down each request. Xet must be off (HF_HUB_DISABLE_XET=1): large files go through Git LFS, in parts above `part_bytes`.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

SHARED_PREFIX = b"oid sha256:"
LFS_ENDINGS = (".safetensors", ".bin", ".png", ".pt", ".gguf")


@dataclass
class Fault:
    """Answer requests that match otherwise than well.

    Attributes:
        method: HTTP method.
        pattern: regular expression, searched in the path.
        status: the answer; None = close the connection.
        times: how often, then all is well.
        after_bytes: read this much of the body before the connection is closed.
        headers: of the answer.
        message: in the body of the answer.
        act: do what was asked, and only then lose the answer.
    """

    method: str
    pattern: str
    status: int | None
    times: int
    after_bytes: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "out of order"
    act: bool = False


@dataclass
class Repo:
    """One repository: branch -> path -> content; large files are known by their being in `lfs`."""

    private: bool
    branches: dict[str, dict[str, bytes]]
    lfs: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, message: str) -> str:
        """Remember the branch as it is; returns the commit's hash."""
        self.messages.append(message)
        files = dict(self.branches[branch])
        oid = hashlib.sha1(repr((branch, len(self.messages), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.heads[branch] = files, oid
        return oid


@dataclass(frozen=True)
class Request:
    """One request as it came in; `body` is the number of bytes."""

    method: str
    path: str
    body: int
    authorized: bool


class HubServer:
    """The server, in a thread. `url`, `token` and `read_token` are for the client, `repos`, `objects` and `requests` for assertions."""

    def __init__(self, user: str = "tester", organizations: tuple[str, ...] = ("lab",), part_bytes: int = 2**40):
        self.user, self.organizations, self.part_bytes = user, organizations, part_bytes
        self.token, self.read_token = "hf_" + "WriteTokenOfTheTests0123456789abcd", "hf_" + "ReadTokenOfTheTests0123456789abcde"
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, pattern: str, status: int | None, times: int = 1, **more: Any) -> None:
        """From now on the next `times` requests that match fail; status None = the connection is closed, after `after_bytes` of the body."""
        self.faults.append(Fault(method, pattern, status, times, **more))

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[repo_id] = Repo(private, {"main": {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}})
        repo.lfs |= {path for path in files or {} if path.endswith(LFS_ENDINGS)}
        repo.commit("main", "initial commit")
        return repo

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch, without .gitattributes."""
        return {path: data for path, data in self.repos[repo_id].branches[branch].items() if path != ".gitattributes"}

    def count(self, method: str, pattern: str) -> int:
        """Requests so far that match."""
        return sum(r.method == method and re.search(pattern, r.path) is not None for r in self.requests)

    def sent(self) -> int:
        """Bytes of request bodies so far."""
        return sum(r.body for r in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # ------------------------------------------------------------ plumbing

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
        self.answer({"error": message}, status, extra)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().strip(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def break_off(self) -> None:
        """Close the connection with a reset, the way a lost link looks."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.connection.close()

    def handle_method(self) -> None:
        hub = self.hub
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        authorization = self.headers.get("Authorization") or ""
        with hub.lock:
            fault = next((f for f in hub.faults if f.times > 0 and f.method == self.command and re.search(f.pattern, path)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is None and not fault.act:
            read = len(self.rfile.read(fault.after_bytes)) if fault.after_bytes else 0
            hub.requests.append(Request(self.command, path, read, bool(authorization)))
            self.break_off()
            return
        body = self.read_body()
        hub.requests.append(Request(self.command, path, len(body), bool(authorization)))
        if fault is not None and not fault.act:
            assert fault.status is not None
            headers = {"X-Error-Message": fault.message, **fault.headers}
            self.answer({"error": fault.message}, fault.status, headers)
            return
        if fault is not None:  # done, but nobody hears of it
            self.answer = lambda *_, **__: self.break_off()  # type: ignore[method-assign]
        with hub.lock:
            self.route(path, query, body, authorization.removeprefix("Bearer "))

    do_GET = do_HEAD = do_POST = do_PUT = handle_method

    # ------------------------------------------------------------ the protocol

    def route(self, path: str, query: dict[str, str], body: bytes, token: str) -> None:
        hub = self.hub
        if self.command == "PUT":
            return self.put_object(path, query, body)
        if token and token not in (hub.token, hub.read_token):
            return self.refuse(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not token:
                return self.refuse(401, "Invalid credentials in Authorization header")
            role = "write" if token == hub.token else "read"
            organizations = [{"name": name} for name in hub.organizations]
            return self.answer({"type": "user", "name": hub.user, "orgs": organizations, "auth": {"type": "access_token", "accessToken": {"role": role}}})
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            good = content.startswith("---\n") and "\n---\n" in content[4:]
            return self.answer({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)
        if self.command == "POST":
            return self.post(path, query, body, token)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+(?:/pr/\d+)?)/(.+)", path):
            return self.resolve(*match.groups(), token=token)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+(?:/pr/\d+)?)(?:/(.*))?)?", path):
            repo_id, kind, revision, below = match.groups()
            found = self.find(repo_id, revision or "main", token)
            if found is None:
                return None
            repo, files, commit = found
            if kind == "tree":
                inside = {name: data for name, data in files.items() if not below or name.startswith(f"{below}/")}
                if below and not inside:
                    return self.refuse(404, "no such folder", "EntryNotFound")
                if query.get("recursive", "").lower() != "true":
                    depth = below.count("/") + 1 if below else 0
                    inside = {name: data for name, data in inside.items() if name.count("/") == depth}
                return self.answer([self.entry(repo, name, data) for name, data in sorted(inside.items())])
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self.answer(
                {
                    "_id": "0",
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": commit,
                    "private": repo.private,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        return self.refuse(404, f"there is no {path}")

    def find(self, repo_id: str, revision: str, token: str) -> tuple[Repo, dict[str, bytes], str] | None:
        """(repository, files, commit), or None after an answer that says why not. As on the Hub, a private repository looks like none."""
        repo = self.hub.repos.get(repo_id)
        if repo_id in self.hub.gated:
            self.refuse(403, "Access to this model is restricted", "GatedRepo")
            return None
        if repo is None or (repo.private and not token):
            self.refuse(404 if token else 401, "Repository not found", "RepoNotFound")
            return None
        if revision in repo.branches:
            return repo, repo.branches[revision], repo.heads[revision]
        if revision in repo.commits:
            return repo, repo.commits[revision], revision
        self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return None

    def entry(self, repo: Repo, name: str, data: bytes) -> dict[str, Any]:
        value: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if name in repo.lfs:
            value["oid"] = hashlib.sha1(SHARED_PREFIX + data).hexdigest()  # of the pointer
            value["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return value

    def may_write(self, repo_id: str, token: str) -> bool:
        if not token:
            self.refuse(401, "Invalid username or password.")
        elif token != self.hub.token or repo_id.partition("/")[0] not in (self.hub.user, *self.hub.organizations):
            self.refuse(403, f"you don't have the rights to write to {repo_id}")
        else:
            return True
        return False

    def post(self, path: str, query: dict[str, str], body: bytes, token: str) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or hub.user}/{wanted['name']}"
            if not self.may_write(repo_id, token):
                return None
            value = {"url": f"{hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
            if repo_id in hub.repos:
                return self.answer({"error": "You already created this model repo", **value}, 409, {"X-Error-Message": "You already created this model repo"})
            hub.add_repo(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
            return self.answer(value)
        if path.startswith("/lfs/complete/"):
            return self.complete_parts(path.rpartition("/")[2], json.loads(body))
        if path == "/lfs/verify":
            known = hub.objects.get(json.loads(body)["oid"])
            return self.answer({}) if known is not None and len(known) == json.loads(body)["size"] else self.refuse(404, "this object was not uploaded")
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            # Without a branch the objects may be meant for a pull request, which everybody with a token may open.
            if not (token == hub.token and "ref" not in json.loads(body)) and not self.may_write(match[1], token):
                return None
            return self.answer({"transfer": "basic", "objects": [self.upload_action(o["oid"], int(o["size"])) for o in json.loads(body)["objects"]]})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|paths-info)/(.+)", path)
        if match is None:
            return self.refuse(404, f"there is no {path}")
        repo_id, what, revision = match.groups()
        if what == "branch":
            return self.create_branch(repo_id, revision, token)
        found = self.find(repo_id, revision, token)
        if found is None:
            return None
        repo, files, _ = found
        if what == "paths-info":
            paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
            return self.answer([self.entry(repo, name, files[name]) for name in paths if name in files])
        if not (query.get("create_pr") or self.may_write(repo_id, token)):
            return None
        if what == "preupload":
            answers = []
            for file in json.loads(body)["files"]:
                name, known = file["path"], files.get(file["path"])
                mode = "lfs" if name.endswith(LFS_ENDINGS) or file["size"] > 10 * 2**20 else "regular"
                oid = None if known is None else self.entry(repo, name, known).get("lfs", self.entry(repo, name, known))["oid"]
                answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
            return self.answer({"files": answers})
        return self.take_commit(repo_id, repo, revision, bool(query.get("create_pr")), body)

    def create_branch(self, repo_id: str, branch: str, token: str) -> None:
        if not self.may_write(repo_id, token) or (found := self.find(repo_id, "main", token)) is None:
            return None
        repo = found[0]
        if branch in repo.branches:
            return self.refuse(409, f"Reference already exists: {branch}")
        repo.branches[branch] = dict(repo.branches["main"])
        repo.commit(branch, f"new branch {branch}")
        return self.answer({})

    def upload_action(self, oid: str, size: int) -> dict[str, Any]:
        hub = self.hub
        value: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if oid in hub.objects:
            return value
        if size > hub.part_bytes:
            count = -(-size // hub.part_bytes)
            header = {"chunk_size": str(hub.part_bytes), **{str(n + 1): f"{hub.url}/lfs/{oid}?part={n + 1}" for n in range(count)}}
            upload = {"href": f"{hub.url}/lfs/complete/{oid}", "header": header}
        else:
            upload = {"href": f"{hub.url}/lfs/{oid}", "header": {}}
        return {**value, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs/verify", "header": {}}}}

    def put_object(self, path: str, query: dict[str, str], body: bytes) -> None:
        oid = path.rpartition("/")[2]
        if "part" in query:
            self.hub.parts[oid, int(query["part"])] = body
            return self.answer(b"", headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "the content does not have this hash")
        self.hub.objects[oid] = body
        return self.answer(b"")

    def complete_parts(self, oid: str, value: dict[str, Any]) -> None:
        data = b"".join(self.hub.parts.get((oid, part["partNumber"]), b"") for part in value["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "the parts do not make up this hash")
        self.hub.objects[oid] = data
        return self.answer({})

    def take_commit(self, repo_id: str, repo: Repo, revision: str, create_pr: bool, body: bytes) -> None:
        hub = self.hub
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        branch = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}" if create_pr else revision
        files, large = dict(repo.branches[revision]), set(repo.lfs)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
                large.discard(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.objects or len(hub.objects[value["oid"]]) != value["size"]:
                    return self.refuse(400, f"{value['path']}: this object was not uploaded")
                files[value["path"]] = hub.objects[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return self.refuse(400, "A file with this name doesn't exist")
        repo.branches[branch], repo.lfs = files, large
        oid = repo.commit(branch, header["summary"])
        number = {"pullRequestUrl": f"{hub.url}/{repo_id}/discussions/{branch.rpartition('/')[2]}"} if create_pr else {}
        return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}", "hookOutput": "", **number})

    def resolve(self, repo_id: str, revision: str, name: str, *, token: str) -> None:
        found = self.find(repo_id, revision, token)
        if found is None:
            return None
        repo, files, commit = found
        if name not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit)
        data, entry = files[name], self.entry(repo, name, files[name])
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            return self.answer(data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
        return self.answer(data, headers=headers)
