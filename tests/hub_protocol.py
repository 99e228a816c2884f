"""What the small Hub of the tests answers: repositories of models, their commits, and who may do what with them.

It does not speak of data sets and Spaces, pull requests, gated repositories, branches taken back, ``.gitignore``, compressed
answers and lists of several pages.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from hub_storage import Answer, File, Refusal, Repository, Request, Storage, content_answer

GIT_ATTRIBUTES = b"".join(
    b"%s filter=lfs diff=lfs merge=lfs -text\n" % name for name in (b"*.safetensors", b"*.bin", b"*.onnx", b"*.npy")
)
DATE = "2025-01-01T00:00:00.000Z"


class Hub:
    """A Hub with one user, ``me``.

    Args:
        chunk_size: LFS files of more bytes are taken in several parts.
        lfs_size: Files of at least so many bytes go by LFS, beside those that ``.gitattributes`` names.
    """

    user = "me"
    token = "hf_written_for_the_tests"
    read_token = "hf_that_may_only_read"
    url = storage_url = ""

    def __init__(self, *, chunk_size: int = 10**9, lfs_size: int = 10**7) -> None:
        self.lfs_size = lfs_size
        self.repositories: dict[str, Repository] = {}
        self.storage = Storage(chunk_size=chunk_size)
        self._lock = threading.RLock()

    def answer(self, request: Request) -> Answer:
        """Find the route of a request and follow it."""
        known = (None, self.token, self.read_token)
        with self._lock:
            try:
                if request.token not in known and not request.is_storage:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for method, pattern, is_storage, route in ROUTES:
                    found = re.fullmatch(pattern, request.path)
                    if found and request.method in method and request.is_storage == is_storage:
                        return route(self, request, *(unquote(part) if part else None for part in found.groups()))
                raise Refusal(404, f"no route for {request.method} {request.path}")
            except Refusal as refusal:
                return refusal.answer

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

    # Account and repositories

    def _whoami(self, request: Request) -> Answer:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if request.token == self.token else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        return Answer({"type": "user", "name": self.user, "fullname": "Me", "orgs": [], "auth": access})

    def _create(self, request: Request) -> Answer:
        wish = request.json()
        repo_id = f"{wish.get('organization') or self.user}/{wish['name']}"
        self._check_writer(request, repo_id)
        url = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            raise Refusal(409, "You already created this model repo", **url)
        self.seed(repo_id, private=wish.get("visibility") == "private" or wish.get("private") is True)
        return Answer(url)

    def seed(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Make a repository of anyone's as it is after its creation, then, if files are given, with one commit of them."""
        made = self.repositories[repo_id] = Repository(repo_id, private)
        first = {".gitattributes": File(GIT_ATTRIBUTES, False)}
        made.add("main", "initial commit", first, frozenset(first))
        if files:
            new = {name: File(content, self._goes_by_lfs(first, name, len(content))) for name, content in files.items()}
            self.storage.blobs |= {file.sha256: file.content for file in new.values() if file.is_lfs}
            made.add("main", "files", first | new, frozenset(new))
        return made

    def _delete(self, request: Request) -> Answer:
        wish = request.json()
        repo_id = f"{wish.get('organization') or self.user}/{wish['name']}"
        del self.repositories[self._repository(request, repo_id, write=True).id]
        return Answer({})

    def _validate_yaml(self, request: Request) -> Answer:
        found = re.match(r"---\n(.*?\n)---", request.json()["content"], re.DOTALL)
        try:
            has_metadata = bool(found and yaml.safe_load(found[1]))
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer({"errors": [], "warnings": missing})

    # Reading

    def _info(self, request: Request, repo_id: str, revision: str | None = None) -> Answer:
        repository = self._repository(request, repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": repo_id, "sha": commit.id, "private": repository.private, "lastModified": DATE}
        return Answer({**about, "siblings": siblings, "tags": [], "gated": False, "disabled": False})

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        files = self._repository(request, repo_id).at(revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive", ["false"])[0].lower() == "true":
            return Answer([file.described(path) for path, file in inside.items()])
        here = dict.fromkeys(prefix + path.removeprefix(prefix).split("/")[0] for path in inside)
        folders = [{"type": "directory", "path": name, "oid": "0" * 40} for name in here if name not in inside]
        return Answer(folders + [inside[name].described(name) for name in here if name in inside])

    def _paths_info(self, request: Request, repo_id: str, revision: str) -> Answer:
        files = self._repository(request, repo_id).at(revision).files
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Answer([files[path].described(path) for path in wanted if path in files])

    def _refs(self, request: Request, repo_id: str) -> Answer:
        found = self._repository(request, repo_id)
        named = {"branches": ("heads", found.branches), "tags": ("tags", found.tags), "converts": ("convert", {})}
        return Answer(
            {
                key: [
                    {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                    for name, commit in refs.items()
                ]
                for key, (kind, refs) in named.items()
            }
        )

    def _commits(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self._repository(request, repo_id)
        line: list[dict[str, Any]] = []
        name: str | None = repository.at(revision).id
        while name is not None:
            commit = repository.at(name)
            line.append({"id": commit.id, "title": commit.message, "message": "", "date": DATE, "authors": []})
            name = commit.parent
        return Answer(line)

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._repository(request, repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.id}
        file = commit.files.get(path)
        if file is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer({"error": "Entry not found"}, 404, headers | missing)
        if not file.is_lfs:
            return content_answer(request, file.content, {**headers, "ETag": f'"{file.oid}"'})
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Answer(b"", 302, {**headers, **linked, "Location": f"{self.storage_url}/lfs/{file.sha256}"})

    # Writing

    def _goes_by_lfs(self, files: dict[str, File], path: str, size: int) -> bool:
        lines = files[".gitattributes"].content.decode().splitlines() if ".gitattributes" in files else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/")[-1]
        return size >= self.lfs_size or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        files = self._repository(request, repo_id, write=True).at(revision).files
        answers = []
        for wish in request.json()["files"]:
            mode = "lfs" if self._goes_by_lfs(files, wish["path"], wish["size"]) else "regular"
            known = {"oid": files[wish["path"]].oid} if wish["path"] in files else {}
            answers.append({"path": wish["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return Answer({"files": answers})

    def _lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        return Answer({"objects": [self._lfs_object(repo_id, **wish) for wish in request.json()["objects"]]})

    def _lfs_object(self, repo_id: str, oid: str, size: int) -> dict[str, Any]:
        upload = self.storage.upload_actions(oid, size, hub_url=self.url, storage_url=self.storage_url)
        verify = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size} | ({"actions": {"upload": upload, "verify": verify}} if upload else {})

    def _verify(self, request: Request, repo_id: str) -> Answer:
        self._repository(request, repo_id, write=True)
        wish = request.json()
        if not self.storage.holds(wish["oid"], wish["size"]):
            raise Refusal(404, "the object is not here, or of another size")
        return Answer({})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repository.at(revision)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if not head.id.startswith(header["value"].get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files, changed = dict(head.files), set()
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            changed.add(path)
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if not self.storage.holds(value["oid"], value["size"]):
                    raise Refusal(400, f"LFS pointer {path} points to a file that does not exist")
                files[path] = File(self.storage.blobs[value["oid"]], True)
            else:
                gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
        made = repository.add(revision, header["value"]["summary"], files, frozenset(changed))
        url = f"{self.url}/{repo_id}/commit/{made.id}"
        return Answer({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})

    def _branch(self, request: Request, repo_id: str, name: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.at(request.json().get("startingPoint", "main")).id
        return Answer({})

    def _tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        repository = self._repository(request, repo_id, write=True)
        name = request.json()["tag"]
        if name in repository.tags:
            raise Refusal(409, f"Tag already exists: {name}")
        repository.tags[name] = repository.at(revision).id
        return Answer({})

    # Storage

    def _put(self, request: Request, oid: str, number: str | None) -> Answer:
        return self.storage.put(request, oid, number)

    def _complete(self, request: Request, oid: str) -> Answer:
        return self.storage.complete(oid, request.json()["parts"])

    def _download(self, request: Request, oid: str) -> Answer:
        return self.storage.get(request, oid)

    def _xet_token(self, request: Request, repo_id: str, kind: str, _: str) -> Answer:
        self._repository(request, repo_id, write=kind == "write")
        return self.storage.xet_token(self.storage_url)

    def _cas(self, request: Request, path: str) -> Answer:
        return self.storage.cas(request, path)


_ID = r"([^/]+/[^/]+?)"
ROUTES: tuple[tuple[tuple[str, ...], str, bool, Callable[..., Answer]], ...] = (
    (("GET",), "/api/whoami-v2", False, Hub._whoami),
    (("POST",), "/api/repos/create", False, Hub._create),
    (("DELETE",), "/api/repos/delete", False, Hub._delete),
    (("POST",), "/api/validate-yaml", False, Hub._validate_yaml),
    (("GET",), f"/api/models/{_ID}", False, Hub._info),
    (("GET",), f"/api/models/{_ID}/revision/([^/]+)", False, Hub._info),
    (("GET",), f"/api/models/{_ID}/tree/([^/]+)(?:/(.+))?", False, Hub._tree),
    (("POST",), f"/api/models/{_ID}/paths-info/([^/]+)", False, Hub._paths_info),
    (("GET",), f"/api/models/{_ID}/refs", False, Hub._refs),
    (("GET",), f"/api/models/{_ID}/commits/([^/]+)", False, Hub._commits),
    (("POST",), f"/api/models/{_ID}/preupload/([^/]+)", False, Hub._preupload),
    (("POST",), f"/api/models/{_ID}/commit/([^/]+)", False, Hub._commit),
    (("POST",), f"/api/models/{_ID}/branch/([^/]+)", False, Hub._branch),
    (("POST",), f"/api/models/{_ID}/tag/([^/]+)", False, Hub._tag),
    (("GET",), f"/api/models/{_ID}/xet-(read|write)-token/([^/]+)", False, Hub._xet_token),
    (("POST",), f"/{_ID}\\.git/info/lfs/objects/batch", False, Hub._lfs_batch),
    (("POST",), f"/{_ID}\\.git/info/lfs/objects/verify", False, Hub._verify),
    (("POST",), "/complete/([0-9a-f]{64})", False, Hub._complete),
    (("GET", "HEAD"), f"/{_ID}/resolve/([^/]+)/(.+)", False, Hub._resolve),
    (("PUT",), "/upload/([0-9a-f]{64})(?:/([0-9]+))?", True, Hub._put),
    (("GET", "HEAD"), "/lfs/([0-9a-f]{64})", True, Hub._download),
    (("GET", "HEAD", "POST", "PUT"), "/cas/(.*)", True, Hub._cas),
)
