"""The published setting: its schedule, its network, and a run of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import published_setting  # noqa: E402


def test_the_schedule_is_the_published_one():
    factors = [published_setting.learning_rate_factor(epoch, 200) for epoch in range(200)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[160] == 1.0 and factors[161] == pytest.approx(0.1) and factors[180] == pytest.approx(0.1)
    assert factors[181] == factors[199] == pytest.approx(0.01)
    short = [published_setting.learning_rate_factor(epoch, 20) for epoch in range(20)]
    assert short == [factors[10 * epoch] for epoch in range(20)]


def test_the_network_halves_the_image_twice_and_has_32_layers():
    import cifar_resnet
    import timm

    model = timm.create_model(cifar_resnet.NAME, num_classes=10).eval()
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 128, 8, 8)
    weighted = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == 32 and model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def save_pictures(folder: Path) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    for split, rows in (("train", 60), ("test", 6)):
        images = [PILImage.new("RGB", (32, 32), colours[row % 3]) for row in range(rows)]
        pictures = Dataset.from_dict({"image": images, "label": [row % 3 for row in range(rows)]}, features=features)
        folder.mkdir(exist_ok=True)
        pictures.to_parquet(str(folder / f"{split}.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("method", published_setting.METHODS)
def test_each_method_runs(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "pictures")
    flags = ["--dataset", "pictures", "--method", method, "--imbalance_factor", "4", "--torch_threads", "1"]
    flags += ["--num_train_epochs", "2", "--output_dir", "run"]
    published_setting.main(flags)
    found = json.loads(Path("run/all_results.json").read_text())
    assert found["train_rows"] == 35 and 0.0 <= found["test_balanced_accuracy"] <= 1.0 and found["epoch"] == 2.0
    if method == "etf_dr":
        published_setting.main([*flags, "--resume", "true"])
        assert json.loads(Path("run/all_results.json").read_text())["test_accuracy"] == found["test_accuracy"]


def test_the_table_is_of_the_finished_runs_by_method_and_factor(tmp_path, capsys):
    for name, method, accuracy in (("a", "etf_dr", 0.5), ("b", "etf_dr", 0.7), ("c", "linear_ce", 0.25)):
        scores = {f"test_{score}": 0.1 for score in published_setting.SCORES}
        found = {**scores, "test_accuracy": accuracy, "train_rows": 1234}
        arguments = {"method": method, "imbalance_factor": 100.0, "num_train_epochs": 200.0}
        (tmp_path / name).mkdir()
        (tmp_path / name / "all_results.json").write_text(json.dumps(found))
        (tmp_path / name / "arguments.json").write_text(json.dumps(arguments))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "all_results.json").write_text('{"test_accuracy": 0.9}')
    (tmp_path / "finetuned" / "arguments.json").write_text('{"head": "etf"}')
    published_setting.main(["--table", str(tmp_path)])
    _, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("| etf_dr | 100 | 1,234 | 200 | 2 | 60.0 ± 14.1 | 10.0 ± 0.0 |")
    assert second.startswith("| linear_ce | 100 | 1,234 | 200 | 1 | 25.0 | 10.0 |")


@pytest.mark.parametrize(("flags", "said"), [(["--table", "."], "no finished run"), ([], "must name CIFAR-100")])
def test_what_is_missing_is_told(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        published_setting.main(flags)
    assert said in capsys.readouterr().err


def test_an_unknown_method_is_told_at_once(capsys):
    with pytest.raises(SystemExit) as stop:
        published_setting.main(["--dataset", "digits", "--method", "etf_rd"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "did you mean 'etf_dr'" in said
