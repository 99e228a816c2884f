"""Laws of the tests' Hub, told by the real client: what goes up comes back, who may do what, and what each fault leads to.

By Xet (`hf_xet` 1.8, where it is installed) are tested: that the client asks for a token and where it then goes; an upload of
new files, whose chunks are stored without compression; and what it raises where the token or the storage is refused or away.
Not tested: grants for uploads to a third place, chunks that the storage knows already, compression, files over several xorbs,
and downloads by Xet, for which the storage would have to read Xet's shards: what is here comes down over HTTP.

The models are made here with random weights, those under the name ``timm/test_vit.r160_in1k`` too.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SMALL = {"config.json": b'{"model_type": "vit"}', "README.md": b"---\nlicense: mit\n---\nA model.\n"}
WEIGHTS = os.urandom(50_000)
FILES = {**SMALL, "model.safetensors": WEIGHTS, "figures/curve.csv": b"1,2\n"}


@pytest.fixture
def api(hub, online):
    return HfApi(token=hub.token)


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def contents(commit):
    return {name: file.content for name, file in commit.files.items() if name != ".gitattributes"}


def download(name, cache, **options):
    return Path(hf_hub_download("me/net", name, cache_dir=cache, **options)).read_bytes()


def add(name, content):
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)


# What goes up comes back


def test_a_folder_becomes_one_commit_with_exactly_its_files(hub, api, folder):
    api.create_repo("me/net")
    info = api.upload_folder(repo_id="me/net", folder_path=folder, commit_message="the first")
    (commit,) = hub.pushed("me/net")
    assert (commit.changed, contents(commit), commit.message) == (set(FILES), FILES, "the first")
    assert (info.oid, info.commit_url) == (commit.id, f"{hub.url}/me/net/commit/{commit.id}")
    assert {name for name, file in commit.files.items() if file.is_lfs} == {"model.safetensors"}


def test_a_large_file_goes_in_parts_and_is_joined_and_verified(hub, api):
    hub.seed("me/net")
    api.create_commit("me/net", [add("model.safetensors", WEIGHTS)], commit_message="parts")
    parts = hub.asked("PUT", "/upload/")
    assert [len(part.body) for part in parts] == [20_000, 20_000, 10_000]
    assert len(hub.asked("POST", "/complete/")) == len(hub.asked("POST", "/verify")) == 1
    assert contents(hub.pushed("me/net")[0]) == {"model.safetensors": WEIGHTS}


@pytest.mark.parametrize(
    ("name", "size", "is_lfs"), [("a.npy", 10, True), ("a.csv", 10, False), ("a.csv", 10**7, True)]
)
def test_a_file_is_large_by_its_name_or_by_its_size(hub, api, name, size, is_lfs):
    hub.storage.chunk_size = 10**9
    hub.seed("me/net")
    api.create_commit("me/net", [add(name, bytes(size))], commit_message="one")
    assert hub.pushed("me/net")[0].files[name].is_lfs is is_lfs and len(hub.asked("PUT", "/upload/")) == is_lfs


def test_the_token_goes_to_the_hub_and_never_to_its_storage(hub, api, folder, tmp_path):
    hub.seed("me/net", private=True)
    api.upload_folder(repo_id="me/net", folder_path=folder)
    snapshot_download("me/net", cache_dir=tmp_path / "cache", token=hub.token)
    tokens = {made.is_storage: set() for made in hub.requests}
    for made in hub.requests:
        tokens[made.is_storage].add(made.token)
    assert tokens[True] == {None} and hub.token in tokens[False]


def test_what_is_there_already_is_neither_sent_nor_committed_again(hub, api, folder):
    hub.seed("me/net")
    infos = [api.upload_folder(repo_id="me/net", folder_path=folder) for _ in range(2)]
    assert len(hub.pushed("me/net")) == 1 and infos[0].oid == infos[1].oid
    assert len(hub.asked("POST", "/commit/")) == 1 and len(hub.asked("POST", "/complete/")) == 1


def test_a_commit_goes_to_the_branch_that_it_names(hub, api, tmp_path):
    hub.seed("me/net", SMALL)
    api.create_branch("me/net", branch="try/1")
    api.create_commit("me/net", [add("a.txt", b"on the branch")], commit_message="x", revision="try/1")
    api.create_tag("me/net", tag="v1", revision="try/1")
    here, there = ({*api.list_repo_files("me/net", revision=name)} for name in ("main", "try/1"))
    assert there - here == {"a.txt"}
    commit = hub.pushed("me/net")[-1].id
    for revision in ("try/1", "v1", commit):
        assert download("a.txt", tmp_path, revision=revision) == b"on the branch"
    assert api.list_repo_commits("me/net", revision="v1")[0].commit_id == commit
    assert {ref.name for ref in api.list_repo_refs("me/net").branches} == {"main", "try/1"}


def test_an_unknown_revision_is_refused_by_name(hub, api, tmp_path):
    hub.seed("me/net", SMALL)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("me/net", [add("a.txt", b"a")], commit_message="x", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/net", "config.json", revision="v9", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/net", "confg.json", cache_dir=tmp_path)


def test_a_commit_onto_a_state_that_is_no_longer_the_last_is_refused(hub, api):
    first = hub.seed("me/net", SMALL).commits[-1].id
    api.create_commit("me/net", [add("a.txt", b"a")], commit_message="x", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit("me/net", [add("b.txt", b"b")], commit_message="x", parent_commit=first)


def test_files_and_repositories_are_removed_where_asked(hub, api):
    hub.seed("me/net", SMALL)
    api.create_commit("me/net", [CommitOperationDelete("config.json")], commit_message="less")
    assert set(contents(hub.pushed("me/net")[-1])) == {"README.md"}
    api.delete_repo("me/net")
    assert hub.repositories == {}


def test_paths_and_folders_are_listed(hub, api):
    hub.seed("me/net", FILES)
    assert {item.path for item in api.list_repo_tree("me/net")} == {
        *SMALL,
        ".gitattributes",
        "model.safetensors",
        "figures",
    }
    assert [item.path for item in api.list_repo_tree("me/net", "figures")] == ["figures/curve.csv"]
    (found,) = api.get_paths_info("me/net", ["model.safetensors", "no.txt"])
    assert (found.size, found.lfs.size) == (50_000, 50_000)


# Who may do what


def test_a_name_that_is_taken_is_refused_unless_that_is_welcome(hub, api):
    api.create_repo("me/net")
    with pytest.raises(HfHubHTTPError, match="409") as caught:
        api.create_repo("me/net")
    assert caught.value.response.status_code == 409
    assert api.create_repo("me/net", exist_ok=True).repo_id == "me/net"


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_wrong", 401), (HfApi, 403)])
def test_none_but_the_owner_writes(hub, online, token, status):
    hub.seed("me/net")
    api = HfApi(token=hub.read_token if token is HfApi else token)
    for call in (
        lambda: api.create_repo("me/other"),
        lambda: api.create_commit("me/net", [add("a.txt", b"a")], commit_message="x"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == status
    assert hub.pushed("me/net") == [] and list(hub.repositories) == ["me/net"]


def test_the_name_of_another_is_refused(api):
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("you/net")


def test_a_private_repository_is_there_for_those_who_show_a_token(hub, api, tmp_path):
    api.create_repo("me/net", private=True)
    api.create_commit("me/net", [add("a.txt", b"a")], commit_message="x")
    assert api.repo_info("me/net").private
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError) as caught:
            hf_hub_download("me/net", "a.txt", cache_dir=tmp_path, token=token)
        assert caught.value.response.status_code == 401
    assert isinstance(_error(lambda: HfApi(token=False).repo_info("me/net")), RepositoryNotFoundError)
    assert download("a.txt", tmp_path, token=hub.read_token) == b"a"


def test_the_token_of_the_environment_is_found(hub, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert HfApi().whoami()["name"] == "me"


def test_a_card_that_cannot_be_read_is_refused_before_anything_goes_up(hub, api):
    hub.seed("me/net")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.create_commit("me/net", [add("README.md", b"---\na: [\n---\n")], commit_message="x")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        api.create_commit("me/net", [add("README.md", b"nothing\n")], commit_message="x")
    assert any("empty or missing yaml" in str(warning.message) for warning in told)


def _error(call):
    try:
        call()
    except Exception as error:
        return error
    return None


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "POST", "pattern": "/preupload/", "status": 500},
        {"method": "POST", "pattern": "objects/batch", "status": 503},
        {"method": "POST", "pattern": "objects/batch", "status": 429, "headers": {"Retry-After": "7"}},
        {"method": "PUT", "pattern": "/upload/", "status": 502},
        {"method": "PUT", "pattern": "/upload/.*/2", "cut": 5_000},
        {"method": "POST", "pattern": "/complete/", "lose_answer": True},
        {"method": "POST", "pattern": "objects/verify", "status": 504},
    ],
    ids=lambda fault: f"{fault['pattern'].strip('/')}-{fault.get('status', 'cut')}",
)
def test_the_client_itself_gets_over_what_passes(hub, api, online, folder, fault):
    hub.seed("me/net")
    hub.fail(**fault, times=2)
    api.upload_folder(repo_id="me/net", folder_path=folder)
    (commit,) = hub.pushed("me/net")
    assert contents(commit) == FILES
    assert online == (
        [8.0, 8.0] if fault.get("headers") else [1.0, 2.0]
    )  # what the server said and one second; or doubled


@pytest.mark.parametrize("status", [500, 503, 429, 401, 403])
@pytest.mark.parametrize("pattern", ["/repos/create", "/commit/"])
def test_the_client_gives_up_at_once_where_a_repository_or_a_commit_is_made(hub, api, folder, pattern, status):
    hub.seed("me/net")
    hub.fail("POST", pattern, status=status)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("me/new")
        api.upload_folder(repo_id="me/net", folder_path=folder)
    assert caught.value.response.status_code == status and hub.pushed("me/net") == []


def test_what_does_not_pass_ends_after_six_tries_and_leaves_no_commit(hub, api, online, folder):
    hub.seed("me/net")
    hub.fail("PUT", "/upload/", times=math.inf, cut=5_000)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        api.upload_folder(repo_id="me/net", folder_path=folder)
    assert hub.pushed("me/net") == [] and len(hub.asked("PUT", "/upload/")) == 6 and sum(online) == 23
    hub.heal()
    api.upload_folder(repo_id="me/net", folder_path=folder)
    assert [contents(commit) for commit in hub.pushed("me/net")] == [FILES]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, api, folder):
    hub.seed("me/net")
    hub.fail("POST", "/commit/", lose_answer=True)
    assert _error(lambda: api.upload_folder(repo_id="me/net", folder_path=folder)) is not None
    info = api.upload_folder(repo_id="me/net", folder_path=folder)
    assert [commit.id for commit in hub.pushed("me/net")] == [info.oid]


def test_the_client_waits_for_ever_for_an_upload_unless_its_session_has_a_limit(hub, api, online, folder):
    hub.seed("me/net")
    client = get_session()
    assert client.timeout.read is None  # a law of the client that ours must make up for
    before, client.timeout = client.timeout, 0.3
    try:
        hub.fail("PUT", "/upload/", delay=60)
        hub.fail("POST", "/commit/", delay=60)
        error = _error(lambda: api.upload_folder(repo_id="me/net", folder_path=folder))
    finally:
        client.timeout = before
    assert "Timeout" in type(error).__name__ and online == [1.0]  # the first was tried again, the commit was not
    assert len(hub.asked("POST", "/complete/")) == 1 and hub.pushed("me/net") == []


def test_a_download_that_is_cut_goes_on_where_it_was_cut(hub, online, tmp_path, monkeypatch):
    hub.seed("me/net", FILES)
    hub.fail("GET", "/lfs/", cut=30_000)
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8_000
    )  # of which whole ones are kept; else 10 MiB
    assert download("model.safetensors", tmp_path) == WEIGHTS
    assert [made.headers.get("range") for made in hub.asked("GET", "/lfs/")] == [None, "bytes=24000-"]


def test_a_download_that_hangs_is_tried_again_in_time(hub, online, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.seed("me/net", FILES)
    hub.fail("GET", "/lfs/", delay=60)
    assert download("model.safetensors", tmp_path) == WEIGHTS
    assert len(hub.asked("GET", "/lfs/")) == 2


def test_a_hub_that_is_down_is_no_matter_for_what_is_cached(hub, online, tmp_path):
    hub.seed("me/net", SMALL)
    first = hf_hub_download("me/net", "config.json", cache_dir=tmp_path)
    hub.fail("HEAD", "/resolve/", times=math.inf, status=503)
    assert hf_hub_download("me/net", "config.json", cache_dir=tmp_path) == first
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("me/net", "README.md", cache_dir=tmp_path)


FETCH = """
import json
from huggingface_hub import hf_hub_download, snapshot_download
names = [snapshot_download("me/net"), hf_hub_download("me/net", "config.json", revision="main")]
print(json.dumps(names))
"""


def test_the_environment_alone_names_the_hub_or_says_that_there_is_none(hub, tmp_path):
    hub.seed("me/net", FILES)
    told = []
    for offline in ("0", "1"):
        environment = hub.environment(tmp_path / "home", HF_HUB_OFFLINE=offline)
        done = subprocess.run(
            [sys.executable, "-c", FETCH], env=environment, capture_output=True, text=True, timeout=60
        )
        told.append((json.loads(done.stdout), len(hub.requests)))
    assert told[0] == told[1] and Path(told[0][0][0], "model.safetensors").read_bytes() == WEIGHTS


# Xet


XET = """
import json, sys, time
from huggingface_hub import CommitOperationAdd, HfApi
names = sys.argv[1:]
start = time.monotonic()
try:
    told = {"url": HfApi().create_commit("me/net", [CommitOperationAdd(name, name) for name in names], commit_message="x")}
except Exception as error:
    told = {"error": type(error).__name__, "message": str(error)}
print(json.dumps({**told, "seconds": time.monotonic() - start}))
"""


@pytest.fixture
def by_xet(hub, folder, tmp_path):
    """A function that commits the folder in a process with Xet, and returns what it led to."""
    pytest.importorskip("hf_xet", reason="needs the package hf_xet")

    def commit(**changes):
        quick = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        stored = {"HF_HUB_DISABLE_XET": "0", "HF_XET_XORB_COMPRESSION_POLICY": "none"}
        environment = hub.environment(tmp_path / "home", HF_TOKEN=hub.token, **{**quick, **stored, **changes})
        command = [sys.executable, "-c", XET, *FILES]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    hub.seed("me/net")
    return commit


def test_new_files_go_by_xet_and_become_one_commit(hub, by_xet):
    told = by_xet()
    (commit,) = hub.pushed("me/net")
    assert (told["url"], contents(commit)) == (f"{hub.url}/me/net/commit/{commit.id}", FILES)
    assert [made.token for made in hub.asked("GET", "/xet-write-token/main")] == [hub.token]
    assert hub.asked("POST", "objects/batch") == hub.asked("PUT", "/upload/") == []
    assert {made.token for made in hub.requests if made.is_storage} == {"xet"}  # the Hub's own stays with the Hub


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"method": "GET", "pattern": "/xet-write-token/", "status": 403}, "403"),
        ({"method": "GET", "pattern": "/xet-write-token/", "status": 503}, "503"),
        ({"method": "POST", "pattern": "/cas/v1/xorb", "status": 503}, "503"),
        ({"method": "POST", "pattern": "/cas/v1/xorb", "cut": 100}, "error"),
        ({"method": "POST", "pattern": "/cas/v1/shards", "status": 500}, "500"),
    ],
    ids=lambda value: f"{value['pattern'].strip('/')}-{value.get('status', 'cut')}" if isinstance(value, dict) else "",
)
def test_a_failure_within_xet_is_no_http_error_and_leaves_no_commit(hub, by_xet, fault, words):
    hub.fail(**fault, times=math.inf)
    told = by_xet()
    assert told["error"] in ("ConnectionError", "RuntimeError", "OSError") and words in told["message"]
    assert hub.token not in told["message"] and hub.pushed("me/net") == []
    hub.heal()
    assert "url" in by_xet()
    assert len(hub.pushed("me/net")) == 1


def test_a_storage_of_xet_that_is_away_ends_in_an_error(hub, by_xet):
    hub.storage_url = "http://127.0.0.1:9"
    assert by_xet()["error"] == "ConnectionError"


# Loading


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """A Hub with models of every kind, and what each gives here for an image of ones."""
    import timm
    import torch
    from hub_loads import describe
    from hub_server import HubServer
    from small_models import save_tokenizer, stock_vit
    from timm.models import save_for_hf

    from etf_adapt.models.auto import adapt

    def saved(model):
        folder = tmp_path_factory.mktemp("model")
        if hasattr(model, "config"):
            model.save_pretrained(folder)
        else:
            save_for_hf(model, str(folder), safe_serialization=True)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return files, describe(model)

    torch.manual_seed(1)
    made = {
        "me/vit": saved(stock_vit()),
        "v2": saved(stock_vit()),
        "me/adapted": saved(adapt(stock_vit(), 4).eval()),
        "me/secret": saved(stock_vit()),
        "me/net": saved(timm.create_model("test_vit", num_classes=4)),
        "timm/test_vit.r160_in1k": saved(timm.create_model("test_vit")),
    }
    save_tokenizer(folder := tmp_path_factory.mktemp("words"))
    words = {path.name: path.read_bytes() for path in folder.iterdir()}
    words |= {"config.json": b'{"model_type": "bert"}'}
    with HubServer() as hub:
        for name, (files, _) in made.items():
            if name != "v2":
                hub.seed(name, files, private=name == "me/secret")
        hub.seed("me/words", words)
        api = HfApi(endpoint=hub.url, token=hub.token)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            api.create_branch("me/vit", branch="v2")
            files = [add(name, content) for name, content in made["v2"][0].items()]
            api.create_commit("me/vit", files, commit_message="other weights", revision="v2")
        yield hub, {name: described for name, (_, described) in made.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def load(hub, home, token="", **changes):
    command = [sys.executable, str(Path(__file__).parents[1] / "hub_loads.py"), token]
    done = subprocess.run(command, env=hub.environment(home, **changes), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def loaded(stocked, home):
    return load(stocked[0], home, stocked[0].token)


KINDS = {  # and whether the head is the one that went up: ours is new where the model is not of ours
    "stock": ("me/vit", True),
    "ours": ("me/vit", False),
    "ours by revision": ("v2", False),
    "adapted": ("me/adapted", True),
    "adapted in stock": ("me/adapted", True),
    "private": ("me/secret", False),
    "timm's hf-hub:": ("me/net", True),
    "a timm repository": ("me/net", False),
    "timm/": ("timm/test_vit.r160_in1k", False),
    "a timm name": ("timm/test_vit.r160_in1k", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_hub_is_the_one_that_went_up(stocked, loaded, kind):
    name, has_its_head = KINDS[kind]
    expected = stocked[1][name]
    assert loaded[kind]["features"] == pytest.approx(expected["features"], abs=1e-5)
    assert (loaded[kind]["logits"] == pytest.approx(expected["logits"], abs=1e-5)) is has_its_head


@pytest.mark.slow
def test_tokenizers_and_image_sizes_come_with_their_models(loaded):
    assert (loaded["tokens"], loaded["processor"]) == ([3, 3], [3, 160, 160])


@pytest.mark.slow
def test_what_was_loaded_once_is_loaded_offline_without_a_request(stocked, loaded, home):
    hub, _ = stocked
    before = len(hub.requests)
    offline = load(hub, home, HF_HUB_OFFLINE="1")
    assert offline == loaded and len(hub.requests) == before
