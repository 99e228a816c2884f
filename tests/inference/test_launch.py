"""How many processes read images where nobody says, and that all that read images ask for it; memory that is kept."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from small_run import NoisyRows, collate, make_model, make_trainer

from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.inference import classifier, finished_model, launch
from etf_adapt.training import budget

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "method", "cores", "shared", "pass_bytes", "expected"),
    [
        (GPU, None, 16, 1e9, 320, 8),
        (torch.device("xpu"), "fork", 4, 1e9, 320, 3),
        (GPU, "fork", 1, 1e9, 320, 0),
        (GPU, "fork", 16, 3 * 2 * 2 * 10 * 64, 320, 3),  # three processes of batches of ten rows
        (GPU, "fork", 16, 100, 320, 0),  # a container's shared memory
        (GPU, "fork", 16, 1e9, 321, 0),  # a pass that is soon done
        (GPU, "forkserver", 16, 1e9, 320, 0),
        (torch.device("cpu"), "fork", 16, 1e9, 320, 0),
        (torch.device("mps"), "fork", 16, 1e9, 320, 0),
    ],
)
def test_many_images_beside_a_gpu_are_read_by_several_processes(
    tmp_path, monkeypatch, device, method, cores, shared, pass_bytes, expected
):
    monkeypatch.setattr(launch, "usable_cores", lambda: cores)
    monkeypatch.setattr(launch, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(launch, "MIN_PASS_BYTES", pass_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=shared))
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: method)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["fork", "spawn"])
    assert launch.choose_num_workers(5, 64, batch_size=10, device=device) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # which share the memory
    if shared < 1e9:
        assert launch.choose_num_workers(5, 64, batch_size=10, device=device) == expected // 3


@pytest.fixture(scope="module")
def images():
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [PILImage.new("RGB", (4, 4))] * 5, "label": [0] * 5}, features=features)


def flat(image):
    return torch.zeros(1, 4, 4)  # 64 bytes


def asked(monkeypatch, module):
    calls = []
    monkeypatch.setattr(module, "choose_num_workers", lambda *size: calls.append(size) or 0)
    return calls


def test_training_asks_by_the_rows_of_a_pass(images, tmp_path, monkeypatch):
    args = make_trainer(tmp_path, dataloader_num_workers=None, per_device_eval_batch_size=9).args
    assert args.dataloader_num_workers == 0
    args.dataloader_num_workers, calls = None, asked(monkeypatch, budget)
    budget.fill_budget(args, 5, ImageDataset(images, flat))
    args.dataloader_num_workers = 3
    budget.fill_budget(args, 5, ImageDataset(images, flat))
    assert args.dataloader_num_workers == 3
    assert calls == [(5, 64, max(9, args.train_batch_size), args.device)]


def test_reading_a_trained_models_rows_asks_too(monkeypatch):
    calls, rows = asked(monkeypatch, finished_model), NoisyRows((9, 5, 3), seed=0)
    rows.row_bytes, rows.dataset = 80, {"label": rows.labels}
    for workers in (None, 0):
        finished_model.read_classes(make_model(), rows, collate, range(3), 3, batch_size=4, num_workers=workers)
    assert calls == [(17, 80, 4, torch.device("cpu"))]


def test_predicting_asks_by_the_inputs_that_are_known(images, monkeypatch):
    calls = asked(monkeypatch, classifier)
    monkeypatch.setattr(classifier, "image_transforms", lambda processor, train: flat)
    found = classifier.Classifier(torch.nn.Identity(), None, "image", [], torch.device("cpu"))
    for inputs in ([image["image"] for image in images], iter([])):
        list(found.batches(inputs, batch_size=2))
    list(found.batches([], num_workers=0))
    assert [size[:3] for size in calls] == [(5, 64, 2), (0, 64, 2)]


MEMORY = """
import torch
from pathlib import Path
from etf_adapt.inference.launch import give_back_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if keep_freed_memory():
    torch.ones(2**26), torch.ones(8)
    kept = resident()
    give_back_memory()
    print(kept - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to read the memory of a process")
def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("needs glibc")
    assert float(done.stdout) > 250  # MB, of 256
