"""Figures of a comparison: means over seeds, paired bootstrap of balanced accuracy, epochs needed, Markdown."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLE_SCORES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "head_third": "head third",
    "middle_third": "middle third",
    "tail_third": "tail third",
    "ece": "ECE",
    "balanced_accuracy_unadjusted": "balanced accuracy before the prior adjustment",
    "tail_third_unadjusted": "tail third before it",
}
"""The scores of a comparison, and what its table calls them."""

COLLAPSE = {
    "train_": "features of training rows",
    "train_logit_": "logits of training rows",
    "": "features of validation rows",
    "logit_": "logits of validation rows",
}
"""Prefixes of the measures of neural collapse (``etf_adapt.training.collapse_monitor``), and what the table calls them."""

COLLAPSE_MEASURES = ("nc1", "nc2", "nc3", "nc4")

REFERENCE = "linear_ce"
"""The method whose last validation score the others are timed to reach."""

DEFAULT = "etf_untuned"
"""The method whose lead over each other one is told."""


RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1000


def best_of(runs: Sequence[Mapping[str, Any]]) -> int:
    """Return which of a method's runs has the least validation log loss, a mean over classes; of equals the last."""
    # Few validation rows are soon all right; the loss still tells how far they are from being wrong.
    losses = [run["all_results"].get("eval_balanced_loss") for run in runs]
    if None in losses:  # of earlier versions, which chose by accuracy, of equals the first
        return max(range(len(runs)), key=lambda index: float(runs[index]["all_results"]["eval_balanced_accuracy"]))
    return max(range(len(runs)), key=lambda index: (-losses[index], index))


def rate_beyond(rates: Sequence[float], best: float) -> float | None:
    """Return the next rate in the direction of the best of ascending rates, where that is an outermost one, else None."""
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.3g}")


def paired_bootstrap(
    correct_a: NDArray[np.bool_],  # (seeds, rows)
    correct_b: NDArray[np.bool_],  # (seeds, rows), same seeds and rows
    labels: NDArray[np.int64],  # (rows,)
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    r"""Return the difference in balanced accuracy of a and b, and the ends of its interval (Efron, Tibshirani 1993).

    The mean over seeds s and classes c of :math:`\frac{1}{n_c} \sum_{i \in c} (a_{si} - b_{si})`; each resample draws seeds,
    and rows within classes, with replacement: the same for a and b, and the same rows for all seeds.
    """
    if correct_a.shape != correct_b.shape or correct_a.shape[1:] != labels.shape or correct_a.size == 0:
        raise ValueError(
            f"`correct_a` {correct_a.shape} and `correct_b` {correct_b.shape} must have one shape (seeds, rows), with as "
            f"many rows as `labels` {labels.shape}."
        )
    generator = np.random.default_rng(seed)
    difference = correct_a.astype(np.float64) - correct_b
    # Rows of a class with the same differences in all seeds are drawn as one group, by multinomial counts: the same
    # distribution in a fraction of the time.
    groups = [_groups(difference[:, labels == label]) for label in np.unique(labels)]
    num_seeds = len(difference)
    drawn = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        by_seed = np.zeros((size, num_seeds))
        for patterns, counts in groups:
            rows = counts.sum()
            by_seed += generator.multinomial(rows, counts / rows, size=size) @ patterns.T / rows
        seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=size)
        drawn.append((seeds * by_seed).sum(axis=1) / (num_seeds * len(groups)))
    outside = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [outside, 1 - outside])
    exact = np.mean([(patterns @ counts).mean() / counts.sum() for patterns, counts in groups])
    return float(exact), float(low), float(high)


def _groups(difference: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the distinct columns (seeds, groups) of a class's differences, and the number of rows of each (groups,)."""
    patterns, first, counts = np.unique(difference, axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)  # not by value: a and b exchanged then draw the same, and turn the interval exactly round
    return patterns[:, order], counts[order]


def epochs_to_reach(history: Iterable[Sequence[float]], target: float) -> float | None:
    """Return the first epoch after which a score was at least the target, or None; epoch 0 (no training) is not counted."""
    return next((epoch for epoch, score in history if epoch > 0 and score >= target), None)


def pack_rows(correct: NDArray[np.bool_]) -> str:
    """Write which rows were right (rows,) as text: eight rows a byte, in base64."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


def unpack_rows(packed: str, num_rows: int) -> NDArray[np.bool_]:
    """Read what ``pack_rows`` wrote: whether each row was right (num_rows,)."""
    octets = np.frombuffer(base64.b64decode(packed), np.uint8)
    if len(octets) != -(-num_rows // 8):
        raise ValueError(f"`packed` (={packed[:16]!r}...) holds {len(octets)} bytes, not those of {num_rows} rows.")
    return np.unpackbits(octets, count=num_rows).astype(bool)


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation: None for that of a single value, and for both where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def summarize(methods: Sequence[Mapping[str, Any]], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Make the table of a comparison as plain numbers; ``methods`` hold their runs, one a seed, in the same order of seeds.

    Methods are measured against the best baseline: the one of the best mean *validation* balanced accuracy, since one chosen
    by its test score would owe some of it to chance. ``lead`` is that of ``DEFAULT`` over a method. With one seed there are no
    intervals and no best.
    """

    def over_seeds(method: Mapping[str, Any], name: str) -> tuple[float, float | None] | None:
        return mean_and_deviation([run["all_results"].get(name) for run in method["runs"]])

    lasts = [
        run["history"][-1][1]
        for method in methods
        if method["name"] == REFERENCE
        for run in method["runs"]
        if run["history"]
    ]
    target = float(np.mean(lasts)) if lasts else None
    baselines = {method["name"]: method for method in methods if method["kind"] == "baseline"}
    best = not_ranked = None
    if any(len(method["runs"]) < 2 for method in methods):
        not_ranked = "one seed does not tell how much another would change"
    elif not baselines:
        not_ranked = "no baseline is finished"
    else:
        best = max(baselines, key=lambda name: (over_seeds(baselines[name], "eval_balanced_accuracy") or (-1.0,))[0])
    correct = {method["name"]: np.stack([run["correct"] for run in method["runs"]]) for method in methods}
    figures = []
    for method in methods:
        whole = [run["all_results"].get("train_runtime") for run in method["runs"] if not run["resumed"]]
        found = {
            "scores": {score: over_seeds(method, f"test_{score}") for score in TABLE_SCORES},
            "difference": best and paired_bootstrap(correct[method["name"]], correct[best], labels),
            "lead": paired_bootstrap(correct[DEFAULT], correct[method["name"]], labels)
            if best and DEFAULT in correct and method["name"] != DEFAULT
            else None,
            "validation": over_seeds(method, "eval_balanced_accuracy"),
            "first_epoch": mean_and_deviation([dict(run["history"]).get(1.0) for run in method["runs"]]),
            "epochs": [
                epochs_to_reach(run["history"], math.inf if target is None else target) for run in method["runs"]
            ],
            "train_seconds": mean_and_deviation(whole),
            "collapse": {
                name: mean_and_deviation([run.get("collapse", {}).get(name) for run in method["runs"]])
                for name in (f"{space}{measure}" for space in COLLAPSE for measure in COLLAPSE_MEASURES)
            },
        }
        figures.append({name: value for name, value in method.items() if name != "runs"} | found)
    return {"rows": figures, "best_baseline": best, "not_ranked": not_ranked, "target": target}


def format_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def format_spread(value: Sequence[float | None] | None, *, scale: float = 100.0) -> str:
    """Format mean ± deviation with one decimal, in per cent; a dash for None."""
    return " ± ".join(f"{scale * number:.1f}" for number in value or () if number is not None) or "-"


def format_difference(difference: Sequence[float] | None) -> str:
    """Format a difference with its interval in percentage points; bold where the whole interval lies above zero."""
    if difference is None:
        return "-"
    value, low, high = (f"{100.0 * number:+.1f}" for number in difference)
    return f"**{value} [{low}, {high}]**" if difference[1] > 0 else f"{value} [{low}, {high}]"
