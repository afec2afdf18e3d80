"""A hub of our own for tests: the part of the Hugging Face hub's HTTP API that its client uses, on 127.0.0.1.

Repositories with commits, branches and pull requests, tokens with rights, gated and private ones, large files by the
LFS protocol in one piece or several, ranges; no Xet. Faults are put in with `Hub.fail`, what was asked is in `Hub.log`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what it may."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Repo:
    """Commits are whole trees: path -> content."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, tree: dict[str, bytes]) -> str:
        """Put a tree at the head of ``ref``; returns the commit's id."""
        named = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in tree.items())
        sha = hashlib.sha1(json.dumps([ref, len(self.commits), named]).encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, pull request or commit id."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """What goes wrong with requests that match, ``times`` times; ``after`` as many bytes where it is a drop."""

    request: str
    what: str  # "drop", "cut", "corrupt" or an HTTP status
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""


@dataclass
class Hub:
    """Everything the server knows; tests read and change it."""

    accounts: dict[str, Account] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)  # LFS object -> bytes that came for it, ever
    part_bytes: int | None = None  # large files in parts of so many bytes
    url: str = ""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(self, request: str, what: str | int, **more: Any) -> None:
        """Let requests whose ``METHOD path`` matches a regular expression fail."""
        self.faults.append(Fault(request, str(what), **more))

    def put(self, name: str, files: dict[str, bytes], **kind: bool) -> str:
        """Make a repository with these files on its main branch; returns the commit."""
        self.repos[name] = Repo(**kind)
        return self.repos[name].commit("main", dict(files))

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """What stands at the head of a branch, without the file that the hub itself puts there."""
        tree = self.repos[name].commits[self.repos[name].refs[ref]]
        return {path: data for path, data in tree.items() if path != ".gitattributes"}

    def asked(self, request: str) -> list[str]:
        """Requests so far that match."""
        return [line for line in self.log if re.search(request, line)]


def is_large(path: str, size: int) -> bool:
    """Which files a hub wants by LFS."""
    return path.endswith(LARGE) or size > 10_000_000


def git_oid(data: bytes) -> str:
    """The name git gives a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    """The ETag of a file: its SHA-256 where it is large."""
    return hashlib.sha256(data).hexdigest() if is_large(path, len(data)) else git_oid(data)


def blob(path: str, data: bytes) -> dict[str, Any]:
    """What a hub says of a file where it is asked for blobs."""
    told: dict[str, Any] = {"size": len(data), "blobId": git_oid(data)}
    large = {"sha256": oid_of(path, data), "size": len(data), "pointerSize": 134}
    return told | ({"lfs": large} if is_large(path, len(data)) else {})


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)/?", "tree"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", "info"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "upload"),
    ("PUT", r"/lfs/(?P<oid>\w+)/(?P<number>\d+)", "upload_part"),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", "complete"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify"),
    ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "file"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Standard error is the test's."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET", head=True)

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str, *, head: bool = False) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        line = f"{'HEAD' if head else method} {unquote(split.path)}"
        self.fault = None
        with self.hub.lock:
            self.hub.log.append(line)
            for fault in self.hub.faults:
                if fault.times and re.search(fault.request, line):
                    fault.times -= 1
                    self.fault = fault
                    break
        try:
            if self.fault is not None and self.fault.what == "drop":
                self._drop(split.path)
                return
            self.body = self._read_body()
            if self.fault is not None and self.fault.what.isdigit():
                raise RefusedError(int(self.fault.what), message=self.fault.message)
            for verb, pattern, name in ROUTES:
                if verb == method and (found := re.fullmatch(pattern, split.path)):
                    values = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    getattr(self, f"_{name}")(**values, **({"head": head} if name == "file" else {}))
                    return
            raise RefusedError(404, message="no such route")
        except RefusedError as error:
            headers = dict(self.fault.headers) if self.fault is not None else {}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.message:
                headers["X-Error-Message"] = error.message
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers, head=head)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _drop(self, path: str) -> None:
        """Read a little of what comes, and hang up."""
        assert self.fault is not None
        length = int(self.headers.get("Content-Length") or 0)
        came = len(self.rfile.read(min(self.fault.after, length)))
        self._note(path, came)
        self.close_connection = True
        self.connection.close()

    def _note(self, path: str, came: int) -> None:
        if found := re.match(r"/lfs/(\w+)", path):
            with self.hub.lock:
                self.hub.received[found[1]] = self.hub.received.get(found[1], 0) + came

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, head: bool = False, size: int = -1
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if size < 0 else size))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # ---- who asks, and for what

    def _account(self, *, needed: bool = True) -> Account | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.accounts:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        if needed and not given:
            raise RefusedError(401, message="Invalid username or password.")
        return self.hub.accounts.get(given)

    def _writer(self, repo: str) -> Account:
        account = self._account()
        assert account is not None
        if account.role == "read" or repo.split("/")[0] not in (account.name, *account.orgs):
            raise RefusedError(403, message=f"You don't have the rights to write to {repo}")
        return account

    def _repo(self, name: str) -> Repo:
        account = self._account(needed=False)
        repo = self.hub.repos.get(name)
        inside = account is not None and name.split("/")[0] in (account.name, *account.orgs)
        if repo is None or (repo.private and not inside):
            raise RefusedError(404 if account else 401, "RepoNotFound", "Repository not found")
        return repo

    def _tree_of(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    # ---- routes

    def _whoami(self) -> None:
        account = self._account()
        assert account is not None
        self._json(
            {
                "type": "user",
                "name": account.name,
                "orgs": [{"name": name} for name in account.orgs],
                "auth": {"accessToken": {"role": account.role}},
            }
        )

    def _create(self) -> None:
        asked = json.loads(self.body)
        account = self._account()
        assert account is not None
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        self._writer(name)
        with self.hub.lock:
            if name in self.hub.repos:
                self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
                return
            self.hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.hub.repos[name].private = asked.get("visibility") == "private"
        self._json({"url": f"{self.hub.url}/{name}"})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _branch(self, repo: str, rev: str) -> None:
        self._writer(repo)
        found = self._repo(repo)
        if rev in found.refs:
            raise RefusedError(409, message="Reference already exists")
        found.refs[rev] = found.refs["main"]
        self._json({})

    def _preupload(self, repo: str, rev: str) -> None:
        if self.query.get("create_pr") != "1":
            self._writer(repo)
        _, tree = self._tree_of(self._repo(repo), rev)
        answers = []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if is_large(file["path"], file["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": oid_of(path, tree[path])} if path in tree else {}))
        self._json({"files": answers})

    def _batch(self, repo: str) -> None:
        self._account()
        self._repo(repo)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                at = f"{self.hub.url}/lfs/{oid}"
                upload: dict[str, Any] = {"href": at}
                if self.hub.part_bytes is not None:
                    count = -(-size // self.hub.part_bytes)
                    numbered = {str(number): f"{at}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{at}/complete", "header": {"chunk_size": str(self.hub.part_bytes), **numbered}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{at}/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, message="the content does not have this SHA-256")
        self.hub.objects[oid] = data

    def _upload(self, oid: str) -> None:
        self._note(self.path, len(self.body))
        self._store(oid, self.body)
        self._send(200, b"")

    def _upload_part(self, oid: str, number: str) -> None:
        self._note(self.path, len(self.body))
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, b"", {"ETag": hashlib.md5(self.body).hexdigest()})

    def _complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(self.hub.parts[oid, number] for number in numbers))
        self._send(200, b"{}")

    def _verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise RefusedError(404, message="no such object")
        self._send(200, b"{}")

    def _commit(self, repo: str, rev: str) -> None:
        pull = self.query.get("create_pr") == "1"
        if not pull:
            self._writer(repo)
        found = self._repo(repo)
        tree = dict(self._tree_of(found, rev)[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(400, message=f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del tree[value["path"]]
        with self.hub.lock:
            number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
            sha = found.commit(f"refs/pr/{number}" if pull else rev, tree)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}
        self._json(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"} if pull else {}))

    def _info(self, repo: str, rev: str = "main") -> None:
        found = self._repo(repo)
        sha, tree = self._tree_of(found, rev)
        told = self.query.get("blobs") == "true"
        names = [{"rfilename": path, **(blob(path, tree[path]) if told else {})} for path in sorted(tree)]
        about = {"private": found.private, "gated": "auto" if found.gated else False, "tags": []}
        self._json({"id": repo, "modelId": repo, "sha": sha, "siblings": names, **about})

    def _tree(self, repo: str, rev: str) -> None:
        rows = []
        for path, data in sorted(self._tree_of(self._repo(repo), rev)[1].items()):
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_large(path, len(data)):
                row["lfs"] = {"oid": oid_of(path, data), "size": len(data), "pointerSize": 134}
            rows.append(row)
        self._json(rows)

    def _file(self, repo: str, rev: str, path: str, *, head: bool) -> None:
        found = self._repo(repo)
        if found.gated:
            raise RefusedError(403, "GatedRepo", f"Access to model {repo} is restricted")
        sha, tree = self._tree_of(found, rev)
        if path not in tree:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        data, status = tree[path], 200
        headers = {"ETag": f'"{oid_of(path, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        fault = self.fault.what if self.fault is not None and not head else ""
        if fault == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        cut = self.fault.after if fault == "cut" and self.fault is not None else len(data)
        self._send(status, data[:cut], headers, head=head, size=len(data))
        if cut < len(data):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of 127.0.0.1; ``hub.url`` says which."""
    handler: Callable[..., Handler] = type("Handler", (Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
