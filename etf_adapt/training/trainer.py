"""Transformers' Trainer with our sampler, loss, heads, metrics and checkpoints: a subclass, no loop of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from etf_adapt.data.image_dataset import RowDraws
from etf_adapt.data.long_tail import labels_of, read_labels
from etf_adapt.data.sampler import ClassBalancedSampler
from etf_adapt.data.text import EvenLengths, SimilarLengths, lengths_of
from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.training_logits import TrainingLogits
from etf_adapt.losses.registry import LOSSES
from etf_adapt.metrics.shots import ShotAccuracy, pooled_balanced_accuracy
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.stock_subclass import FEATURES
from etf_adapt.training.arguments import HEAD_RATE, SAMPLER_POWERS, ETFTrainingArguments
from etf_adapt.training.callbacks import EpochStart, ProgressBar, Realign, Reweight, RunLog
from etf_adapt.training.checkpoints import resolve_checkpoint
from etf_adapt.training.collapse_monitor import CollapseMonitor
from etf_adapt.training.evaluation import predict_rows
from etf_adapt.training.launch import set_threads
from etf_adapt.training.messages import RunSetup, describe_run, describe_start
from etf_adapt.training.parameters import (
    batch_norms,
    fix_parameters,
    reestimate_batch_norms,
    require_finite,
    set_head_learning_rate,
)
from etf_adapt.training.publishing import PublishingTrainer
from etf_adapt.training.soft_labels import SoftLabels


class ETFTrainer(PublishingTrainer):
    """Train a model with an ETF head, or with any head to compare it with, by transformers' ``Trainer``.

    What differs from the stock class: rows are drawn by ``ClassBalancedSampler``; a fresh ETF or cosine head is aligned on
    the training rows before the first step, and a fixed one again after each epoch; each training row is scored by the head
    that would have been set without it; a fixed head stays out of the optimizer whatever was unfrozen; mixup, CutMix and
    smoothing give soft labels to the model's own loss; evaluation streams and counts each row once; a loss or weight that
    is not finite ends the run before it is saved; a checkpoint is complete or known not to be, holds no
    ``training_args.bin``, and is resumed bit for bit on the CPU.

    Args:
        model: Model made by ``ETFFor...`` or ``etf_adapt.adapt``; what is trained of it is float32.
        args: Settings of the run.
        train_dataset: Training rows, map-style, as ``data_collator`` takes them.
        eval_dataset: Validation rows; needed unless ``eval_strategy`` is ``"no"``.
        alignment_dataset: The training rows in the same order as evaluation transforms them; ``train_dataset`` by default.
        data_collator: Makes a batch of rows, with ``labels`` (batch,) and ``row_id`` (batch,), the row's number in its data
            set; the latter is needed to evaluate on several processes.
        processing_class: Tokenizer or image processor, saved beside the model.
        labels: Label of each training row; by default the column ``label`` or ``labels`` of ``train_dataset``.
        callbacks: Further callbacks.

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
    """

    model: ETFModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: ETFTrainingArguments,
        *,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | None = None,
        alignment_dataset: Dataset[Any] | None = None,
        data_collator: Any = None,
        processing_class: Any = None,
        labels: Sequence[int] | NDArray[np.int64] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.heads = head_modules(model)
        if not self.heads or not isinstance(model, ETFModel):
            raise ValueError(
                "`model` has no head and loss of etf_adapt: load it with ETFFor..., or call adapt(model, ...)."
            )
        set_threads(args.torch_threads)
        num_classes = next(iter(self.heads.values())).num_classes
        self.train_labels: NDArray[np.int64] | None = None
        self.class_counts: NDArray[np.int64] | None = None
        if train_dataset is not None:
            self.train_labels = labels_of(train_dataset) if labels is None else read_labels(labels).ids
            self.class_counts = np.bincount(self.train_labels, minlength=num_classes)
            if len(self.train_labels) != len(train_dataset):  # type: ignore[arg-type]
                raise ValueError(
                    f"`labels` has {len(self.train_labels)} entries: give one for each row of `train_dataset`."
                )
            if len(self.class_counts) > num_classes:
                raise ValueError(
                    f"`train_dataset` has label {len(self.class_counts) - 1}, but the head has {num_classes} classes: load "
                    f"the model with num_labels={len(self.class_counts)}."
                )
            model.set_loss(model.etf_settings["loss"], class_counts=self.class_counts.tolist())
        self.alignment_dataset = train_dataset if alignment_dataset is None else alignment_dataset
        self.alignment: dict[str, Any] | None = None
        self._training_logits = TrainingLogits(self.heads)
        self._soft_labels = SoftLabels(
            num_classes, mixup=args.mixup, cutmix=args.cutmix, smoothing=args.label_smoothing
        )
        self._train_sampler: RowDraws | None = None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        for stock in (PrinterCallback, ProgressCallback):
            self.remove_callback(stock)
        self.realign_epochs = self._resolve_realign_epochs()
        if args.final_frame is not None:
            model.require_frame(args.final_frame)
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"`final_frame` (={args.final_frame!r}) cannot be had with FSDP or DeepSpeed, which split the head over "
                    "processes: leave it out or use DDP."
                )
        own = [
            EpochStart(self._updates_per_epoch, lambda: [self._train_sampler]),
            Realign(self._updates_per_epoch, self.align, self.realign_epochs),
            RunLog(),
            *([] if args.disable_tqdm else [ProgressBar()]),
        ]
        if args.reweight_from is not None:
            self._set_class_weights(False)
            own.append(Reweight(self._updates_per_epoch, self._set_class_weights, args.reweight_from))
        for callback in (*own, *callbacks):
            self.add_callback(callback)
        self._monitors = self._make_monitors()
        self.batch_norm = self._resolve_batch_norm()
        self._frozen_norms = batch_norms(model) if self.batch_norm != "train" else []

    # What is trained, and from where

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True for the newest complete one in ``output_dir``.
            trial: As in ``Trainer``.
            ignore_keys_for_eval: Without effect: evaluation reads the logits alone.

        Returns:
            Number of steps, mean loss and figures of the run.

        Raises:
            ValueError: Nothing is left to train, weights to train are not float32, the checkpoint belongs to a run with
                another draw, or ``output_dir`` holds another run.
            FileNotFoundError: There is no complete checkpoint to resume from.
            FloatingPointError: A loss or a weight is not finite.
        """
        checkpoint = resolve_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        steps = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs
        freed = fix_parameters(self.model, freeze=self.args.freeze, steps=steps)
        if freed:
            self._say(f"fixed again, after requires_grad_(True) had freed it: the head `{', '.join(freed)}`")
        if checkpoint is not None:
            self.restore(checkpoint)
        for line in describe_run(self.describe_setup()):
            self._say(line)
        if checkpoint is not None:
            self._say(f"resuming from {checkpoint}")
        elif self.needs_alignment() or self.realign_epochs:
            replaced = {head.frame for head in self.heads.values()} - {"random", "initialised", self.args.frame}
            if replaced:
                self._say(f"the head's {', '.join(sorted(replaced))} frame is set anew; --realign_epochs 0 keeps it")
            if self.batch_norm == "reestimate":
                batches = self.accelerator.prepare_data_loader(self._alignment_loader(mixed=True))
                reestimate_batch_norms(self.model, batches)
            self.align()
            for line in self._describe_start():
                self._say(line)
        else:
            self._training_logits.clear()  # of a head that may have changed since
        output = super().train(str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval)
        if self.args.final_frame is not None:
            self.model.fold_heads()
            self.heads = head_modules(self.model)
            self.align(self.args.final_frame)
            self._say(f"refitted, {self._describe_start()[0]}")
        require_finite(self.model, step=self.state.global_step)
        return output

    def align(self, frame: str | None = None) -> None:
        """Set the head in closed form from the training rows as evaluation reads them (``etf_adapt.align_head``).

        Args:
            frame: The closed form; that of the settings where None.

        Raises:
            FloatingPointError: A weight is not finite.
        """
        require_finite(self.model, step=self.state.global_step)
        result = align_head(
            self.model,
            self._alignment_loader(mixed=False),
            class_counts=self.class_counts,
            frame=frame or self.args.frame,
            penalty=self.args.frame_penalty,
            feature_lengths=self.args.feature_lengths,
            seed=self.args.seed,
        )
        for head in self.heads.values():
            for rows in (head.weight, head.bias):
                if rows is not None:
                    broadcast(rows.data)  # Processes may round the same sums differently.
        self.alignment = {name: value for name, value in vars(result).items() if name not in ("left_out", "lengths")}
        logits = self._training_logits
        logits.clear()
        for (path, head), rows_left_out, lengths in zip(
            self.heads.items(), result.left_out, result.lengths, strict=True
        ):
            if rows_left_out is not None and self.args.leave_one_out and not head.trainable:
                logits.left_out[path] = rows_left_out.to(self.args.device)
            if lengths is not None and not head.trainable:
                logits.lengths[path] = lengths.to(self.args.device)

    def _set_class_weights(self, on: bool) -> None:
        settings = {name: value for name, value in self.model.etf_settings["loss"].items() if name != "class_weights"}
        if "class_weights" not in LOSSES[settings["name"]].options:
            weighted = [name for name, loss in LOSSES.items() if "class_weights" in loss.options]
            raise ValueError(
                f"`reweight_from` (={self.args.reweight_from}) weights the classes of {', '.join(weighted)}, and the loss "
                f"is {settings['name']}: choose one of these, or leave it out."
            )
        self.model.set_loss({**settings, "class_weights": "effective_number"} if on else settings)

    def describe_setup(self) -> RunSetup:
        """Say in plain values what the run is about to do."""
        head, args = next(iter(self.heads.values())), self.args
        is_fresh = self.needs_alignment()
        to_set = "means" if head.kind == "cosine" else args.frame
        parameters = list(self.model.parameters())
        return RunSetup(
            device=args.device.type,
            distributed_type=self.accelerator.distributed_type.value,
            mixed_precision=args.mixed_precision,
            class_counts=() if self.class_counts is None else self.class_counts.tolist(),
            validation_rows=len(self.eval_dataset) if isinstance(self.eval_dataset, Sized) else None,
            head_kind=head.kind,
            frame=to_set if is_fresh else str(head.frame),
            is_frame_to_be_set=is_fresh,
            is_head_trained=head.trainable,
            realign_epochs=self.realign_epochs,
            batch_norm=self.batch_norm,
            parameters=sum(parameter.numel() for parameter in parameters),
            trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            learning_rate=args.learning_rate,
            head_learning_rate=self.head_learning_rate,
            sampler=args.sampler,
            batch_size=self.get_total_train_batch_size(args),
            seed=args.seed,
        )

    def _describe_start(self) -> list[str]:
        """Describe the last alignment, with advice."""
        head, validation = next(iter(self.heads.values())), None
        if self.class_counts is not None:
            with suppress(ValueError):  # a data set that tells no labels
                validation = np.bincount(labels_of(self.eval_dataset), minlength=len(self.class_counts))
        return describe_start(
            self.alignment or {},
            num_classes=head.num_classes,
            in_features=head.weight[0].numel(),
            class_counts=self.class_counts,
            validation_counts=validation,
        )

    def _resolve_realign_epochs(self) -> float:
        """Return after how many first epochs the head is aligned again: as asked, else all where that can be had."""
        asked = self.args.realign_epochs
        is_set = all(head.kind == "etf" and not head.trainable for head in self.heads.values())
        is_whole = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        if asked is None:
            return math.inf if is_set and is_whole and self.args.frame != "random" else 0
        if asked and not is_set:
            raise ValueError(
                f"`realign_epochs` (={asked}) sets the head's rows anew, and this head learns them or draws them at random: "
                "set it to 0, or use a fixed 'etf' head."
            )
        if asked and not is_whole:
            raise ValueError(
                f"`realign_epochs` (={asked}) cannot be had with FSDP or DeepSpeed, which split the head over processes: set "
                "it to 0 or use DDP."
            )
        return asked

    def needs_alignment(self) -> bool:
        """Return whether the head is fresh and of a kind that is set before the first step."""
        return all(
            head.kind in ("etf", "cosine") and head.frame in ("random", "initialised") for head in self.heads.values()
        )

    def _alignment_loader(self, *, mixed: bool) -> DataLoader[Any]:
        """Load the training rows as evaluation reads them, each once in order, or mixed as training draws them."""
        dataset = self.alignment_dataset
        if dataset is None:
            raise ValueError("`train_dataset` (=None) is needed to train and to align the head: pass it to ETFTrainer.")
        return DataLoader(
            dataset,
            batch_size=self.args.train_batch_size if mixed else self.args.eval_batch_size,
            sampler=self._get_train_sampler() if mixed else self._get_eval_sampler(dataset),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def _resolve_batch_norm(self) -> str:
        """Return what happens to BatchNorm's statistics: as asked, else frozen wherever features must not drift."""
        if not batch_norms(self.model):
            return "none"
        head = next(iter(self.heads.values()))
        fixed = head.kind == "etf" and not head.trainable
        if self.args.batch_norm == "train" and fixed and self.args.frame != "random":
            raise ValueError(
                "`batch_norm` (='train') moves the features away from a head that was aligned on them and is fixed: set it "
                "to 'frozen' or 'reestimate', or make the head trainable."
            )
        return self.args.batch_norm or ("frozen" if fixed or self.args.freeze == "backbone" else "train")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the stock optimizer, with the parameters of a trained head in groups of their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            trained = [head for head in self.heads.values() if head.trainable]
            set_head_learning_rate(optimizer, trained, self.head_learning_rate)
        return optimizer

    @property
    def head_learning_rate(self) -> float:
        """Learning rate of a trained head at its peak."""
        rate = self.args.head_learning_rate
        return HEAD_RATE * self.args.learning_rate if rate is None else rate

    # The draw, the step and the loss

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
        if lengths is None or "row_id" not in eval_dataset.column_names:  # whose order tells the rows apart
            return SequentialSampler(eval_dataset)
        return EvenLengths(lengths, batch_size=self.args.eval_batch_size, seed=self.args.seed)

    def draw_settings(self) -> dict[str, Any]:
        """Return all that decides which rows are drawn when and what they train, for the checkpoints."""
        labels = np.zeros(0, np.int64) if self.train_labels is None else self.train_labels
        trained = (
            (name, *parameter.shape) for name, parameter in self.model.named_parameters() if parameter.requires_grad
        )
        return {
            "trained parameters": f"of hash {sha256(repr(sorted(trained)).encode()).hexdigest()[:12]}",
            "sampler": self.args.sampler,
            "train_sampling_strategy": self.args.train_sampling_strategy,
            "batch size": self.get_total_train_batch_size(self.args),
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "rows": f"{len(labels)} of hash {sha256(labels.astype(np.int64).tobytes()).hexdigest()[:12]}",
        }

    def own_state(self) -> dict[str, Any]:
        """Return what a checkpoint of ours holds beyond transformers' own."""
        frames = {path: head.frame for path, head in self.heads.items()}
        return {"frames": frames, "alignment": self.alignment}

    def own_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds in tensors."""
        return self._training_logits.tensors()

    def restore_own_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``own_state`` and ``own_tensors`` returned when the checkpoint was written."""
        self._training_logits.load_tensors(tensors, self.args.device)
        for path, head in self.heads.items():
            head.frame = state["frames"][path]
        self.alignment = state["alignment"]

    def _updates_per_epoch(self) -> int:
        return len(self._train_sampler or ()) // self.get_total_train_batch_size(self.args)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the rows that a pass over a loader reads: for training those drawn, not those of the data set."""
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
        """Return the model's own loss of a training batch, on soft labels where mixup, CutMix or smoothing ask for them."""
        inputs = dict(inputs)
        row_ids, labels = inputs.pop("row_id", None), inputs["labels"]
        for norm in self._frozen_norms:
            norm.eval()  # Trainer puts the whole model into training mode before each step.
        if self._soft_labels.is_active:
            name = FEATURES if FEATURES in inputs else self.model.main_input_name
            inputs[name], inputs["labels"] = self._soft_labels(inputs[name], inputs["labels"])
        with self._training_logits.of(labels, None if self._soft_labels.mixes else row_ids):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss (={loss.item()}) of step {self.state.global_step + 1} is not finite and nothing was saved since the "
                "last checkpoint: lower `learning_rate`, set `max_grad_norm`, or train in float32."
            )
        return (loss, outputs) if return_outputs else loss

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Predict each row once, over all processes, and measure.

        Args:
            dataloader: This process's share of the rows.
            description: What it is done for.
            prediction_loss_only: Without effect.
            ignore_keys: Without effect.
            metric_key_prefix: Put before the name of each metric.

        Returns:
            ``predictions``: the ``RowPredictions``; ``label_ids``; ``metrics``: those of ``ShotAccuracy`` and
            ``balanced_accuracy_pooled``; and the number of rows.
        """
        require_finite(self.model, step=self.state.global_step)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:  # evaluation without training: autocast, device
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader
        rows = predict_rows(model, self._with_progress(dataloader), num_rows=len(dataloader.dataset))  # type: ignore[arg-type]
        metric = ShotAccuracy(self.class_counts, shot_bounds=(self.args.shot_bounds[0], self.args.shot_bounds[1]))
        metric.add_batch(
            predictions=rows.predictions, references=rows.labels, confidences=rows.confidences, losses=rows.losses
        )
        metrics: dict[str, float | None] = metric.compute()
        metrics["balanced_accuracy_pooled"] = pooled_balanced_accuracy(
            rows.predictions, rows.labels, min_rows=self.args.min_validation_rows
        )
        if self.is_in_train and metric_key_prefix == "eval":
            for sample, monitor in self._monitors.items():
                collapse = monitor.measure(self.model, self.compute_loss_context_manager())
                metrics |= {f"{sample}{name}": value for name, value in collapse.items()}
        named: Any = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        predictions: Any = rows  # where the stock class has an array of all logits
        return EvalLoopOutput(
            predictions=predictions, label_ids=rows.labels, metrics=named, num_samples=len(rows.labels)
        )

    def _make_monitors(self) -> dict[str, CollapseMonitor]:
        """Return what measures collapse on validation rows, and on training rows; nothing where weights are split up."""
        size = min(self.args.collapse_rows, (0 if self.train_labels is None else len(self.train_labels)) // 10)
        if size < 4 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return {}
        samples: dict[str, tuple[Any, Any]] = {"train_": (self.alignment_dataset, self.train_labels)}
        with suppress(ValueError):  # a data set that tells no labels
            samples = {"": (self.eval_dataset, labels_of(self.eval_dataset)), **samples}
        options: dict[str, Any] = {"collate": self.data_collator, "batch_size": self.args.eval_batch_size}
        num_classes = next(iter(self.heads.values())).num_classes
        return {
            name: CollapseMonitor(rows, labels, num_classes=num_classes, max_rows=size, seed=self.args.seed, **options)
            for name, (rows, labels) in samples.items()
        }

    def _with_progress(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(line)
