"""What the small Hub of the tests keeps: repositories with their commits, LFS objects that come whole or in parts or by Xet.

Of Xet's storage (CAS) it takes what `hf_xet` 1.8 uploads: the chunks of a xorb, if they are stored without compression
(``HF_XET_XORB_COMPRESSION_POLICY=none``), and shards, which it does not read. It neither grants uploads to a third place, nor
finds chunks that it has already, nor gives files back by Xet: they are downloaded over HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

_CHUNK_HEAD = 8  # version, size stored (3 bytes), compression, size (3 bytes)


@dataclass
class Request:
    """One request as it came in; ``token`` is None where there was no Authorization header."""

    method: str
    path: str
    token: str | None
    headers: dict[str, str]
    query: dict[str, list[str]]
    is_storage: bool
    body: bytes = b""
    status: int = 0

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
    parent: str | None
    message: str
    files: dict[str, File]
    changed: frozenset[str]


@dataclass
class Repository:
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.id == name:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, message: str, files: dict[str, File], changed: frozenset[str]) -> Commit:
        parent = self.branches.get(branch)
        name = hashlib.sha1(f"{self.id} {branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(name, parent, message, files, changed))
        self.branches[branch] = name
        return self.commits[-1]


def content_answer(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """Answer with a file, or with the range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    wish = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not wish:
        return Answer(content, 200, headers)
    start, end = int(wish[1]), min(int(wish[2] or len(content)), len(content) - 1)
    if start >= len(content):
        raise Refusal(416, "Range Not Satisfiable")
    return Answer(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


class Storage:
    """Contents by their SHA-256.

    Args:
        chunk_size: Objects of more bytes are taken in several parts.
    """

    def __init__(self, *, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.blobs: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._xorbs: list[list[bytes]] = []

    def upload_actions(self, oid: str, size: int, *, hub_url: str, storage_url: str) -> dict[str, Any] | None:
        """Say how an object comes here by LFS; None where it is here already."""
        if oid in self.blobs:
            return None
        if size <= self.chunk_size:
            return {"href": f"{storage_url}/upload/{oid}"}
        numbers = range(1, -(-size // self.chunk_size) + 1)
        parts = {str(number): f"{storage_url}/upload/{oid}/{number}" for number in numbers}
        return {"href": f"{hub_url}/complete/{oid}", "header": {"chunk_size": str(self.chunk_size), **parts}}

    def put(self, request: Request, oid: str, number: str | None) -> Answer:
        if number is None:
            return self._store(oid, request.body)
        self._parts.setdefault(oid, {})[int(number)] = request.body
        return Answer(b"", 200, {"ETag": f'"{hashlib.sha256(request.body).hexdigest()}"'})

    def complete(self, oid: str, parts: list[dict[str, Any]]) -> Answer:
        """Join the parts of an object, each of which must be the one that was uploaded."""
        had = self._parts.get(oid, {})
        for part in parts:
            content = had.get(part["partNumber"], b"")
            if part["etag"].strip('"') != hashlib.sha256(content).hexdigest():
                raise Refusal(400, f"part {part['partNumber']} is not what was uploaded")
        return self._store(oid, b"".join(had[number] for number in sorted(had)))

    def _store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content has another hash than its name")
        self.blobs[oid] = content
        return Answer({})

    def get(self, request: Request, oid: str) -> Answer:
        if oid not in self.blobs:
            raise Refusal(404, "no such object")
        return content_answer(request, self.blobs[oid], {"ETag": f'"{oid}"'})

    def holds(self, oid: str, size: int) -> bool:
        """Say whether an object of this name and size came in, by LFS or by Xet."""
        if oid not in self.blobs:
            self._find_in_xorbs(oid, size)
        return len(self.blobs.get(oid, b"")) == size

    def _find_in_xorbs(self, oid: str, size: int) -> None:
        """Find the run of chunks that is a file: the shards would say so, but the hash of the whole does as well."""
        for chunks in self._xorbs:
            ends = list(accumulate(map(len, chunks), initial=0))
            for first, start in enumerate(ends):
                if start + size in ends[first:]:
                    content = b"".join(chunks[first : ends.index(start + size)])
                    if hashlib.sha256(content).hexdigest() == oid:
                        self.blobs[oid] = content

    def xet_token(self, storage_url: str) -> Answer:
        told = {"casUrl": f"{storage_url}/cas", "exp": int(time.time()) + 3600, "accessToken": "xet"}
        names = {"casUrl": "X-Xet-Cas-Url", "exp": "X-Xet-Token-Expiration", "accessToken": "X-Xet-Access-Token"}
        return Answer(told, 200, {names[key]: str(value) for key, value in told.items()})

    def cas(self, request: Request, path: str) -> Answer:
        if request.method == "POST" and path.startswith("v1/xorbs/"):
            chunks, at = [], 0
            while at < len(request.body):
                stored = int.from_bytes(request.body[at + 1 : at + 4], "little")
                if request.body[at] or request.body[at + 4]:
                    raise Refusal(400, "only chunks of version 0 without compression are read here")
                chunks.append(request.body[at + _CHUNK_HEAD : at + _CHUNK_HEAD + stored])
                at += _CHUNK_HEAD + stored
            self._xorbs.append(chunks)
            return Answer({"was_inserted": True})
        if request.method == "POST" and path == "v1/shards":
            return Answer({"result": 1})
        raise Refusal(404, "not spoken here")
