"""Runs of recipes/compare.py without a model: what finetune.py would write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare
import pytest

from etf_adapt.results import run_folder, tables
from etf_adapt.training.checkpoints import begin_checkpoint, complete_checkpoint

LABELS = ["cat"] * 6 + ["dog"] * 4
REAL_LAUNCH = compare.Children.launch
SHARED = ["--dataset", "pets", "--num_train_epochs", "2"]
ADJUSTED = [*SHARED, "--prior_adjustment", "fit"]  # as they are kept
TWO_ROWS = ["--results", "r", "--rows", "linear_ce", "etf_dr", "--seeds", "0", "1", "--learning_rates", "1e-3", "1e-4"]


class FakeRuns:
    """Stand in for `Children.launch`: writes what finetune.py would, without a model, and notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []
        self.stop_at: int | None = None
        self.labels = LABELS
        self.has_validation = True
        self.leaves_checkpoints = False

    def __call__(self, command: list[str]) -> tuple[int, list[str]]:
        script = command.index(str(compare.FINETUNE))
        flags = dict(zip(command[script + 1 :: 2], [*command[script + 2 :: 2], ""]))
        call = {name.removeprefix("--"): value for name, value in flags.items()}
        self.calls.append(call)
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.write(**call)
        return 0, ["done"]

    def score(self, *, learning_rate: str = "0.0001", head_learning_rate: str = "0", **_: str) -> float:
        """Return a validation score: best at 1e-4, and for the head at 1e-3."""
        away = [
            abs(math.log10(float(rate) / best))
            for rate, best in ((learning_rate, 1e-4), (head_learning_rate, 1e-3))
            if rate != "0"
        ]
        return 0.9 - 0.1 * away[0] - 0.05 * sum(away[1:])

    def write(self, *, output_dir: str, evaluate_test: str, seed: str, **flags: str) -> None:
        folder = Path(output_dir)
        run_folder.write_json(folder / run_folder.ARGUMENTS_FILE, {})
        seconds = 3.0
        if self.leaves_checkpoints:
            if flags.get("resume_from_checkpoint") == "last":
                seconds = 0.001  # it trains no step more
            else:
                begin_checkpoint(folder / "checkpoint-5")
                complete_checkpoint(folder / "checkpoint-5", {})
        score = self.score(**flags)
        entries = [
            {"epoch": 1.0, "step": 1, "eval_balanced_accuracy": 0.5, "eval_nc1": 9.0, "eval_train_logit_nc2": 8.0},
            {"epoch": 2.0, "eval_balanced_accuracy": score, "eval_nc1": 3.0, "eval_train_logit_nc2": 0.25},
        ]
        (folder / run_folder.LOG_FILE).write_text("\n".join(map(json.dumps, [*entries, {"loss": 0.1}])))
        test = {"balanced_accuracy": [0.7, 0.8, 0.9][int(seed)], "few": None} if evaluate_test == "true" else None
        validation = {"balanced_accuracy": score, "balanced_loss": 1.0 - score} if self.has_validation else None
        run_folder.write_json(
            folder / run_folder.RESULTS_FILE, tables.flat_results({"train_runtime": seconds}, validation, test)
        )
        if test:
            names = ["cat", "dog"]
            labels = [names.index(label) for label in self.labels]
            run_folder.write_predictions(
                folder / run_folder.PREDICTIONS_FILE,
                row_ids=range(len(labels)),
                labels=labels,
                predictions=[0] * len(labels),
                confidences=[0.5] * len(labels),
                label_names=names,
            )


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        compare.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    return said


def files() -> set[str]:
    return {path.name for path in Path("r/runs").glob("*.json")}
