"""The part of our Trainer that stops and goes on: checkpoints that are whole, and a state that is restored whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.checkpoints import (
    begin_checkpoint,
    complete_checkpoint,
    read_state,
    read_tensors,
    rotate_checkpoints,
    write_tensors,
)
from etf_adapt.training.parameters import require_finite


class ResumableTrainer(Trainer):
    """Mend what transformers' ``Trainer`` gets wrong where a run is saved, stopped and resumed (5.24).

    - A checkpoint is marked as complete when all processes have written theirs, and only then are older ones deleted; of
      those only our own.
    - Weights that are not finite are not saved, nor the arguments, which the stock class pickles with the Hub token in
      clear.
    - The count of evaluations without a better one is part of the checkpoint, and a run that had ended when it was
      saved has ended when it is resumed: the stock class trains one more step.
    - The best checkpoint is found in a folder that was moved.
    - A run does not go on with another draw than it began with.

    Subclasses say what draws their rows (``draw_settings``) and what else is to be kept (``own_state``).
    """

    args: ETFTrainingArguments
    model: PreTrainedModel
    _misses = 0  # evaluations since the best one

    def draw_settings(self) -> dict[str, Any]:
        """Return all that decides which rows are drawn when and what they train, by names that a person knows."""
        raise NotImplementedError

    def own_state(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold beyond transformers' own, ready for JSON."""
        raise NotImplementedError

    def own_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint is to hold in tensors, by name."""
        raise NotImplementedError

    def restore_own_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``own_state`` and ``own_tensors`` returned when the checkpoint was written."""
        raise NotImplementedError

    def restore(self, checkpoint: Path) -> None:
        """Take up our part of a checkpoint's state; transformers' own follows in ``train``.

        Args:
            checkpoint: Folder of a complete checkpoint.

        Raises:
            ValueError: It belongs to a run with another draw, or that trains other parameters.
        """
        state = read_state(checkpoint)
        for name, value in self.draw_settings().items():
            if state["draw"].get(name, value) != value:
                raise ValueError(
                    f"`{checkpoint}` was written with {name} {state['draw'][name]!r}, and this run has {value!r}: it would "
                    "go on otherwise than it began. Resume with the same settings, or start another run."
                )
        self._misses = state["misses"]
        self.restore_own_state(state["own"], read_tensors(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.model, step=self.state.global_step)
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        with self._without_stock_rotation():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_tensors(folder, self.own_tensors())
            state = {"draw": self.draw_settings(), "misses": self._misses, "own": self.own_state()}
            complete_checkpoint(folder, state)
            rotate_checkpoints(folder.parent, self.args.save_total_limit, keep=self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # One for each file of weights, among our lines.
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if bars:
            logging.enable_progress_bar()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of equally good checkpoints the latest is the best: few validation rows are soon all right, training is not done."""
        is_better = super()._determine_best_metric(metrics, trial)
        self._misses = 0 if is_better else self._misses + 1
        self.control.should_training_stop |= self._is_stopped_early()
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        is_equal = not is_better and self.state.best_metric is not None and metrics.get(name) == self.state.best_metric
        if is_equal and self.args.save_strategy != "no":
            self.state.best_global_step = self.state.global_step
        return is_better or is_equal

    def _is_stopped_early(self) -> bool:
        return self.args.early_stopping_patience is not None and self._misses >= self.args.early_stopping_patience

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        )
        if resume is None:
            self._misses = 0
            return epochs, batches
        # Once more: loading the weights, which has happened in between, takes a head that has changed for a new one.
        self.restore_own_state(read_state(resume)["own"], read_tensors(resume))
        if self.state.best_global_step:
            best = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if self._is_stopped_early() or self.state.global_step >= max_steps:
            return num_train_epochs, 0
        return epochs, batches

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        with self._without_stock_rotation():
            return super()._finalize_training(trial, num_train_samples, start_time)

    @contextmanager
    def _without_stock_rotation(self) -> Iterator[None]:
        """Keep the stock class from deleting: it takes any folder ``checkpoint-*`` for its own, and too early."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit
