"""transformers' Trainer with our sampler, loss, heads, metrics and checkpoints: a subclass, no loop of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from etf_adapt.data.image_dataset import RowDraws
from etf_adapt.data.long_tail import labels_of, read_labels
from etf_adapt.data.progress import use_bars
from etf_adapt.data.sampler import ClassBalancedSampler
from etf_adapt.data.text import EvenLengths, SimilarLengths, lengths_of
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.training_logits import TrainingLogits
from etf_adapt.inference.launch import set_threads
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.results.advice import advise
from etf_adapt.results.best_metric import check_metric, require_measurable
from etf_adapt.training import parameters
from etf_adapt.training.aligning import AligningTrainer
from etf_adapt.training.arguments import HEAD_RATE, SAMPLER_POWERS, ETFTrainingArguments
from etf_adapt.training.budget import choose_rate, fill_budget
from etf_adapt.training.callbacks import ProgressBar, ProgressPrinter, Realign, RunLog
from etf_adapt.training.collapse_monitor import make_monitors
from etf_adapt.training.finishing import finish
from etf_adapt.training.messages import describe_alignment, describe_run
from etf_adapt.training.soft_labels import SoftLabels


class ETFTrainer(AligningTrainer):
    """Train a model with an ETF head, or with any head to compare it with, by transformers' ``Trainer``.

    Unlike the stock class: examples are drawn by ``ClassBalancedSampler``; a fresh ETF or cosine head is aligned before the
    first step, and a fixed one again in training; each training row is scored by the head as it would be without that row;
    a fixed head stays out of the optimizer whatever was unfrozen; mixup, CutMix and smoothing give soft labels to the model's
    own loss; evaluation counts each row once and keeps no logits, except for ``compute_metrics``; a loss or weight that is not
    finite ends the run unsaved; checkpoints are complete or known not to be, hold no pickled arguments, and are resumed bit for
    bit on the CPU. ``predict`` returns logits, and ``finish`` leaves a calibrated model with its results and card.

    Args:
        model: Model made by ``ETFFor...`` or ``etf_adapt.adapt``; its trained parameters are float32.
        args: Settings of the run.
        data_collator: Makes a batch of rows, with ``labels`` (batch,) and ``row_id`` (batch,), the row's number in its data
            set; evaluation on several processes needs the latter.
        train_dataset: Training rows, map-style, as ``data_collator`` takes them.
        eval_dataset: Validation rows, or a dict of such data sets; needed unless ``eval_strategy`` is ``"no"``.
        processing_class: Tokenizer or image processor, saved beside the model.
        model_init: Makes the model, in place of ``model``: a fresh one for each run of ``train`` and of
            ``hyperparameter_search``, where it may take the trial.
        compute_loss_func: Loss of ``(outputs, labels, num_items_in_batch)`` in training, in place of the model's own; labels
            are class indices, or probabilities (batch, num_classes) with mixup, CutMix or smoothing.
        compute_metrics: Further metrics, of an ``EvalPrediction`` with the logits (rows, num_classes) and the labels (rows,).
        callbacks: Further callbacks.
        optimizers: Optimizer and schedule; the optimizer has its learning rates, also of a trained head.
        optimizer_cls_and_kwargs: Class of the optimizer and its options, ``lr`` among them.
        preprocess_logits_for_metrics: Makes of ``(logits, labels)`` of a batch the tensor (batch, ...) that is kept of the
            logits, for ``compute_metrics`` and ``predict``.
        alignment_dataset: The training rows in the same order with the transforms of evaluation; by default ``train_dataset``.
        labels: Label of each training row; by default the column ``label`` or ``labels`` of ``train_dataset``.

    Raises:
        ValueError: The model has no head of ours, or settings and model do not fit.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from etf_adapt.models.auto import adapt
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = adapt(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)), 2)
        >>> rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": row % 2} for row in range(8)]
        >>> args = ETFTrainingArguments(mkdtemp(), num_train_epochs=1, per_device_train_batch_size=4, eval_strategy="no")
        >>> trainer = ETFTrainer(model, args, train_dataset=rows, labels=[row["labels"] for row in rows])
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        runs: 1 process ...
        2
        >>> trainer.predict(rows).predictions.argmax(-1).shape
        (8,)
    """

    model: ETFModel
    finish = finish

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: ETFTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        alignment_dataset: Dataset[Any] | None = None,
        labels: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        args = ETFTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, ETFTrainingArguments):
            raise TypeError(
                f"`args` (a {type(args).__name__}) must be ETFTrainingArguments: they take the same fields, and more."
            )
        if (model is None) == (model_init is None):
            raise ValueError(
                f"`model` and `model_init` are {'both None' if model is None else 'both given'}: pass one of them."
            )
        parameters.check_optimizers(args, optimizers[0], optimizer_cls_and_kwargs)
        set_threads(args.torch_threads)
        use_bars(not args.disable_tqdm)
        self.train_labels = None
        if train_dataset is not None:
            ids = labels_of(train_dataset) if labels is None else read_labels(labels).ids
            if len(ids) != len(train_dataset):  # type: ignore[arg-type]
                raise ValueError(f"`labels` has {len(ids)} entries: give one for each row of `train_dataset`.")
            self.train_labels = ids
        self.alignment_dataset = train_dataset if alignment_dataset is None else alignment_dataset
        args = copy(args)  # which may be another run's too
        fill_budget(args, 0 if self.train_labels is None else len(self.train_labels), self.alignment_dataset)
        if model is not None:
            self._take_up(model)
        self._train_sampler: RowDraws | None = None
        self.given_optimizer = optimizers[0]
        shown = ProgressPrinter() if args.disable_tqdm else ProgressBar()
        ours = [Realign(lambda: self._steps_in_epoch, self.realign), RunLog(lambda: self.run_dir), shown]
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, [*ours, *(callbacks or ())], optimizers, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
        )  # fmt: skip
        self.remove_callback(self.callback_handler.callbacks[-1])  # the stock printer or bar, which comes last
        self._settle()
        parameters.require_embeddings(self.model, args.neftune_noise_alpha)
        if args.final_frame is not None:
            self._require_whole_weights("final_frame")
        validation_labels = self._labels_of_evaluation()
        if self._has_whole_weights:
            samples = {"": (eval_dataset, validation_labels), "train_": (self.alignment_dataset, self.train_labels)}
            self._monitors = make_monitors(samples, self.first_head.num_classes, args, data_collator)
        if (metric := args.metric_for_best_model) and compute_metrics is None:
            sets = [*eval_dataset] if isinstance(eval_dataset, dict) else []
            check_metric(metric, collapse_rows=args.collapse_rows, sets=sets)
            if args.eval_strategy != "no" and self.class_counts is not None:
                require_measurable(
                    metric,
                    class_counts=self.class_counts,
                    validation_labels=validation_labels,
                    shot_bounds=args.shot_bounds,
                    monitors=self._monitors if len(self.heads) == 1 else {},
                )

    def _take_up(self, model: PreTrainedModel) -> None:
        """Find the heads of a model, and give its loss the class counts."""
        self.heads = head_modules(model)
        if not self.heads or not isinstance(model, ETFModel):
            raise ValueError(
                "`model` has no head and loss of etf_adapt: load it with ETFFor..., or call adapt(model, ...)."
            )
        if self.train_labels is not None:
            self.class_counts = np.bincount(self.train_labels, minlength=self.first_head.num_classes)
            if len(self.class_counts) > self.first_head.num_classes:
                raise ValueError(
                    f"`train_dataset` has label {len(self.class_counts) - 1}, but the head has {self.first_head.num_classes} "
                    f"classes: load the model with num_labels={len(self.class_counts)}."
                )
            model.set_loss(model.etf_settings["loss"], class_counts=self.class_counts.tolist())
        self.alignment = {}
        self._training_logits = TrainingLogits(self.heads)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make a fresh model, whose head is not aligned yet."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        self._take_up(model)
        return model

    def _settle(self) -> None:
        """Resolve what depends on the settings and the model, both of which a trial may change."""
        args = self.args
        if args.learning_rate in (None, self._chosen_rate):  # not one that a trial has set
            rows = 0 if self.train_labels is None else len(self.train_labels)
            epochs, steps_in_epoch = args.num_train_epochs, math.ceil(rows / self.get_total_train_batch_size(args))
            steps = args.max_steps if args.max_steps > 0 else math.ceil(cast(float, epochs) * steps_in_epoch)
            frozen = parameters.frozen_parameters(self.model, args.freeze)
            trained = [part.numel() for part in self.model.parameters() if part.requires_grad and part not in frozen]
            self._chosen_rate = args.learning_rate = choose_rate(steps, sum(trained))
        self.model.without_dropout = args.dropout == "off"
        self.realignment = self._resolve_realignment()
        self._training_logits.leaves_out, self._training_logits.notes = args.leave_one_out, self.realignment == "steps"
        self.batch_norm = parameters.resolve_batch_norm(self.model, self.first_head, args)
        self.model.freeze_batch_norm = self.batch_norm != "train"
        self.model.without_dropout |= args.dropout is None and self.realignment == "steps"
        num_classes, smoothing = self.first_head.num_classes, args.label_smoothing
        self._soft_labels = SoftLabels(num_classes, mixup=args.mixup, cutmix=args.cutmix, smoothing=smoothing)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start, or from ``resume_from_checkpoint``: a folder, or True for the newest one in ``output_dir``.

        Raises:
            ValueError: Nothing is left to train, trained weights are not float32, the checkpoint belongs to a run with other
                settings (of its length alone a resumed run may have another), or ``output_dir`` holds another run,
                finished or running.
            FileNotFoundError: There is no complete checkpoint to resume from.
            FloatingPointError: A loss or a weight is not finite.
            DiskFullError: A checkpoint finds no room; earlier ones are whole.
            Stopped: A signal (SIGINT, SIGTERM, SIGUSR1) ended the run, and its state is saved: a ``SystemExit``, code 128 + its
                number.
        """
        with self.running(resume_from_checkpoint, trial) as self._resumed:
            output = super().train(str(self._resumed) if self._resumed else None, trial, ignore_keys_for_eval)
            if self.args.final_frame is not None:
                self.model.fold_heads()
                self.heads = head_modules(self.model)
                self.align(self.args.final_frame)
                self.print(f"refitted, {describe_alignment(self.alignment, num_classes=self.first_head.num_classes)}")
        parameters.require_finite(self.model, step=self.state.global_step)
        self.train_metrics = output.metrics
        return output

    def _hp_search_setup(self, trial: Any) -> None:
        # In `train` of the stock class the first moment at which model and settings are those of this run or trial.
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._settle()
        self._begin(self._resumed)

    def _begin(self, checkpoint: Path | None) -> None:
        """Say what runs, and take up the checkpoint or align a fresh head."""
        steps = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs
        freed = parameters.fix_parameters(self.model, freeze=self.args.freeze, steps=cast(float, steps))
        if freed:
            self.print(f"fixed again, after requires_grad_(True) had freed it: the head `{', '.join(freed)}`")
        self._realigned_at = None
        changes = [] if checkpoint is None else self.restore(checkpoint)
        self.print(*describe_run(self))
        if checkpoint is not None:
            self.print(f"resuming from {checkpoint}", *changes)
        elif self.needs_alignment() or self.realignment != "never":
            replaced = {head.frame for head in self.heads.values()} - {"random", "initialised", self.args.frame}
            if replaced:
                self.print(f"the head's {', '.join(sorted(replaced))} frame is set anew; --realign never keeps it")
            self.align(row_ids=self.sampled_rows())
            self.print(describe_alignment(self.alignment, num_classes=self.first_head.num_classes), *self._advise())
        else:
            self._training_logits.rows.clear()  # of an alignment before the head may have changed

    def _advise(self) -> list[str]:
        if self.class_counts is None:
            return []
        labels = self._labels_of_evaluation()
        advice = advise(
            self.alignment,
            class_counts=self.class_counts,
            in_features=self.first_head.weight[0].numel(),
            validation_counts=None if labels is None else np.bincount(labels),
        )
        return [f"advice: {line}" for line in advice]

    # Learning rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the stock optimizer, with a trained head's parameters in groups with their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            trained = [head for head in self.heads.values() if head.trainable]
            parameters.set_head_learning_rate(optimizer, trained, self.head_learning_rate)
        return optimizer

    @property
    def head_learning_rate(self) -> float:
        """Learning rate of a trained head at its peak."""
        rate = self.args.head_learning_rate
        return HEAD_RATE * self.learning_rates[0] if rate is None else rate

    @property
    def learning_rates(self) -> list[float]:
        """Learning rates of the backbone at their peak."""
        if self.given_optimizer is not None:
            return sorted({group["lr"] for group in self.given_optimizer.param_groups})
        _, options = self.optimizer_cls_and_kwargs or (None, {})
        return [options.get("lr", cast(float, self.args.learning_rate))]

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Search as the stock class does; by default for the best ``metric_for_best_model``, or with "minimize" the least loss.

        The stock objective is the sum of all metrics. ``direction`` follows the metric, and is "minimize" for an objective of
        one's own.
        """
        name, rises = str(self.args.metric_for_best_model or "loss"), self.args.greater_is_better
        rises = not name.endswith("loss") if rises is None else rises
        if direction is None:
            direction = "maximize" if rises and compute_objective is None else "minimize"
        if rises and direction == "minimize":
            name = "loss"
        objective = compute_objective or itemgetter(f"eval_{name.removeprefix('eval_')}")
        return super().hyperparameter_search(hp_space, objective, n_trials, direction, backend, hp_name, **kwargs)

    # Sampling and loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        if self.train_labels is None:
            raise ValueError("`train_dataset` (=None) is needed to train: pass it to ETFTrainer.")
        batch_size = self.get_total_train_batch_size(self.args)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        power = SAMPLER_POWERS[self.args.sampler]
        sampler: Any = ClassBalancedSampler(self.train_labels, power=power, batch_size=batch_size, seed=seed)
        lengths = lengths_of(self.train_dataset, self.args.length_column_name)
        if lengths is not None and self.args.train_sampling_strategy == "group_by_length":
            sampler = SimilarLengths(sampler, lengths, batch_size=batch_size, seed=seed)
        self._train_sampler = RowDraws(sampler)
        return self._train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        lengths = lengths_of(eval_dataset, self.args.length_column_name)
        if lengths is None or "row_id" not in eval_dataset.column_names:  # rows are numbered as they come
            return SequentialSampler(eval_dataset)
        return EvenLengths(lengths, batch_size=self.args.eval_batch_size, seed=self.args.seed)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the number of rows of a pass over a loader: for training those drawn, not those of the data set."""
        if dataloader.dataset is self.train_dataset and self._train_sampler is not None:
            return len(self._train_sampler)
        return super().num_examples(dataloader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the model's own loss of a training batch, on soft labels with mixup, CutMix or smoothing."""
        inputs = dict(inputs)
        row_ids, labels = inputs.pop("row_id", None), inputs["labels"]
        if self._soft_labels.is_active:
            name = self.model.main_input_name
            inputs[name], inputs["labels"] = self._soft_labels(inputs[name], inputs["labels"])
        if self.compute_loss_func is not None:
            self.model._unlabelled_steps = 0  # the model need not warn that its own loss is not used
        with self._training_logits.of(labels, None if self._soft_labels.mixes else row_ids):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._looks_at(loss) and not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss (={loss.item()}) of step {self.state.global_step + 1} is not finite and nothing was saved since the "
                "last checkpoint: lower `learning_rate`, set `max_grad_norm`, or train in float32."
            )
        return (loss, outputs) if return_outputs else loss

    def _looks_at(self, loss: Tensor) -> bool:
        """Return whether a loss is read: on an accelerator now and then, for it waits; what is saved is read always."""
        return loss.device.type == "cpu" or self.state.global_step % max(1, int(self.state.logging_steps)) == 0
