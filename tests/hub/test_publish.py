"""Laws of publishing: what goes up is whole, in one commit, and every failure ends in the command that carries on."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_texts
import torch
from huggingface_hub import HfApi, close_session, get_session
from safetensors.numpy import save_file
from safetensors.torch import load_file
from slow_cases import rest_slow
from small_card import card_facts

from etf_adapt import extend, refit
from etf_adapt.commands.publish import main
from etf_adapt.hub import send
from etf_adapt.hub.publish import publish
from etf_adapt.hub.send import HubError
from etf_adapt.results.card import make_card, write_card, write_short_card
from etf_adapt.results.run_folder import STATISTICS_FILE

MODEL = "model.safetensors"
READERS = {"config.json", MODEL, "README.md", "all_results.json", "preprocessor_config.json", "figures/shots.png"}
OURS = {
    "checkpoint-6/optimizer.pt", "checkpoint-6/model.safetensors", "training_args.bin", "log.jsonl", "arguments.json",
    "predictions.csv", "runs/events.out.tfevents", ".config.json.1234", "figures/other.png", "optimizer.pt",
}  # fmt: skip


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def write_weights(folder, *names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        tensors = {f"{name}.weight": rng.standard_normal((100, 120)).astype(np.float32)}
        save_file(tensors, folder / name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A finished run's folder, beside much that is not for readers; the working folder is its parent."""
    run = tmp_path / "out" / "run"
    for name in READERS | OURS:
        write(run, name, b"{}")
    write(run, "config.json", json.dumps({"architectures": ["ViTForImageClassification"]}).encode())
    write(
        run, "README.md", b"---\nlicense: mit\n---\n# A model\n![shots](figures/shots.png) ![x](https://x.org/a.png)\n"
    )
    write_weights(run, MODEL)
    monkeypatch.chdir(tmp_path)
    return run.relative_to(tmp_path)


@pytest.fixture(autouse=True)
def login(hub, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def published(commit, folder):
    """Say whether a commit holds exactly what readers need of a folder, as it lies there."""
    files = {name: file.content for name, file in commit.files.items() if name != ".gitattributes"}
    return commit.changed == READERS and files == {name: (folder / name).read_bytes() for name in READERS}


def refusal(folder, repo_id="me/net", **options):
    """Publish, which must fail; return the message without the command that carries on, and that command's words."""
    before = snapshot(folder) if folder.is_dir() else {}
    with pytest.raises(HubError) as caught:
        publish(folder, repo_id, **options)
    assert snapshot(folder) == before if before else True
    message, command = re.split(r"\n(?:The folder is whole\. To carry on|Then): ", str(caught.value))
    program, *words = shlex.split(command)
    assert [program, words[0]] == ["etf-adapt", "publish"] and words[1:3] == [str(folder), repo_id]
    return message, words[1:]


# What goes up


def test_a_finished_folder_becomes_one_commit_of_what_readers_need(hub, folder):
    url = publish(folder, "me/net")
    (commit,) = hub.pushed("me/net")
    assert url == f"{hub.url}/me/net/commit/{commit.id}" and published(commit, folder)


def test_nothing_that_is_sent_tells_of_the_machine_but_the_token_to_the_hub(hub, folder, tmp_path):
    publish(folder, "me/net", private=True, revision="v1", commit_message="first")
    sent = [(made.path.encode(), made.body, json.dumps(made.headers).encode()) for made in hub.requests]
    for secret in (str(tmp_path), hub.token):
        assert not [part for path, body, _ in sent for part in (path, body) if secret.encode() in part]
    assert not [headers for _, _, headers in sent if str(tmp_path).encode() in headers]
    assert {made.token for made in hub.asked("PUT", "/upload/")} == {None}


def test_what_is_published_already_is_not_published_again(hub, folder):
    assert publish(folder, "me/net") == publish(folder, "me/net") and len(hub.pushed("me/net")) == 1


def test_weights_of_an_earlier_publication_do_not_stay_beside_the_new(hub, folder):
    publish(folder, "me/net")
    (folder / MODEL).unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_weights(folder, *shards, seed=1)
    index = {"metadata": {}, "weight_map": {f"{name}.weight": name for name in shards}}
    write(folder, "model.safetensors.index.json", json.dumps(index).encode())
    publish(folder, "me/net")
    commit = hub.pushed("me/net")[-1]
    assert MODEL not in commit.files and {*shards, "model.safetensors.index.json"} <= set(commit.files)


def test_what_others_put_into_the_repository_stays(hub, folder):
    hub.seed("me/net", {"notes.txt": b"mine", "2_Dense/model.safetensors": b"x"})
    publish(folder, "me/net")
    assert {"notes.txt", "2_Dense/model.safetensors"} <= set(hub.pushed("me/net")[-1].files)


def test_a_branch_is_made_and_the_main_one_left_alone(hub, folder):
    publish(folder, "me/net", revision="v1", commit_message="the first")
    repository = hub.repositories["me/net"]
    assert set(repository.at("v1").files) >= READERS and set(repository.at("main").files) == {".gitattributes"}
    assert repository.at("v1").message == "the first"


@pytest.mark.parametrize("private", [True, False, None])
def test_a_new_repository_is_seen_by_whom_its_owner_says(hub, folder, private):
    publish(folder, "me/net", private=private)
    assert hub.repositories["me/net"].private is bool(private)


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_others_see_is_not_taken_for_a_private_one(hub, folder, private):
    hub.seed("me/net", private=not private)
    message, words = refusal(folder, private=private)
    assert f"`private` (={private})" in message and ("--private" if private else "--public") in words
    assert hub.pushed("me/net") == []


# What does not go up


def spoil_weights(folder):
    content = (folder / MODEL).read_bytes()
    write(folder, MODEL, content[:-100])


SPOILED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "half a config": (lambda folder: write(folder, "config.json", b'{"model_type":'), "config.json that is no JSON"),
    "an empty config": (lambda folder: write(folder, "config.json", b"{}"), "names no architecture"),
    "no weights": (lambda folder: (folder / MODEL).unlink(), "lacks model.safetensors"),
    "half the weights": (spoil_weights, "model.safetensors, which is not whole"),
    "a shard too few": (
        lambda folder: write(folder, "model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks model-2.safetensors",
    ),
    "a wrong index": (
        lambda folder: write(folder, "model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}'),
        "lacks a, which is in the index",
    ),
    "a lost picture": (lambda folder: (folder / "figures/shots.png").unlink(), "lacks figures/shots.png"),
    "a picture elsewhere": (lambda folder: write(folder, "README.md", b"![x](../../secret.png)"), "lacks ../../secret.png"),
    "half a card": (lambda folder: write(folder, "README.md", b"---\na: [\n---\n"), "README.md whose head is no YAML"),
    "a token": (lambda folder: write(folder, "README.md", b"hf_" + b"a" * 34), "looks like a token of the Hub, in README.md"),
    "a path": (
        lambda folder: write(folder, "config.json", json.dumps({"model_type": "x", "a": str(folder.resolve())}).encode()),
        "a path of this machine, in config.json",
    ),
    "a lost head": (
        lambda folder: [
            write(folder, "modules.json", b'[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]'),
            write(folder, "2_Dense/config.json", b"{}"),
        ],
        "lacks 2_Dense/model.safetensors",
    ),
    "a lost module": (lambda folder: write(folder, "modules.json", b'[{"path": "1_Pooling"}]'), "lacks 1_Pooling/config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_folder_that_is_not_fit_is_refused_before_the_hub_is_asked(hub, folder, name):
    spoil, words = SPOILED[name]
    spoil(folder)
    message, _ = refusal(folder)
    assert message.startswith(f"`folder` (={str(folder)!r})") and words in message
    assert hub.requests == []


def test_a_checkpoint_and_a_missing_folder_are_refused(hub, folder):
    assert "is a checkpoint in the middle of a run" in refusal(folder / "checkpoint-6")[0]
    assert "is no folder" in refusal(folder / "nowhere")[0] and hub.requests == []


@pytest.mark.parametrize("repo_id", ["net", "me/net/x", "me/ne t", "me/../net"])
def test_a_name_that_no_repository_can_have_is_refused(hub, folder, repo_id):
    assert f"`repo_id` (={repo_id!r}) must be user/name" in refusal(folder, repo_id)[0] and hub.requests == []


def test_a_card_that_the_hub_cannot_read_is_refused(hub, folder):
    hub.fail("POST", "/validate-yaml", status=400)
    assert "Invalid metadata in README.md" in refusal(folder)[0] and hub.pushed("me/net") == []


def test_a_path_is_found_as_json_writes_it(hub, folder, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/josé"))
    write(folder, "config.json", json.dumps({"model_type": "x", "a": "/home/josé/m"}).encode())
    assert "a path of this machine, in config.json" in refusal(folder)[0] and hub.requests == []


def test_a_word_of_a_tokenizer_is_no_path_of_this_machine(hub, folder):
    write(folder, "tokenizer.json", json.dumps({"model": {"vocab": {str(folder.resolve().parent): 7}}}).encode())
    publish(folder, "me/net")
    assert "tokenizer.json" in hub.pushed("me/net")[-1].files


# Faults


LASTING = {
    "create 503": ({"method": "POST", "pattern": "/repos/create", "status": 503}, "503 Service Unavailable"),
    "create 403": ({"method": "POST", "pattern": "/repos/create", "status": 403}, "403 Forbidden"),
    "create silent": ({"method": "POST", "pattern": "/repos/create", "delay": 60}, "ReadTimeout"),
    "branch 500": ({"method": "POST", "pattern": "/branch/", "status": 500}, "500 Internal Server Error"),
    "upload 403": ({"method": "PUT", "pattern": "/upload/", "status": 403}, "403 Forbidden"),
    "upload cut": ({"method": "PUT", "pattern": "/upload/"}, "Error: "),
    "commit 409": ({"method": "POST", "pattern": "/commit/", "status": 409}, "409 Conflict"),
    "commit cut": ({"method": "POST", "pattern": "/commit/"}, "Error: "),
    "commit silent": ({"method": "POST", "pattern": "/commit/", "delay": 60}, "ReadTimeout"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_fails_leaves_no_commit_and_one_command_carries_on(hub, folder, monkeypatch, capsys, name):
    fault, words = LASTING[name]
    monkeypatch.setattr(send, "SECONDS", 0.3 if "delay" in fault else 30.0)
    hub.fail(**fault, times=math.inf)
    message, command = refusal(folder, private=True, revision="v1", commit_message="my first")
    assert message.startswith("`repo_id` (='me/net'): ") and words in message and hub.token not in message
    assert "http" not in message and ("me/net" not in hub.repositories or hub.pushed("me/net") == [])
    hub.heal()
    main(command)
    (commit,) = hub.pushed("me/net")
    assert published(commit, folder) and commit.message == "my first"
    assert hub.repositories["me/net"].branches["v1"] == commit.id
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/net/commit/{commit.id}"


def test_a_hub_that_is_away_ends_in_the_command(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError: " in refusal(folder)[0]


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("", "me/net", "no token was found: log in (`hf auth login`) or set HF_TOKEN"),
        (
            "hf_wrong",
            "me/net",
            "401 Unauthorized: Invalid credentials in Authorization header Log in anew (`hf auth login`)",
        ),
        ("hf_that_may_only_read", "me/net", "Take a token with write access"),
        ("hf_written_for_the_tests", "you/net", "You don't have the rights to write to you/net"),
    ],
)
def test_who_may_not_write_is_refused_at_once(hub, folder, online, monkeypatch, token, repo_id, words):
    monkeypatch.setenv("HF_TOKEN", token)
    message, _ = refusal(folder, repo_id)
    assert words in message and (not token or token not in message)
    assert online == [] and hub.repositories == {}


def test_offline_is_an_error_with_its_cause(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refusal(folder)[0] and hub.requests == []


def test_a_failure_within_xet_ends_in_the_command_without_the_token(hub, folder, monkeypatch):
    """Whose errors are no HTTP errors; its limits are set while it sends, and no longer."""
    seen = {}

    def fail(self, **_):
        seen.update(os.environ)
        raise RuntimeError(f"Data processing error: 503 at https://cas.example.org by {hub.token}")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "7")
    message, _ = refusal(folder)
    assert "Data processing error: 503 at" in message and "http" not in message and hub.token not in message
    assert (seen["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"], seen["HF_XET_CLIENT_READ_TIMEOUT"]) == ("7", "60s")
    assert "HF_XET_CLIENT_READ_TIMEOUT" not in os.environ


def test_a_bug_stays_what_it_is(hub, folder, monkeypatch):
    monkeypatch.setattr(HfApi, "upload_folder", lambda self: None)
    with pytest.raises(TypeError):
        publish(folder, "me/net")


def test_the_client_is_patient_for_a_while_also_a_new_one_and_is_left_as_it_was(hub, folder, monkeypatch):
    seen = []

    def fail(self, **_):
        for _ in range(2):
            seen.append(get_session().timeout.read)
            close_session()  # as the library does where a connection broke
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", fail)
        refusal(folder)
    assert seen == [send.SECONDS] * 2
    publish(folder, "me/net")
    assert get_session().timeout.read is None


# The card of a run


@pytest.fixture
def run_folder(folder):
    (folder / "README.md").unlink()
    write_card(folder, card_facts(recalls=[0.5, 0.1], row_counts=[10, 10]))
    return folder


def card_there(hub):
    return hub.pushed("me/net")[-1].files["README.md"].content.decode()


def edit_there(hub, text):
    """Do what a person does on the Hub's page."""
    HfApi(token=hub.token).upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/net")


def edit_here(folder, words):
    (folder / "README.md").write_text(text := (folder / "README.md").read_text() + words)
    return text


def test_the_card_of_a_run_names_the_model_as_the_hub_does(hub, run_folder):
    publish(run_folder, "me/net")
    assert 'model="me/net"' in card_there(hub) and "hf-hub:me/net" in card_there(hub)
    assert {"class_counts.png", "recalls.png"} <= hub.pushed("me/net")[-1].changed


@pytest.mark.parametrize("is_run", rest_slow([True, False], fast=1))
def test_statistics_go_out_where_asked_for_and_the_card_says_so(hub, run_folder, is_run):
    if not is_run:
        (run_folder / "card.json").unlink()
        write_short_card(run_folder, "me/net", library="timm", task="image", lines=["head set by refit"])
    write_weights(run_folder, STATISTICS_FILE)
    for asked in (True, False, True, False):
        publish(run_folder, "me/net", statistics=asked)
        assert (STATISTICS_FILE in hub.pushed("me/net")[-1].files) is asked
        assert card_there(hub).count(STATISTICS_FILE) == asked


def test_statistics_that_are_not_there_are_no_commit(hub, folder):
    message, words = refusal(folder, statistics=True)
    assert (
        message.startswith("`folder` (='out/run') holds no etf_statistics.safetensors to publish") and not hub.requests
    )
    assert words[-1] == "--statistics"


def test_a_card_edited_in_the_folder_is_published_as_it_is_each_time(hub, run_folder, caplog):
    for words in ("\n## Mine\n", "\n## And more\n"):
        text = edit_here(run_folder, words)
        publish(run_folder, "me/net")
        assert card_there(hub) == text == (run_folder / "README.md").read_text()
    assert caplog.messages == ["README.md was edited and is published as it is."] * 2


def test_a_card_edited_on_the_hub_stays_while_the_weights_are_sent(hub, run_folder, caplog):
    publish(run_folder, "me/net")
    edit_there(hub, text := card_there(hub) + "\n## Theirs\n")
    write_weights(run_folder, MODEL, seed=3)
    publish(run_folder, "me/net")
    publish(run_folder, "me/net")
    assert card_there(hub) == text and MODEL in hub.pushed("me/net")[-1].changed
    assert caplog.messages[0] == "README.md was edited in me/net and stays there as it is."


def test_a_card_that_no_person_edited_there_is_replaced(hub, run_folder):
    """Be it the short one of a model, or that of another run."""
    write_short_card(run_folder.parent, "me/net", library="timm", task="image")
    short = (run_folder.parent / "README.md").read_text()
    for card in (short, make_card(card_facts(command="of another run"))):
        hub.seed("me/net", {"README.md": card.encode()})
        publish(run_folder, "me/net")
        assert "## Results" in card_there(hub) and "another run" not in card_there(hub)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_card_that_cannot_be_read_there_is_not_replaced(hub, run_folder, method):
    publish(run_folder, "me/net")
    edit_there(hub, "---\nlicense: mit\n---\n# Theirs\n")
    hub.fail(method, "/resolve/.*README", status=503, times=math.inf)
    assert send.carry_on_command("a run", "me/net", private=True) == "etf-adapt publish 'a run' me/net --private"
    with pytest.raises(HubError, match=r"To carry on: etf-adapt publish"):
        publish(run_folder, "me/net")
    assert card_there(hub) == "---\nlicense: mit\n---\n# Theirs\n"


# The program


def run(hub, home, *words, **changes):
    command = [sys.executable, "-m", "etf_adapt", "publish", *words]
    done = subprocess.run(command, env=hub.environment(home, **changes), capture_output=True, text=True, timeout=120)
    assert hub.token not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def test_the_program_prints_the_commit_or_one_message(hub, folder, tmp_path):
    refused = run(hub, tmp_path / "home", str(folder), "me/net")
    assert (
        refused.returncode == 2 and refused.stdout == "" and refused.stderr.startswith("error: `repo_id` (='me/net')")
    )
    assert refused.stderr.endswith(f"To carry on: etf-adapt publish {folder} me/net\n")
    done = run(hub, tmp_path / "home", str(folder), "me/net", "--private", HF_TOKEN=hub.token)
    assert done.stdout == f"{hub.url}/me/net/commit/{hub.pushed('me/net')[0].id}\n" and done.returncode == 0


def test_no_token_can_be_given_as_an_argument(capsys):
    with pytest.raises(SystemExit):
        main(["folder", "me/net", "--token", "hf_x"])
    assert "There is no argument '--token'" in capsys.readouterr().err


LOAD = """
import json, sys, torch
from etf_adapt import ETFForImageClassification
model = ETFForImageClassification.from_pretrained("me/net", revision=sys.argv[1])
print(json.dumps(model.eval()(torch.ones(1, 3, 8, 8)).logits.tolist()))
"""


@pytest.mark.slow
def test_what_a_run_leaves_goes_out_and_comes_back(hub, tmp_path):
    from small_run import make_trainer

    trainer = make_trainer(tmp_path / "run", save_strategy="epoch")
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    done = run(hub, tmp_path / "home", str(tmp_path / "run"), "me/net", "--revision", "v1", HF_TOKEN=hub.token)
    assert done.returncode == 0 and hub.pushed("me/net")[0].changed == {"config.json", MODEL}
    command = [sys.executable, "-c", LOAD, "v1"]
    expected = trainer.model.eval()(torch.ones(1, 3, 8, 8)).logits.tolist()
    for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
        environment = hub.environment(tmp_path / "home", **changes)
        loaded = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert json.loads(loaded.stdout.splitlines()[-1])[0] == pytest.approx(expected[0], abs=1e-5), loaded.stderr


@pytest.mark.slow
def test_another_extends_a_model_of_the_hub_by_its_statistics(hub, tmp_path):
    small_texts.write(tmp_path / "rows", train=small_texts.rows({"ash": 9, "birch": 7}, 0))
    small_texts.write(tmp_path / "new", train=small_texts.rows({"cedar": 4}, 1))
    small_texts.stock_folder(tmp_path / "model")
    refit(tmp_path / "model", str(tmp_path / "rows"), output=tmp_path / "mine", new_labels=True)
    publish(tmp_path / "mine", "me/words", statistics=True)
    expected = extend(tmp_path / "mine", str(tmp_path / "new")).model.state_dict()
    command = [sys.executable, "-m", "etf_adapt", "extend", "me/words", str(tmp_path / "new"), "--output", "theirs"]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "theirs" / MODEL)
    assert torch.equal(made["classifier.weight"], expected["classifier.weight"]) and len(made["classifier.weight"]) == 3
