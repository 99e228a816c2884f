"""Pretrain `micro`, the backbone of at most 2 MB inside the package, on CIFAR-100 images.

    python recipes/pretrain_micro.py --data $DATA/cifar100

`--data` is a folder with train and test parquet files (columns `image` and `label`, a ClassLabel). The output is a
folder in timm hub layout with its README. The shipped weights saw every training row; `--held_out 20` keeps the last 20
training rows a class aside and reports on them: for choosing. The test rows are scored once, at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

# ResNet-18-D, narrow and without its last stage: a 32 px image is 16x16 in the stem, then 8x8, 4x4 and 2x2.
ARCHITECTURE = "resnet18d"
MODEL_ARGS: dict[str, Any] = {"layers": [2, 2, 1, 0], "channels": [48, 112, 160, 160], "stem_width": 24}
IMAGE_SIZE, PADDING = 32, 4
MEAN, STD = [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]  # of the CIFAR-100 training pixels

README = """\
---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
datasets: [cifar100]
---
# micro

A small image backbone, the default model of etf_adapt: timm's `{architecture}` with
`{model_args}`:
{parameters:,} parameters, {macs:.1f} million multiply-adds at 32 x 32 px. Matrices are stored in float16, vectors in
float32; it loads as float32.

- Accuracy on the {test_rows:,} CIFAR-100 test rows, on the stored weights, nothing chosen on them: **{accuracy:.2%}**.
- Trained on {train_rows:,} official CIFAR-100 training images (the first 200 of each class in official order; the test
  rows are the first 50 of each class). `micro` saw CIFAR-100 training images: it stands in no CIFAR-100 table.
- Command: `python recipes/pretrain_micro.py --data $DATA/cifar100`, with
  {options}.
- {date}, {minutes:.0f} minutes on {threads} CPU cores ({cpu}); torch {torch}, timm {timm}.
- Licence: weights Apache-2.0. The authors of CIFAR-100 state no licence; it is free for research with citation
  (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto, 2009).
- Load: `timm.create_model("local-dir:<this folder>", pretrained=True)`, or
  `transformers.AutoModelForImageClassification.from_pretrained("<this folder>")`.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parents[1] / "etf_adapt" / "micro")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=0.15, help="peak of the one-cycle schedule")
    parser.add_argument("--weight_decay", type=float, default=5e-4, help="of matrices; vectors have none")
    parser.add_argument("--label_smoothing", type=float, default=0.1)
    parser.add_argument("--mixup_alpha", type=float, default=0.2)
    parser.add_argument("--held_out", type=int, default=0, help="last training rows of each class kept for choosing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Decode one split: images (rows, 32, 32, 3) uint8, labels (rows,), class names."""
    files = sorted(str(path) for path in folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"`--data` (={folder}) holds no {split}-*.parquet; name the folder of both splits.")
    table = datasets.Dataset.from_parquet(files)
    images = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
    return torch.from_numpy(images), torch.tensor(table["label"]), table.features["label"].names


def last_rows(labels: Tensor, rows_per_class: int) -> Tensor:
    """Mark the last `rows_per_class` rows of each class: (rows,) bool."""
    later = functional.one_hot(labels).flip(0).cumsum(0).flip(0)  # rows of each class from here to the end
    return later.gather(1, labels[:, None])[:, 0] <= rows_per_class


def normalise(images: Tensor) -> Tensor:
    """Turn (batch, 32, 32, 3) uint8 into (batch, 3, 32, 32) float32, channels last in memory."""
    return ((images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def crop_and_flip(padded: Tensor, rows: Tensor) -> Tensor:
    """Cut a random window from each padded image, mirrored half of the time: (batch, 32, 32, 3) uint8."""
    y, x = torch.randint(2 * PADDING + 1, (2, len(rows), 1)) + torch.arange(IMAGE_SIZE)  # (batch, 32) each
    x = torch.where(torch.rand(len(rows), 1) < 0.5, x, x.flip(1))
    return padded[rows[:, None, None], y[:, :, None], x[:, None, :]]


def train(model: nn.Module, images: Tensor, labels: Tensor, settings: argparse.Namespace) -> None:
    """Run SGD with one cycle of the learning rate, mixup and label smoothing."""
    padded = functional.pad(images.permute(0, 3, 1, 2).float(), [PADDING] * 4, mode="reflect")
    padded = padded.byte().permute(0, 2, 3, 1).contiguous()  # (rows, 40, 40, 3)
    held_out = last_rows(labels, settings.held_out)
    rows_to_train = torch.nonzero(~held_out)[:, 0]
    steps = len(rows_to_train) // settings.batch_size

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    mixup = torch.distributions.Beta(settings.mixup_alpha, settings.mixup_alpha)
    started = time.perf_counter()
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total = 0.0
        order = rows_to_train[torch.randperm(len(rows_to_train))]
        for rows in order[: steps * settings.batch_size].view(steps, settings.batch_size):
            inputs, targets = normalise(crop_and_flip(padded, rows)), labels[rows]
            share = mixup.sample()
            logits = model(share * inputs + (1 - share) * inputs.flip(0))
            loss = share * criterion(logits, targets) + (1 - share) * criterion(logits, targets.flip(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        line = f"epoch {epoch}/{settings.epochs}  loss {total / steps:.3f}  {time.perf_counter() - started:.0f} s"
        if settings.held_out:
            line += f"  held out {accuracy(model, images[held_out], labels[held_out]):.2%}"
        print(line, flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Score the rows in eval mode."""
    model.eval()
    predictions = torch.cat([model(normalise(batch)).argmax(1) for batch in images.split(500)])
    return (predictions == labels).float().mean().item()


@torch.no_grad()
def multiply_adds(model: nn.Module) -> int:
    """Count the multiply-adds of the matrices on one image."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        counts.append(output.numel() // output.shape[1] * layer.get_parameter("weight").numel())

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model.eval()
    model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    for handle in handles:
        handle.remove()
    return sum(counts)


def save(model: nn.Module, label_names: list[str], folder: Path) -> None:
    """Write config.json and model.safetensors in timm hub layout, each file in one step."""
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(label_names),
        "num_features": model.num_features,
        "global_pool": "avg",
        "dtype": "float32",  # else transformers takes the dtype of the first stored tensor for the whole model
        "label_names": label_names,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "cifar100",
            "custom_load": False,
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": len(label_names),
            "pool_size": [2, 2],
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
        },
    }
    tensors = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).contiguous() for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "new.safetensors", metadata={"format": "pt"})
    os.replace(folder / "new.safetensors", folder / "model.safetensors")
    (folder / "new.json").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "new.json", folder / "config.json")


def main() -> None:
    settings = parse()
    started = time.perf_counter()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    images, labels, label_names = read_split(settings.data, "train")
    test_images, test_labels, _ = read_split(settings.data, "test")

    model = timm.create_model(ARCHITECTURE, num_classes=len(label_names), **MODEL_ARGS)
    model = model.to(memory_format=torch.channels_last)
    train(model, images, labels, settings)
    save(model, label_names, settings.output_dir)

    stored = timm.create_model(f"local-dir:{settings.output_dir}", pretrained=True)
    options = {name: value for name, value in vars(settings).items() if name not in ("data", "output_dir")}
    facts = {
        "architecture": ARCHITECTURE,
        "model_args": json.dumps(MODEL_ARGS),
        "parameters": sum(parameter.numel() for parameter in stored.parameters()),
        "macs": multiply_adds(stored) / 1e6,
        "test_rows": len(test_labels),
        "accuracy": accuracy(stored, test_images, test_labels),
        "train_rows": len(labels) - settings.held_out * len(label_names),
        "options": ", ".join(f"{name} {value}" for name, value in options.items()),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": (time.perf_counter() - started) / 60,
        "threads": settings.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    (settings.output_dir / "README.md").write_text(README.format(**facts))
    print(f"test accuracy {facts['accuracy']:.2%}; wrote {settings.output_dir}")


if __name__ == "__main__":
    main()
