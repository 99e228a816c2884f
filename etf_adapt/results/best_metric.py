"""The metric by which checkpoints are compared: its name, its direction, and whether a run can measure it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etf_adapt.errors import nearest_names
from etf_adapt.results.tables import GROUPS

ERRORS = ("loss", "balanced_loss", "ece")
SCORES = ("balanced_accuracy_pooled", "balanced_accuracy", "accuracy", "macro_f1", *GROUPS, *ERRORS)
MEASURES = ("nc1", "nc2", "nc3", "nc4")
COLLAPSE = tuple(f"{rows}{space}{name}" for rows in ("", "train_") for space in ("", "logit_") for name in MEASURES)


def more_is_better(metric: str) -> bool | None:
    """Return whether more of a metric is better, given its name with or without ``eval_``; None for a name that is no one's."""
    name = metric.removeprefix("eval_")
    return name not in (*ERRORS, *COLLAPSE) if name in (*SCORES, *COLLAPSE) else None


def check_metric(metric: str, *, collapse_rows: int = 0, sets: Sequence[str] = ()) -> None:
    """Refuse a metric that no evaluation gives; with several validation sets its name begins with that of one of them."""
    name = metric.removeprefix("eval_")
    if sets:
        chosen = next((key for key in sets if name.startswith(f"{key}_")), None)
        if chosen is None:
            raise ValueError(
                f"`metric_for_best_model` (={metric!r}) must begin with the name of one of the data sets in `eval_dataset` "
                f"({', '.join(sets)}): say {sets[0]}_{name}, for example."
            )
        name = name.removeprefix(f"{chosen}_")
    if name in COLLAPSE and not collapse_rows:
        raise ValueError(
            f"`metric_for_best_model` (={metric!r}) is measured with `collapse_rows` above 0 only: set it."
        )
    names = (*SCORES, *(COLLAPSE if collapse_rows else ()))
    if name not in names:
        near = "".join(f": did you mean {match!r}?" for match in nearest_names(name, names, limit=1)) or "."
        raise ValueError(
            f"`metric_for_best_model` (={metric!r}) is no metric of evaluation{near} There are {', '.join(names)}."
        )


def require_measurable(
    metric: str,
    *,
    class_counts: NDArray[np.int64],
    validation_labels: NDArray[np.int64] | None,
    shot_bounds: Sequence[int],
    monitors: Mapping[str, Any],
) -> None:
    """Refuse a metric that no evaluation gives: recall of a group that has no class or no row, collapse of too few rows."""
    from etf_adapt.metrics.shots import class_groups  # late: it imports torch

    name = metric.removeprefix("eval_")
    least, greatest = shot_bounds
    if name in GROUPS:
        classes = class_groups(class_counts, shot_bounds)[name]
        why = f"none of its {len(classes)} classes has a validation row"
        if not len(classes):
            why = (
                f"it has no class: classes have {class_counts.min()} to {class_counts.max()} training rows (many: more than "
                f"{greatest}, medium: {least} to {greatest}, few: less than {least})"
            )
        is_measured = bool(len(classes) and (validation_labels is None or np.isin(validation_labels, classes).any()))
    else:
        why = "it needs four `collapse_rows`, forty training rows, two rows each of two classes, and a single head"
        monitor = monitors.get("train_" if name.startswith("train_") else "")
        is_measured = name not in COLLAPSE or (monitor is not None and monitor.is_measurable)
    if not is_measured:
        raise ValueError(
            f"`metric_for_best_model` (={metric!r}) is not measured here, since {why}: choose another metric."
        )
