"""The part of our Trainer that leaves things behind: complete checkpoints, exact resuming, publishing once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from etf_adapt.hub.publish import publish
from etf_adapt.hub.send import HubError, check_name_and_token
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.checkpoints import (
    begin_checkpoint,
    complete_checkpoint,
    read_state,
    read_tensors,
    rotate_checkpoints,
    write_tensors,
)
from etf_adapt.training.early_stopping import EarlyStopping
from etf_adapt.training.parameters import require_finite


class ResumableTrainer(Trainer):
    """Mend what transformers' ``Trainer`` (5.24) gets wrong where a run is saved, stopped, resumed and published.

    - A checkpoint is marked as complete when all processes have written theirs; only then are older ones deleted, and of
      those only our own.
    - Weights that are not finite are not saved; nor are the arguments, which the stock class pickles with the Hub token in
      clear.
    - The count of evaluations without improvement is part of the checkpoint, and a run that had ended when it was saved has
      ended when it is resumed: the stock class trains one more step.
    - The best checkpoint is found in a folder that was moved.
    - A run is not resumed with other settings of sampling than it began with.
    - A finished folder is published in one commit. The stock class makes the repository before the first step, and sends the
      whole output folder, with the pickle that holds the token.

    Subclasses set ``train_labels`` (rows,) and ``early_stopping``, and define what else belongs to a checkpoint.
    """

    args: ETFTrainingArguments
    model: PreTrainedModel
    train_labels: NDArray[np.int64] | None = None
    early_stopping: EarlyStopping

    def draw_settings(self) -> dict[str, Any]:
        """Return all that decides which rows are drawn when and what they train, by names for a person."""
        labels = np.zeros(0, np.int64) if self.train_labels is None else self.train_labels
        trained = [
            (name, *parameter.shape) for name, parameter in self.model.named_parameters() if parameter.requires_grad
        ]
        return {
            "trained parameters": f"of hash {sha256(repr(sorted(trained)).encode()).hexdigest()[:12]}",
            "sampler": self.args.sampler,
            "train_sampling_strategy": self.args.train_sampling_strategy,
            "batch size": self.get_total_train_batch_size(self.args),
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "rows": f"{len(labels)} of hash {sha256(labels.astype(np.int64).tobytes()).hexdigest()[:12]}",
        }

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint holds beyond transformers' own: values for JSON, and tensors."""
        raise NotImplementedError

    def restore_own_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``own_state`` returned when the checkpoint was written."""
        raise NotImplementedError

    # Checkpoints

    def restore(self, checkpoint: Path) -> None:
        """Take up our part of a checkpoint, if it was written with the same draw; transformers' own follows in ``train``."""
        state = read_state(checkpoint)
        for name, value in self.draw_settings().items():
            if state["draw"].get(name, value) != value:
                raise ValueError(
                    f"`{checkpoint}` was written with {name} {state['draw'][name]!r}, and this run has {value!r}: it would "
                    "go on otherwise than it began. Resume with the same settings, or start another run."
                )
        self.early_stopping.misses = state["misses"]
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
            own, tensors = self.own_state()
            write_tensors(folder, tensors)
            complete_checkpoint(
                folder, {"draw": self.draw_settings(), "misses": self.early_stopping.misses, "own": own}
            )
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
        # Of equally good checkpoints the latest is the best: few validation rows are soon all right, when training is not done.
        is_better = super()._determine_best_metric(metrics, trial)
        self.early_stopping.count(is_better=is_better)
        self.control.should_training_stop |= self.early_stopping.is_due
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        is_equal = not is_better and self.state.best_metric is not None and metrics.get(name) == self.state.best_metric
        if is_equal and self.args.save_strategy != "no":
            self.state.best_global_step = self.state.global_step
        return is_better or is_equal

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        )
        if resume is None:
            self.early_stopping.misses = 0
            return epochs, batches
        # Once more: the weights were loaded in between, by which a head that changed counts as a new one.
        self.restore_own_state(read_state(resume)["own"], read_tensors(resume))
        if self.state.best_global_step:
            best = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if self.early_stopping.is_due or self.state.global_step >= max_steps:
            return num_train_epochs, 0
        return epochs, batches

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        with self._without_stock_rotation():
            return super()._finalize_training(trial, num_train_samples, start_time)

    @contextmanager
    def _without_stock_rotation(self) -> Iterator[None]:
        # The stock class takes any folder `checkpoint-*` for its own, and deletes before the new one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    # Publishing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse now what would fail at the end; the repository is made when the folder is finished."""
        if not self.args.hub_model_id:
            raise HubError("`hub_model_id` (=None) is needed to publish: user/name.")
        if self.is_world_process_zero():
            check_name_and_token(self.args.hub_model_id, token)
        self.hub_model_id: Any = self.args.hub_model_id
        self.push_in_progress = None

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Save the model and publish ``output_dir``; return the address of the commit, on the first process.

        ``revision`` and ``private`` are those of the arguments where None. ``blocking=False`` is refused, since a folder that
        is being sent must not change; so are arguments of the stock card.
        """
        if not blocking or kwargs:
            raise ValueError(f"`push_to_hub` takes no {', '.join(kwargs) or 'blocking=False'}: leave it out.")
        self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        url = None
        try:
            if self.is_world_process_zero():
                url = publish(
                    str(self.args.output_dir),
                    str(self.hub_model_id),
                    private=self.args.hub_private_repo if private is None else private,
                    revision=revision or self.args.hub_revision,
                    commit_message=commit_message,
                    token=token,
                )
        finally:  # the others wait here, also for what fails
            self.accelerator.wait_for_everyone()
        return url
