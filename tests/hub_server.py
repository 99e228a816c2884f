"""A small Hub on this machine, for the real `huggingface_hub` client: ``with HubServer() as hub: ... hub.url ... hub.token``.

Written from what the client (2.4) asks: the packages on the index that call themselves a Hub are mirrors, which only read, or
clients of a program that they do not bring. It has one user, ``me``, and takes models only: regular files and LFS files in
one part. It knows no Xet, pull requests, tags, gated repositories and lists of several pages.

Faults come by order of a test: ``hub.fail("POST", "/commit/", times=2, status=503)``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
DATE = "2025-01-01T00:00:00.000Z"


@dataclass
class Request:
    """One request as it came in; ``token`` is None where there was no Authorization header."""

    method: str
    path: str
    token: str | None
    headers: dict[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Answer:
    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error, in the form in which the Hub's client takes errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message, **body}, status, headers)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Name of the content: as git has it, of LFS files the hash of the whole."""
        if self.is_lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid, **lfs}


@dataclass(frozen=True)
class Commit:
    """A state of a repository: all its ``files``, and which of them this commit ``changed``."""

    id: str
    message: str
    files: dict[str, File]
    changed: frozenset[str]


@dataclass
class Repository:
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        name = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.id == name:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, message: str, files: dict[str, File], changed: frozenset[str]) -> Commit:
        name = hashlib.sha1(f"{self.id} {branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(name, message, files, changed))
        self.branches[branch] = name
        return self.commits[-1]


@dataclass
class Fault:
    method: str
    pattern: str
    times: float
    status: int | None
    delay: float


def goes_by_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


class HubServer:
    """A Hub on a port of this machine; ``requests`` are those that came in."""

    user = "me"
    token = "hf_written_for_the_tests"
    read_token = "hf_that_may_only_read"
    url = ""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.RLock()

    def __enter__(self) -> HubServer:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    # What a test orders and asks

    def fail(self, method: str, pattern: str, *, times: float = 1, status: int | None = None, delay: float = 0) -> None:
        """Let the next requests of a method whose path a pattern is found in go wrong.

        Args:
            method: GET, HEAD, POST, PUT or DELETE.
            pattern: Regular expression.
            times: How many requests; ``math.inf`` for all.
            status: Answer with this status instead of doing anything; without it the connection breaks.
            delay: Wait so many seconds before.
        """
        self._faults.append(Fault(method, pattern, times, status, delay))

    def heal(self) -> None:
        """Take back all faults."""
        self._faults.clear()

    def asked(self, method: str, pattern: str) -> list[Request]:
        """Return the requests so far of a method whose path a pattern is found in."""
        return [made for made in self.requests if made.method == method and re.search(pattern, made.path)]

    def pushed(self, repo_id: str) -> list[Commit]:
        """Return the commits that came in, the oldest first, without the one that every repository begins with."""
        return self.repositories[repo_id].commits[1:]

    def seed(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Make a repository of anyone's as it is after its creation, then, if files are given, with one commit of them."""
        made = self.repositories[repo_id] = Repository(repo_id, private)
        first = {".gitattributes": File(GIT_ATTRIBUTES, False)}
        made.add("main", "initial commit", first, frozenset(first))
        if files:
            new = {name: File(content, goes_by_lfs(name)) for name, content in files.items()}
            self.blobs |= {file.sha256: file.content for file in new.values()}
            made.add("main", "files", first | new, frozenset(new))
        return made

    def environment(self, home: str | os.PathLike[str], **changes: str) -> dict[str, str]:
        """Return the environment of a process whose client speaks to this Hub, and keeps its cache and token in a folder.

        Args:
            home: The folder; nothing of the user's own cache is seen.
            changes: What else to set. Without it, no token is known and nothing goes by Xet.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} | quiet | ours | changes

    # What it answers

    def answer(self, request: Request) -> Answer:
        """Find the route of a request and follow it."""
        with self._lock:
            try:
                if request.token not in (None, self.token, self.read_token):
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for methods, pattern, route in ROUTES:
                    found = re.fullmatch(pattern, request.path)
                    if found and request.method in methods:
                        return route(self, request, *(unquote(part) if part else None for part in found.groups()))
                raise Refusal(404, f"no route for {request.method} {request.path}")
            except Refusal as refusal:
                return refusal.answer

    def fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == request.method and re.search(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None

    def _check_writer(self, request: Request, repo_id: str) -> None:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        if request.token != self.token:
            raise Refusal(403, "This token has no permission to write")
        if not repo_id.startswith(f"{self.user}/"):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def _repository(self, request: Request, repo_id: str, *, write: bool = False) -> Repository:
        found = self.repositories.get(repo_id)
        if found is None or (found.private and request.token is None):
            raise Refusal(401 if request.token is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_writer(request, repo_id)
        return found

    def _create(self, request: Request) -> Answer:
        wish = request.json()
        repo_id = f"{wish.get('organization') or self.user}/{wish['name']}"
        self._check_writer(request, repo_id)
        url = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            raise Refusal(409, "You already created this model repo", **url)
        self.seed(repo_id, private=wish.get("visibility") == "private" or wish.get("private") is True)
        return Answer(url)

    def _validate_yaml(self, request: Request) -> Answer:
        found = re.match(r"---\n(.*?\n)---", request.json()["content"], re.DOTALL)
        try:
            has_metadata = bool(found and yaml.safe_load(found[1]))
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer({"errors": [], "warnings": missing})

    def _info(self, request: Request, repo_id: str, revision: str | None = None) -> Answer:
        repository = self._repository(request, repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": repo_id, "sha": commit.id, "private": repository.private, "lastModified": DATE}
        return Answer({**about, "siblings": siblings, "tags": [], "gated": False, "disabled": False})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        files = self._repository(request, repo_id).at(revision).files
        prefix = f"{folder}/" if folder else ""
        inside = [file.described(path) for path, file in files.items() if path.startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer(inside)

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._repository(request, repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.id}
        file = commit.files.get(path)
        if file is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer({"error": "Entry not found"}, 404, headers | missing)
        return Answer(file.content, 200, {**headers, "ETag": f'"{file.oid}"'})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        files = self._repository(request, repo_id, write=True).at(revision).files
        answers = []
        for wish in request.json()["files"]:
            mode = "lfs" if goes_by_lfs(wish["path"]) else "regular"
            known = {"oid": files[wish["path"]].oid} if wish["path"] in files else {}
            answers.append({"path": wish["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return Answer({"files": answers})

    def _lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        objects = []
        for wish in request.json()["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/upload/{wish['oid']}"}}}
            objects.append(wish | ({} if wish["oid"] in self.blobs else upload))
        return Answer({"objects": objects})

    def _put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash than its name")
        self.blobs[oid] = request.body
        return Answer({})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        files, changed = dict(repository.at(revision).files), set()
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            changed.add(path)
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                files[path] = File(self.blobs[value["oid"]], True)
            elif files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        made = repository.add(revision, header["value"]["summary"], files, frozenset(changed))
        url = f"{self.url}/{repo_id}/commit/{made.id}"
        return Answer({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})

    def _branch(self, request: Request, repo_id: str, name: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.at(request.json().get("startingPoint", "main")).id
        return Answer({})


_ID = r"([^/]+/[^/]+?)"
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., Answer]], ...] = (
    (("POST",), "/api/repos/create", HubServer._create),
    (("POST",), "/api/validate-yaml", HubServer._validate_yaml),
    (("GET",), f"/api/(?:models|datasets)/{_ID}", HubServer._info),
    (("GET",), f"/api/(?:models|datasets)/{_ID}/revision/([^/]+)", HubServer._info),
    (("GET",), f"/api/(?:models|datasets)/{_ID}/tree/([^/]+)(?:/(.+))?", HubServer._tree),
    (("POST",), f"/api/models/{_ID}/preupload/([^/]+)", HubServer._preupload),
    (("POST",), f"/api/models/{_ID}/commit/([^/]+)", HubServer._commit),
    (("POST",), f"/api/models/{_ID}/branch/([^/]+)", HubServer._branch),
    (("POST",), f"/{_ID}\\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    (("GET", "HEAD"), f"/(?:datasets/)?{_ID}/resolve/([^/]+)/(.+)", HubServer._resolve),
    (("PUT",), "/upload/([0-9a-f]{64})", HubServer._put),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the network for this machine's name
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no mistake of ours
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for the receipt of its head
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Keep quiet: the requests are in ``hub.requests``."""

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        token = headers["authorization"].removeprefix("Bearer ") if "authorization" in headers else None
        request = Request(self.command, self.path.partition("?")[0], token, headers)
        self.hub.requests.append(request)
        fault = self.hub.fault_of(request)
        if fault and fault.delay:
            self.hub.stopped.wait(fault.delay)
        if fault and not fault.status:
            return self._break()
        request.body = self._body(headers)
        return self._send(Answer({"error": "fault"}, fault.status) if fault else self.hub.answer(request))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        try:
            self.send_response(answer.status)
            for name, value in {"Content-Type": kind, **answer.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except OSError:  # the client has gone
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
