"""Laws of publishing from a model, a trainer and the recipe: one commit at the end, and whatever fails costs no training."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from small_card import card_facts
from small_run import make_model, make_trainer

from etf_adapt.commands.main import main
from etf_adapt.hub.publish import publish
from etf_adapt.hub.send import HubError
from etf_adapt.models.auto import ETFForImageClassification
from etf_adapt.results.card import read_facts, write_card

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))


SHORT = [
    "--max_train_rows",
    "90",
    "--per_device_train_batch_size",
    "32",
    "--torch_threads",
    "1",
    "--num_train_epochs",
    "1",
]
PUBLISH = ["--push_to_hub", "--hub_model_id", "me/net"]


@pytest.fixture(autouse=True)
def login(hub, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)


def text(hub, name="README.md"):
    return hub.pushed("me/net")[-1].files[name].content.decode()


# A model


def test_a_model_goes_up_in_one_commit_and_comes_back(hub, tmp_path):
    model = make_model(class_counts=[9, 3, 1], loss="logit_adjusted").eval()
    url = model.push_to_hub("me/net", private=True, revision="v1", commit_message="mine")
    (commit,) = hub.pushed("me/net")
    assert (commit.changed, commit.message) == ({"config.json", "model.safetensors", "README.md"}, "mine")
    assert url.endswith(commit.id) and hub.repositories["me/net"].private
    assert ModelCard(text(hub)).data.library_name == "transformers"
    back = ETFForImageClassification.from_pretrained("me/net", revision="v1", cache_dir=tmp_path)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(back(images).logits, model(images).logits) and back.etf_settings == model.etf_settings


def test_a_timm_model_goes_up_in_timms_layout(hub):
    ETFForImageClassification.from_pretrained("timm/test_vit.r160_in1k", num_labels=3, pretrained=False).push_to_hub(
        "me/net"
    )
    assert json.loads(text(hub, "config.json"))["architecture"] == "test_vit"
    assert ModelCard(text(hub)).data.library_name == "timm"


def test_a_card_that_is_there_stays(hub):
    hub.seed("me/net", {"README.md": b"# Mine\n"})
    make_model().push_to_hub("me/net")
    assert text(hub) == "# Mine\n" and hub.pushed("me/net")[-1].changed == {"config.json", "model.safetensors"}


def test_a_model_that_cannot_go_up_names_what_carries_on_and_no_folder_that_is_gone(hub):
    hub.fail("POST", "/commit/", status=500, times=math.inf)
    with pytest.raises(
        HubError, match=r"model\.push_to_hub\('me/net'\).*etf-adapt publish folder me/net --private"
    ) as caught:
        make_model().push_to_hub("me/net", private=True)
    assert "/tmp" not in str(caught.value)


def test_saving_does_not_publish_on_the_side(hub, tmp_path):
    with pytest.raises(ValueError, match=r"`push_to_hub` .=True. of save_pretrained"):
        make_model().save_pretrained(tmp_path, push_to_hub=True)
    assert hub.requests == []


# A trainer


def test_a_trainer_asks_nothing_of_the_hub_before_it_is_done_and_then_sends_what_is_finished(hub, tmp_path):
    trainer = make_trainer(
        tmp_path, push_to_hub=True, hub_model_id="me/net", hub_private_repo=True, save_strategy="epoch"
    )
    trainer.train()
    assert hub.requests == []
    trainer.push_to_hub()
    (commit,) = hub.pushed("me/net")
    assert commit.changed == {"config.json", "model.safetensors"} and hub.repositories["me/net"].private
    assert trainer.push_to_hub().endswith(commit.id) and len(hub.pushed("me/net")) == 1
    for unsupported in ({"blocking": False}, {"dataset": "x"}):
        with pytest.raises(ValueError, match="takes no"):
            trainer.push_to_hub(**unsupported)


def test_a_finished_run_has_the_card_of_its_repository_before_it_is_sent(hub, tmp_path):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_model_id="me/net", num_train_epochs=1)
    trainer.train()
    trainer.finish(dataset={"name": "trees"}, base_model="google/vit", command="python train.py")
    facts = read_facts(tmp_path)
    assert hub.repositories == {} and (facts.model_id, facts.on_hub) == ("me/net", True)
    assert (facts.base_model, facts.command) == ("google/vit", "python train.py")
    trainer.push_to_hub()
    (commit,) = hub.pushed("me/net")
    assert {"README.md", "model.safetensors", "all_results.json"} <= commit.changed


@pytest.mark.parametrize(("name", "words"), [(None, r"`hub_model_id` .=None."), ("net", "must be user/name")])
def test_a_trainer_refuses_a_name_before_it_trains(hub, tmp_path, name, words):
    with pytest.raises(HubError, match=words):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id=name)


def test_a_token_is_no_argument(tmp_path):
    with pytest.raises(ValueError, match=r"`hub_token`.*hf auth login"):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id="me/net", hub_token="hf_x")


# The recipe


@pytest.mark.slow
def test_a_run_is_published_under_its_name_with_its_card(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["finetune", *SHORT, *PUBLISH, "--hub_private_repo", "true", "--hub_revision", "v1", "--output_dir", "run"])
    (commit,) = hub.pushed("me/net")
    assert hub.repositories["me/net"].branches["v1"] == commit.id and hub.repositories["me/net"].private
    assert f"published: {hub.url}/me/net/commit/{commit.id}" in capsys.readouterr().out
    assert commit.changed == {
        "config.json", "model.safetensors", "README.md", "all_results.json", "class_counts.png", "recalls.png"
    }  # fmt: skip
    for line in ('model="me/net"', "hf-hub:me/net", 'from_pretrained("me/net")'):
        assert line in text(hub)
    for content in (file.content for file in commit.files.values()):
        assert str(tmp_path).encode() not in content and hub.token.encode() not in content


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a run, with its card."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("run")
    write_card("run", card_facts(recalls=[0.5, 0.1], row_counts=[10, 10]))
    return Path("run")


def test_a_run_gives_its_card_to_a_model_that_was_published_without_one(hub, finished):
    make_model().push_to_hub("me/net")
    publish(finished, "me/net")
    assert "## Results" in text(hub) and "etf_adapt: short" not in text(hub)


@pytest.mark.slow
def test_a_run_that_cannot_be_published_is_finished_and_one_command_carries_on(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub.fail("POST", "/commit/", status=503, times=math.inf)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", *SHORT, *PUBLISH, "--output_dir", "run"])
    said = capsys.readouterr().err
    assert caught.value.code == 3 and "trained and saved, but not published" in said
    assert json.loads(Path("run/all_results.json").read_text())["test_balanced_accuracy"] > 0.1
    hub.heal()
    main(shlex.split(said.split("To carry on: ")[1].splitlines()[0])[1:])
    assert len(hub.pushed("me/net")) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push_to_hub"], "needs the name of a repository: add --hub_model_id user/name"),
        (["--push_to_hub", "--hub_model_id", "net"], "`repo_id` .='net'. must be user/name"),
        ([*PUBLISH, "--hub_token", "hf_x"], "`hub_token`"),
    ],
)
def test_what_cannot_be_published_is_told_before_anything_else(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", *SHORT, *flags, "--output_dir", "run"])
    assert caught.value.code == 2 and re.search(words, capsys.readouterr().err) and not Path("run").exists()


def test_no_token_is_told_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit):
        main(["finetune", *SHORT, *PUBLISH, "--output_dir", "run"])
    assert "no token was found" in capsys.readouterr().err and not Path("run").exists()


STOCK = """
import sys
sys.modules["etf_adapt"] = None
import timm, torch
from transformers import pipeline
from PIL import Image
photo = Image.new("RGB", (300, 200), (10, 200, 30))
[first, *_] = pipeline("image-classification", model="me/net", device="cpu")(photo)
model = timm.create_model("hf-hub:me/net", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
image = timm.data.create_transform(**data, is_training=False)(photo).unsqueeze(0)
print(first["label"] == model.pretrained_cfg["label_names"][int(model(image).argmax())])
"""


@pytest.mark.slow
def test_a_short_name_goes_from_download_to_a_model_on_the_hub(hub, tmp_path):
    """The command of the first page, with a repository of the model's real layout; its weights are random."""
    import timm
    from timm.models import save_for_hf

    name = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    model = timm.create_model(name.split(".")[0], num_classes=1000)
    model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    del model
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.seed(f"timm/{name}", files)
    command = [
        os.path.join(os.path.dirname(sys.executable), "accelerate"), "launch", str(ROOT / "recipes/finetune.py"),
        "--model", "vit_base", "--head", "etf", "--max_train_rows", "10", "--max_steps", "1",
        "--per_device_train_batch_size", "2",
        "--evaluate_test", "false", "--validation_fraction", "0", "--realign", "never", "--output_dir", "run", *PUBLISH,
    ]  # fmt: skip
    environment = hub.environment(tmp_path / "home", HF_TOKEN=hub.token)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (commit,) = hub.pushed("me/net")
    assert {"config.json", "model.safetensors", "README.md"} <= commit.changed
    assert ModelCard(text(hub)).data.base_model == f"timm/{name}"
    read = subprocess.run([sys.executable, "-c", STOCK], env=environment, capture_output=True, text=True, timeout=600)
    assert read.stdout.split()[-1:] == ["True"], read.stderr[-3000:]
