"""The tables of recipes/compare.py: test scores, cost of each method, and how the figures were made.

In Markdown for the files, and in columns for the terminal, whose lines are of at most ``WIDTH`` characters.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import comparison
import numpy as np
from compare_methods import Method
from comparison import format_difference, format_markdown, format_spread

from etf_adapt.results import tables

WIDTH = 100


def terminal_scores(summary: Mapping[str, Any], file: str) -> str:
    """Format the test scores that methods are compared by, and where the others are."""
    names = ("balanced_accuracy", "few", "tail_third")
    first, *titles = (comparison.TABLE_SCORES[name] for name in names)
    lines = [("method", first, "minus best baseline [95 %]", *titles)]
    for method in summary["rows"]:
        balanced, *scores = (format_spread(method["scores"][name]) for name in names)
        is_best = method["name"] == summary["best_baseline"]
        gain = "best baseline" if is_best else format_difference(method["difference"]).replace("*", "")
        lines.append((method["name"], balanced, gain, *scores))
    notes = [f"Test rows, per cent, mean ± standard deviation over seeds. All scores, costs and commands: {file}."]
    if summary["not_ranked"]:
        notes.append(f"Methods are not ranked: {summary['not_ranked']}.")
    if summary["unfinished"]:
        notes.append(f"Not finished and left out: {', '.join(summary['unfinished'])}.")
    notes += edge_note(summary["edges"])
    return _columns(lines, (24, 19, 29, 14, 14), notes)


def at_edges(methods: Sequence[tuple[Method, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Return the methods whose best rate is an outermost one of those tried, so that a better one may lie beyond."""
    rates = {method.name: [run["learning_rate"] for run in runs] for method, runs in methods}
    best = {method.name: runs[comparison.best_of(runs)]["learning_rate"] for method, runs in methods}
    return [name for name in rates if comparison.rate_beyond(sorted({*rates[name]}), best[name]) is not None]


def edge_note(names: Sequence[str]) -> list[str]:
    """Format what ``at_edges`` returns; no line without names."""
    note = f"The best rate is the lowest or highest tried for {', '.join(names)}: --widen 2 tries further."
    return [note] if names else []


def terminal_validation(methods: Sequence[tuple[Method, Sequence[Mapping[str, Any]]]], file: str) -> str:
    """Format the best validation score of each method, and the rates that gave it."""
    lines = [("method", "validation", "learning rate", "of the head")]
    for method, runs in methods:
        best = runs[comparison.best_of(runs)]
        head = "-" if best["head_rate"] is None else f"x {number(best['head_rate'])}"
        score = tables.percent(best["all_results"]["eval_balanced_accuracy"])
        lines.append((method.name, score, number(best["learning_rate"]), head))
    note = f"Balanced accuracy of validation rows, per cent, at the best rates. One seed ranks nothing. At each rate: {file}."
    return _columns(lines, (24, 14, 17, 15), [note, *edge_note(at_edges(methods))])


def _columns(lines: Sequence[Sequence[str]], widths: Sequence[int], notes: Sequence[str]) -> str:
    rows = ["".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, "", *(textwrap.fill(note, WIDTH, break_on_hyphens=False) for note in notes)])


def score_table(summary: Mapping[str, Any]) -> str:
    """Format the test scores."""
    first, *titles = comparison.TABLE_SCORES.values()
    cells = []
    for method in summary["rows"]:
        balanced, *scores = map(format_spread, method["scores"].values())
        is_best = method["name"] == summary["best_baseline"]
        gain = "best baseline" if is_best else format_difference(method["difference"])
        cells.append([method["title"], balanced, gain, format_difference(method["lead"]), *scores])
    head = ["method", first, "minus best baseline [95 %]", "untuned default minus it [95 %]"]
    return format_markdown([*head, *titles], cells)


def cost_table(summary: Mapping[str, Any]) -> str:
    """Format what each method is, how its rates were found, and its cost."""
    head = ["method", "kind", "flags", "learning rate", "of the head", "tuning runs", "validation of the best of them",
            "validation", "after the first epoch", f"epochs to {comparison.REFERENCE}'s last validation",
            "training seconds"]  # fmt: skip
    lines = []
    for method in summary["rows"]:
        epochs = method["epochs"]
        reached = [epoch for epoch in epochs if epoch is not None]
        some = f" ({len(reached)} of {len(epochs)} seeds)" if len(reached) < len(epochs) else ""
        lines.append(
            [
                method["title"],
                method["kind"],
                f"`{shlex.join(method['flags'])}`",
                "by the rule" if method["learning_rate"] is None else number(method["learning_rate"]),
                "-" if method["head_rate"] is None else f"x {number(method['head_rate'])}",
                str(method["tuning_runs"]),
                tables.percent(method["tuning_validation"]),
                format_spread(method["validation"]),
                format_spread(method["first_epoch"]),
                f"{np.mean(reached):.1f}{some}" if reached else "-",
                format_spread(method["train_seconds"], scale=1.0),
            ]
        )
    return format_markdown(head, lines)


def collapse_table(summary: Mapping[str, Any]) -> list[str]:
    """Format the measures of neural collapse after the last epoch; no table where none were taken (--collapse_rows)."""
    spaces = [*comparison.COLLAPSE]
    cells = []
    for method in summary["rows"]:
        values = [[method["collapse"][f"{space}{name}"] for name in comparison.COLLAPSE_MEASURES] for space in spaces]
        cells_of_spaces = (
            " / ".join("-" if value is None else f"{value[0]:.2f}" for value in space) for space in values
        )
        cells.append([method["title"], *cells_of_spaces])
    if all(value is None for method in summary["rows"] for value in method["collapse"].values()):
        return []
    return [format_markdown(["NC1 / NC2 / NC3 / NC4 in", *comparison.COLLAPSE.values()], cells)]


def validation_table(
    methods: Sequence[tuple[Method, Sequence[Mapping[str, Any]]]],
    seed: int,
    made_by: str,
    versions: Mapping[str, Sequence[str]],
) -> str:
    """Format what the rates were chosen by: each method's validation score at each rate, for one seed."""
    cells = []
    for method, runs in methods:
        scores = [tables.percent(run["all_results"]["eval_balanced_accuracy"]) for run in runs]
        rates = [(number(run["learning_rate"]), run["head_rate"]) for run in runs]
        names = [rate if head is None else f"{rate} (head x {number(head)})" for rate, head in rates]
        best = comparison.best_of(runs)
        at_each = "; ".join(f"{name}: {score}" for name, score in zip(names, scores, strict=True))
        cells.append([method.title, method.kind, f"`{shlex.join(method.flags)}`", scores[best], names[best], at_each])
    below = (
        f"Balanced accuracy of validation rows in per cent, seed {seed}: what rates and defaults are chosen by. One seed ranks "
        "nothing; the test rows were not touched for it."
    )
    table = format_markdown(["method", "kind", "flags", "best validation", "at", "at each rate"], cells)
    return "\n\n".join([table, made_by, below, *edge_note(at_edges(methods)), environment(versions)]) + "\n"


def command(
    results: str,
    lists: Mapping[str, Sequence[Any]],
    passed: Mapping[str, str],
    launcher: str,
    *,
    tuning_only: bool = False,
) -> str:
    """Return the command that makes a table, as Markdown; `passed` are the flags of all runs."""
    flags = [f"--{name} {' '.join(values)}" for name, values in _written(lists).items()]
    flags += [f"--launcher {shlex.quote(launcher)}"] if launcher else []
    flags += ["--tuning_only"] if tuning_only else []
    flags += [f"--{name} {values}".strip() for name, values in passed.items()]
    return f"`python recipes/compare.py --results {shlex.quote(results)} {' '.join(flags)}`"


def environment(versions: Mapping[str, Sequence[str]]) -> str:
    """Return versions and hardware in one line."""
    return ", ".join(f"{name} {' / '.join(values)}" for name, values in versions.items())


def _written(lists: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    return {name: [value if name == "rows" else number(value) for value in values] for name, values in lists.items()}


def caption(summary: Mapping[str, Any], lists: Mapping[str, Sequence[Any]], made_by: str) -> str:
    """Return the text below the tables: command, protocol, versions; `summary` is that of ``comparison.summarize``."""
    lists = _written(lists)
    widened = f", up to {lists['widen'][0]} more where the best is an outermost one" if "widen" in lists else ""
    rates, factors, seeds = (", ".join(lists[name]) for name in ("learning_rates", "head_rates", "seeds"))
    parts = [
        made_by,
        f"Test rows, per cent, mean ± sample standard deviation over seeds {seeds}. All methods had the same tuning effort: "
        f"learning rates {rates}{widened}, and of a head that is trained {factors} times each; chosen by the log loss of "
        f"validation rows, a mean over classes, of seed {lists['seeds'][0]}, of equals the higher (of runs before "
        "2026-11-29: by balanced accuracy, of equals the lower).",
        f"Minus best baseline: balanced accuracy minus that of {summary['best_baseline']}, the baseline of the best mean "
        "validation balanced accuracy, with the 95 % interval of a paired bootstrap over test rows within classes and over "
        f"seeds ({comparison.RESAMPLES:,} resamples), not corrected for the number of methods; bold where all of the interval "
        "lies above 0.",
    ]
    if summary["not_ranked"]:
        parts[2] = f"Methods are not ranked, and there are no intervals: {summary['not_ranked']}."
    if collapse_table(summary):
        parts.append("Measures of collapse are those after the last epoch, before a refit.")
    parts.append("Training seconds compare only between runs of the same number at once (`jobs` in their files).")
    if summary["target"] is not None:
        target = tables.percent(summary["target"])
        parts.append(f"Epochs to {target}, {comparison.REFERENCE}'s last validation balanced accuracy.")
    if summary["unfinished"]:
        parts.append(f"Not finished and left out: {', '.join(summary['unfinished'])}.")
    parts += edge_note(summary["edges"])
    parts.append(environment(summary["versions"]))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Format a number as short as it is."""
    return f"{value:.12g}"
