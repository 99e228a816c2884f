"""What happens around the steps of a run: epochs told to the sampler, heads aligned again, and what is said."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from etf_adapt.report import LOG_FILE, percent, write_log

if TYPE_CHECKING:
    from etf_adapt.training import ETFTrainer

_MALLOC_OPTIONS = {-4: 0, -1: -1}  # of malloc.h: M_MMAP_MAX none, M_TRIM_THRESHOLD without end


def set_threads(threads: int | None = None) -> int:
    """Set the CPU threads of this process, undoing the single thread that launchers leave.

    ``accelerate launch`` and ``torchrun`` set OMP_NUM_THREADS=1, so that two cores would run as one. The cores that this
    process may use are shared out among the processes of this machine, unless a number is given or no launcher ran.

    Args:
        threads: Number of threads, at least 1; None as above.

    Returns:
        The number now set.

    Example:
        >>> set_threads(1)
        1
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if threads is None and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Tell the C library to keep memory that is freed for the next batch, where it would give it back to the system.

    On CPUs glibc otherwise maps the large tensors of each step anew, and the system clears their pages, at every operation;
    networks of convolutions feel it most. Results are the same; the peak of memory is held until the process ends. Not for
    texts, whose batches differ in size: that of the longest text takes many times what the others do.

    Returns:
        Whether the C library is one that can be told (glibc).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(option, value) == 1 for option, value in _MALLOC_OPTIONS.items())
    except (OSError, AttributeError):  # another system, or another C library
        return False


def unmet_requests(distributed_type: str) -> list[str]:
    """Say what a launcher was asked for and does not happen.

    ``accelerate launch --cpu --num_processes 2`` starts one process without a word; it leaves MASTER_ADDR behind, which
    it sets for more than one only. FSDP and DeepSpeed are passed over on CPUs (accelerate 1.15).

    Args:
        distributed_type: What Accelerate does: a value of ``accelerate.DistributedType``.

    Returns:
        A sentence for each.
    """
    said = []
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and PartialState().num_processes == 1:
        said.append(
            "WARNING: several processes were asked for, but one runs: start them with `torchrun --nproc_per_node <n>` or "
            "`accelerate launch --multi_gpu --num_processes <n>`, which start them on CPUs too."
        )
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" and distributed_type != kind:
            said.append(f"WARNING: {kind} was asked for, but Accelerate runs {distributed_type} on this machine.")
    return said


def describe_run(trainer: ETFTrainer) -> list[str]:
    """Say what really runs: processes, device and precision; rows and classes; head; trained parameters; and the draw.

    Args:
        trainer: A trainer that is about to train.

    Returns:
        Lines for a person.
    """
    args, state = trainer.args, PartialState()
    runs = (
        f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} of {torch.get_num_threads()} threads"
    )
    kind = f" ({trainer.accelerator.distributed_type.value})" if state.num_processes > 1 else ""
    precision = "float32" if args.mixed_precision == "no" else f"{args.mixed_precision} autocast over float32 weights"
    counts = [] if trainer.class_counts is None else [int(rows) for rows in trainer.class_counts if rows]
    classes = f"{len(counts)} classes of {min(counts):,} to {max(counts):,} rows" if counts else "no classes"
    imbalance = f" (imbalance {max(counts) / min(counts):.4g})" if counts else ""
    validation = f", {len(trainer.eval_dataset):,} to validate" if isinstance(trainer.eval_dataset, Sized) else ""
    head = next(iter(trainer.heads.values()))
    frame = f"{head.frame} frame"
    if trainer.needs_alignment():
        frame = f"{'means' if head.kind == 'cosine' else args.frame} frame to be set"
    learns = "learned" if head.trainable else "fixed"
    if trainer.realign_epochs:
        first = "" if math.isinf(trainer.realign_epochs) else f" of the first {trainer.realign_epochs:.0f}"
        learns = f"fixed but for an alignment after each epoch{first}"
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    rates = f"learning rate {args.learning_rate:.4g}" + (
        f", of the head {trainer.head_learning_rate:.4g}" if head.trainable else ""
    )
    lines = [
        f"runs: {runs} on {args.device.type}{kind}, {precision}",
        f"data: {sum(counts):,} rows to train, {classes}{imbalance}{validation}",
        f"head: {head.kind}, {frame}, {learns}; BatchNorm statistics {trainer.batch_norm}",
        f"trained: {trained:,} of {size:,} parameters, {rates}",
        f"draw: {args.sampler}, {trainer.get_total_train_batch_size(args):,} rows a step, seed {args.seed}",
    ]
    return [*lines, *unmet_requests(trainer.accelerator.distributed_type.value)]


class EpochStart(TrainerCallback):
    """Tell the sampler which epoch begins.

    After a stop in mid-epoch ``accelerate.skip_first_batches`` wraps the sampler so deep, with two processes, that
    ``set_epoch`` of the loader no longer reaches it, and the epoch is resumed with the first epoch's rows.

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        targets: Function that returns what to tell: objects with ``set_epoch``.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], targets: Callable[[], list[Any]]) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.targets = targets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch that the number of steps done says."""
        for target in self.targets():
            target.set_epoch(state.global_step // self.updates_per_epoch())


class Realign(TrainerCallback):
    """Align the head again at the end of each of the first epochs.

    This happens in the last step of the epoch, not after it: a checkpoint of that step then holds the new head.

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        align: Function that aligns the head.
        epochs: Number of epochs after which it does.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], align: Callable[[], None], epochs: float) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.align = align
        self.epochs = epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Align after the last step of an epoch, and of the run."""
        done, rest = divmod(state.global_step, self.updates_per_epoch())
        last = rest > 0 and state.global_step == state.max_steps  # in the middle of an epoch
        if (rest == 0 and done <= self.epochs) or (last and done < self.epochs):
            self.align()


class Reweight(TrainerCallback):
    """Switch class weights of the loss on for the last epochs: deferred re-weighting (Cao et al. 2019).

    Args:
        updates_per_epoch: Function that returns the optimizer steps of an epoch.
        set_weights: Function that switches them on or off.
        share: Share of the steps after which the next epoch has them.
    """

    def __init__(self, updates_per_epoch: Callable[[], int], set_weights: Callable[[bool], None], share: float) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.set_weights = set_weights
        self.share = share

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch by the step at which this epoch began, which is not where it is resumed."""
        began = state.global_step // self.updates_per_epoch() * self.updates_per_epoch()
        self.set_weights(began >= self.share * state.max_steps)


class RunLog(TrainerCallback):
    """Say one plain line per evaluation, and keep the log as JSON lines in the run's folder.

    The file is written from the trainer's history, which checkpoints hold: after a resume it has no line twice.
    """

    def __init__(self) -> None:
        self._train: Mapping[str, Any] = {}
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file anew from the history."""
        self._start = time.monotonic()
        self._write(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what was logged."""
        logs = logs or {}
        self._write(args, state)
        if "loss" in logs:
            self._train = logs
        if "eval_accuracy" in logs or ("loss" in logs and args.eval_strategy == "no"):
            self._say(f"{self._where(args, state)}{self._training()}{_scores(logs)}", args, state)

    def _where(self, args: TrainingArguments, state: TrainerState) -> str:
        seconds = time.monotonic() - self._start
        epochs = f"epoch {state.epoch or 0.0:.4g}/{args.num_train_epochs:g}" if args.max_steps <= 0 else "step"
        return f"{epochs} ({state.global_step}/{state.max_steps} steps, {seconds:.0f} s)"

    def _training(self) -> str:
        if not self._train:
            return ""
        said = f" | train loss {self._train['loss']:.4f}, learning rate {self._train['learning_rate']:.2e}"
        self._train = {}
        return said

    @staticmethod
    def _write(args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(str(args.output_dir))
        if state.is_world_process_zero and folder.is_dir():
            write_log(folder / LOG_FILE, state.log_history)

    @staticmethod
    def _say(line: str, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            tqdm.write(line)


def _scores(logs: Mapping[str, Any]) -> str:
    if "eval_accuracy" not in logs:
        return ""
    names = ("balanced_accuracy", "accuracy", "many", "medium", "few")
    said = [f"{name.replace('_', ' ')} {percent(logs.get(f'eval_{name}'))}" for name in names]
    return " | validation: " + ", ".join(said)


class ProgressBar(ProgressCallback):
    """Transformers' progress bar, without its print of every log: ``RunLog`` says what is worth a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print nothing."""
