"""Training arguments: transformers' own, with our defaults and fields; some of theirs are mapped or refused."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from etf_adapt.errors import check_choice

SAMPLER_POWERS = {"instance": 0.0, "sqrt": 0.5, "balanced": 1.0}
"""Power of ``ClassBalancedSampler`` for each choice of ``sampler``."""

BEST_METRIC = "balanced_accuracy_pooled"

HEAD_RATE = 10.0
"""Default learning rate of a trained head over that of the backbone: a new head starts far from where it must go."""

# Fields of TrainingArguments that would bypass our loss, sampler, evaluation or checkpoints: value required, why.
REFUSED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (
        False,
        "it starts the run again from changed weights with other batches; set the batch size",
    ),
    "batch_eval_metrics": (False, "no logits are kept: metrics are computed from predictions"),
    "bf16_full_eval": (False, "it rounds the weights themselves; evaluation runs in the precision of training"),
    "dataloader_drop_last": (False, "it would leave rows out of evaluation; training batches are always whole"),
    "fp16_full_eval": (False, "it rounds the weights themselves; evaluation runs in the precision of training"),
    "enable_jit_checkpoint": (
        False,
        "its checkpoint is taken in mid-step and does not resume exactly; set `save_steps`",
    ),
    "hub_token": (None, "a token in a command or file is read by others: log in (`hf auth login`) or set HF_TOKEN"),
    "hub_strategy": ("end", "the others upload `training_args.bin`, a pickle that holds the Hub token"),
    "ignore_data_skip": (False, "a resumed run must see the rows that the uninterrupted one would have seen"),
    "include_for_metrics": ([], "metrics take predictions, labels and confidences only"),
    "logging_nan_inf_filter": (False, "it hides a loss that is not finite; such a loss stops the run"),
    "prediction_loss_only": (False, "the best checkpoint is chosen by a metric"),
    "use_liger_kernel": (False, "it replaces the model's loss"),
}
# Mapped instead of refused: `label_smoothing_factor` becomes `label_smoothing` (soft labels for the model's own loss, where the
# stock smoother applies cross-entropy); `train_sampling_strategy="group_by_length"` batches rows of similar length *within*
# our sampler's draw; `data_seed` seeds our sampler; `load_best_model_at_end` is off where `eval_strategy` is "no"; `use_cpu` is
# on where there is no device. Without effect, since no logits are kept: `eval_accumulation_steps`, `eval_do_concat_batches`,
# `eval_use_gather_object`.

# The same for the fields of `accelerator_config`.
REFUSED_ACCELERATOR: dict[str, tuple[Any, str]] = {
    "split_batches": (False, "`per_device_train_batch_size` is the batch of one process"),
    "dispatch_batches": (None, "each process reads its own rows"),
    "even_batches": (True, "processes must run the same number of evaluation batches"),
}


_STOCK = {entry.name: entry for entry in fields(TrainingArguments)}


def _default(name: str, value: Any, text: str | None = None) -> Any:
    """Return a field of TrainingArguments with another default, and transformers' help unless ours is given."""
    return field(default=value, metadata={"help": text or _STOCK[name].metadata["help"]})


def _option(value: Any, text: str) -> Any:
    return field(default=value, metadata={"help": text})


@dataclass
class ETFTrainingArguments(TrainingArguments):
    """Hold all settings of a run: ``transformers.TrainingArguments`` with other defaults, and the fields added here.

    Each field carries its description as metadata, which ``python recipes/finetune.py --help`` prints. Fields of transformers
    that would bypass our loss, sampler, evaluation or checkpoints are refused here, before any data or model is read.

    Raises:
        ValueError: A value is outside its range, or would bypass them; the message names value, rule and remedy.

    Example:
        >>> args = ETFTrainingArguments(output_dir="out", sampler="balanced", label_smoothing_factor=0.1)
        >>> args.label_smoothing, args.label_smoothing_factor
        (0.1, 0.0)
    """

    # Our defaults for fields of TrainingArguments
    per_device_train_batch_size: int = _default("per_device_train_batch_size", 64)
    per_device_eval_batch_size: int = _default("per_device_eval_batch_size", 128)
    num_train_epochs: float = _default("num_train_epochs", 10.0)
    learning_rate: float = _default("learning_rate", 1e-4)
    lr_scheduler_type: str = _default("lr_scheduler_type", "cosine")
    warmup_steps: float = _default("warmup_steps", 0.1)
    weight_decay: float = _default("weight_decay", 0.05)
    eval_strategy: str = _default("eval_strategy", "epoch")
    save_strategy: str = _default("save_strategy", "epoch")
    save_total_limit: int | None = _default("save_total_limit", 2, "Checkpoints kept; newest and best always are.")
    logging_strategy: str = _default("logging_strategy", "epoch")
    logging_nan_inf_filter: bool = _default(
        "logging_nan_inf_filter", False, "Only False: a loss that is not finite stops the run."
    )
    load_best_model_at_end: bool = _default("load_best_model_at_end", True)
    metric_for_best_model: str | None = _default(
        "metric_for_best_model", BEST_METRIC, "Metric by which the best checkpoint is chosen."
    )
    train_sampling_strategy: Literal["group_by_length", "random"] = _default(
        "train_sampling_strategy",
        "group_by_length",
        "Whether rows of similar length share a batch, where rows have lengths.",
    )
    remove_unused_columns: bool = _default("remove_unused_columns", False)
    disable_tqdm: bool | None = _default("disable_tqdm", None, "No progress bar; by default only in terminals.")
    report_to: None | str | list[str] = _default("report_to", "none")  # noqa: RUF009, RUF036 - transformers' parser takes None first
    hub_strategy: str = _default("hub_strategy", "end", "Only end: the model is pushed once, finished.")
    seed: int = _default("seed", 0, "Seed of initialisation, sampling, augmentation and dropout.")

    # Our own fields
    sampler: Literal["instance", "sqrt", "balanced"] = _option(
        "instance", "Sampling: instance draws examples uniformly, balanced draws classes uniformly, sqrt lies between."
    )
    head_learning_rate: float | None = _option(
        None, "Learning rate of a trained head; default: ten times learning_rate."
    )
    freeze: Literal["none", "backbone"] = _option(
        "none", "backbone trains the head alone; none trains all that is not fixed."
    )
    early_stopping_patience: int | None = _option(
        None, "Evaluations without improvement of metric_for_best_model after which the run ends; default: never."
    )
    mixup: float = _option(0.0, "Alpha of mixup (https://arxiv.org/abs/1710.09412), images only; 0 for none.")
    cutmix: float = _option(0.0, "Alpha of CutMix (https://arxiv.org/abs/1905.04899), images only; 0 for none.")
    label_smoothing: float = _option(0.0, "Weight in [0, 1) of the uniform distribution in the training labels.")
    batch_norm: Literal["frozen", "train"] | None = _option(
        None, "Running statistics of BatchNorm in the backbone; default: frozen under a fixed head, else train."
    )
    frame: Literal["whitened", "means", "rotated", "random"] = _option(
        "whitened", "Closed form that sets a fresh ETF head before the first step."
    )
    frame_penalty: float | None = _option(
        None,
        "Penalty of the whitened frame, a multiple of the covariance's mean eigenvalue; default: by leave-one-out.",
    )
    realign_epochs: int | None = _option(
        None, "A fixed ETF head is aligned again after each of this many first epochs; default: after every epoch."
    )
    leave_one_out: bool = _option(
        True,
        "Score each training row by the aligned, fixed head as it would be without that row: rows with a row_id, no mixup or "
        "CutMix; of more than 20,000 rows those of a sample that is even over the classes.",
    )
    final_frame: Literal["whitened", "means"] | None = _option(
        None, "Closed form that a head of any kind is refitted by after training; default: none."
    )
    shot_bounds: list[int] = field(
        default_factory=lambda: [20, 100],
        metadata={"help": "Training counts (at least, at most) of a medium class: above is many, below is few."},
    )
    min_validation_rows: int = _option(
        5, "Classes with fewer validation rows share one pooled recall in balanced_accuracy_pooled."
    )
    collapse_rows: int = _option(
        0,
        "Most rows, and at most a tenth of the training rows, on which neural collapse is measured at each evaluation.",
    )
    torch_threads: int | None = _option(
        None, "CPU threads of each process; default: an equal share of the cores under a launcher."
    )

    def __post_init__(self) -> None:
        self._map_label_smoothing()
        self._check_ranges()
        # On the command line an empty list and no list are the same.
        self.include_for_metrics = self.include_for_metrics or []
        for name, (required, why) in REFUSED.items():
            _require(name, getattr(self, name), required, why)
        self.load_best_model_at_end = self.load_best_model_at_end and self.eval_strategy != "no"
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if not torch.accelerator.is_available():
            # Processes started on a machine without a device join only if told so; each would run alone otherwise, all
            # of them writing into one folder (accelerate 1.15).
            self.use_cpu = True
        super().__post_init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and self.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE (={os.environ['WORLD_SIZE']}) processes were started, but they do not know of each other: make no "
                "Accelerator and no PartialState before these arguments."
            )
        for name, (required, why) in REFUSED_ACCELERATOR.items():
            _require(f"accelerator_config.{name}", getattr(self.accelerator_config, name), required, why)

    def _map_label_smoothing(self) -> None:
        if self.label_smoothing_factor:
            if self.label_smoothing not in (0.0, self.label_smoothing_factor):
                raise ValueError(
                    f"`label_smoothing_factor` (={self.label_smoothing_factor}) and `label_smoothing` "
                    f"(={self.label_smoothing}) are one setting: give one of them."
                )
            self.label_smoothing, self.label_smoothing_factor = self.label_smoothing_factor, 0.0

    def _check_ranges(self) -> None:
        hints = get_type_hints(ETFTrainingArguments)
        for name in ETFTrainingArguments.__annotations__:
            hint, value = hints[name], getattr(self, name)
            for literal in (part for part in (hint, *get_args(hint)) if get_origin(part) is Literal):
                if value is not None or literal is hint:
                    check_choice(name, value, get_args(literal))
        for name in ("mixup", "cutmix", "realign_epochs", "collapse_rows", "seed", "data_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must not be negative.")
        for name in ("early_stopping_patience", "torch_threads", "min_validation_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"`head_learning_rate` (={self.head_learning_rate}) must be positive.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` (={self.label_smoothing}) must lie in [0, 1).")
        if (self.mixup or self.cutmix) and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"`per_device_train_batch_size` (={self.per_device_train_batch_size}) must be even with mixup or CutMix: "
                "they mix pairs of rows of a batch."
            )
        if self.realign_epochs and self.frame == "random":
            raise ValueError(
                f"`realign_epochs` (={self.realign_epochs}) needs a `frame` that is made from features: choose one, or "
                "set it to 0."
            )
        if self.early_stopping_patience and (self.eval_strategy == "no" or not self.metric_for_best_model):
            raise ValueError(
                f"`early_stopping_patience` (={self.early_stopping_patience}) needs evaluations with a metric: set "
                "`eval_strategy` to epoch or steps, and `metric_for_best_model`."
            )
        if len(self.shot_bounds) != 2 or not 0 < self.shot_bounds[0] <= self.shot_bounds[1]:
            raise ValueError(
                f"`shot_bounds` (={self.shot_bounds}) must be two positive counts in rising order, such as 20 100."
            )


def _require(name: str, value: Any, required: Any, why: str) -> None:
    if value != required:
        raise ValueError(f"`{name}` (={getattr(value, 'value', value)!r}) must be {required!r} here: {why}.")
