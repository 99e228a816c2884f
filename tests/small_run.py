"""A run of a few seconds: noisy images of three uneven classes and a ViT of 3,000 weights; a module and a program.

As a program it takes one JSON argument: the keywords of ``make_trainer``, and ``resume``, ``kill_at`` (a step at which the
process kills itself), ``unreadable`` (the data set, "eval" or "alignment", and which of its rows cannot be read) and ``record``
(a folder for the rows seen, the final weights and the metrics, or the error that ended the run).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from etf_adapt.errors import DataError
from etf_adapt.models.auto import adapt
from etf_adapt.training import aligning
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.trainer import ETFTrainer

COUNTS = (60, 21, 7)


class NoisyRows(Dataset):
    """Images (3, 8, 8): the pattern of the row's class and noise."""

    unreadable: int | None = None

    def __init__(self, counts: tuple[int, ...], seed: int) -> None:
        patterns = torch.randn(len(counts), 3, 8, 8, generator=torch.Generator().manual_seed(99))
        order = np.random.default_rng(seed).permutation(sum(counts))
        self.labels = np.repeat(np.arange(len(counts)), counts)[order]
        noise = torch.randn(len(order), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.images = patterns[self.labels] + noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row == self.unreadable:
            raise DataError(f"Row {row} cannot be read.")
        return {"pixel_values": self.images[row], "labels": int(self.labels[row]), "row_id": int(row)}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "row_id": torch.tensor([row["row_id"] for row in rows]),
    }


def make_model(num_classes: int = len(COUNTS), *, drop: float = 0.1, **head: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, hidden_dropout_prob=drop)
    return adapt(ViTForImageClassification(config), num_classes, **head)


def make_trainer(
    output_dir: str | Path,
    *,
    counts: tuple[int, ...] = COUNTS,
    eval_counts: tuple[int, ...] | None = None,
    model: Any = None,
    drop: float = 0.1,
    callbacks: tuple[TrainerCallback, ...] = (),
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    **settings: Any,
) -> ETFTrainer:
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    args = ETFTrainingArguments(output_dir=str(output_dir), **{**defaults, "torch_threads": 1, **settings})
    train = NoisyRows(tuple(counts), seed=0)
    return ETFTrainer(
        make_model(len(counts), drop=drop) if model is None else model,
        args,
        train_dataset=train,
        eval_dataset=eval_dataset or NoisyRows(tuple(eval_counts or [7] * len(counts)), seed=1),
        data_collator=collate,
        labels=train.labels,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def weights(trainer: ETFTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def run_program(
    settings: dict[str, Any],
    *,
    killed: bool = False,
    failed: bool = False,
    launcher: tuple[str, ...] = (sys.executable,),
) -> str:
    """Run this file; ``killed``: it must end by SIGKILL; ``failed``: its launcher must say that it did."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    command = [*launcher, __file__, json.dumps(settings)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == (-signal.SIGKILL if killed else 1 if failed else 0), done.stderr[-3000:]
    return done.stdout


class KillAt(TrainerCallback):
    """Kill this process, as no handler can catch it, when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(settings: dict[str, Any]) -> None:
    resume, kill_at, record = settings.pop("resume", None), settings.pop("kill_at", None), settings.pop("record", None)
    unreadable = settings.pop("unreadable", None)
    trainer = make_trainer(**settings, callbacks=() if kill_at is None else (KillAt(kill_at),))
    if unreadable is not None:
        name, row = unreadable
        trainer.alignment_dataset = copy(trainer.train_dataset)
        getattr(trainer, f"{name}_dataset").unreadable = row
    seen: list[list[int]] = []
    step = trainer.training_step

    def recorded(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append(inputs["row_id"].tolist())
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = recorded
    rank = trainer.args.process_index
    try:
        trainer.train(resume)
    except DataError as error:
        Path(record, f"{rank}.txt").write_text(str(error))
        return
    metrics = {name: value for name, value in trainer.evaluate().items() if "second" not in name and "time" not in name}
    if record is not None:
        folder = Path(record)
        folder.mkdir(exist_ok=True)
        logits = trainer.predict(trainer.eval_dataset).predictions.tolist()
        (folder / f"{rank}.json").write_text(json.dumps({"rows": seen, "metrics": metrics, "logits": logits}))
        if rank == 0:
            save_file(
                {name: value.contiguous() for name, value in weights(trainer).items()}, folder / "weights.safetensors"
            )
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    aligning.MIN_READ_ROWS = 1
    main(json.loads(sys.argv[1]))
