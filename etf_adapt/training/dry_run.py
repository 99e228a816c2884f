"""What a run would do, from a few batches: its steps, and how long it takes and how much memory it needs."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device

from etf_adapt.heads.in_model import evaluation_mode
from etf_adapt.training.messages import count_rows, describe_run

if TYPE_CHECKING:
    from datasets import Dataset

    from etf_adapt.data.load import ClassificationData
    from etf_adapt.training.trainer import ETFTrainer

MEASURED_STEPS = 3  # of which the first, with its allocations and compilation, does not count
EXAMPLES = 3
ADAM_STATE = 2  # moments of each trained parameter


def dry_run(trainer: ETFTrainer, data: ClassificationData) -> list[str]:
    """Describe a run, and estimate its time and memory from a few steps without an update, on each process."""
    args, model = trainer.args, trainer.model
    loader = trainer.get_train_dataloader()
    batches = list(islice(cycle(loader), MEASURED_STEPS))
    per_epoch = max(1, len(loader) // args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else round(per_epoch * cast(float, args.num_train_epochs))
    epochs = steps / per_epoch

    model.train()
    step_seconds = [_seconds(lambda batch=batch: _step(trainer, batch)) for batch in batches]
    model.zero_grad()
    with evaluation_mode(model):
        read_seconds = [_seconds(lambda batch=batch: _read(model, batch, args.device)) for batch in batches]
    rows_per_second = args.train_batch_size * args.world_size / max(min(read_seconds[1:]), 1e-9)
    is_once = trainer.realignment == "steps" and not args.load_best_model_at_end
    passes = 0 if trainer.realignment == "never" else 1 if is_once else math.ceil(epochs)
    alignments = int(trainer.needs_alignment()) + passes
    evaluated = (count_rows(trainer.eval_dataset) or 0) * (epochs if args.eval_strategy != "no" else 0)
    sample = trainer.sampled_rows()
    rows_read = alignments * ((count_rows(trainer.train_dataset) or 0) if sample is None else len(sample)) + evaluated
    seconds = steps * args.gradient_accumulation_steps * min(step_seconds[1:]) + rows_read / rows_per_second
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    memory = _peak_memory(args.device) + ADAM_STATE * trained
    return [
        *(f"example: {line}" for line in examples(data.train, data.label_names)),
        *describe_run(trainer),
        f"steps: {steps:,} ({epochs:.4g} epochs of {per_epoch:,}); {alignments} passes over the rows to set the head",
        f"time: about {_duration(seconds)} after the start: {min(step_seconds[1:]):.3g} s a step, "
        f"{rows_per_second:,.0f} rows a second without gradients",
        f"memory: about {memory / 2**30:.2g} GB of each {args.device.type}, with the optimizer's state",
    ]


def examples(rows: Dataset, label_names: Sequence[str]) -> list[str]:
    """Describe the first rows: class, and text or size of the image."""
    lines = []
    for row in rows.select(range(min(EXAMPLES, len(rows)))):
        shown = "image of {} x {} pixels".format(*row["image"].size) if "image" in row else repr(row["text"])[:80]
        lines.append(f"{label_names[row['label']]}: {shown}")
    return lines


def _step(trainer: ETFTrainer, batch: dict[str, Any]) -> None:
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    trainer.accelerator.backward(loss)


def _read(model: Any, batch: dict[str, Any], device: torch.device) -> None:
    model(**send_to_device({name: batch[name] for name in batch if name not in ("labels", "row_id")}, device))


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
