"""Printed lines: what runs, what an alignment did, and advice before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from etf_adapt.data.long_tail import EVEN_IMBALANCE
from etf_adapt.geometry.penalty import PENALTIES
from etf_adapt.inference.launch import unmet_requests
from etf_adapt.results.tables import percent

COARSE_ERROR = 0.02  # standard error of a validation balanced accuracy from which it can hardly tell settings apart


def describe_run(trainer: Any) -> list[str]:
    """Describe the run of an ``ETFTrainer``: processes, device, precision; rows and classes; head; parameters; sampling."""
    args, head, distributed_type = trainer.args, trainer.first_head, trainer.accelerator.distributed_type.value
    processes, threads = PartialState().num_processes, torch.get_num_threads()
    runs = f"{processes} process{'es' if processes > 1 else ''} of {threads} threads"
    kind = f" ({distributed_type})" if processes > 1 else ""
    precision = "float32"
    if args.mixed_precision != "no":
        precision = f"{args.mixed_precision} autocast over float32 weights"
    counts = [] if trainer.class_counts is None else [rows for rows in trainer.class_counts.tolist() if rows]
    classes = f"{len(counts)} classes of {min(counts):,} to {max(counts):,} rows" if counts else "no classes"
    imbalance = f" (imbalance {max(counts) / min(counts):.4g})" if counts else ""
    held_out = count_rows(trainer.eval_dataset)
    validation = "" if held_out is None else f", {held_out:,} to validate"
    learns = "fixed" if head.is_fixed else "learned"
    if trainer.realignment != "never":
        steps = f"{trainer.realign_steps} steps, from what training reads" if trainer.realignment == "steps" else "epoch"
        learns = f"fixed but for an alignment every {steps}"
    frame = f"{head.frame} frame"
    if trainer.needs_alignment():
        frame = f"{args.frame if head.is_stock_layer else 'means'} frame to be set"
    sizes = {parameter: parameter.numel() for parameter in trainer.model.parameters()}
    trained = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    rates = f"learning rate {', '.join(f'{rate:.4g}' for rate in trainer.learning_rates)}"
    if not head.is_fixed and trainer.given_optimizer is None:
        rates += f", of the head {trainer.head_learning_rate:.4g}"
    learning = f"trained: {trained:,} of {sum(sizes.values()):,} parameters, {rates}"
    if args.max_steps <= 0 and args.num_train_epochs == 0:
        learning = (
            "trained: nothing; the head is set in closed form alone, as etf-adapt refit MODEL DATASET --new_labels does"
        )
    return [
        f"runs: {runs} on {args.device.type}{kind}, {precision}",
        f"data: {sum(counts):,} rows to train, {classes}{imbalance}{validation}",
        f"head: {head.kind}, {frame}, {learns}; BatchNorm statistics {trainer.batch_norm}",
        learning,
        f"draw: {args.sampler}, {trainer.get_total_train_batch_size(args):,} rows a step, seed {args.seed}",
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


def advise(
    result: Mapping[str, Any],
    *,
    class_counts: Sequence[int] | np.ndarray,
    in_features: int,
    validation_counts: Sequence[int] | np.ndarray | None = None,
) -> list[str]:
    """Return what speaks against the settings of a run, from its class counts and the first alignment: reason and remedy.

    Example:
        >>> result = {"penalties": (1.0,), "balanced_accuracy": 0.7}
        >>> advise(result, class_counts=[90, 80], in_features=8)
        ['the classes are nearly even (1.1 : 1): a linear head (--head linear --loss cross_entropy) is likely as good']
    """
    counts = np.asarray(class_counts)
    advice = []
    imbalance = counts.max() / max(counts.min(), 1)
    if imbalance < EVEN_IMBALANCE:
        advice.append(
            f"the classes are nearly even ({imbalance:.2g} : 1): a linear head (--head linear --loss cross_entropy) is likely "
            "as good"
        )
    if len(counts) - 1 > in_features:
        advice.append(
            f"{len(counts):,} classes do not fit {in_features:,} dimensions (one less than the classes are needed): no feature "
            "reaches its vertex, only the nearest cosine; a wider backbone has room"
        )
    alone = int((counts == 1).sum())
    if alone:
        advice.append(
            f"{alone:,} class{'es have' if alone > 1 else ' has'} a single training row: what such a row teaches is its own "
            "feature, and no figure before training knows these classes; a second row each helps most"
        )
    penalty = next(iter(result["penalties"]), None)
    if penalty is not None and result["balanced_accuracy"] is not None and penalty in (PENALTIES[0], PENALTIES[-1]):
        smallest = (
            f"the smallest penalty ({penalty:g}) was the best: the classes differ in directions in which the features hardly "
            "vary; --frame_penalty sets a smaller one"
        )
        greatest = (
            f"the greatest penalty ({penalty:g}) was the best: the head is the class means as they are, since the rows are too "
            "few to tell how features vary within a class, or these directions matter alike"
        )
        advice.append(smallest if penalty == PENALTIES[0] else greatest)
    error = _standard_error(result["balanced_accuracy"], validation_counts)
    if error >= COARSE_ERROR:
        advice.append(
            f"the validation rows tell balanced accuracies apart to about ±{percent(2 * error)} points (two standard errors): "
            "do not choose settings by smaller differences; a larger validation_fraction or several seeds tell more"
        )
    return advice


def _standard_error(accuracy: float | None, counts: Sequence[int] | np.ndarray | None) -> float:
    r"""Return the standard error of a balanced accuracy over K classes of n_c rows; 0 where it is unknown.

    .. math:: \frac1K \sqrt{\sum_c \frac{p (1 - p)}{n_c}}, \quad p \text{ the accuracy}
    """
    held = np.asarray([] if counts is None else counts)
    held = held[held > 0]
    if accuracy is None or not len(held):
        return 0.0
    return math.sqrt(accuracy * (1.0 - accuracy) * float((1.0 / held).sum())) / len(held)
