"""The part of our Trainer that aligns the head: from which rows, when, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from etf_adapt.data.long_tail import even_sample, labels_of
from etf_adapt.geometry.closed_form import MEAN_FRAMES
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.alignment import (
    MAX_SAMPLED_ROWS,
    TrainingRows,
    align_head,
    keeps_rows,
    most_kept_rows,
    read_rows,
)
from etf_adapt.heads.in_model import has_dropout
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.heads.seen_rows import SEEN_PENALTY, Form
from etf_adapt.heads.training_logits import TrainingLogits
from etf_adapt.training.evaluating import EvaluatingTrainer
from etf_adapt.training.parameters import require_finite

READ_EVERY = 3  # where steps read the rows, a pass reads one of so many, even over the classes
MIN_READ_ROWS = 1_000  # and so many at least,
MIN_READ_OF_CLASS = 5  # or so many a class on average


class AligningTrainer(EvaluatingTrainer):
    """Set heads by a closed form from the training rows; ``alignment`` is what the last time did."""

    alignment_dataset: Any
    train_labels: NDArray[np.int64] | None
    alignment: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    train_metrics: Mapping[str, float] = {}  # of the last run of `train`
    heads: dict[str, ClassifierHead]
    realignment = "never"  # "steps", "epochs" or "never": when a fixed head is aligned again in training
    _training_logits: TrainingLogits
    _realigned_at: int | None = None  # step
    _statistics: tuple[int, tuple[ClassStatistics, ...]] | None = None  # of the last pass over all rows, with its step
    _read_again_at: int | None = None  # step of a pass over some, where `_training_logits` has the statistics

    @property
    def first_head(self) -> ClassifierHead:
        """The only head of most models; those of a distilled model share all settings."""
        return next(iter(self.heads.values()))

    def align(self, frame: str | None = None, *, row_ids: NDArray[np.int64] | None = None) -> None:
        """Set the head by a closed form, ``args.frame`` by default, from the training rows (``etf_adapt.align_head``).

        From all of them, or first from some, of all classes, where training reads the others.
        """
        require_finite(self.model, step=self.state.global_step)
        loader = self.rows_loader(self._some_rows(row_ids))
        with self._polled(len(loader) // self.args.world_size):
            result = align_head(
                self.model,
                loader,
                class_counts=self.class_counts,
                frame=frame or self.args.frame,
                penalty=self.args.frame_penalty,
                seed=self.args.seed,
            )
        self.alignment = {
            name: value for name, value in vars(result).items() if name not in ("rows_seen", "statistics")
        }
        self._statistics, self._read_again_at = (self.state.global_step, result.statistics), None
        is_wanted = self.args.leave_one_out or self.realignment == "steps"
        seen = zip(self.heads.items(), result.rows_seen, strict=True)
        kept = {path: rows for (path, head), rows in seen if rows is not None and not head.trainable and is_wanted}
        self._training_logits.rows = {path: rows.to(self.args.device) for path, rows in kept.items()}
        if row_ids is not None:
            for path, rows in self._training_logits.rows.items():
                rows.hold_all(torch.tensor(self.train_labels))
                rows.set_head(self.heads[path], self._form_of_training(rows.form))
        self._share_heads()

    def sampled_rows(self) -> NDArray[np.int64] | None:
        """Return the rows that a pass reads where the steps read the others too, as many of each class; None for all.

        ``SeenRows`` then has place for all rows, and these must be numbered.
        """
        is_trained = self.args.freeze != "backbone" and (self.args.max_steps > 0 or self.args.num_train_epochs != 0)
        if self.realignment != "steps" or self.train_labels is None or not is_trained:
            return None
        num_rows, heads = len(self.train_labels), self.heads.values()
        if num_rows > most_kept_rows(heads) or not all(keeps_rows(head.weight) for head in heads):
            return None
        ends = {row: self.alignment_dataset[row] for row in (0, num_rows - 1)}
        if not all(isinstance(values, Mapping) and values.get("row_id") == row for row, values in ends.items()):
            return None
        num_classes = self.first_head.num_classes
        wanted = max(MIN_READ_ROWS, num_rows // READ_EVERY, MIN_READ_OF_CLASS * num_classes)
        return even_sample(self.train_labels, num_classes, wanted, seed=self.args.seed)

    def _read_again(self, row_ids: NDArray[np.int64]) -> None:
        """Align by a pass over these rows and those that the steps have not read since the last pass."""
        require_finite(self.model, step=self.state.global_step)
        held = self._training_logits.rows
        stale = next(iter(held.values())).stale().cpu().numpy()
        row_ids = np.union1d(row_ids, stale)
        with self._polled(len(row_ids) // self.args.eval_batch_size // self.args.world_size):
            read = self.read(self._some_rows(row_ids), "aligning the head", max_rows=len(row_ids))
        for (path, rows), features in zip(held.items(), read.features, strict=True):
            rows.read_again(cast(Tensor, read.row_ids), features)
            rows.set_head(self.heads[path], self._form_of_training(rows.form))
        self._share_heads()
        self.alignment = {**self.alignment, "penalties": tuple(rows.form.penalty for rows in held.values())}
        self._read_again_at = self.state.global_step

    def _form_of_training(self, form: Form) -> Form:
        """Return the form of a head whose features see the training rows: leave-one-out scores say little of its penalty."""
        is_chosen = form.penalty is not None and self.args.frame_penalty is None
        return replace(form, penalty=SEEN_PENALTY) if is_chosen else form

    def _some_rows(self, row_ids: NDArray[np.int64] | None) -> Any:
        """Return the training rows of these numbers, or all."""
        rows = self.alignment_dataset
        if row_ids is None:
            return rows
        return rows.select(row_ids) if isinstance(rows, Dataset) else Subset(rows, row_ids.tolist())

    def _share_heads(self) -> None:
        """Give all processes the heads of the first: they may round the same sums differently."""
        for head in self.heads.values():
            for parameter in (head.weight, head.bias):
                if parameter is not None:
                    broadcast(parameter.data)

    def realign(self, ends_epoch: bool, ends_run: bool) -> None:
        """Align again where it is due after a step: by a pass, or from what training has read of the rows."""
        step = self.state.global_step
        if self.realignment == "never" or self._realigned_at == step:  # before a signal came: the step is ended anew
            return
        is_due = ends_epoch or step % self.realign_steps == 0
        # What was read a while ago costs an evaluation some points, by which it would choose later epochs.
        chooses = self.args.load_best_model_at_end or self.args.early_stopping_patience is not None
        rows = self._training_logits.rows
        by_steps = self.realignment == "steps" and is_due and not ends_run and not (ends_epoch and chooses)
        # Where rows have no numbers, are mixed, or are scored token by token, nothing was noted.
        if by_steps and rows and all([rows[path].realign(self.heads[path]) for path in rows]):
            self._share_heads()
            self._realigned_at = step
        elif ends_run or ends_epoch:
            row_ids = self.sampled_rows() if rows.keys() == self.heads.keys() else None
            self.align() if row_ids is None else self._read_again(row_ids)
            self._realigned_at = step

    def final_rows(self) -> tuple[ClassStatistics, ...]:
        """Return what each head is the closed form of: the training rows under the weights as they are; else nothing."""
        is_closed_form = all(head.frame in MEAN_FRAMES and head.is_stock_layer for head in self.heads.values())
        if not is_closed_form or not self._has_whole_weights:
            return ()
        if self._read_again_at == self.state.global_step:
            return tuple(rows.statistics for rows in self._training_logits.rows.values())
        step, rows = self._statistics or (-1, ())
        if step == self.state.global_step:
            return rows
        # The best weights are those of an earlier epoch, or an early stop came between two alignments.
        if self.realignment == "never":
            return ()
        rows = tuple(self.read(self.alignment_dataset, "aligning the head").statistics)
        self._statistics = self.state.global_step, rows
        return rows

    def read(self, dataset: Any, what: str, max_rows: int = MAX_SAMPLED_ROWS) -> TrainingRows:
        """Read what the heads are given of the rows of a data set; features are kept of so many."""
        counts = np.zeros(self.first_head.num_classes, np.int64)
        with suppress(ValueError):  # a data set whose labels are in its batches alone: all rows are kept
            counts += np.bincount(labels_of(dataset), minlength=len(counts))
        return read_rows(self.model, self.rows_loader(dataset), counts, self.args.seed, max_rows=max_rows, what=what)

    def read_held_out(self, dataset: Any) -> TrainingRows:
        """Read what the heads are given of validation rows, unless the last evaluation has done so; in the rows' order."""
        if self._evaluated is not None:
            step, evaluated, rows = self._evaluated
            if step == self.state.global_step and evaluated is dataset and rows.kept is not None and rows.kept.size:
                features, labels, row_ids = map(torch.from_numpy, (rows.kept, rows.labels, rows.row_ids))
                return TrainingRows([], [features], labels, row_ids, [])
        found = self.read(dataset, "calibrating")
        if found.row_ids is None:
            return found
        order = found.row_ids.argsort()  # sums in another order end in other bits, and a resumed run has no evaluation
        ordered = [part[order] for part in found.features]
        return replace(found, features=ordered, labels=found.labels[order], row_ids=found.row_ids[order])

    @contextmanager
    def _reading(self, dataset: Any) -> Iterator[Callable[[Tensor, Tensor], Tensor] | None]:
        head, found = self.first_head, list[Tensor]()
        is_wanted = self.is_in_train and head.frame == "whitened" and len(self.heads) == 1
        # Under autocast they are not what an alignment reads.
        if not is_wanted or len(dataset) > MAX_SAMPLED_ROWS or self.accelerator.mixed_precision != "no":
            yield None
            return
        hook = head.register_forward_hook(lambda module, inputs, output: found.append(inputs[0].flatten(1)))

        def read(logits: Tensor, labels: Tensor) -> Tensor:
            # A head that scores every token reads other features than those of a row; a compiled one calls no hook.
            wanted = [((len(labels), head.weight.shape[1]), torch.float32)]
            is_whole = [(part.shape, part.dtype) for part in found] == wanted
            batch = found[0] if is_whole else torch.zeros(len(labels), 0)
            found.clear()
            return batch.cpu()

        try:
            yield read
        finally:
            hook.remove()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_global_step != self.state.global_step:
            self._statistics = self._evaluated = self._read_again_at = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for rows in self._training_logits.rows.values():
            rows.gather()  # on all processes: one alone writes them
        super()._save_checkpoint(model, trial)

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the heads' frames and the last alignment, and the rows as the heads last read them."""
        frames = {path: head.frame for path, head in self.heads.items()}
        rows = self._training_logits
        state = {
            "frames": frames,
            "alignment": self.alignment,
            "forms": rows.forms(),
            "realigned_at": self._realigned_at,
            "read_again_at": self._read_again_at,
        }
        return state, rows.tensors()

    def restore_own_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``own_state`` returned when the checkpoint was written."""
        self._training_logits.restore(tensors, state["forms"], self.args.device)
        for path, head in self.heads.items():
            head.frame = state["frames"][path]
        self.alignment = state["alignment"] or {}
        self._realigned_at, self._read_again_at = state["realigned_at"], state.get("read_again_at")

    def _labels_of_evaluation(self) -> NDArray[np.int64] | None:
        with suppress(ValueError):  # a data set without labels
            return labels_of(self.eval_dataset)
        return None

    @property
    def _has_whole_weights(self) -> bool:
        """Whether each process holds all weights."""
        return not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _require_whole_weights(self, name: str) -> None:
        if not self._has_whole_weights:
            raise ValueError(
                f"`{name}` (={getattr(self.args, name)!r}) cannot be had with FSDP or DeepSpeed, which split the head over "
                "processes: leave it out or use DDP."
            )

    @property
    def realign_steps(self) -> int:
        """Steps between two alignments without a pass; setting very many class vectors costs as much as several steps."""
        return self.args.realign_steps or max(10, self.first_head.num_classes // 100)

    def _resolve_realignment(self) -> str:
        """Return when the head is aligned again: as asked, else as often as serves, where possible."""
        asked = self.args.realign
        is_alignable = all(head.is_set_from_data and not head.trainable for head in self.heads.values())
        is_linear = all(head.is_stock_layer for head in self.heads.values())
        if asked is None:
            if not is_alignable or not self._has_whole_weights or self.args.frame == "random":
                return "never"
            # Under dropout the features of training are others than those that the head is to score.
            by_steps = is_linear and not (self.args.dropout == "model" and has_dropout(self.model))
            return "steps" if by_steps else "epochs"
        if asked != "never" and not is_alignable:
            raise ValueError(
                f"`realign` (={asked!r}) sets the class vectors anew, and this head learns them or draws them at random: "
                "set it to never, or use a fixed 'etf' head."
            )
        if asked == "steps" and not is_linear:
            raise ValueError(f"`realign` (={asked!r}) is for heads that are linear layers: set it to epochs or never.")
        if asked != "never":
            self._require_whole_weights("realign")
        return asked

    def needs_alignment(self) -> bool:
        """Return whether the head is fresh and is set from data before the first step."""
        return all(head.is_set_from_data and head.frame in ("random", "initialised") for head in self.heads.values())

    def rows_loader(self, dataset: Any) -> DataLoader[Any]:
        """Load each row of a data set once, in evaluation's order."""
        if dataset is None:
            raise ValueError("`train_dataset` (=None) is needed to train and to align the head: pass it to ETFTrainer.")
        return DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            sampler=self._get_eval_sampler(dataset),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers or 0,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
