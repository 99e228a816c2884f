"""A data set by name or path as checked train, validation and test splits in one form."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from etf_adapt.data.digits import open_data_set
from etf_adapt.data.long_tail import long_tailed_indices
from etf_adapt.data.progress import ProgressLines
from etf_adapt.data.splits import fewer_rows, validation_rows
from etf_adapt.errors import DataError, quoted
from etf_adapt.sources.columns import (
    Columns,
    arrow_column,
    describe_columns,
    encode_labels,
    find_columns,
    first_true,
    labels_are_hidden,
    match_labels,
)
from etf_adapt.sources.image_checks import as_images, check_images
from etf_adapt.sources.opening import Source, logger


@dataclass(frozen=True)
class ClassificationData:
    """A data set ready to train on: each split has the columns `task`, "text_pair" for pairs of texts, and "label"."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    task: str  # "image" (a `datasets.Image`) or "text" (a string)
    label_names: list[str]  # of the `ClassLabel` in every split: their positions are the labels
    class_counts: np.ndarray  # (num_classes,) int64, training rows, all at least 1
    allow_flip: bool = True  # whether a mirrored image still shows its class
    description: dict[str, Any] = field(default_factory=dict)  # of the rows' origin and choice, ready for JSON

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label, as transformers' configurations hold them."""
        return dict(enumerate(self.label_names))


def load_data(
    dataset: str,
    *,
    image_column: str | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    imbalance_factor: float | None = None,
    imbalance_profile: str = "exponential",
    class_order: str = "label",
    validation_fraction: float = 0.1,
    validation_before_long_tail: bool = False,
    max_train_rows: int | None = None,
    min_classes: int = 2,
    seed: int = 0,
    revision: str | None = None,
    image_root: str | None = None,
) -> ClassificationData:
    """Load a data set for classification, check it, and bring it into one form; no image is decoded.

    The steps: find the columns; read the labels of every split and match them to train's by *name*; cut a missing validation
    split, balanced, with `validation_before_long_tail`; make train long-tailed; else cut the validation split now, stratified;
    cut train down to `max_train_rows`; check texts and the headers of the chosen images. A validation or test split whose
    labels are all hidden (-1) is left out.

    Args:
        dataset: "digits" (embedded); a csv, tsv, json, jsonl or parquet file, or a pattern of such; a folder of such files, of
            images (`<class>/...` or `<split>/<class>/...`, or with a table that names them) or from `save_to_disk`; or a Hub
            id, with the configuration after a colon where there are several ("nyu-mll/glue:sst2"). A local path goes first; a
            local folder named digits is `./digits`.
        image_column: Column of images, where it is not found by itself.
        text_column: Column of texts, likewise; or the two columns of pairs of texts, which are tokenized as pairs.
        label_column: Column of classes, likewise.
        imbalance_factor: Largest over smallest class count that train gets, at least 1; None is the data set's own
            default: 20 for "digits", all rows for any other.
        imbalance_profile: "exponential" or "step"; see `etf_adapt.make_long_tailed`.
        class_order: "label" or "permuted": which classes are the rare ones.
        validation_fraction: Share of the training rows, in [0, 1), that a missing validation split is cut from; 0 cuts none.
        validation_before_long_tail: Cut the validation split before the long tail, with the same number of rows from
            each class, as benchmarks do; by default after it, as a user's own rows would be.
        max_train_rows: Training rows to keep at most, each class in its proportion.
        min_classes: Classes that there are at least: two to train a classifier, one to add rows of to one.
        seed: Seed of every choice of rows, at least 0.
        revision: Branch, tag or commit of a Hub data set.
        image_root: Folder of the images that a table names; by default that of the table. Names are looked for in folders
            below it, too, and may lack their suffix.

    Returns:
        The splits and what is known of them.

    Raises:
        DataError: A `ValueError`: the data set or an option breaks a rule; the message says where and the way on.
        FileNotFoundError: Nothing lies at the path.

    Example:
        >>> data = load_data("digits")
        >>> data.task, data.train.column_names, data.class_counts.tolist()
        ('image', ['image', 'label'], [107, 78, 56, 40, 29, 21, 14, 10, 7, 5])
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"`validation_fraction` (={validation_fraction}) must be in [0, 1): it is a share of the rows.")
    tail: dict[str, Any] = {"profile": imbalance_profile, "class_order": class_order, "seed": seed}
    # Two rows stand for the data, so that a wrong option is known before anything is read.
    long_tailed_indices([0, 1], imbalance_factor=1 if imbalance_factor is None else imbalance_factor, **tail)

    source = open_data_set(dataset, revision=revision, image_root=image_root)
    columns = find_columns(
        source.splits["train"], image_column=image_column, text_column=text_column, label_column=label_column
    )
    splits = _visible_splits(source, columns)
    labels, names = _read_all_labels(splits, columns, min_classes=min_classes)
    rows = {split: np.arange(len(values)) for split, values in labels.items()}

    options: dict[str, Any] = {"num_classes": len(names), "seed": seed}

    def train_labels() -> np.ndarray:
        return labels["train"][rows["train"]]

    def cut_validation(*, balanced: bool) -> None:
        cut = validation_rows(train_labels(), fraction=validation_fraction, balanced=balanced, **options)
        rows["validation"], rows["train"] = rows["train"][cut], np.delete(rows["train"], cut)

    cuts = "validation" not in splits and validation_fraction > 0
    if cuts and validation_before_long_tail:
        cut_validation(balanced=True)
    if imbalance_factor is None:
        imbalance_factor = source.imbalance_factor
    if imbalance_factor is not None:
        kept = long_tailed_indices(train_labels(), imbalance_factor=imbalance_factor, **tail)
        rows["train"] = rows["train"][kept]
    if cuts and not validation_before_long_tail:
        cut_validation(balanced=False)
    if max_train_rows is not None:
        rows["train"] = rows["train"][fewer_rows(train_labels(), max_rows=max_train_rows, **options)]

    chosen = {}
    for split, ids in rows.items():
        home = split if split in splits else "train"
        form = _in_one_form(splits[home], columns, labels[home], names, source.folder)
        if columns.task == "image":
            lines = ProgressLines(f"checking images of split {home}", len(ids))
            check_images(form, rows=ids, split=home, report=lines.update)
        else:
            _check_texts(form, split=home)
        # In memory: `select` would otherwise write the row ids beside the data.
        chosen[split] = form if len(ids) == len(form) else form.select(ids, keep_in_memory=True)

    counts = np.bincount(labels["train"][rows["train"]], minlength=len(names))
    when = "before the long tail, balanced" if validation_before_long_tail else "after the long tail, stratified"
    origin = "its own split" if "validation" in splits else f"cut from train {when}" if cuts else "none"
    description = {
        "name": dataset,
        "kind": source.kind,
        "revision": revision,
        "task": columns.task,
        "columns": {name: getattr(columns, name) for name in ("input", "pair", "label", "left_out", "rules")},
        "num_classes": len(names),
        "label_names": names,
        "rows": {split: len(ids) for split, ids in rows.items()},
        "rows_in_source": {split: len(values) for split, values in labels.items()},
        "files": {"number": len(source.files), "first": _short_names(source)},
        "split_names": {split: str(rows.split) for split, rows in splits.items() if rows.split is not None},
        "class_counts": counts.tolist(),
        "imbalance_factor": float(counts.max() / counts.min()),
        "long_tail": None if imbalance_factor is None else {"imbalance_factor": float(imbalance_factor), **tail},
        "validation_origin": origin,
        "seed": seed,
        # As little-endian 64-bit integers, so that two runs can show that they used the same rows.
        "row_ids_sha256": {split: sha256(ids.astype("<i8").tobytes()).hexdigest() for split, ids in rows.items()},
    }
    held_out = chosen.get("validation"), chosen.get("test")
    return ClassificationData(chosen["train"], *held_out, columns.task, names, counts, source.allow_flip, description)


def _visible_splits(source: Source, columns: Columns) -> dict[str, Dataset]:
    splits = {}
    for split, dataset in source.splits.items():
        for name in (columns.input, columns.pair, columns.label):
            if name is not None and name not in dataset.column_names:
                raise DataError(
                    f"Column `{name}` is missing in split {split}, which has {describe_columns(dataset)}: add it, or take "
                    "the split away."
                )
        if split != "train" and labels_are_hidden(dataset, columns.label):
            logger.warning("Split %s is left out: its labels are hidden.", split)
        else:
            splits[split] = dataset
    return splits


def _read_all_labels(
    splits: dict[str, Dataset], columns: Columns, *, min_classes: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the labels of every split as indices to train's class names, and those names."""
    train, names = encode_labels(splits["train"], columns.label, split="train")
    if len(names) < min_classes:
        raise DataError(
            f"Label column `{columns.label}` has {len(names)} class ({', '.join(names)}), but a classifier needs two: "
            "check the column."
        )
    counts = np.bincount(train, minlength=len(names))
    if not counts.all():
        empty = [names[label] for label in np.flatnonzero(counts == 0)]
        raise DataError(
            f"{len(empty)} of {len(names)} classes have no training rows: {quoted(empty)}. Add rows, or take the names out of "
            f"label column `{columns.label}`."
        )
    _warn_of_similar(names)
    labels = {"train": train}
    for split in splits.keys() - labels.keys():
        labels[split] = match_labels(*encode_labels(splits[split], columns.label, split=split), names, split=split)
    return {split: labels[split] for split in splits}, names


def _warn_of_similar(names: list[str]) -> None:
    """Warn of class names that differ in case, blanks or Unicode form alone; they stay apart."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            listed = ", ".join(map(repr, group))
            logger.warning("Classes that differ in case, blanks or Unicode form alone stay apart: %s", listed)


def _in_one_form(
    dataset: Dataset, columns: Columns, labels: np.ndarray, names: list[str], folder: Path | None
) -> Dataset:
    """Reduce a split to the columns "image", or "text" (and "text_pair"), and "label", the latter with train's names."""
    new_names = {columns.input: columns.task} | ({columns.pair: "text_pair"} if columns.pair else {})
    dataset = dataset.select_columns(list(new_names))
    dataset = dataset.rename_columns({old: new for old, new in new_names.items() if old != new})
    if columns.task == "image":
        dataset = as_images(dataset, folder=folder)
    return dataset.add_column("label", labels, feature=ClassLabel(names=names))


def _check_texts(dataset: Dataset, *, split: str) -> None:
    for name in set(dataset.column_names) - {"label"}:
        texts = pc.fill_null(arrow_column(dataset, name), "")
        row = first_true(pc.or_(pc.equal(texts, ""), pc.utf8_is_space(texts)))
        if row is not None:
            raise DataError(
                f"Row {row} of split {split} has an empty {name.replace('_', ' ')}: fill it or remove the row."
            )


def _short_names(source: Source) -> list[str]:
    """Return the names of the first files, from the data set's folder on."""
    root = source.folder or Path()
    names = [file.relative_to(root) if file.is_relative_to(root) else Path(file.name) for file in source.files[:10]]
    return [name.as_posix() for name in names]
