"""Training arguments: transformers' own, with our defaults, our fields, and what of theirs is mapped or refused."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from etf_adapt.geometry.frames import FRAMES

SAMPLER_POWERS = {"instance": 0.0, "sqrt": 0.5, "balanced": 1.0}
"""Power of ``ClassBalancedSampler`` for each name of ``sampler``: 0 draws classes as they are, 1 draws them equally."""

BEST_METRIC = "balanced_accuracy_pooled"

HEAD_RATE = 10.0
"""Learning rate of a trained head over that of the backbone, unless ``head_learning_rate`` sets it."""

REFUSED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (
        False,
        "it starts the run again from changed weights with other batches; set the batch size",
    ),
    "batch_eval_metrics": (False, "metrics are streamed already"),
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
    "include_for_metrics": ([], "metrics are streamed and take predictions, labels and confidences only"),
    "logging_nan_inf_filter": (False, "it hides a loss that is not finite; such a loss stops the run"),
    "prediction_loss_only": (False, "the best checkpoint is chosen by a metric"),
    "use_liger_kernel": (False, "it replaces the model's loss"),
}
"""Fields of ``TrainingArguments`` that would bypass our loss, sampler, evaluation or checkpoints: value required, why.

Mapped instead of refused: ``label_smoothing_factor`` becomes ``label_smoothing`` (soft labels for the model's own loss,
where the stock smoother applies cross-entropy); ``train_sampling_strategy="group_by_length"`` batches rows of similar
length *within* our sampler's draw, and ``"random"`` does not (others are refused); ``data_seed`` seeds our sampler;
``load_best_model_at_end`` needs evaluations and is off where ``eval_strategy`` is ``"no"``; ``use_cpu`` is on where there
is no device.
Without effect, since evaluation streams: ``eval_accumulation_steps``, ``eval_do_concat_batches``,
``eval_use_gather_object``.
"""

REFUSED_ACCELERATOR: dict[str, tuple[Any, str]] = {
    "split_batches": (False, "`per_device_train_batch_size` is the batch of one process"),
    "dispatch_batches": (None, "each process reads its own rows"),
    "even_batches": (True, "processes must run the same number of evaluation batches"),
}
"""The same for the fields of ``accelerator_config``."""


@dataclass
class ETFTrainingArguments(TrainingArguments):
    """Hold all settings of a run: ``transformers.TrainingArguments`` with other defaults, and the fields added here.

    The first block below is the one place where our defaults for transformers' fields stand. What of theirs is mapped
    or refused is in ``REFUSED`` and the text under it, and is checked here, before any data or model is read.

    Args:
        sampler: How often classes are drawn: ``"instance"`` as they are, ``"sqrt"`` by the root of their counts,
            ``"balanced"`` equally (powers 0, 1/2 and 1 of ``ClassBalancedSampler``).
        head_learning_rate: Learning rate of a trained head; ten times ``learning_rate`` where None, since a new head starts
            far from where it must go and the backbone does not. Without effect on a fixed head.
        freeze: ``"backbone"`` trains the head alone; ``"none"`` trains all that is not fixed.
        early_stopping_patience: Evaluations without a better ``metric_for_best_model`` after which the run ends, at
            least 1; None never ends it early.
        mixup: Alpha of mixup, 0 for none (Zhang et al. 2018, https://arxiv.org/abs/1710.09412). Images only.
        cutmix: Alpha of CutMix, 0 for none (Yun et al. 2019, https://arxiv.org/abs/1905.04899). Images only.
        label_smoothing: Weight in [0, 1) of the uniform distribution in the training labels.
        batch_norm: Running statistics of BatchNorm layers in the backbone: ``"frozen"``; ``"reestimate"``, that is
            estimated once on the training rows before the alignment and then frozen; ``"train"``, as usual. None means
            frozen under a fixed head and train under any other. A head aligned once goes stale when they move.
        frame: What a fresh ETF head is set to before the first step (``etf_adapt.align_head``).
        frame_penalty: Penalty of the frames that have one, in mean eigenvalues; chosen on the data where None.
        realign_epochs: A fixed ETF head is aligned again after each of this many first epochs; after every epoch where None,
            never where 0. Between two alignments it stays as it is.
        leave_one_out: In training each row is scored by the head that would have been set without it, where the head is fixed
            and aligned, rows have a ``row_id``, and none are mixed (``etf_adapt.heads.training_logits.LeftOutRows``). Of
            more than 20,000 rows those of a sample that is even over the classes; the others are scored by the head as it is.
        feature_lengths: In training the logits of a fixed head are divided by the length of the feature, where the frame has
            a metric for it (``etf_adapt.heads.training_logits.FeatureLengths``).
        final_frame: Closed form that the head, of whatever kind and however trained, is set to once more after training: a
            classifier refitted on the final features (nearest class mean and its relatives); none where None.
        reweight_from: Share of the epochs, in [0, 1), after which class weights by effective number multiply the loss
            (deferred re-weighting, Cao et al. 2019, https://arxiv.org/abs/1906.07413; theirs is 0.8); never where None.
        shot_bounds: Training counts (at least, at most) of a medium class: above is many, below is few.
        min_validation_rows: Classes with fewer validation rows than this share one pooled recall in
            ``balanced_accuracy_pooled``, the default ``metric_for_best_model``.
        collapse_rows: Most rows of the samples of train and of validation on which neural collapse is measured at each
            evaluation of a run (``etf_adapt.monitor``), at most a tenth of the training rows; 0 measures none.
        torch_threads: CPU threads of each process; None shares the cores among the processes of this machine where
            a launcher left one thread.

    Raises:
        ValueError: A value is outside its range or in ``REFUSED``; the message names value, rule and remedy.

    Example:
        >>> args = ETFTrainingArguments(output_dir="out", sampler="balanced", label_smoothing_factor=0.1)
        >>> args.label_smoothing, args.label_smoothing_factor
        (0.1, 0.0)
    """

    # Our defaults for fields of TrainingArguments
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Training rows per step and process."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Evaluation rows per step and process."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Number of training epochs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps, or their share of all steps if below 1."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay; none on biases and norms."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; newest and best always are."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Refused: a loss that is not finite stops."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's weights."})
    metric_for_best_model: str | None = field(default=BEST_METRIC, metadata={"help": "Metric of the best checkpoint."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length (where rows have lengths) or random."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that forward does not name."})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "No progress bar; by default only in terminals."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 - transformers' parser takes None first only
        default="none", metadata={"help": "Trackers to report to."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "Only end: the model is pushed once, finished."})
    seed: int = field(default=0, metadata={"help": "Seed of initialisation, draw, augmentation and dropout."})

    # Our own fields
    sampler: Literal["instance", "sqrt", "balanced"] = field(
        default="instance", metadata={"help": "Draw classes as they are, by the root of their counts, or equally."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a trained head; default: ten times learning_rate."}
    )
    freeze: Literal["none", "backbone"] = field(default="none", metadata={"help": "What is not trained."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End after so many evaluations without a better metric."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 for none."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix; 0 for none."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Weight of the uniform label distribution."})
    batch_norm: Literal["frozen", "reestimate", "train"] | None = field(
        default=None, metadata={"help": "BatchNorm statistics; default: frozen under a fixed head, else train."}
    )
    frame: Literal["whitened", "discriminant", "ridge", "means", "nearest_mean", "rotated", "random"] = field(
        default="whitened", metadata={"help": "Closed form that sets a fresh ETF head before the first step."}
    )
    frame_penalty: float | None = field(
        default=None, metadata={"help": "Its penalty; chosen on the data if not given."}
    )
    realign_epochs: int | None = field(
        default=None, metadata={"help": "Align again after each of this many first epochs; default: after every epoch."}
    )
    leave_one_out: bool = field(
        default=True, metadata={"help": "Score each training row by the head that would have been set without it."}
    )
    feature_lengths: bool = field(
        default=False,
        metadata={"help": "Divide the logits by the feature's length in training, in frames that allow it."},
    )
    final_frame: str | None = field(
        default=None, metadata={"help": f"Refit any head after training: one of {', '.join(FRAMES[1:])}."}
    )
    reweight_from: float | None = field(
        default=None, metadata={"help": "Share of the epochs after which class weights multiply the loss."}
    )
    shot_bounds: list[int] = field(
        default_factory=lambda: [20, 100], metadata={"help": "Training counts (at least, at most) of a medium class."}
    )
    min_validation_rows: int = field(
        default=5,
        metadata={"help": "Classes with fewer validation rows share one recall where checkpoints are chosen."},
    )
    collapse_rows: int = field(
        default=512, metadata={"help": "Most rows of the samples on which neural collapse is measured; 0 for none."}
    )
    torch_threads: int | None = field(default=None, metadata={"help": "CPU threads of each process."})

    def __post_init__(self) -> None:
        self._map_label_smoothing()
        self._check_ranges()
        # An empty list on the command line cannot be told from no list.
        self.include_for_metrics = self.include_for_metrics or []
        for name, (required, why) in REFUSED.items():
            _require(name, getattr(self, name), required, why)
        _one_of("train_sampling_strategy", self.train_sampling_strategy, ("random", "group_by_length"))
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
        _one_of("sampler", self.sampler, tuple(SAMPLER_POWERS))
        _one_of("freeze", self.freeze, ("none", "backbone"))
        _one_of("frame", self.frame, FRAMES)
        if self.final_frame is not None:
            _one_of("final_frame", self.final_frame, FRAMES[1:])
        if self.batch_norm is not None:
            _one_of("batch_norm", self.batch_norm, ("frozen", "reestimate", "train"))
        for name in ("mixup", "cutmix", "realign_epochs", "collapse_rows", "seed", "data_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must not be negative.")
        for name in ("early_stopping_patience", "torch_threads", "min_validation_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"`head_learning_rate` (={self.head_learning_rate}) must be positive.")
        if self.reweight_from is not None and not 0 <= self.reweight_from < 1:
            raise ValueError(f"`reweight_from` (={self.reweight_from}) must lie in [0, 1): a share of the epochs.")
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


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(choices)}.{hint}")
