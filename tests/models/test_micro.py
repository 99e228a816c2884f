"""The packaged backbone: small, stock in both libraries, and really pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from transformers import AutoModelForImageClassification

import etf_adapt

FOLDER = Path(etf_adapt.__file__).parent / "micro"


@pytest.fixture(scope="module")
def micro() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()


def normalised(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    config = resolve_model_data_config(model)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)  # (rows, 3, height, width)


def test_the_folder_is_at_most_two_megabytes_and_holds_no_pickle() -> None:
    files = sorted(path.name for path in FOLDER.iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert sum((FOLDER / name).stat().st_size for name in files) <= 2_000_000


def test_the_config_is_timm_hub_layout_that_transformers_accepts() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architecture"] in timm.list_models()
    assert "num_classes" not in config["model_args"]
    assert len(set(config["label_names"])) == config["num_classes"] == 100


def test_timm_and_transformers_read_the_same_float32_model(micro: torch.nn.Module) -> None:
    wrapped = AutoModelForImageClassification.from_pretrained(FOLDER).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert wrapped.dtype == torch.float32
    torch.testing.assert_close(wrapped(pixel_values=images).logits, micro(images), rtol=0, atol=0)
    assert list(wrapped.config.id2label.values()) == json.loads((FOLDER / "config.json").read_text())["label_names"]


def test_other_image_sizes_are_scored(micro: torch.nn.Module) -> None:
    for size in (16, 33, 64):
        assert micro(torch.zeros(2, 3, size, size)).shape == (2, 100)


def test_unseen_images_are_recognised(micro: torch.nn.Module, shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "cifar100" / "test-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path)).select(range(500))
    images = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    with torch.no_grad():
        predictions = micro(normalised(micro, images)).argmax(1)
    assert rows.features["label"].names == json.loads((FOLDER / "config.json").read_text())["label_names"]
    assert (predictions == torch.tensor(rows["label"])).float().mean() > 0.5  # 0.558 when written; chance is 0.01
