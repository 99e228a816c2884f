"""Callbacks around the steps of a run: re-alignment, the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from etf_adapt.data.progress import ProgressLines
from etf_adapt.results.run_folder import LOG_FILE, write_log
from etf_adapt.results.tables import percent


class Realign(TrainerCallback):
    """Call ``realign`` after each step, with whether it ends an epoch and the run."""

    def __init__(self, steps_in_epoch: Callable[[], int], realign: Callable[[bool, bool], None]) -> None:
        self.steps_in_epoch = steps_in_epoch
        self.realign = realign

    # In the last step of an epoch, not after it: a checkpoint of that step then holds the new head.
    def on_step_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Align if it is due."""
        self.realign(state.global_step % self.steps_in_epoch() == 0, state.global_step == state.max_steps)


class RunLog(TrainerCallback):
    """Print one line per evaluation, and keep the log as JSON lines in the run's folder."""

    # The file is written from the trainer's history, which checkpoints hold: after a resume it has no line twice.

    def __init__(self, folder: Callable[[], str]) -> None:
        self.folder = folder
        self._train: Mapping[str, Any] = {}
        self._start = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Write the file anew from the history."""
        self._start = time.monotonic()
        self._write(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Add what was logged."""
        logs: Mapping[str, Any] = kwargs["logs"]
        self._write(state)
        if "loss" in logs:
            self._train = logs
        scores = _scores(logs)
        if scores or ("loss" in logs and args.eval_strategy == "no"):
            seconds = time.monotonic() - self._start
            line = f"epoch {state.epoch or 0.0:.4g}/{args.num_train_epochs:g}" if args.max_steps <= 0 else "step"
            line += f" ({state.global_step}/{state.max_steps} steps, {seconds:.0f} s)"
            if self._train:
                line += " | train loss {loss:.4f}, learning rate {learning_rate:.2e}".format_map(self._train)
            if state.is_world_process_zero:
                tqdm.write(line + scores)
            self._train = {}

    def _write(self, state: TrainerState) -> None:
        folder = Path(self.folder())
        if state.is_world_process_zero and folder.is_dir():
            write_log(folder / LOG_FILE, state.log_history)


def _scores(logs: Mapping[str, Any]) -> str:
    """Return the scores of an evaluation; of several data sets, each is logged with its name in those of the scores."""
    last = "balanced_accuracy_pooled"
    prefix = next((name.removesuffix(last) for name in logs if name.startswith("eval_") and name.endswith(last)), None)
    if prefix is None:
        return ""
    names = ("balanced_accuracy", "accuracy", "many", "medium", "few")
    scores = [f"{name.replace('_', ' ')} {percent(logs.get(f'{prefix}{name}'))}" for name in names]
    return f" | validation{prefix[4:-1].replace('_', ' ', 1)}: " + ", ".join(scores)


class ProgressBar(ProgressCallback):
    """Transformers' progress bar without its print of every log, which ``RunLog`` replaces."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


class ProgressPrinter(TrainerCallback):
    """Print how many steps are done where there is no bar: an epoch may take hours."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._lines = ProgressLines("training steps", state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Print a line if one is due."""
        self._lines.update(state.global_step)
