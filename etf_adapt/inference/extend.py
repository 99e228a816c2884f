"""Extend: rows and classes added to a finished classifier, or taken away, by one pass over these rows alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from etf_adapt.data.load import load_data
from etf_adapt.errors import DataError, quoted
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.in_model import head_modules
from etf_adapt.inference.finished_model import check_output, move_to_device, read_classes, write_folder
from etf_adapt.inference.head_statistics import by_classes, follows, load_statistics, set_heads
from etf_adapt.inference.launch import join_processes
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.folders import locate
from etf_adapt.results.run_folder import STATISTICS_FILE

_RESIDUE = 1e-3  # of a feature's norm, that may be left of a class whose rows were all taken away


@dataclass(frozen=True)
class ExtendResult:
    """What ``extend`` did."""

    model: Any = field(repr=False)
    added: int  # rows
    removed: int
    new_classes: Sequence[str]
    dropped_classes: Sequence[str]  # whose rows were all taken away
    class_counts: Mapping[str, int]  # rows of each class from now on

    def describe(self) -> list[str]:
        """Return lines for a person: what was done, and what was not."""
        total = sum(self.class_counts.values())
        lines = [
            f"{self.added:,} rows added, {self.removed:,} taken away: {total:,} of {len(self.class_counts):,} classes"
        ]
        lines += [f"new classes: {', '.join(self.new_classes)}"] if self.new_classes else []
        lines += [f"classes without rows, dropped: {', '.join(self.dropped_classes)}"] if self.dropped_classes else []
        return [*lines, f"the other {total - self.added:,} rows were not read again; the result was not evaluated"]


def extend(
    model: str | Path,
    dataset: str | None = None,
    *,
    remove: str | None = None,
    output: str | Path | None = None,
    keep_statistics: bool = True,
    max_length: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    **data_options: Any,
) -> ExtendResult:
    r"""Add rows to a finished classifier, of its classes or of new ones, or take rows away; no other row is read.

    The head is a function of the count and the sum of each class's features and of the second moment of all, which
    ``etf_adapt.refit`` and ``etf_adapt.ETFTrainer`` keep beside the model. With those of the new rows added it is the head of
    all rows together, to rounding. Penalty, logit scale and strength of the prior adjustment stay; the adjustment is that of
    the new counts. The backbone stays as it is: it has not learned to tell a new class from the others.

    Args:
        model: Folder that holds ``etf_statistics.safetensors``.
        dataset: Any name that ``etf_adapt.load_data`` takes, whose training rows are added; one class suffices. Classes of
            names that the model knows are its own; the others are new ones.
        remove: The same for rows to take away; they must be rows that the head was set from. A class of which no row is left is
            dropped.
        output: New or empty folder for the result, a stock checkpoint with a card. Nothing is written where None.
        keep_statistics: Whether to keep the new statistics beside the result.
        max_length: Tokens to cut texts to; by default the model's own.
        batch_size: Rows at once.
        num_workers: Processes that decode images; by default up to 8 for many images beside a GPU, else none.
        data_options: Further arguments of ``etf_adapt.load_data``.

    Returns:
        The model and what was done.

    Raises:
        DataError: A `ValueError`: the data set breaks a rule, or rows to take away are not there.
        ValueError: The model has no statistics, or they are not those of its head.
        OSError: The model or the data set is not there.

    Example:
        >>> from tempfile import mkdtemp
        >>> from etf_adapt import refit
        >>> folder = mkdtemp()
        >>> before = refit("micro", "digits", new_labels=True, imbalance_factor=20, output=folder)
        >>> extend(folder, "digits", imbalance_factor=1).added > 800
        True
    """
    join_processes()
    check_output(output)
    if dataset is None and remove is None:
        raise ValueError("`dataset` (=None) and `remove` (=None): give rows to add or to take away.")
    location = locate(model, fetch=True)
    statistics = load_statistics(location)
    if not statistics:
        raise ValueError(
            f"`model` (={str(model)!r}) holds no {STATISTICS_FILE}: set its head anew by refit, which leaves one, as do runs "
            "whose head was aligned on the final features (unless keep_statistics was false)."
        )
    options: dict[str, Any] = {"validation_fraction": 0.0, "min_classes": 1, **data_options}
    sources = {sign: load_data(name, **options) for sign, name in ((1, dataset), (-1, remove)) if name is not None}
    task = next(iter(sources.values())).task
    factory = ETFForImageClassification if task == "image" else ETFForSequenceClassification
    made: Any = factory.from_pretrained(location, dtype="auto")
    heads = head_modules(made)
    if remove is not None and any(part.unread is not None for part in statistics.values()):
        raise ValueError(
            f"`remove` (={remove!r}): the head of {str(model)!r} was set from a sample of its rows, and which these are is not "
            "kept: set it anew by refit without the rows to take away."
        )
    if heads.keys() != statistics.keys() or not all(follows(heads[path], statistics[path]) for path in heads):
        raise ValueError(
            f"`model` (={str(model)!r}): {STATISTICS_FILE} is not of this head, which was changed since: set it anew by refit."
        )
    move_to_device(made)

    # The rows, each under the number of its class among the old ones and the new ones behind them.
    old = [str(made.config.id2label[index]) for index in range(made.config.num_labels)]
    new = [name for name in sources[1].label_names if name not in old] if 1 in sources else []
    names, num_rows = old + new, dict.fromkeys((1, -1), 0)
    places = torch.tensor([*range(len(old)), *[-1] * len(new)])
    rows = {path: by_classes(part.rows, places) for path, part in statistics.items()}
    for sign, data in sources.items():
        if unknown := set(data.label_names) - set(names):
            raise DataError(
                f"`remove` (={remove!r}) has rows of classes that the model lacks: {quoted(sorted(unknown))}."
            )
        prepared = prepare_rows(made, location, data, augment=False, max_length=max_length)
        classes = [names.index(name) for name in data.label_names]
        reading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        found = read_classes(made, prepared.alignment, prepared.collator, classes, len(names), **reading)
        num_rows[sign] = len(data.train)
        for path, part in zip(heads, found.statistics, strict=True):
            rows[path] = rows[path] + part if sign == 1 else rows[path] - part
    kept = torch.nonzero(next(iter(rows.values())).counts > 0)[:, 0]
    for part in rows.values():
        _require_possible(part, names)
    rows = {path: by_classes(part, kept) for path, part in rows.items()}

    # The head.
    changed = {path: dataclasses.replace(part, rows=rows[path]) for path, part in statistics.items()}
    if (unread := next(iter(statistics.values())).unread) is not None:
        unread = torch.cat([unread, torch.zeros(len(new)).double()])
        changed = {path: dataclasses.replace(part, unread=unread) for path, part in changed.items()}
    totals = next(iter(changed.values())).class_counts
    counts = {names[index]: int(totals[place]) for place, index in enumerate(kept.tolist())}
    own = {"trainable": made.etf_settings["head"]["trainable"], "loss": made.etf_settings["loss"]}
    adapt(
        made, len(counts), id2label=dict(enumerate(counts)), class_counts=[*counts.values()], head_path=[*heads], **own
    )
    set_heads(made, changed)
    dropped = [name for name in names if name not in counts]
    result = ExtendResult(made, num_rows[1], num_rows[-1], new, dropped, counts)
    if output is not None:
        write_folder(output, made, changed if keep_statistics else {}, result.describe(), location=location, task=task)
    return result


def _require_possible(rows: ClassStatistics, names: Sequence[str]) -> None:
    """Refuse what is left where rows were taken away that had not been there."""
    norm = (rows.moment.diagonal().sum() / rows.counts.sum().clamp_min(1)).sqrt()
    is_empty = rows.counts == 0
    wrong = (rows.counts < 0) | (is_empty & (rows.sums.norm(dim=1) > _RESIDUE * norm))
    if bool(wrong.any()):
        raise DataError(
            f"`remove`: class {names[int(wrong.nonzero()[0])]!r} has other rows than those to take away: name rows that the "
            "head was set from, each once."
        )
    if int((~is_empty).sum()) < 2:
        raise DataError("`remove` leaves fewer than two classes: a classifier needs two.")
