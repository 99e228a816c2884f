"""Fields that ``ETFTrainingArguments`` adds to transformers' own, and our defaults for some of theirs; imports no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

BEST_METRIC = "balanced_accuracy_pooled"


def option(value: Any, text: str) -> Any:
    """Return a field with its default and its line in ``--help``."""
    return field(default=value, metadata={"help": text})


@dataclass
class TrainingSettings:
    """Fields of a run with their defaults; ``ETFTrainingArguments`` checks them."""

    # Fields of TrainingArguments with other defaults
    num_train_epochs: float | None = option(None, "Passes over the training rows; default: 4 to 10, by their number.")
    learning_rate: float | None = option(
        None,
        "Peak learning rate of the backbone; default: by the number of steps and of trained parameters, up to 1e-3.",
    )
    per_device_train_batch_size: int | None = option(
        None, "Training rows of a batch, on each process; default: 16 to 64, by their number."
    )
    dataloader_num_workers: int | None = option(
        None, "Processes that load and transform rows; default: up to 8 for many images beside a GPU, else none."
    )
    per_device_eval_batch_size: int = option(128, "Rows of a batch in evaluation, on each process.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.1, "Steps of rising learning rate; below 1 a share of all steps.")
    weight_decay: float = option(0.05, "Weight decay of AdamW.")
    seed: int = option(0, "Seed of initialisation, sampling, augmentation and dropout.")
    train_sampling_strategy: Literal["group_by_length", "random"] = option(
        "group_by_length", "Whether rows of similar length share a batch, where rows have lengths."
    )
    remove_unused_columns: bool = option(False, "Only false: our collators choose the columns.")
    eval_strategy: str = option("epoch", "When to evaluate on validation rows: epoch, steps or no.")
    save_strategy: str = option("epoch", "When to write a checkpoint: epoch, steps, best or no.")
    save_total_limit: int | None = option(2, "Checkpoints kept; newest and best always are.")
    logging_strategy: str = option("epoch", "When the loss is logged: epoch, steps or no.")
    logging_nan_inf_filter: bool = option(False, "Only false: a loss that is not finite stops the run.")
    load_best_model_at_end: bool = option(True, "End with the best checkpoint, not the last one.")
    metric_for_best_model: str | None = option(BEST_METRIC, "Metric by which the best checkpoint is chosen.")
    disable_tqdm: bool | None = option(None, "Hide progress bars; by default they are shown in terminals alone.")
    report_to: None | str | list[str] = option("none", "Trackers, such as tensorboard or wandb.")  # noqa: RUF009, RUF036 - transformers' parser takes None first
    hub_strategy: str = option("end", "Only end: the model is pushed once, finished.")

    # Our own fields
    sampler: Literal["instance", "sqrt", "balanced"] = option(
        "instance", "Sampling: instance draws examples uniformly, balanced draws classes uniformly, sqrt lies between."
    )
    freeze: str = option(
        "none",
        "backbone: train the head alone, if it is one that learns; or a regular expression of names of parameters to freeze.",
    )
    head_learning_rate: float | None = option(
        None, "Learning rate of a trained head; default: ten times learning_rate."
    )
    early_stopping_patience: int | None = option(
        None, "Evaluations without improvement of metric_for_best_model after which the run ends; default: never."
    )
    mixup: float = option(0.0, "Alpha of mixup (https://arxiv.org/abs/1710.09412), images only; 0 for none.")
    cutmix: float = option(0.0, "Alpha of CutMix (https://arxiv.org/abs/1905.04899), images only; 0 for none.")
    label_smoothing: float = option(0.0, "Weight in [0, 1) of the uniform distribution in the training labels.")
    batch_norm: Literal["frozen", "train"] | None = option(
        None, "Running statistics of BatchNorm in the backbone; default: frozen under a fixed head, else train."
    )
    dropout: Literal["off", "model"] | None = option(
        None,
        "Dropout and stochastic depth of the backbone: off, or as the model has them; default: off under a head that is "
        "aligned by steps.",
    )
    torch_threads: int | None = option(
        None, "CPU threads of each process; default: an equal share of the cores under a launcher."
    )
    frame: Literal["whitened", "means", "random"] = option(
        "whitened", "How a fresh ETF head is set before the first step: in closed form (whitened, means) or at random."
    )
    frame_penalty: float | None = option(
        None,
        "Penalty of the whitened frame, a multiple of the covariance's mean eigenvalue; default: by leave-one-out before "
        "training, 1 while the features learn, and at the end by the validation rows.",
    )
    realign: Literal["steps", "epochs", "never"] | None = option(
        None,
        "When a fixed ETF head is aligned again. epochs: after each epoch, by a pass over the rows; steps: also every "
        "realign_steps, from what training reads of the rows, with a pass over a third of them, even over the classes, only to "
        "choose the best epoch and at the end; never. "
        "Default: steps, but epochs with the backbone's dropout.",
    )
    realign_steps: int | None = option(
        None,
        "Steps between two alignments from what training reads of the rows; default: 10, of very many classes a hundredth of "
        "their number.",
    )
    keep_statistics: bool = option(
        True, "Keep the sums of each class's final features beside the finished model, for `etf_adapt.extend`."
    )
    leave_one_out: bool = option(
        True,
        "Score each training row by the aligned, fixed head as it would be without that row: rows with a row_id, no mixup or "
        "CutMix; of very many rows those of a sample that is even over the classes.",
    )
    final_frame: Literal["whitened", "means"] | None = option(
        None, "Closed form that a head of any kind is refitted by after training; default: none."
    )
    shot_bounds: list[int] = field(
        default_factory=lambda: [20, 100],
        metadata={"help": "Training counts (at least, at most) of a medium class: above is many, below is few."},
    )
    min_validation_rows: int = option(
        5, "Classes with fewer validation rows share one pooled recall in balanced_accuracy_pooled."
    )
    collapse_rows: int = option(
        0,
        "Most rows, and at most a tenth of the training rows, on which neural collapse is measured at each evaluation.",
    )
