"""The part of our Trainer that leaves things behind: complete checkpoints, exact resuming, publishing once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from etf_adapt.hub.publish import publish
from etf_adapt.hub.send import HubError, check_name_and_token
from etf_adapt.inference.launch import first_process_decides
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.weights import without_bars
from etf_adapt.results.claim import check_claim, read_run
from etf_adapt.results.run_folder import public_value
from etf_adapt.training import checkpoints
from etf_adapt.training.arguments import FIXED_ON_RESUME, LENGTH, ETFTrainingArguments
from etf_adapt.training.parameters import describe_learning, require_finite
from etf_adapt.training.stopping import StoppableTrainer


class ResumableTrainer(StoppableTrainer):
    """Mend what transformers' ``Trainer`` (5.24) gets wrong where a run is saved, stopped, resumed and published.

    Subclasses set ``train_labels`` (rows,), and define what else belongs to a checkpoint.
    """

    args: ETFTrainingArguments
    model: ETFModel
    train_labels: NDArray[np.int64] | None = None
    # What a checkpoint holds beyond transformers' own, values for JSON and tensors; and to take it up.
    own_state: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    restore_own_state: Callable[[Mapping[str, Any], Mapping[str, Tensor]], None]
    _chosen_rate: float | None = None  # where the arguments named none
    misses = 0
    """Evaluations since the best one: ``early_stopping_patience`` of them end the run."""

    def draw_settings(self) -> dict[str, Any]:
        """Return all that decides which rows are drawn when and what they train, in values for JSON by names for a person."""
        labels = np.zeros(0, np.int64) if self.train_labels is None else self.train_labels
        trained = [(name, *value.shape) for name, value in self.model.named_parameters() if value.requires_grad]
        return {
            "trained parameters": f"of hash {sha256(repr(sorted(trained)).encode()).hexdigest()[:12]}",
            "sampler": self.args.sampler,
            "train_sampling_strategy": self.args.train_sampling_strategy,
            "batch size": self.get_total_train_batch_size(self.args),
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "rows": f"{len(labels)} of hash {sha256(labels.astype(np.int64).tobytes()).hexdigest()[:12]}",
            **{name: public_value(getattr(self.args, name)) for name in FIXED_ON_RESUME},
            **describe_learning(self.model),
        }

    # Checkpoints

    def restore(self, checkpoint: Path) -> list[str]:
        """Take up our part of a checkpoint, if it was written with the same settings; return a line for a change of length."""
        state = checkpoints.read_state(checkpoint)
        if state["save_only_model"]:
            raise ValueError(
                f"`{checkpoint}` was written with `save_only_model` and cannot be resumed: start another run."
            )
        if self._chosen_rate is not None:  # by the steps of this run, which may be more now
            self._chosen_rate = self.args.learning_rate = state["draw"]["learning_rate"]
        # The stock class takes some settings from the arguments and others from the checkpoint.
        for name, value in self.draw_settings().items():
            if (before := state["draw"].get(name)) != value:
                raise ValueError(
                    f"`{checkpoint}` was written with {name} {before!r}, and this run has {value!r}: it would go on "
                    "otherwise than it began. Resume with the same settings, or start another run."
                )
        self.misses = state["misses"]
        self.restore_own_state(state["own"], checkpoints.read_tensors(checkpoint))
        lengths = {name: (before, getattr(self.args, name)) for name, before in state["length"].items()}
        return [
            f"`{name}` was {before:g} and is {now:g}: the learning rate follows the schedule of the new length from here on"
            for name, (before, now) in lengths.items()
            if before != now
        ]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and isinstance(self.lr_scheduler, LambdaLR):
            # The optimizer's state holds the next step's rate by the schedule of the run's earlier length.
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite(self.model, step=self.state.global_step)
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            check_claim(str(self.args.output_dir))
        with checkpoints.room_for(folder, output_dir=self.run_dir, count_bytes=self._count_bytes):
            if self.args.should_save:
                checkpoints.begin_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            with self._without_stock_rotation():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                own, tensors = self.own_state()
                checkpoints.write_tensors(folder, tensors)
                state = {
                    "draw": self.draw_settings(),
                    "length": {name: getattr(self.args, name) for name in LENGTH},
                    "save_only_model": self.args.save_only_model,
                    "misses": self.misses,
                    "own": own,
                    "next": self._next_of_save,
                }
                checkpoints.complete_checkpoint(folder, state, run=read_run(self.run_dir))
        self._saved_step, self._is_saved = self.state.global_step, True
        if self.args.should_save:
            checkpoints.rotate_checkpoints(folder, self.args.save_total_limit, keep=self.state.best_model_checkpoint)

    def _count_bytes(self) -> int:
        states = [] if self.optimizer is None else self.optimizer.state.values()
        held = [*self.model.state_dict().values(), *(value for state in states for value in state.values())]
        return sum(getattr(value, "nbytes", 0) for value in held)

    def _load_best_model(self) -> None:
        best, metric = str(self.state.best_model_checkpoint), self.args.metric_for_best_model
        if flaw := first_process_decides(partial(checkpoints.find_flaw, best, read_run(self.run_dir))):
            self.print(f"{best}, the best by {metric}, cannot be used: {flaw}. Step {self.state.global_step} is kept.")
        else:
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        with checkpoints.room_for(Path(folder), output_dir=self.run_dir, count_bytes=self._count_bytes), without_bars():
            # Without the arguments, which the stock class pickles with the Hub token in clear.
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        key = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if metrics.get(key, 0.0) is None:
            raise ValueError(f"`{key}` is the best checkpoint's metric and no validation row tells it: choose another.")
        # Of equally good checkpoints the latest is the best: few validation rows are soon all right, when training is not done.
        is_better = super()._determine_best_metric(metrics, trial)
        self.misses = 0 if is_better else self.misses + 1
        self.control.should_training_stop |= self._is_out_of_patience
        is_equal = not is_better and self.state.best_metric is not None and metrics.get(key) == self.state.best_metric
        if is_equal and self.args.save_strategy != "no":
            self.state.best_global_step = self.state.global_step
        return is_better or is_equal

    @property
    def _is_out_of_patience(self) -> bool:
        return self.misses >= (self.args.early_stopping_patience or math.inf)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        length = max_steps, num_update_steps_per_epoch, num_train_epochs
        epochs, batches = super()._init_training_state(*length, resume, trial)
        self._steps_in_epoch = num_update_steps_per_epoch
        if resume is None:
            self.misses = 0
            return epochs, batches
        self.state.compute_steps(self.args, max_steps)  # the checkpoint holds those of the earlier arguments
        state = checkpoints.read_state(resume)
        self._checkpoint, self._next_of_checkpoint = resume, state["next"]
        # Once more: the weights were loaded in between, by which a head that changed counts as a new one.
        self.restore_own_state(state["own"], checkpoints.read_tensors(resume))
        # The stock class forgets the best checkpoint of a folder that was moved; the best step may have none of its own.
        noted = TrainerState.load_from_json(str(Path(resume, TRAINER_STATE_NAME))).best_model_checkpoint
        best = Path(self.run_dir, Path(noted or "").name)
        self.state.best_model_checkpoint = str(best) if noted and best.is_dir() else None
        if noted and not best.is_dir():
            self.print(f"{best}, the best so far, is gone: the best of what follows, or else the last, will be taken.")
        if self._is_out_of_patience or self.state.global_step >= max_steps:
            return num_train_epochs, 0  # the stock class would train one more step
        return epochs, batches

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._finish_step(self._checkpoint, {"model": self.model_wrapped, "trial": trial, "start_time": start_time})
        self._saved_step = None  # what is loaded and refitted from here on is no state to go on from
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
