"""Plots of a model card: training examples and recall of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"many": "#2f6f9f", "medium": "#d08a2e", "few": "#b23a48"}


def draw_class_counts(file: Path, class_counts: Sequence[int], *, shot_bounds: Sequence[int]) -> None:
    """Draw the training examples of each class, largest first, coloured by shot group."""
    counts = np.asarray(class_counts)
    order = np.argsort(-counts, kind="stable")
    figure, axes = _axes()
    for name, classes in _groups(counts, shot_bounds).items():
        places = np.flatnonzero(np.isin(order, classes))
        axes.bar(places, counts[order[places]], width=0.9, color=COLOURS[name], label=f"{name} ({len(classes)})")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set(xlabel="classes, by training examples", ylabel="training examples")
    _save(figure, file)


def draw_recalls(
    file: Path, class_counts: Sequence[int], recalls: Sequence[float | None], *, shot_bounds: Sequence[int]
) -> None:
    """Draw the recall of each class over its training examples, with the mean of each shot group; None is left out."""
    counts = np.asarray(class_counts)
    shares = np.array(recalls, dtype=float)  # None becomes NaN
    figure, axes = _axes()
    for name, classes in _groups(counts, shot_bounds).items():
        known = classes[np.isfinite(shares[classes])]
        if not len(known):
            continue
        mean = shares[known].mean()
        axes.scatter(counts[known], 100 * shares[known], s=14, alpha=0.6, color=COLOURS[name], linewidths=0)
        ends = (counts[known].min() / 1.05, counts[known].max() * 1.05)
        axes.plot(ends, (100 * mean, 100 * mean), color=COLOURS[name], label=f"{name}: mean {100 * mean:.1f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_ylim(-4, 104)
    axes.set(xlabel="training examples of the class", ylabel="recall (%)")
    _save(figure, file)


def _groups(counts: np.ndarray, shot_bounds: Sequence[int]) -> dict[str, Any]:
    from etf_adapt.metrics.shots import class_groups

    groups = class_groups(counts, shot_bounds)
    return {name: groups[name] for name in COLOURS if len(groups[name])}


def _axes() -> tuple[Any, Any]:
    """Return an empty figure that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    figure.savefig(file, metadata={"Software": None})
