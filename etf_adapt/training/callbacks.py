"""What happens around the steps of a run: epochs told to the sampler, heads aligned again, the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from etf_adapt.results.run_folder import LOG_FILE, write_log
from etf_adapt.results.tables import percent


class EpochStart(TrainerCallback):
    """Tell the sampler which epoch begins.

    After a stop in mid-epoch ``accelerate.skip_first_batches`` wraps the sampler so deep, with two processes, that
    ``set_epoch`` of the loader no longer reaches it, and the epoch is resumed with the first epoch's rows.

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        targets: Function that returns what to tell: objects with ``set_epoch``.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], targets: Callable[[], list[Any]]) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.targets = targets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch that the number of steps done says."""
        for target in self.targets():
            target.set_epoch(state.global_step // self.updates_per_epoch())


class Realign(TrainerCallback):
    """Align the head again at the end of each of the first epochs.

    This happens in the last step of the epoch, not after it: a checkpoint of that step then holds the new head.

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        align: Function that aligns the head.
        epochs: Number of epochs after which it does.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], align: Callable[[], None], epochs: float) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.align = align
        self.epochs = epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Align after the last step of an epoch, and of the run."""
        done, rest = divmod(state.global_step, self.updates_per_epoch())
        last = rest > 0 and state.global_step == state.max_steps  # in the middle of an epoch
        if (rest == 0 and done <= self.epochs) or (last and done < self.epochs):
            self.align()


class Reweight(TrainerCallback):
    """Switch class weights of the loss on for the last epochs: deferred re-weighting (Cao et al. 2019).

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        set_weights: Function that switches them on or off.
        share: Share of the steps after which the next epoch has them.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], set_weights: Callable[[bool], None], share: float) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.set_weights = set_weights
        self.share = share

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch by the step at which this epoch began, which is not where it is resumed."""
        began = state.global_step // self.updates_per_epoch() * self.updates_per_epoch()
        self.set_weights(began >= self.share * state.max_steps)


class RunLog(TrainerCallback):
    """Say one plain line per evaluation, and keep the log as JSON lines in the run's folder.

    The file is written from the trainer's history, which checkpoints hold: after a resume it has no line twice.
    """

    def __init__(self) -> None:
        self._train: Mapping[str, Any] = {}
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file anew from the history."""
        self._start = time.monotonic()
        self._write(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what was logged."""
        logs = logs or {}
        self._write(args, state)
        if "loss" in logs:
            self._train = logs
        if "eval_accuracy" in logs or ("loss" in logs and args.eval_strategy == "no"):
            self._say(f"{self._where(args, state)}{self._training()}{_scores(logs)}", args, state)

    def _where(self, args: TrainingArguments, state: TrainerState) -> str:
        seconds = time.monotonic() - self._start
        epochs = f"epoch {state.epoch or 0.0:.4g}/{args.num_train_epochs:g}" if args.max_steps <= 0 else "step"
        return f"{epochs} ({state.global_step}/{state.max_steps} steps, {seconds:.0f} s)"

    def _training(self) -> str:
        if not self._train:
            return ""
        said = f" | train loss {self._train['loss']:.4f}, learning rate {self._train['learning_rate']:.2e}"
        self._train = {}
        return said

    @staticmethod
    def _write(args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(str(args.output_dir))
        if state.is_world_process_zero and folder.is_dir():
            write_log(folder / LOG_FILE, state.log_history)

    @staticmethod
    def _say(line: str, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            tqdm.write(line)


def _scores(logs: Mapping[str, Any]) -> str:
    if "eval_accuracy" not in logs:
        return ""
    names = ("balanced_accuracy", "accuracy", "many", "medium", "few")
    said = [f"{name.replace('_', ' ')} {percent(logs.get(f'eval_{name}'))}" for name in names]
    return " | validation: " + ", ".join(said)


class ProgressBar(ProgressCallback):
    """Transformers' progress bar, without its print of every log: ``RunLog`` says what is worth a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print nothing."""
