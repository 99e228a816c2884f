"""Lines for a person: what runs, what an alignment did, and advice before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.results.tables import percent
from etf_adapt.training.launch import unmet_requests

EVEN_IMBALANCE = 2.0
"""Imbalance below which classes count as evenly filled."""

COARSE_ERROR = 0.02
"""Standard error of a validation balanced accuracy from which settings can hardly be told apart by it."""


@dataclass(frozen=True)
class RunSetup:
    """What a run is about to do, in plain values."""

    device: str
    distributed_type: str
    mixed_precision: str
    class_counts: Sequence[int]
    validation_rows: int | None
    head_kind: str
    frame: str
    is_frame_to_be_set: bool
    is_head_trained: bool
    realign_epochs: float
    batch_norm: str
    parameters: int
    trained_parameters: int
    learning_rate: float
    head_learning_rate: float
    sampler: str
    batch_size: int
    seed: int


def describe_run(setup: RunSetup) -> list[str]:
    """Say what really runs: processes, device and precision; rows and classes; head; trained parameters; the draw."""
    processes, threads = PartialState().num_processes, torch.get_num_threads()
    runs = f"{processes} process{'es' if processes > 1 else ''} of {threads} threads"
    kind = f" ({setup.distributed_type})" if processes > 1 else ""
    precision = "float32"
    if setup.mixed_precision != "no":
        precision = f"{setup.mixed_precision} autocast over float32 weights"
    counts = [int(rows) for rows in setup.class_counts if rows]
    classes = f"{len(counts)} classes of {min(counts):,} to {max(counts):,} rows" if counts else "no classes"
    imbalance = f" (imbalance {max(counts) / min(counts):.4g})" if counts else ""
    validation = "" if setup.validation_rows is None else f", {setup.validation_rows:,} to validate"
    learns = "learned" if setup.is_head_trained else "fixed"
    if setup.realign_epochs:
        first = "" if math.isinf(setup.realign_epochs) else f" of the first {setup.realign_epochs:.0f}"
        learns = f"fixed but for an alignment after each epoch{first}"
    frame = f"{setup.frame} frame{' to be set' if setup.is_frame_to_be_set else ''}"
    rates = f"learning rate {setup.learning_rate:.4g}"
    if setup.is_head_trained:
        rates += f", of the head {setup.head_learning_rate:.4g}"
    return [
        f"runs: {runs} on {setup.device}{kind}, {precision}",
        f"data: {sum(counts):,} rows to train, {classes}{imbalance}{validation}",
        f"head: {setup.head_kind}, {frame}, {learns}; BatchNorm statistics {setup.batch_norm}",
        f"trained: {setup.trained_parameters:,} of {setup.parameters:,} parameters, {rates}",
        f"draw: {setup.sampler}, {setup.batch_size:,} rows a step, seed {setup.seed}",
        *unmet_requests(setup.distributed_type),
    ]


def describe_start(
    result: Mapping[str, Any],
    *,
    num_classes: int,
    in_features: int,
    class_counts: Sequence[int] | np.ndarray | None,
    validation_counts: Sequence[int] | np.ndarray | None,
) -> list[str]:
    """Say what an alignment did and tells: a line on it, and one for each piece of advice."""
    said = [describe_alignment(result, num_classes=num_classes)]
    if class_counts is None:
        return said
    advice = advise(result, class_counts=class_counts, in_features=in_features, validation_counts=validation_counts)
    return [*said, *(f"advice: {line}" for line in advice)]


def describe_alignment(result: Mapping[str, Any], *, num_classes: int) -> str:
    """Say what an alignment did, what was picked by it, and how good the head is as it was set.

    Args:
        result: Fields of an ``etf_adapt.heads.alignment.AlignmentResult``.
        num_classes: Number of classes.

    Returns:
        A line for a person.

    Example:
        >>> result = {"frame": "means", "rows": 1200, "penalties": (None,), "balanced_accuracy": None}
        >>> describe_alignment({**result, "nearest_mean_accuracy": 0.75}, num_classes=4)
        'aligned: means frame on 1,200 rows; nearest class mean 75.0, chance 25.0'
    """
    said = [f"aligned: {result['frame']} frame on {result['rows']:,} rows"]
    said += [f"penalty {penalty:.4g}" for penalty in result["penalties"][:1] if penalty is not None]
    scores = {
        "leave-one-out balanced accuracy": result["balanced_accuracy"],
        "nearest class mean": result["nearest_mean_accuracy"],
    }
    known = [f"{name} {percent(score)}" for name, score in scores.items() if score is not None]
    return "; ".join([", ".join(said), *([", ".join([*known, f"chance {percent(1 / num_classes)}"])] if known else [])])


def advise(
    result: Mapping[str, Any],
    *,
    class_counts: Sequence[int] | np.ndarray,
    in_features: int,
    validation_counts: Sequence[int] | np.ndarray | None = None,
) -> list[str]:
    r"""Say what speaks against the settings of a run, from its class counts and the alignment before its first step.

    The standard error of a balanced accuracy over classes of :math:`n_c` validation rows, where each row is right with
    probability p, is

    .. math:: \frac1K \sqrt{\sum_c \frac{p (1 - p)}{n_c}}

    with the leave-one-out balanced accuracy of the head before training for p.

    Args:
        result: Fields of an ``etf_adapt.heads.alignment.AlignmentResult``.
        class_counts: Training rows of each class (num_classes,).
        in_features: Width of what the head reads.
        validation_counts: Validation rows of each class (num_classes,).

    Returns:
        One sentence a finding, each with its reason and what to do; none where there is nothing to say.

    Example:
        >>> result = {"penalties": (1.0,), "balanced_accuracy": 0.7, "nearest_mean_accuracy": 0.6}
        >>> advise(result, class_counts=[90, 80], in_features=8)
        ['the classes are nearly even (1.1 : 1): a linear head (--head linear --loss cross_entropy) is likely as good']
    """
    counts = np.asarray(class_counts)
    said = []
    imbalance = counts.max() / max(counts.min(), 1)
    if imbalance < EVEN_IMBALANCE:
        said.append(
            f"the classes are nearly even ({imbalance:.2g} : 1): a linear head (--head linear --loss cross_entropy) is likely "
            "as good"
        )
    if len(counts) - 1 > in_features:
        said.append(
            f"{len(counts):,} classes do not fit {in_features:,} dimensions (one less than the classes are needed): no feature "
            "reaches its vertex, only the nearest cosine; a wider backbone has room"
        )
    alone = int((counts == 1).sum())
    if alone:
        said.append(
            f"{alone:,} class{'es have' if alone > 1 else ' has'} a single training row: what such a row teaches is its own "
            "feature, and no figure before training knows these classes; a second row each helps most"
        )
    penalty = next(iter(result["penalties"]), None)
    if penalty is not None and result["balanced_accuracy"] is not None and penalty in (PENALTIES[0], PENALTIES[-1]):
        said.append(_at_an_edge(penalty))
    error = _standard_error(result["balanced_accuracy"] or result["nearest_mean_accuracy"], validation_counts)
    if error >= COARSE_ERROR:
        said.append(
            f"the validation rows tell balanced accuracies apart to about ±{percent(2 * error)} points (two standard errors): "
            "do not choose settings by smaller differences; a larger validation_fraction or several seeds tell more"
        )
    return said


def _at_an_edge(penalty: float) -> str:
    if penalty == PENALTIES[0]:
        return (
            f"the smallest penalty ({penalty:g}) was the best: the classes differ in directions in which the features hardly "
            "vary; --frame_penalty sets a smaller one"
        )
    return (
        f"the greatest penalty ({penalty:g}) was the best: the head is the class means as they are, since the rows are too few "
        "to tell how features vary within a class, or these directions matter alike"
    )


def _standard_error(accuracy: float | None, counts: Sequence[int] | np.ndarray | None) -> float:
    """Return the standard error of a balanced accuracy; 0 where it cannot be told."""
    held = np.asarray([] if counts is None else counts)
    held = held[held > 0]
    if accuracy is None or not len(held):
        return 0.0
    return math.sqrt(accuracy * (1.0 - accuracy) * float((1.0 / held).sum())) / len(held)
