"""Batch, epochs, learning rate and reading processes of a run that does not name them."""

from __future__ import annotations

import math
from typing import Any

from etf_adapt.inference.launch import choose_num_workers

BATCH_SIZES = (16, 32, 64)  # rows of a step
STEPS_IN_EPOCH = 24  # that a batch should leave
EPOCHS = (4, 10)  # at least and at most
STEPS = 250  # that a run should have
MOVEMENT = 0.035  # learning rate times steps, of SIZE trained parameters
RATES = (1e-4, 2e-4)  # at least and at most, of these: few steps do not serve better for being long
SIZE = 22e6  # of MiniLM
HIGHEST_RATE = 1e-3  # of small models


def choose_batch_size(num_rows: int) -> int:
    """Return how many rows a step reads: the fewer there are, the smaller, so that a small data set gets its steps."""
    return max((size for size in BATCH_SIZES if size * STEPS_IN_EPOCH <= num_rows), default=BATCH_SIZES[0])


def choose_epochs(steps_in_epoch: int) -> float:
    """Return the number of epochs that makes ``STEPS`` of them, within ``EPOCHS``."""
    return float(min(max(math.ceil(STEPS / max(steps_in_epoch, 1)), EPOCHS[0]), EPOCHS[1]))


def fill_budget(args: Any, num_rows: int, dataset: Any) -> None:
    """Set batch, epochs and reading processes of arguments that name none, for so many training rows over all processes."""
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = choose_batch_size(num_rows // args.world_size)
    if args.num_train_epochs is None:
        rows_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        args.num_train_epochs = choose_epochs(math.ceil(num_rows / rows_a_step))
    if args.dataloader_num_workers is None:
        row_bytes = getattr(dataset, "row_bytes", 0)  # of an ``ImageDataset``
        batch_size = max(args.train_batch_size, args.eval_batch_size)
        args.dataloader_num_workers = choose_num_workers(num_rows, row_bytes, batch_size, args.device)


def choose_rate(num_steps: int, num_trained: int) -> float:
    """Return the peak learning rate of AdamW for a run of so many steps, of so many trained parameters.

    The best rate times steps times the root of the size was nearly one number over data sets and models (recipes/README.md).
    """
    rate = min(max(MOVEMENT / max(num_steps, 1), RATES[0]), RATES[1])
    return float(f"{min(rate * math.sqrt(SIZE / max(num_trained, 1)), HIGHEST_RATE):.2g}")
