"""Scores of a run by name, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

GROUPS = ("many", "medium", "few", "head_third", "middle_third", "tail_third")
UNADJUSTED = ("balanced_accuracy", "few", "tail_third")
# In all_results.json with the prefix `eval_` (validation) and with `test_`; `_unadjusted` is before the prior adjustment.
SCORES = (
    *("accuracy", "balanced_accuracy", "macro_f1", *GROUPS, "ece", "loss", "balanced_loss"),
    *(f"{name}_unadjusted" for name in UNADJUSTED),
)


def flat_results(
    train: Mapping[str, Any], validation: Mapping[str, Any] | None, test: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Join the figures of a run: those of training as named, then ``eval_<score>`` and ``test_<score>``, None where missing."""
    sets = {"eval": validation or {}, "test": test or {}}
    return {**train, **{f"{prefix}_{name}": sets[prefix].get(name) for prefix in sets for name in SCORES}}


def shot_table(
    scores: Mapping[str, Any],
    class_counts: Sequence[int] | np.ndarray,
    row_counts: Sequence[int] | np.ndarray,
    *,
    shot_bounds: Sequence[int] = (20, 100),
) -> list[tuple[str, str, int, int, float | None]]:
    """Return lines of (group of classes, training rows of a class, classes, evaluated rows, accuracy in [0, 1] or None)."""
    # Here, because it imports torch, which a check of arguments must not wait for.
    from etf_adapt.metrics.shots import class_groups

    counts, rows, every = np.asarray(class_counts), np.asarray(row_counts), np.arange(len(class_counts))
    low, high = shot_bounds
    bounds = {"many": f"> {high}", "medium": f"{low}..{high}", "few": f"< {low}"}
    titles = {"balanced_accuracy": "mean of classes", "accuracy": "mean of rows"}
    table = []
    for name, classes in (class_groups(counts, shot_bounds) | dict.fromkeys(titles, every)).items():
        extremes = {int(counts[classes].min()), int(counts[classes].max())} if len(classes) else ()
        span = bounds.get(name) or "..".join(map(str, sorted(extremes))) or "-"
        title = titles.get(name, name.replace("_", " "))
        table.append((title, span, len(classes), int(rows[classes].sum()), scores.get(name)))
    return table


def format_table(table: Iterable[tuple[str, str, int, int, float | None]]) -> str:
    """Return the lines of ``shot_table`` in columns for a terminal."""
    lines = [f"  {'':<16}{'training rows':>14}{'classes':>9}{'rows':>9}{'accuracy %':>12}"]
    for name, bounds, classes, rows, accuracy in table:
        lines.append(f"  {name:<16}{bounds:>14}{classes:>9,}{rows:>9,}{percent(accuracy):>12}")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """Return a share as per cent with one decimal, a dash for None or NaN."""
    return "-" if share is None or not math.isfinite(share) else f"{100.0 * share:.1f}"
