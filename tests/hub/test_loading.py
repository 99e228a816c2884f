"""Models of every kind and tables come back from a Hub by their names, models in stock libraries too, and again offline.

The models have random weights, that under the name ``timm/test_vit.r160_in1k`` too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from datasets import Dataset
from hub_loads import describe
from hub_server import HubServer
from small_models import save_tokenizer, stock_vit
from timm.models import save_for_hf

from etf_adapt.models.auto import adapt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """A Hub with models of every kind, and what each gives here for an image of ones."""

    def files_of(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def saved(model):
        folder = tmp_path_factory.mktemp("model")
        if hasattr(model, "config"):
            model.save_pretrained(folder)
        else:
            save_for_hf(model, str(folder), safe_serialization=True)
        return files_of(folder), describe(model)

    torch.manual_seed(1)
    made = {
        "me/vit": saved(stock_vit()),
        "me/adapted": saved(adapt(stock_vit(), 4).eval()),
        "me/secret": saved(stock_vit()),
        "me/net": saved(timm.create_model("test_vit", num_classes=4)),
        "timm/test_vit.r160_in1k": saved(timm.create_model("test_vit")),
    }
    other_files, other = saved(stock_vit())
    save_tokenizer(words := tmp_path_factory.mktemp("words"))
    with HubServer() as hub:
        for name, (files, _) in made.items():
            hub.seed(name, files, private=name == "me/secret")
        hub.seed("me/words", files_of(words) | {"config.json": b'{"model_type": "bert"}'})
        second = hub.seed("other", other_files).at("main")  # another commit of me/vit, on a branch
        hub.repositories["me/vit"].add("v2", "other weights", second.files, second.changed)
        yield hub, {name: described for name, (_, described) in made.items()} | {"v2": other}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_hub_is_the_one_that_went_up(stocked, loaded, kind):
    name, has_its_head = KINDS[kind]
    expected = stocked[1][name]
    assert loaded[kind]["features"] == pytest.approx(expected["features"], abs=1e-5)
    assert (loaded[kind]["logits"] == pytest.approx(expected["logits"], abs=1e-5)) is has_its_head


def test_tokenizers_and_image_sizes_come_with_their_models(loaded):
    assert (loaded["tokens"], loaded["processor"]) == ([3, 3], [3, 160, 160])


def test_what_was_loaded_once_is_loaded_offline_without_a_request(stocked, loaded, home):
    hub, _ = stocked
    before = len(hub.requests)
    offline = load(hub, home, HF_HUB_OFFLINE="1")
    assert offline == loaded and len(hub.requests) == before


CONFIGS = """---
configs:
- {config_name: one, data_files: [{split: train, path: a/x.jsonl}, {split: dev, path: a/y.jsonl}]}
- {config_name: two, data_files: b.jsonl}
---
"""
FORM = """---
configs:
- {config_name: default, data_files: c.csv, sep: "|"}
---
"""
TYPES = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {"0": ash, "1": birch}}}}
---
"""
READ = """
import json, sys
from etf_adapt.sources.opening import open_source
splits = {name: open_source(name).splits for name in sys.argv[1:]}
print(json.dumps({name: {split: rows.to_dict() for split, rows in found.items()} for name, found in splits.items()}))
"""


def test_tables_of_the_hub_are_read_as_local_ones_unless_their_types_or_form_are_stated(tmp_path):
    Dataset.from_dict({"text": ["a"], "label": [7]}).to_parquet(tmp_path / "train.parquet")
    with HubServer() as hub:
        hub.seed("me/rows", {"train.csv": b"text,label\na,001\n", "test.csv": b"text,label\nb,01\n"})
        lines = {"a/x.jsonl": b'{"text": "a", "label": "007"}\n', "a/y.jsonl": b'{"text": "b", "label": "07"}\n'}
        hub.seed("me/many", {"README.md": CONFIGS.encode(), "b.jsonl": b'{"text": "c", "label": "1"}\n', **lines})
        hub.seed("me/tabs", {"train.tsv": b'text\tlabel\n"a\t1.10\n'})
        hub.seed("me/bars", {"README.md": FORM.encode(), "c.csv": b"text|label\na|001\n"})
        hub.seed("me/typed", {"README.md": TYPES.encode(), "train.csv": b"text,label\na,1\n"})
        hub.seed("me/parquet", {"train.parquet": (tmp_path / "train.parquet").read_bytes()})
        names = ["me/rows", "me/many:one", "me/many:two", "me/tabs", "me/bars", "me/typed", "me/parquet"]

        def read(**changes):
            environment = hub.environment(tmp_path / "home", **changes)
            command = [sys.executable, "-c", READ, *names]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        found = read()
        assert found == {
            "me/rows": {"train": {"text": ["a"], "label": ["001"]}, "test": {"text": ["b"], "label": ["01"]}},
            "me/many:one": {"train": {"text": ["a"], "label": ["007"]}, "validation": {"text": ["b"], "label": ["07"]}},
            "me/many:two": {"train": {"text": ["c"], "label": ["1"]}},
            "me/tabs": {"train": {"text": ['"a'], "label": ["1.10"]}},
            "me/bars": {"train": {"text": ["a"], "label": [1]}},
            "me/typed": {"train": {"text": ["a"], "label": [1]}},
            "me/parquet": {"train": {"text": ["a"], "label": [7]}},
        }
        before = len(hub.requests)
        assert read(HF_HUB_OFFLINE="1") == found and len(hub.requests) == before
