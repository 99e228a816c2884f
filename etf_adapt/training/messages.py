"""Printed lines: what runs, and what an alignment did."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from accelerate import PartialState

from etf_adapt.inference.launch import unmet_requests
from etf_adapt.results.tables import percent


def describe_run(trainer: Any) -> list[str]:
    """Describe the run of an ``ETFTrainer``: processes, device, precision; rows and classes; head; parameters; sampling."""
    args, head, distributed_type = trainer.args, trainer.first_head, trainer.accelerator.distributed_type.value
    processes, threads = PartialState().num_processes, torch.get_num_threads()
    runs = f"{processes} process{'es' if processes > 1 else ''} of {threads} threads"
    kind = f" ({distributed_type})" if processes > 1 else ""
    mixed = f"{args.mixed_precision} autocast over float32 weights"
    precision = "float32" if args.mixed_precision == "no" else mixed
    counts = [] if trainer.class_counts is None else [rows for rows in trainer.class_counts.tolist() if rows]
    classes = f"{len(counts)} classes of {min(counts):,} to {max(counts):,} rows" if counts else "no classes"
    imbalance = f" (imbalance {max(counts) / min(counts):.4g})" if counts else ""
    held_out = count_rows(trainer.eval_dataset)
    validation = "" if held_out is None else f", {held_out:,} to validate"
    learns = "learned" if head.trainable else "fixed"
    intervals = {"steps": f"{trainer.realign_steps} steps, from what training reads", "epochs": "epoch"}
    if trainer.realignment in intervals:
        learns = f"fixed but for an alignment every {intervals[trainer.realignment]}"
    dropout = "; dropout off" if trainer.model.without_dropout else ""
    fresh = f"{args.frame if head.is_stock_layer else 'means'} frame to be set"
    frame = fresh if trainer.needs_alignment() else f"{head.frame} frame"
    sizes = {parameter: parameter.numel() for parameter in trainer.model.parameters()}
    trained = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    rates = f"learning rate {', '.join(f'{rate:.4g}' for rate in trainer.learning_rates)}"
    if trainer._chosen_rate is not None:
        rates += " (by the number of steps)"
    if head.trainable and trainer.given_optimizer is None:
        rates += f", of the head {trainer.head_learning_rate:.4g}"
    learning = f"trained: {trained:,} of {sum(sizes.values()):,} parameters, {rates}"
    if args.max_steps <= 0 and args.num_train_epochs == 0:
        learning = (
            "trained: nothing; the head is set in closed form alone, as etf-adapt refit MODEL DATASET --new_labels does"
        )
    workers = f", read by {args.dataloader_num_workers} processes" if args.dataloader_num_workers else ""
    return [
        f"runs: {runs} on {args.device.type}{kind}, {precision}",
        f"data: {sum(counts):,} rows to train, {classes}{imbalance}{validation}",
        f"head: {head.kind}, {frame}, {learns}; BatchNorm statistics {trainer.batch_norm}{dropout}",
        learning,
        f"draw: {args.sampler}, {trainer.get_total_train_batch_size(args):,} rows a step, seed {args.seed}{workers}",
        *args.without_effect(),
        *unmet_requests(distributed_type),
    ]


def count_rows(dataset: Any) -> int | None:
    """Return the rows of a data set, or of a dict of data sets, as far as they are known."""
    sets = dataset.values() if isinstance(dataset, dict) else [dataset]
    return sum(map(len, sets)) if all(isinstance(rows, Sized) for rows in sets) else None


def describe_alignment(result: Mapping[str, Any], *, num_classes: int) -> str:
    """Describe what an alignment did, and how good the head is as it was set.

    Example:
        >>> result = {"frame": "whitened", "rows": 1200, "penalties": (0.3,), "balanced_accuracy": 0.75}
        >>> describe_alignment(result, num_classes=4)
        'aligned: whitened frame on 1,200 rows, penalty 0.3; leave-one-out balanced accuracy 75.0, chance 25.0'
    """
    line = f"aligned: {result['frame']} frame on {result['rows']:,} rows"
    line += "".join(f", penalty {penalty:.4g}" for penalty in result["penalties"][:1] if penalty is not None)
    accuracy = result["balanced_accuracy"]
    known = f"; leave-one-out balanced accuracy {percent(accuracy)}, chance {percent(1 / num_classes)}"
    return line if accuracy is None else line + known
