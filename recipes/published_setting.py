"""Run the setting of the published method: long-tailed CIFAR-100, from scratch, on a ResNet-32 of double width.

    python recipes/published_setting.py --dataset $DATA/cifar100 --method etf_dr --seed 0
    python recipes/published_setting.py --dataset uoft-cs/cifar100 --label_column fine_label --method linear_ce
    python recipes/published_setting.py --dataset $DATA/cifar100 --method etf_dr --num_train_epochs 2     # a look, on a CPU
    python recipes/published_setting.py --dataset $DATA/cifar100 --method etf_dr --seed 0 --resume true   # after a stop
    python recipes/published_setting.py --table out                # of the finished runs in a folder; runs nothing

From Yang et al. (2022, https://arxiv.org/abs/2203.09081) and their published code: 200 epochs of batches of 128, SGD
with momentum 0.9, weight decay 2e-4, learning rate 0.1 after 5 epochs of warm-up, a tenth of it after epoch 160 and a
hundredth after 180, crops with a margin of 4 pixels, mirroring, mixup with alpha 1 always, no resampling; BatchNorm
and a unit feature before the fixed frame. The methods are `etf_dr` (dot regression, in-batch class balance), `etf_ce`
(cross-entropy on the same head) and `linear_ce` (a linear layer that learns).

Where this differs, on purpose: the frame is a uniform draw and seeded; weight and bias of the linear layer learn
(theirs, in these configurations, do not); cross-entropy on the frame uses vertices of length one (theirs have lengths
that change with each batch); the last epoch is scored, once (theirs is the best of all epochs on the test split).
Shot groups are thirds of the classes by training count. `$DATA/cifar100` holds 200 training images a class at most,
where the whole data set has 500: say so beside every figure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from comparison import format_markdown, format_spread, mean_and_deviation

from etf_adapt import errors
from etf_adapt.commands.dataclass_parser import Parser
from etf_adapt.results import run_folder, tables

METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "etf_dr": ("paper", None),  # the head's own loss
    "etf_ce": ("paper", {"name": "cross_entropy"}),
    "linear_ce": ("linear", {"name": "cross_entropy"}),
}
EPOCHS, WARM_UP, DROPS = 200, 5, (160, 180)
SCORES = ("accuracy", "macro_f1", "head_third", "middle_third", "tail_third", "ece")


@dataclass
class Arguments:
    """What may be chosen; all else is the published setting."""

    dataset: str | None = field(default=None, metadata={"help": "CIFAR-100: a Hub id, file or folder."})
    method: Literal["etf_dr", "etf_ce", "linear_ce"] = field(default="etf_dr", metadata={"help": "Head and loss."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it is not found."})
    imbalance_factor: float = field(default=100.0, metadata={"help": "The paper's are 200, 100 and 50."})
    num_train_epochs: float = field(default=float(EPOCHS), metadata={"help": "The schedule is stretched to these."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most so many rows."})
    seed: int = field(default=0, metadata={"help": "Of rows, weights, frame and augmentation."})
    output_dir: str | None = field(
        default=None, metadata={"help": "By default out/published-<method>-<factor>-<seed>."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in output_dir."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    torch_threads: int | None = field(default=None, metadata={"help": "CPU threads."})
    table: str | None = field(default=None, metadata={"help": "Only print the table of the runs in this folder."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe on command-line arguments."""
    with errors.one_line_errors(stopped="stopped; --resume true goes on from the newest checkpoint"):
        parser = Parser([Arguments], description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
        (args,) = parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))
        if args.table is not None:
            print(table(Path(args.table)))
            return
        if args.dataset is None:
            raise ValueError("`dataset` (=None) must name CIFAR-100: a Hub id, file or folder.")
        name = f"published-{args.method}-{args.imbalance_factor:g}-{args.seed}"
        args.output_dir = args.output_dir or str(Path("out", name))
        run_folder.check_output_dir(args.output_dir, resume=args.resume)
        run(args)


def run(args: Arguments) -> None:
    """Prepare data and network, train from scratch, score the last epoch, and report."""
    import cifar_resnet  # timm knows the network from here on
    import torch
    import transformers

    from etf_adapt.data.image_dataset import ImageDataset
    from etf_adapt.data.load import load_data
    from etf_adapt.models.auto import ETFForImageClassification
    from etf_adapt.training.arguments import ETFTrainingArguments

    # Data: the long tail of the field, no validation rows, the published augmentation.
    data = load_data(
        args.dataset,
        label_column=args.label_column,
        imbalance_factor=args.imbalance_factor,
        max_train_rows=args.max_train_rows,
        validation_fraction=0.0,
        seed=args.seed,
    )
    if data.test is None:
        raise ValueError(f"`dataset` (={args.dataset!r}) must have a test split: it is what is scored.")
    train, plain = published_transforms()

    # Network, from random weights.
    transformers.set_seed(args.seed)
    head, loss = METHODS[args.method]
    model = ETFForImageClassification.from_pretrained(
        f"timm/{cifar_resnet.NAME}",
        num_labels=len(data.label_names),
        head=head,
        loss=loss,
        pretrained=False,
        seed=args.seed,
    )

    # Train, and score the last epoch.
    settings = ETFTrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=128,
        learning_rate=0.1,
        mixup=1.0,
        frame="random",
        batch_norm="train",
        eval_strategy="no",
        seed=args.seed,
        bf16=args.bf16,
        dataloader_num_workers=args.dataloader_num_workers,
        dataloader_persistent_workers=args.dataloader_num_workers > 0,  # the epochs are short
        torch_threads=args.torch_threads,
    )
    run_folder.write_json(Path(args.output_dir, run_folder.ARGUMENTS_FILE), run_folder.public_arguments(args))
    rows = ImageDataset(data.train, train, seed=args.seed)
    trainer = trainer_class()(model, settings, train_dataset=rows, labels=data.train["label"])
    outcome = trainer.train(resume_from_checkpoint=args.resume or None)
    scores = trainer.predict(ImageDataset(data.test, plain), metric_key_prefix="test").metrics

    # Report.
    if trainer.is_world_process_zero():
        found = {**outcome.metrics, **scores, "train_rows": len(rows), "torch": torch.__version__}
        run_folder.write_json(Path(args.output_dir, run_folder.RESULTS_FILE), found)
        named = ("accuracy", "balanced_accuracy", "head_third", "middle_third", "tail_third")
        scored = ", ".join(f"{name.replace('_', ' ')} {tables.percent(scores[f'test_{name}'])}" for name in named)
        print(f"\n{args.method}, {len(rows):,} training rows: {scored}\n{args.output_dir}")


def table(folder: Path) -> str:
    """Return the table of the finished runs in a folder: test scores, mean ± standard deviation over seeds, in per cent."""
    groups: dict[tuple[str, float, float, int], list[dict[str, Any]]] = {}
    for results in sorted(folder.glob(f"*/{run_folder.RESULTS_FILE}")):
        found = json.loads(results.read_text())
        made = json.loads(results.with_name(run_folder.ARGUMENTS_FILE).read_text())
        if "method" not in made:  # a run of finetune.py
            continue
        row = made["method"], made["imbalance_factor"], made["num_train_epochs"], found["train_rows"]
        groups.setdefault(row, []).append(found)
    if not groups:
        raise FileNotFoundError(f"`table` (={str(folder)!r}) holds no finished run: give the folder of their folders.")
    rows = []
    for (method, factor, epochs, train_rows), runs in sorted(groups.items()):
        spreads = [format_spread(mean_and_deviation([run[f"test_{name}"] for run in runs])) for name in SCORES]
        rows.append([method, f"{factor:g}", f"{train_rows:,}", f"{epochs:g}", str(len(runs)), *spreads])
    named = [name.replace("_", " ") for name in SCORES]
    return format_markdown(["method", "imbalance", "training rows", "epochs", "runs", *named], rows)


def published_transforms() -> tuple[Any, Any]:
    """Return the transforms of training images and of test images (32 x 32)."""
    import torch
    from cifar_resnet import MEAN, STD
    from torchvision.transforms import v2

    finish = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *finish]), v2.Compose(finish)


def learning_rate_factor(epoch: int, num_epochs: float) -> float:
    """Return the learning rate of an epoch (from 0) over its peak, by the published schedule stretched to `num_epochs`."""
    published = epoch * EPOCHS / num_epochs
    if published < WARM_UP:
        return (int(published) + 1) / WARM_UP
    return 0.1 ** sum(published > drop for drop in DROPS)


def trainer_class() -> type:
    """Return the trainer with the published optimizer and schedule."""
    import torch

    from etf_adapt.training.trainer import ETFTrainer

    class PublishedTrainer(ETFTrainer):
        """Train by SGD with weight decay on all that learns, and the published schedule."""

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            """Make the optimizer."""
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.SGD(trained, lr=self.args.learning_rate, momentum=0.9, weight_decay=2e-4)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """Make the schedule: one learning rate for each epoch."""
            epochs = self.args.num_train_epochs
            steps = max(1, round(num_training_steps / epochs))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: learning_rate_factor(step // steps, epochs)
            )
            return self.lr_scheduler

    return PublishedTrainer


if __name__ == "__main__":
    main()
