"""transformers' Trainer with our sampler, loss, heads, metrics and checkpoints: a subclass, no loop of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
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
from etf_adapt.heads.in_model import batch_norms, head_modules
from etf_adapt.heads.training_logits import TrainingLogits
from etf_adapt.metrics.shots import pooled_balanced_accuracy
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.training.arguments import HEAD_RATE, SAMPLER_POWERS, ETFTrainingArguments
from etf_adapt.training.callbacks import EpochStart, ProgressBar, Realign, RunLog
from etf_adapt.training.checkpoints import resolve_checkpoint
from etf_adapt.training.collapse_monitor import make_monitors
from etf_adapt.training.early_stopping import EarlyStopping
from etf_adapt.training.evaluation import predict_rows, score_rows
from etf_adapt.training.launch import set_threads
from etf_adapt.training.messages import RunSetup, advise, describe_alignment, describe_run
from etf_adapt.training.parameters import (
    fix_parameters,
    require_finite,
    resolve_batch_norm,
    set_head_learning_rate,
)
from etf_adapt.training.resumable import ResumableTrainer
from etf_adapt.training.soft_labels import SoftLabels


class ETFTrainer(ResumableTrainer):
    """Train a model with an ETF head, or with any head to compare it with, by transformers' ``Trainer``.

    Unlike the stock class: examples are drawn by ``ClassBalancedSampler``; a fresh ETF or cosine head is aligned before the
    first step, and a fixed one again after each epoch; each training row is scored by the head as it would be without that row;
    a fixed head stays out of the optimizer whatever was unfrozen; mixup, CutMix and smoothing give soft labels to the model's
    own loss; evaluation keeps no logits and counts each row once; a loss or weight that is not finite ends the run unsaved;
    checkpoints are complete or known not to be, hold no pickled arguments, and are resumed bit for bit on the CPU.

    Args:
        model: Model made by ``ETFFor...`` or ``etf_adapt.adapt``; its trained parameters are float32.
        args: Settings of the run.
        train_dataset: Training rows, map-style, as ``data_collator`` takes them.
        eval_dataset: Validation rows; needed unless ``eval_strategy`` is ``"no"``.
        alignment_dataset: The training rows in the same order with the transforms of evaluation; by default ``train_dataset``.
        data_collator: Makes a batch of rows, with ``labels`` (batch,) and ``row_id`` (batch,), the row's number in its data
            set; evaluation on several processes needs the latter.
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
        self._head = next(iter(self.heads.values()))
        set_threads(args.torch_threads)
        num_classes = self._head.num_classes
        self.train_labels: NDArray[np.int64] | None = None
        self.class_counts: NDArray[np.int64] | None = None
        if train_dataset is not None:
            self.train_labels = labels_of(train_dataset) if labels is None else read_labels(labels).ids
            self.class_counts = _count_classes(self.train_labels, len(train_dataset), num_classes)  # type: ignore[arg-type]
            model.set_loss(model.etf_settings["loss"], class_counts=self.class_counts.tolist())
        self.alignment_dataset = train_dataset if alignment_dataset is None else alignment_dataset
        self.alignment: dict[str, Any] | None = None
        self._training_logits = TrainingLogits(self.heads)
        self._soft_labels = SoftLabels(
            num_classes, mixup=args.mixup, cutmix=args.cutmix, smoothing=args.label_smoothing
        )
        self._train_sampler: RowDraws | None = None
        self.early_stopping = EarlyStopping(args.early_stopping_patience)
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
        if args.final_frame is not None and not self._has_whole_weights:
            raise ValueError(
                f"`final_frame` (={args.final_frame!r}) cannot be had with FSDP or DeepSpeed, which split the head over "
                "processes: leave it out or use DDP."
            )
        for callback in (
            EpochStart(self._updates_per_epoch, lambda: self._train_sampler),
            Realign(self._updates_per_epoch, self.align, self.realign_epochs),
            RunLog(),
            *([] if args.disable_tqdm else [ProgressBar()]),
            *callbacks,
        ):
            self.add_callback(callback)
        self._monitors = {}
        if args.collapse_rows and self._has_whole_weights:
            samples = {
                "": (eval_dataset, self._labels_of_evaluation()),
                "train_": (self.alignment_dataset, self.train_labels),
            }
            self._monitors = make_monitors(samples, num_classes, args, data_collator)
        self.batch_norm = resolve_batch_norm(model, self._head, args)
        self._frozen_norms = batch_norms(model) if self.batch_norm != "train" else []

    # Training and alignment

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start, or from ``resume_from_checkpoint``: a folder, or True for the newest one in ``output_dir``.

        Raises:
            ValueError: Nothing is left to train, trained weights are not float32, the checkpoint belongs to a run with other
                settings of sampling, or ``output_dir`` holds another run.
            FileNotFoundError: There is no complete checkpoint to resume from.
            FloatingPointError: A loss or a weight is not finite.
        """
        checkpoint = resolve_checkpoint(str(self.args.output_dir), resume_from_checkpoint)
        steps = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs
        freed = fix_parameters(self.model, freeze=self.args.freeze, steps=steps)
        if freed:
            self._print(f"fixed again, after requires_grad_(True) had freed it: the head `{', '.join(freed)}`")
        if checkpoint is not None:
            self.restore(checkpoint)
        self._print(*describe_run(self.args, self.describe_setup()))
        if checkpoint is not None:
            self._print(f"resuming from {checkpoint}")
        elif self.needs_alignment() or self.realign_epochs:
            replaced = {head.frame for head in self.heads.values()} - {"random", "initialised", self.args.frame}
            if replaced:
                self._print(f"the head's {', '.join(sorted(replaced))} frame is set anew; --realign_epochs 0 keeps it")
            self.align()
            self._print(self._describe_alignment(), *self._advise())
        else:
            self._training_logits.clear()  # of an alignment before the head may have changed
        output = super().train(str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval)
        if self.args.final_frame is not None:
            self.model.fold_heads()
            self.heads = head_modules(self.model)
            self._head = next(iter(self.heads.values()))
            self.align(self.args.final_frame)
            self._print(f"refitted, {self._describe_alignment()}")
        require_finite(self.model, step=self.state.global_step)
        return output

    def align(self, frame: str | None = None) -> None:
        """Set the head by a closed form, ``args.frame`` by default, from the training rows (``etf_adapt.align_head``)."""
        require_finite(self.model, step=self.state.global_step)
        result = align_head(
            self.model,
            self._alignment_loader(),
            class_counts=self.class_counts,
            frame=frame or self.args.frame,
            penalty=self.args.frame_penalty,
            seed=self.args.seed,
        )
        for head in self.heads.values():
            for parameter in (head.weight, head.bias):
                if parameter is not None:
                    broadcast(parameter.data)  # Processes may round the same sums differently.
        self.alignment = {name: value for name, value in vars(result).items() if name != "left_out"}
        self._training_logits.clear()
        for (path, head), left_out in zip(self.heads.items(), result.left_out, strict=True):
            if left_out is not None and self.args.leave_one_out and head.is_fixed:
                self._training_logits.left_out[path] = left_out.to(self.args.device)

    def describe_setup(self) -> RunSetup:
        """Return the settings of the run in plain values."""
        is_fresh = self.needs_alignment()
        to_set = self.args.frame if self._head.is_stock_layer else "means"
        sizes = {parameter: parameter.numel() for parameter in self.model.parameters()}
        return RunSetup(
            distributed_type=self.accelerator.distributed_type.value,
            class_counts=() if self.class_counts is None else self.class_counts.tolist(),
            validation_rows=len(self.eval_dataset) if isinstance(self.eval_dataset, Sized) else None,
            head_kind=self._head.kind,
            frame=to_set if is_fresh else str(self._head.frame),
            is_frame_to_be_set=is_fresh,
            is_head_trained=not self._head.is_fixed,
            realign_epochs=self.realign_epochs,
            batch_norm=self.batch_norm,
            parameters=sum(sizes.values()),
            trained_parameters=sum(size for parameter, size in sizes.items() if parameter.requires_grad),
            head_learning_rate=self.head_learning_rate,
            batch_size=self.get_total_train_batch_size(self.args),
        )

    def _describe_alignment(self) -> str:
        return describe_alignment(self.alignment or {}, num_classes=self._head.num_classes)

    def _advise(self) -> list[str]:
        if self.alignment is None or self.class_counts is None:
            return []
        labels = self._labels_of_evaluation()
        advice = advise(
            self.alignment,
            class_counts=self.class_counts,
            in_features=self._head.weight[0].numel(),
            validation_counts=None if labels is None else np.bincount(labels, minlength=self._head.num_classes),
        )
        return [f"advice: {line}" for line in advice]

    def _labels_of_evaluation(self) -> NDArray[np.int64] | None:
        with suppress(ValueError):  # a data set without labels
            return labels_of(self.eval_dataset)
        return None

    @property
    def _has_whole_weights(self) -> bool:
        """Whether each process holds all weights."""
        return not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _resolve_realign_epochs(self) -> float:
        """Return the number of first epochs after which the head is aligned again: as asked, else all where possible."""
        asked = self.args.realign_epochs
        is_alignable = all(head.is_set_from_data and head.is_fixed for head in self.heads.values())
        if asked is None:
            return math.inf if is_alignable and self._has_whole_weights and self.args.frame != "random" else 0
        if asked and not is_alignable:
            raise ValueError(
                f"`realign_epochs` (={asked}) sets the class vectors anew, and this head learns them or draws them at random: "
                "set it to 0, or use a fixed 'etf' head."
            )
        if asked and not self._has_whole_weights:
            raise ValueError(
                f"`realign_epochs` (={asked}) cannot be had with FSDP or DeepSpeed, which split the head over processes: set "
                "it to 0 or use DDP."
            )
        return asked

    def needs_alignment(self) -> bool:
        """Return whether the head is fresh and is set from data before the first step."""
        return all(head.is_set_from_data and head.frame in ("random", "initialised") for head in self.heads.values())

    def _alignment_loader(self) -> DataLoader[Any]:
        """Load the training rows with the transforms of evaluation, each once, in evaluation's order."""
        dataset = self.alignment_dataset
        if dataset is None:
            raise ValueError("`train_dataset` (=None) is needed to train and to align the head: pass it to ETFTrainer.")
        return DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            sampler=self._get_eval_sampler(dataset),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the stock optimizer, with a trained head's parameters in groups with their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            trained = [head for head in self.heads.values() if not head.is_fixed]
            set_head_learning_rate(optimizer, trained, self.head_learning_rate)
        return optimizer

    @property
    def head_learning_rate(self) -> float:
        """Learning rate of a trained head at its peak."""
        rate = self.args.head_learning_rate
        return HEAD_RATE * self.args.learning_rate if rate is None else rate

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

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the heads' frames and the last alignment, and how class vectors change without each row."""
        frames = {path: head.frame for path, head in self.heads.items()}
        return {"frames": frames, "alignment": self.alignment}, self._training_logits.tensors()

    def restore_own_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``own_state`` returned when the checkpoint was written."""
        self._training_logits.load_tensors(tensors, self.args.device)
        for path, head in self.heads.items():
            head.frame = state["frames"][path]
        self.alignment = state["alignment"]

    def _updates_per_epoch(self) -> int:
        return len(self._train_sampler or ()) // self.get_total_train_batch_size(self.args)

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
        for norm in self._frozen_norms:
            norm.eval()  # Trainer puts the whole model into training mode before each step.
        if self._soft_labels.is_active:
            name = self.model.main_input_name
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
        """Predict each row once, over all processes, and return ``RowPredictions`` where the stock class has all logits."""
        require_finite(self.model, step=self.state.global_step)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:  # evaluation without training: autocast, device
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader
        rows = predict_rows(model, self._with_progress(dataloader), num_rows=len(dataloader.dataset))  # type: ignore[arg-type]
        metrics = score_rows(rows, self.class_counts, self.args.shot_bounds)
        metrics["balanced_accuracy_pooled"] = pooled_balanced_accuracy(
            rows.predictions, rows.labels, min_rows=self.args.min_validation_rows
        )
        if self.is_in_train and metric_key_prefix == "eval":
            for sample, monitor in self._monitors.items():
                collapse = monitor.measure(self.model, self.compute_loss_context_manager())
                metrics |= {f"{sample}{name}": value for name, value in collapse.items()}
        named: Any = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        predictions: Any = rows
        return EvalLoopOutput(
            predictions=predictions, label_ids=rows.labels, metrics=named, num_samples=len(rows.labels)
        )

    def _with_progress(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _print(self, *lines: str) -> None:
        if self.is_world_process_zero():
            tqdm.write("\n".join(lines))


def _count_classes(labels: NDArray[np.int64], num_rows: int, num_classes: int) -> NDArray[np.int64]:
    """Return the rows of each class (num_classes,), if there is one label for each row and a class for each label."""
    if len(labels) != num_rows:
        raise ValueError(f"`labels` has {len(labels)} entries: give one for each row of `train_dataset`.")
    counts = np.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes:
        raise ValueError(
            f"`train_dataset` has label {len(counts) - 1}, but the head has {num_classes} classes: load the model with "
            f"num_labels={len(counts)}."
        )
    return counts
