"""Which runs recipes/compare.py does: at every rate to choose one, then at the best with every seed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comparison
from compare_arguments import by_name, chosen_methods, read_json
from compare_methods import Method
from compare_table import number

AFTER_TRAINING = ("final_frame",)
"""Flags that act on the trained model alone."""


@dataclass(frozen=True)
class Run:
    """One run of finetune.py; `head_rate` is the head's learning rate over the backbone's, None for a fixed head."""

    method: Method
    stage: str  # "tuning" or "final"
    learning_rate: float | None  # None: by the default's rule
    head_rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its file and folder: no two runs share one."""
        rate = "" if self.learning_rate is None else f"-lr{number(self.learning_rate)}"
        head = "" if self.head_rate is None else f"-head{number(self.head_rate)}x"
        return f"{self.method.name}-{self.stage}{rate}{head}-seed{self.seed}"

    @property
    def settings(self) -> list[str]:
        """What it adds to the flags that all runs share, to train the same model."""
        rate = [] if self.learning_rate is None else ["--learning_rate", number(self.learning_rate)]
        flags = [*self.method.flags, *rate, "--seed", str(self.seed)]
        if self.learning_rate is not None and self.head_rate is not None:
            flags += ["--head_learning_rate", number(self.head_rate * self.learning_rate)]
        return flags

    @property
    def training(self) -> str:
        """Name of what it trains: runs that differ in what comes after training alone have the same."""
        flags = by_name(self.settings)
        return "-".join(f"{name}_{value}" for name, value in flags.items() if name not in AFTER_TRAINING)

    @property
    def flags(self) -> list[str]:
        """What it adds to the flags that all runs share."""
        return [*self.settings, "--evaluate_test", "true" if self.stage == "final" else "false"]

    def __str__(self) -> str:
        rate = "by the rule" if self.learning_rate is None else number(self.learning_rate)
        head = "" if self.head_rate is None else f" (head x {number(self.head_rate)})"
        return f"{self.stage} {self.method.name}, learning rate {rate}{head}, seed {self.seed}"


def tuning_runs(method: Method, options: argparse.Namespace) -> list[Run]:
    """Return the runs that choose a method's rates, lowest rates first: of the given ones, and of those that widen them."""
    if not method.is_tuned:
        return []
    heads = sorted(options.head_rates) if method.trains_head else [None]
    rates = sorted(options.learning_rates)
    for beyond in range(options.widen + 1):
        runs = [Run(method, "tuning", rate, head, options.seeds[0]) for rate in rates for head in heads]
        found = [record for run in runs if (record := read_run(run, options)) is not None]
        if beyond == options.widen or len(found) < len(runs):
            break
        if (further := comparison.rate_beyond(rates, found[comparison.best_of(found)]["learning_rate"])) is None:
            break
        rates = sorted([*rates, further])
    return runs


def final_runs(method: Method, options: argparse.Namespace) -> list[Run]:
    """Return the runs of a method at its best rates; none before its tuning is finished."""
    if not method.is_tuned:
        return [Run(method, "final", None, None, seed) for seed in options.seeds]
    runs = tuning_runs(method, options)
    found = [record for run in runs if (record := read_run(run, options)) is not None]
    if len(found) < len(runs):
        return []
    return [replace(runs[comparison.best_of(found)], stage="final", seed=seed) for seed in options.seeds]


def spent_trainings(options: argparse.Namespace) -> set[str]:
    """Return the trainings of finished runs from which no run will go on; while a method is tuned, each may be the best."""
    finished, wanted = set(), set()
    for method in chosen_methods(options):
        tuning = tuning_runs(method, options)
        final = [] if options.tuning_only else final_runs(method, options)  # none before its tuning is finished
        pending = {run for run in (*tuning, *final) if read_run(run, options) is None}
        finished |= {run.training for run in {*tuning, *final} - pending}
        wanted |= {run.training for run in (pending if final or options.tuning_only else tuning)}
    return finished - wanted


def read_run(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the record of a run, None if it is not finished."""
    file = options.results / "runs" / f"{run.name}.json"
    if not file.is_file():
        return None
    found = read_json(file)
    if found["flags"] != options.flags | by_name(run.flags):
        raise ValueError(f"{file} had other flags than row {run.method.name} has now: remove it to run it again.")
    return found


def validation_score(found: Mapping[str, Any]) -> Any:
    """Return the balanced accuracy of validation rows."""
    return found["all_results"]["eval_balanced_accuracy"]
