"""A sample of the sweep over all models: each kind of head that there is, the refused, and one too large to hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import support

SAMPLE = {
    "image": {
        "ViTForImageClassification": ["classifier"],
        "ResNetForImageClassification": ["classifier.1"],
        "LevitForImageClassificationWithTeacher": ["classifier.linear", "classifier_distill.linear"],
    },
    "text": {
        "BertForSequenceClassification": ["classifier"],
        "RobertaForSequenceClassification": ["classifier.out_proj"],
        "GPT2ForSequenceClassification": ["score"],
        "BartForSequenceClassification": ["classification_head.out_proj"],
    },
    "encoder": {"DINOv3ViTModel": ["classifier"], "SiglipVisionModel": ["classifier"], "ViTMAEModel": []},
    "timm": {
        "test_vit": ["timm_model.head"],
        "test_resnet": ["timm_model.fc"],
        "dpn48b": ["timm_model.classifier"],  # a convolution
        "caformer_s18": ["timm_model.head.fc.fc2"],
        "levit_128s": ["timm_model.head.linear", "timm_model.head_dist.linear"],
        "vit_huge_patch14_224": ["head"],  # on the meta device
        "gemma4_vit_167m_enc": [],
    },
}


@pytest.mark.slow
def test_every_name_and_class_is_listed_once():
    listed = {kind: [name for name, _ in support.names(kind)] for kind in support.KINDS}
    assert all(len(set(names)) == len(names) for names in listed.values())
    assert len(listed["timm"]) > 1300 and len(listed["text"]) > 120 and len(listed["image"]) > 40
    assert all(set(SAMPLE[kind]) <= set(names) for kind, names in listed.items())


@pytest.mark.slow
def test_a_sample_of_all_kinds_of_head(tmp_path):
    wanted = [name for models in SAMPLE.values() for name in models]
    flags = ["--results", str(tmp_path / "found"), "--table", str(tmp_path / "SUPPORT.md"), "--jobs", "2"]
    support.main([*flags, "--only", *wanted])
    for kind, models in SAMPLE.items():
        found = support.read(tmp_path / "found", kind)
        assert {name: record["heads"] for name, record in found.items()} == models
        for name, record in found.items():
            assert record["outcome"] == ("works" if models[name] else "refused"), record
    table = (tmp_path / "SUPPORT.md").read_text()
    assert "| timm's names | 7 | 6 | 1 | 0 | 0 | 5 | 1 |" in table and "gemma4_vit_167m_enc" in table
    before = {path.name: path.read_text() for path in (tmp_path / "found").iterdir()}
    support.main([*flags, "--only", *wanted])
    assert {path.name: path.read_text() for path in (tmp_path / "found").iterdir()} == before, "nothing is tried again"
    assert all(json.loads(line)["said"] != "" for line in before["timm.jsonl"].splitlines() if "refused" in line)
