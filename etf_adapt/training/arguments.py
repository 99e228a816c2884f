"""Training arguments: transformers' own, with our defaults and fields; some of theirs are mapped or refused."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from etf_adapt.errors import check_choice
from etf_adapt.results.best_metric import more_is_better
from etf_adapt.training.settings import TrainingSettings

SAMPLER_POWERS = {"instance": 0.0, "sqrt": 0.5, "balanced": 1.0}
"""Power of ``ClassBalancedSampler`` for each choice of ``sampler``."""

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
    "dataloader_in_order": (True, "a resumed run must see the rows that the uninterrupted one would have seen"),
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
    "parallelism_config": (None, "only whole rows are trained on; `fsdp` and `deepspeed` split the weights"),
    "prediction_loss_only": (False, "the best checkpoint is chosen by a metric"),
    "remove_unused_columns": (
        False,
        "it removes `row_id`, which tells rows apart, and the columns that a transform reads; a collator chooses what it takes",
    ),
    "use_liger_kernel": (False, "it replaces the model's loss"),
}

# The same for the fields of `accelerator_config`.
REFUSED_ACCELERATOR: dict[str, tuple[Any, str]] = {
    "split_batches": (False, "`per_device_train_batch_size` is the batch of one process"),
    "dispatch_batches": (None, "each process reads its own rows"),
    "even_batches": (True, "processes must run the same number of evaluation batches"),
}

# Fields that do nothing here, and why; a run says so where one of them is set.
WITHOUT_EFFECT: dict[str, str] = {
    "average_tokens_across_devices": "the loss is a mean over rows, which have one label each",
    **dict.fromkeys(("do_predict", "do_train"), "what runs is what is called; the recipe trains and scores in one run"),
    **dict.fromkeys(
        ("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), "evaluation keeps no logits"
    ),
    "hub_always_push": "the model is pushed once, finished",
    "label_names": "the labels are the entry `labels` of a batch",
    "liger_kernel_config": "`use_liger_kernel` is refused",
    "local_rank": "launchers set LOCAL_RANK",
}

# Settings by which a run goes on as it began. Of the length alone a resumed run may have another: the schedule follows it.
FIXED_ON_RESUME = (
    "learning_rate", "head_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm",
    "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "neftune_noise_alpha", "mixup", "cutmix", "label_smoothing", "freeze", "batch_norm", "dropout",
    "frame", "frame_penalty", "realign", "realign_steps", "leave_one_out",
    "metric_for_best_model", "shot_bounds", "min_validation_rows",
)  # fmt: skip
LENGTH = ("num_train_epochs", "max_steps")

LEAST = {
    **dict.fromkeys(("mixup", "cutmix", "collapse_rows", "seed", "data_seed", "learning_rate"), 0),
    **dict.fromkeys(("early_stopping_patience", "torch_threads", "min_validation_rows", "realign_steps"), 1),
}


@dataclass
class ETFTrainingArguments(TrainingSettings, TrainingArguments):  # type: ignore[misc]  # fewer sampling strategies
    """Hold all settings of a run: ``transformers.TrainingArguments`` with other defaults, and the fields added here.

    Each field carries its description as metadata, which ``etf-adapt finetune --help`` prints. Fields of transformers
    that would bypass our loss, sampler, evaluation or checkpoints are refused here, before any data or model is read.

    Raises:
        ValueError: A value is outside its range, or would bypass them; the message names value, rule and remedy.

    Example:
        >>> args = ETFTrainingArguments(output_dir="out", sampler="balanced", label_smoothing_factor=0.1)
        >>> args.label_smoothing, args.label_smoothing_factor
        (0.1, 0.0)
    """

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            if self.label_smoothing not in (0.0, self.label_smoothing_factor):
                raise ValueError(
                    f"`label_smoothing_factor` (={self.label_smoothing_factor}) and `label_smoothing` "
                    f"(={self.label_smoothing}) are one setting: give one of them."
                )
            self.label_smoothing, self.label_smoothing_factor = self.label_smoothing_factor, 0.0
        self._check_ranges()
        # On the command line an empty list and no list are the same.
        self.include_for_metrics = self.include_for_metrics or []
        for name, (required, why) in REFUSED.items():
            _require(name, getattr(self, name, required), required, why)
        is_score = more_is_better(self.metric_for_best_model or "")
        if is_score is not None:
            if self.greater_is_better not in (None, is_score):
                raise ValueError(
                    f"`greater_is_better` (={self.greater_is_better}) must be {is_score}, as by default, for "
                    f"`metric_for_best_model` (={self.metric_for_best_model!r})."
                )
            self.greater_is_better = is_score
        self.load_best_model_at_end = self.load_best_model_at_end and self.eval_strategy != "no"
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if not torch.accelerator.is_available():
            # Processes started on a machine without a device join only if told so; each would run alone otherwise, all
            # of them writing into one folder (accelerate 1.15).
            self.use_cpu = True
        workers, self.dataloader_num_workers = self.dataloader_num_workers, self.dataloader_num_workers or 0
        super().__post_init__()
        self.dataloader_num_workers = workers
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and self.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE (={os.environ['WORLD_SIZE']}) processes were started, but they do not know of each other: make no "
                "Accelerator and no PartialState before these arguments."
            )
        for name, (required, why) in REFUSED_ACCELERATOR.items():
            _require(f"accelerator_config.{name}", getattr(self.accelerator_config, name), required, why)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("`fp16` (=True) needs a GPU: bf16=True runs on CPUs too.")
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # whose own default is that less is better
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **cast(Any, self.lr_scheduler_kwargs or {})}
        self._check_parts()

    def _check_parts(self) -> None:
        """Make what would be made later only, so that a missing package or a wrong option is known now."""
        kwargs: Any = self.lr_scheduler_kwargs
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate or 1.0)
        parts: dict[str, Callable[[], Any]] = {
            # Optimizers with target modules need the model.
            "optim": lambda: self.optim_target_modules or Trainer.get_optimizer_cls_and_kwargs(self),
            "lr_scheduler_type": lambda: get_scheduler(self.lr_scheduler_type, stand_in, 1, 2, kwargs),
            "report_to": lambda: [make() for make in get_reporting_integration_callbacks(self.report_to)],
        }
        for name, make in parts.items():
            try:
                make()
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                value = getattr(self, name)
                raise ValueError(f"`{name}` (={getattr(value, 'value', value)!r}) cannot be used: {error}") from error

    def without_effect(self) -> list[str]:
        """Return a line for each field that was set and has no effect."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        values = {name: getattr(self, name) for name in WITHOUT_EFFECT if name in defaults}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        return [f"without effect: `{name}` (={value!r}): {WITHOUT_EFFECT[name]}" for name, value in changed.items()]

    def _check_ranges(self) -> None:
        hints = get_type_hints(TrainingSettings)
        for name in TrainingSettings.__annotations__:
            hint, value = hints[name], getattr(self, name)
            for literal in (part for part in (hint, *get_args(hint)) if get_origin(part) is Literal):
                if value is not None or literal is hint:
                    check_choice(name, value, get_args(literal))
        for name, least in LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least {least}.")
        optim = str(getattr(self.optim, "value", self.optim))
        if optim.startswith(("schedule_free", "lomo", "adalomo")) or optim.endswith("layerwise"):
            raise ValueError(
                f"`optim` (={optim!r}) steps beside the parameter groups that hold a head's learning rate, or trains weights "
                "that are not those to align, evaluate and save: choose another, such as adamw_torch."
            )
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"`head_learning_rate` (={self.head_learning_rate}) must be positive.")
        try:
            re.compile(self.freeze)
        except re.error as error:
            raise ValueError(f"`freeze` (={self.freeze!r}) is no regular expression: {error}.") from error
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` (={self.label_smoothing}) must lie in [0, 1).")
        if (self.mixup or self.cutmix) and (self.per_device_train_batch_size or 0) % 2:
            raise ValueError(
                f"`per_device_train_batch_size` (={self.per_device_train_batch_size}) must be even with mixup or CutMix: "
                "they mix pairs of rows of a batch."
            )
        if self.realign in ("steps", "epochs") and self.frame == "random":
            raise ValueError(
                f"`realign` (={self.realign!r}) needs a `frame` that is made from features: choose one, or set it to never."
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
