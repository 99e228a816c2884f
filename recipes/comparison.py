"""Compare finished runs: means over seeds, paired bootstrap of balanced accuracy, epochs needed, tables in Markdown."""

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
"""Prefixes of the measures of neural collapse (``etf_adapt.monitor``), and what the table calls them."""

COLLAPSE_MEASURES = ("nc1", "nc2", "nc3", "nc4")

REFERENCE = "linear_ce"
"""The row whose last validation score the others are timed to reach."""

RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1000


def paired_bootstrap(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    labels: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    r"""Estimate by how much the balanced accuracy of a exceeds that of b, with an interval.

    The difference is the mean over seeds s and classes c of :math:`\frac{1}{n_c} \sum_{i \in c} (a_{si} - b_{si})`. Each
    resample draws as many seeds, and of each class as many test rows, as there are, with replacement: the same for a and
    b, and the same rows for all seeds. The interval covers the choice of test rows and, as far as so few can tell, of
    seeds. Rows of a class whose differences are the same in all seeds are drawn as one group, by multinomial counts: the
    same distribution in a fraction of the time.

    Args:
        correct_a: Whether a was right (seeds, rows).
        correct_b: The same of b, for the same seeds and rows in the same order.
        labels: Class of each row (rows,).
        resamples: Number of resamples, at least 1.
        confidence: Share of the resampled differences within the interval, in (0, 1).
        seed: Of the draw.

    Returns:
        The difference, and the low and the high end of its interval.

    Raises:
        ValueError: The shapes do not fit, or there is nothing to compare.

    References:
        Efron, Tibshirani (1993). An Introduction to the Bootstrap. https://doi.org/10.1201/9780429246593

    Example:
        >>> a, b = np.array([[True, True, True, True]]), np.array([[True, True, False, False]])
        >>> paired_bootstrap(a, b, np.array([0, 0, 1, 1]))
        (0.5, 0.5, 0.5)
    """
    if correct_a.shape != correct_b.shape or correct_a.shape[1:] != labels.shape or correct_a.size == 0:
        raise ValueError(
            f"`correct_a` {correct_a.shape} and `correct_b` {correct_b.shape} must have one shape (seeds, rows), with as "
            f"many rows as `labels` {labels.shape}."
        )
    generator = np.random.default_rng(seed)
    difference = correct_a.astype(np.float64) - correct_b
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
    """Return the distinct columns (seeds, groups) of a class's differences, and how many rows have each (groups,)."""
    patterns, first, counts = np.unique(difference, axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)  # not by value: a and b exchanged then draw the same, and turn the interval exactly round
    return patterns[:, order], counts[order]


def epochs_to_reach(history: Iterable[Sequence[float]], target: float) -> float | None:
    """Return the first epoch after which a score was at least the target.

    Args:
        history: Pairs of epoch and score, in rising order; those of epoch 0, before any training, are not counted.
        target: The score to reach.

    Returns:
        The epoch; None where no score reached the target.

    Example:
        >>> epochs_to_reach([(0, 0.9), (1, 0.5), (2, 0.8)], 0.8), epochs_to_reach([(1, 0.5)], 0.8)
        (2, None)
    """
    return next((epoch for epoch, score in history if epoch > 0 and score >= target), None)


def pack_rows(correct: NDArray[np.bool_]) -> str:
    """Write which rows were right (rows,) as text: eight rows a byte, in base64.

    Example:
        >>> pack_rows(np.array([True, False, True]))
        'oA=='
    """
    return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


def unpack_rows(packed: str, num_rows: int) -> NDArray[np.bool_]:
    """Read what ``pack_rows`` wrote.

    Args:
        packed: Its text.
        num_rows: Number of rows, which the text tells only to eight.

    Returns:
        Whether each row was right (num_rows,).

    Raises:
        ValueError: The text holds another number of rows.

    Example:
        >>> unpack_rows("oA==", 3).tolist()
        [True, False, True]
    """
    octets = np.frombuffer(base64.b64decode(packed), np.uint8)
    if len(octets) != -(-num_rows // 8):
        raise ValueError(f"`packed` (={packed[:16]!r}...) holds {len(octets)} bytes, not those of {num_rows} rows.")
    return np.unpackbits(octets, count=num_rows).astype(bool)


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation: no deviation of a single value, and neither where a value is missing.

    Example:
        >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([1.0]), mean_and_deviation([1.0, None])
        ((2.0, 1.4142135623730951), (1.0, None), None)
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def summarize(rows: Sequence[Mapping[str, Any]], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Make the table of a comparison as plain numbers.

    Rows are measured against the best baseline: that of the best mean *validation* balanced accuracy, since one chosen by its
    test score would owe some of it to chance. With one seed there are no intervals and no best.

    Args:
        rows: Of each row ``name``, ``kind`` ("baseline" or another) and what else is to be kept, and in ``runs`` what each
            seed left, in the same order for all rows: ``all_results``, ``history`` as for ``epochs_to_reach``, ``resumed``, and
            ``correct``, whether each test row was right (test rows,).
        labels: Class of each test row (test rows,).

    Returns:
        ``rows`` with their figures in place of the runs; ``best_baseline``, a name or None; ``not_ranked``, why there are no
        intervals, or None; ``target``, what ``epochs`` count to, or None.

    Example:
        >>> results = {"eval_balanced_accuracy": 0.7, "test_balanced_accuracy": 0.5}
        >>> run = {"all_results": results, "history": [(1, 0.7)], "resumed": False, "correct": np.array([True, False])}
        >>> summary = summarize([{"name": "linear_ce", "kind": "baseline", "runs": [run]}], np.array([0, 1]))
        >>> summary["rows"][0]["scores"]["balanced_accuracy"], summary["target"], summary["not_ranked"][:8]
        ((0.5, None), 0.7, 'one seed')
    """

    def over_seeds(row: Mapping[str, Any], name: str) -> tuple[float, float | None] | None:
        return mean_and_deviation([run["all_results"].get(name) for run in row["runs"]])

    lasts = [run["history"][-1][1] for row in rows if row["name"] == REFERENCE for run in row["runs"] if run["history"]]
    target = float(np.mean(lasts)) if lasts else None
    baselines = {row["name"]: row for row in rows if row["kind"] == "baseline"}
    best = not_ranked = None
    if any(len(row["runs"]) < 2 for row in rows):
        not_ranked = "one seed does not tell how much another would change"
    elif not baselines:
        not_ranked = "no baseline is finished"
    else:
        best = max(baselines, key=lambda name: (over_seeds(baselines[name], "eval_balanced_accuracy") or (-1.0,))[0])
    correct = {row["name"]: np.stack([run["correct"] for run in row["runs"]]) for row in rows}
    figures = []
    for row in rows:
        whole = [run["all_results"].get("train_runtime") for run in row["runs"] if not run["resumed"]]
        found = {
            "scores": {score: over_seeds(row, f"test_{score}") for score in TABLE_SCORES},
            "difference": best and paired_bootstrap(correct[row["name"]], correct[best], labels),
            "validation": over_seeds(row, "eval_balanced_accuracy"),
            "epochs": [epochs_to_reach(run["history"], math.inf if target is None else target) for run in row["runs"]],
            "train_seconds": mean_and_deviation(whole),
            "collapse": {
                name: mean_and_deviation([run.get("collapse", {}).get(name) for run in row["runs"]])
                for name in (f"{space}{measure}" for space in COLLAPSE for measure in COLLAPSE_MEASURES)
            },
        }
        figures.append({name: value for name, value in row.items() if name != "runs"} | found)
    return {"rows": figures, "best_baseline": best, "not_ranked": not_ranked, "target": target}


def format_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set rows of cells as a Markdown table.

    Example:
        >>> print(format_markdown(["row", "score"], [["a", "1"]]))
        | row | score |
        | --- | --- |
        | a | 1 |
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def format_spread(value: Sequence[float | None] | None, *, scale: float = 100.0) -> str:
    """Write mean ± deviation with one decimal, as per cent; a dash where there is none.

    Example:
        >>> format_spread((0.5, 0.01)), format_spread((12.34, None), scale=1.0), format_spread(None)
        ('50.0 ± 1.0', '12.3', '-')
    """
    return " ± ".join(f"{scale * number:.1f}" for number in value or () if number is not None) or "-"


def format_difference(difference: Sequence[float] | None) -> str:
    """Write a difference with its interval in percentage points; bold where all of the interval lies above zero.

    Example:
        >>> format_difference((0.02, 0.01, 0.03)), format_difference((0.01, -0.01, 0.03)), format_difference(None)
        ('**+2.0 [+1.0, +3.0]**', '+1.0 [-1.0, +3.0]', '-')
    """
    if difference is None:
        return "-"
    value, low, high = (f"{100.0 * number:+.1f}" for number in difference)
    return f"**{value} [{low}, {high}]**" if difference[1] > 0 else f"{value} [{low}, {high}]"
