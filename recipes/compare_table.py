"""The tables of recipes/compare.py in Markdown: what the test rows say, what each row took, and how they came about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import comparison
import numpy as np
from compare_rows import Row
from comparison import format_difference, format_markdown, format_spread

from etf_adapt.results import tables


def score_table(summary: Mapping[str, Any]) -> str:
    """Set what the test rows say."""
    first, *titles = comparison.TABLE_SCORES.values()
    cells = []
    for row in summary["rows"]:
        balanced, *scores = map(format_spread, row["scores"].values())
        is_best = row["name"] == summary["best_baseline"]
        gain = "best baseline" if is_best else format_difference(row["difference"])
        cells.append([row["title"], balanced, gain, *scores])
    return format_markdown(["row", first, "minus best baseline [95 %]", *titles], cells)


def cost_table(summary: Mapping[str, Any]) -> str:
    """Set what each row is, how its rates were found, and what it took."""
    head = ["row", "kind", "flags", "learning rate", "of the head", "tuning runs", "validation of the best of them",
            "validation", f"epochs to {comparison.REFERENCE}'s last validation", "training seconds"]  # fmt: skip
    cells = []
    for row in summary["rows"]:
        reached = [epochs for epochs in row["epochs"] if epochs is not None]
        some = f" ({len(reached)} of {len(row['epochs'])} seeds)" if len(reached) < len(row["epochs"]) else ""
        head_rate = "-" if row["head_rate"] is None else f"x {number(row['head_rate'])}"
        cells.append([row["title"], row["kind"], f"`{shlex.join(row['flags'])}`", number(row["learning_rate"]), head_rate,
                      str(row["tuning_runs"]), tables.percent(row["tuning_validation"]), format_spread(row["validation"]),
                      f"{np.mean(reached):.1f}{some}" if reached else "-",
                      format_spread(row["train_seconds"], scale=1.0)])  # fmt: skip
    return format_markdown(head, cells)


def collapse_table(summary: Mapping[str, Any]) -> list[str]:
    """Set the measures of neural collapse after the last epoch; no table where none were taken."""
    spaces = [*comparison.COLLAPSE]
    cells = []
    for row in summary["rows"]:
        values = [[row["collapse"][f"{space}{name}"] for name in comparison.COLLAPSE_MEASURES] for space in spaces]
        told = (" / ".join("-" if value is None else f"{value[0]:.2f}" for value in space) for space in values)
        cells.append([row["title"], *told])
    if all(value is None for row in summary["rows"] for value in row["collapse"].values()):
        return []
    return [format_markdown(["NC1 / NC2 / NC3 / NC4 in", *comparison.COLLAPSE.values()], cells)]


def validation_table(
    rows: Sequence[tuple[Row, Sequence[Mapping[str, Any]]]], seed: int, told: str, versions: Mapping[str, Sequence[str]]
) -> str:
    """Set what the rates were chosen by: each row's score at each of them, on validation rows of one seed.

    Args:
        rows: Rows with their runs of the first stage.
        seed: Their seed.
        told: The command.
        versions: Versions and hardware, each with its values.
    """
    cells = []
    for row, runs in rows:
        scores = [tables.percent(run["all_results"]["eval_balanced_accuracy"]) for run in runs]
        rates = [(number(run["learning_rate"]), run["head_rate"]) for run in runs]
        names = [rate if head is None else f"{rate} (head x {number(head)})" for rate, head in rates]
        best = max(range(len(runs)), key=lambda run: float(runs[run]["all_results"]["eval_balanced_accuracy"]))
        at_each = "; ".join(f"{name}: {score}" for name, score in zip(names, scores, strict=True))
        cells.append([row.title, row.kind, f"`{shlex.join(row.flags)}`", scores[best], names[best], at_each])
    told_below = (
        f"Balanced accuracy of validation rows in per cent, seed {seed}: what rates and defaults are chosen by. One seed ranks "
        "nothing; the test rows were not touched for it."
    )
    table = format_markdown(["row", "kind", "flags", "best validation", "at", "at each rate"], cells)
    return "\n\n".join([table, told, told_below, environment(versions)]) + "\n"


def command(
    results: str,
    lists: Mapping[str, Sequence[Any]],
    passed: Mapping[str, str],
    launcher: str,
    *,
    tuning_only: bool = False,
) -> str:
    """Return the command that makes a table, as Markdown.

    Args:
        results: Folder of the results, as it may be published.
        lists: Rows, seeds and rates.
        passed: Flags that went to all runs, with their values.
        launcher: What ran them; nothing where it was python.
        tuning_only: Whether the first stage is all of it.
    """
    flags = [f"--{name} {' '.join(values)}" for name, values in _written(lists).items()]
    flags += [f"--launcher {shlex.quote(launcher)}"] if launcher else []
    flags += ["--tuning_only"] if tuning_only else []
    flags += ["--", *(f"--{name} {values}".strip() for name, values in passed.items())]
    return f"`python recipes/compare.py --results {shlex.quote(results)} {' '.join(flags)}`"


def environment(versions: Mapping[str, Sequence[str]]) -> str:
    """Return versions and hardware in one line."""
    return ", ".join(f"{name} {' / '.join(values)}" for name, values in versions.items())


def _written(lists: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    return {name: [value if name == "rows" else number(value) for value in values] for name, values in lists.items()}


def caption(summary: Mapping[str, Any], lists: Mapping[str, Sequence[Any]], told: str) -> str:
    """Say below the table how it came about.

    Args:
        summary: What ``comparison.summarize`` returned, with the unfinished rows and the versions.
        lists: Rows, seeds and rates.
        told: The command.
    """
    lists = _written(lists)
    rates, factors, seeds = (", ".join(lists[name]) for name in ("learning_rates", "head_rates", "seeds"))
    parts = [
        told,
        f"Test rows, per cent, mean ± sample standard deviation over seeds {seeds}. All rows had the same tuning effort: "
        f"learning rates {rates}, and of a head that is trained {factors} times each; chosen by the validation balanced "
        f"accuracy of seed {lists['seeds'][0]}, of equals the lower.",
        f"Minus best baseline: balanced accuracy minus that of {summary['best_baseline']}, the baseline of the best mean "
        "validation balanced accuracy, with the 95 % interval of a paired bootstrap over test rows within classes and over "
        f"seeds ({comparison.RESAMPLES:,} resamples), not corrected for the number of rows; bold where all of it is above 0.",
    ]
    if summary["not_ranked"]:
        parts[2] = f"Rows are not ranked, and there are no intervals: {summary['not_ranked']}."
    parts.append(
        "Measures of collapse are those after the last epoch, before a refit. Training seconds are comparable only among runs "
        "that had the machine to themselves in the same number (`jobs` in their files)."
    )
    if summary["target"] is not None:
        target = tables.percent(summary["target"])
        parts.append(f"Epochs to {target}, {comparison.REFERENCE}'s last validation balanced accuracy.")
    if summary["unfinished"]:
        parts.append(f"Not finished and left out: {', '.join(summary['unfinished'])}.")
    parts.append(environment(summary["versions"]))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Write a number as short as it is."""
    return f"{value:.12g}"
