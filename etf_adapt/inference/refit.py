"""Refit: the head of any trained classifier set once more in closed form, in one pass over its training rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from etf_adapt.data.load import ClassificationData, load_data
from etf_adapt.data.long_tail import EVEN_IMBALANCE
from etf_adapt.errors import DataError, check_choice, quoted
from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.heads.alignment import TrainingRows
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.heads.seen_rows import SEEN_PENALTY
from etf_adapt.inference.finished_model import check_output, move_to_device, read_classes, write_folder
from etf_adapt.inference.head_statistics import set_heads
from etf_adapt.inference.held_out import choose_by_log_loss, choose_nothing, mean_logits, score_features, score_left_out
from etf_adapt.inference.launch import join_processes
from etf_adapt.inference.predictions import predictions_of, score_rows
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.metrics.calibration import fit_balanced
from etf_adapt.metrics.shots import SHOT_BOUNDS
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.folders import locate
from etf_adapt.models.names import ENTRY
from etf_adapt.models.pooling import PooledEncoder
from etf_adapt.models.swap import restore_head
from etf_adapt.results.card import read_facts
from etf_adapt.results.run_folder import ARGUMENTS_FILE
from etf_adapt.results.tables import percent
from etf_adapt.sources.opening import logger

HELD_OUT = ("auto", "share", "none")
MAX_ROWS, MAX_ROWS_A_CLASS = 50_000, 200  # that the pass reads by default, whichever is more

_OPTIONS_OF_ROWS = (
    "imbalance_factor", "imbalance_profile", "class_order", "validation_fraction", "validation_before_long_tail",
    "max_train_rows", "image_column", "text_column", "label_column",
)  # fmt: skip

_LEFT_ALONE = (
    "the head is left as it was: the log loss of held-out rows, each class alike, does not fall (or the classes are even and "
    "no row is held out); `force` (--force) sets it all the same"
)
_Layer = tuple[Tensor, Tensor | None]  # class vectors and biases, float64


@dataclass(frozen=True)
class RefitResult:
    """What ``refit`` did; scores are those of ``etf_adapt.ShotAccuracy``, empty where there are none."""

    model: Any = field(repr=False)
    is_set: bool  # False: nothing got better, and the head was left alone
    penalty: float
    calibration: tuple[float, float] | None  # logit scale and strength of the prior adjustment
    rows: int  # that set the head
    all_rows: int  # of which these are a sample, or all
    judge: str  # the rows of the scores, in words
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]

    def describe(self) -> list[str]:
        """Return lines for a person: what was done, and balanced accuracies."""
        calibration = "not calibrated: no row is held out (of rows that the model never saw, held_out='share' is)"
        if self.calibration is not None:
            scale, strength = self.calibration
            adjustment = f" - {strength:.3g} log(class frequency)" if strength > 1e-3 else ""
            calibration = f"calibrated: logits x {scale:.4g}{adjustment}"
        rows = f"{self.rows:,} rows"
        if self.rows < self.all_rows:
            rows = f"{self.rows:,} of {self.all_rows:,} rows, a sample even over the classes (more by `max_rows`, --max_rows)"
        lines = [f"head in closed form from {rows}, penalty {self.penalty:.4g}; {calibration}"]
        titles = {"balanced_accuracy": "balanced accuracy"}
        titles |= {f"{name}_third": f"{name} third of the classes" for name in ("head", "middle", "tail")}
        for name, title in titles.items() if self.after else ():
            old = f"{percent(self.before[name])} before, " if self.before else ""
            lines.append(f"{title}: {old}{percent(self.after[name])} after")
        lines.append(f"scores are of {self.judge}")
        return lines if self.is_set else [*lines, _LEFT_ALONE]


@dataclass(frozen=True)
class _Judge:
    """Which rows choose and judge."""

    words: str
    split: str | None = None  # "validation"; None is each training row, scored without itself
    is_seen: bool = False  # the features may have been trained on them: they choose nothing
    joins: bool = False  # they are training rows, kept out until the head is set for the last time


def refit(
    model: str | Path,
    dataset: str,
    *,
    output: str | Path | None = None,
    new_labels: bool = False,
    held_out: str = "auto",
    force: bool = False,
    penalty: float | None = None,
    max_rows: int | None = None,
    keep_statistics: bool = True,
    head_path: str | Sequence[str] | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    **data_options: Any,
) -> RefitResult:
    r"""Set the head of a trained classifier anew in closed form, in one pass over its training rows; nothing is trained.

    The head becomes the whitened frame of ``etf_adapt.align_head``, in which each class counts once however few rows it has.
    Penalty, confidences and the adjustment by the class frequencies are chosen by rows that the features were not trained on,
    by their class-balanced log loss. Rows that trained a backbone can choose nothing: they lie closer together than new ones.

    Args:
        model: Folder, Hub id or short name of any image or text classifier, of this library or not.
        dataset: Any name that ``etf_adapt.load_data`` takes: the training rows of the model. Classes are matched by name.
        output: New or empty folder for the result, a stock checkpoint with a card. Nothing is written where None.
        new_labels: The model was trained on other labels, or on none: it becomes a classifier of the data set's classes.
        held_out: Rows that choose and judge. "auto" is each training row scored without itself for new labels and frozen
            backbones; else the validation rows of the run that made the model; else the data set's own validation split, taken
            as unseen; else "none". "share" is a stratified tenth of the training rows, for a model that saw none of them.
        force: Set the head also where the log loss of the held-out rows does not fall.
        penalty: :math:`\lambda` of the whitened frame, in mean eigenvalues; chosen where None.
        max_rows: Training rows to read: of more, a sample even over the classes, with all rows of rarer ones; the adjustment
            by the class frequencies is of all rows. By default 50,000, or 200 a class where that is more.
        keep_statistics: Whether to keep the statistics beside the model, for ``etf_adapt.extend``.
        head_path: Module path or paths of the head, where it is not found.
        pooling: Of a text's tokens, for new labels: "stock" or "mean".
        max_length: Tokens to cut texts to; by default the model's own.
        batch_size: Rows at once.
        num_workers: Processes that decode images; by default up to 8 for many images beside a GPU, else none.
        data_options: Further arguments of ``etf_adapt.load_data``; by default those of the run that made the model.

    Returns:
        The model, what was done, and the scores before and after. Where nothing got better the model is as it was, and
        nothing is written.

    Raises:
        DataError: A `ValueError`: the data set breaks a rule, or its classes are not those of the model.
        ValueError: The model is no classifier, or an option is invalid.
        OSError: The model or the data set is not there.

    Example:
        >>> result = refit("micro", "digits", new_labels=True)
        >>> result.judge, result.model.config.num_labels
        ('each training row scored without itself', 10)
    """
    check_choice("held_out", held_out, HELD_OUT)
    join_processes()
    check_output(output)
    location = locate(model, fetch=True)
    run = _run_of(location, dataset)
    itself = held_out == "auto" and (new_labels or run.get("freeze") == "backbone")
    whole = {"validation_fraction": 0.0} if itself else {}
    data = load_data(dataset, **{**run.get("options", {}), **whole, **data_options})
    judge = _Judge("each training row scored without itself") if itself else _find_judge(held_out, data, run)

    # The model with its own head, then with a head of ours in its place.
    factory = ETFForImageClassification if data.task == "image" else ETFForSequenceClassification
    labels: dict[str, Any] = {"id2label": data.id2label} if new_labels else {}
    made: Any = factory.from_pretrained(location, dtype="auto", head_path=head_path, pooling=pooling, **labels)
    paths = list(head_modules(made))
    old = [] if new_labels else _take_old_heads(made, paths, location)
    names = [str(made.config.id2label[index]) for index in range(made.config.num_labels)]
    if names == [f"LABEL_{index}" for index in range(len(data.label_names))]:
        logger.warning("The model's classes have no names (LABEL_0, ...): they take the data set's, in its order.")
        names = data.label_names
    classes = _match(data.label_names, names)
    made = adapt(made, len(names), id2label=dict(enumerate(names)), head_path=paths)
    move_to_device(made)

    # One pass.
    rows = prepare_rows(made, location, data, augment=False, max_length=max_length)

    def read(split: str, most: int | None = None) -> TrainingRows:
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "max_rows": most}
        return read_classes(made, getattr(rows, split), rows.collator, classes, len(names), **options)

    train = read("alignment", max(MAX_ROWS, MAX_ROWS_A_CLASS * len(names)) if max_rows is None else max_rows)
    judged = train if judge.split is None else read(judge.split)
    counts = torch.zeros(len(names)).double()
    counts[classes] = torch.from_numpy(data.class_counts).double()
    unread = counts - train.statistics[0].counts if len(data.train) > train.statistics[0].counts.sum() else None
    intercepts = [head.bias is not None for head in head_modules(made).values()]

    # What the rows choose.
    score = score_features(train.statistics, judged.features, intercepts)
    if judge.split is None and not judge.is_seen:
        usable = counts[judged.labels] >= 2  # a row that is alone in its class cannot be left out
        features = [part[usable] for part in judged.features]
        judged = dataclasses.replace(judged, features=features, labels=judged.labels[usable])
        score = score_left_out(train.statistics, judged.features, judged.labels, intercepts)
    before = mean_logits(judged.features, old) if old else None
    if judge.is_seen or len(judged.labels) == 0:
        choice = choose_nothing(score, SEEN_PENALTY if penalty is None else penalty, judged.labels, before)
    else:
        grid = PENALTIES if penalty is None else (penalty,)
        choice = choose_by_log_loss(score, judged.labels, counts, penalties=grid, adjusts=made.is_adjustable)

    # Set the head for the last time, with the rows that had been kept out.
    parts = zip(paths, train.statistics, judged.statistics, intercepts, strict=True)
    heads = {path: choice.head(part + other if judge.joins else part, own, unread) for path, part, other, own in parts}
    helps = before is None or force or _helps(choice.log_loss, before, judged.labels, counts)
    if helps:
        set_heads(made, heads)
    else:
        for head, layer in zip(head_modules(made).values(), old, strict=True):
            head.set_class_vectors(*layer, frame="loaded")
    first = heads[paths[0]]
    made.set_loss(class_counts=first.class_counts.int().tolist())
    result = RefitResult(
        made,
        helps,
        choice.penalty,
        None if math.isnan(choice.log_loss) else (choice.logit_scale, choice.prior_strength),
        int(first.rows.counts.sum()),
        int(first.class_counts.sum()),
        judge.words,
        {} if before is None else _scores(before, judged.labels, counts),
        _scores(choice.logits, judged.labels, counts),
    )
    if output is not None and helps:
        kept = heads if keep_statistics else {}
        write_folder(output, made, kept, result.describe(), location=location, task=data.task)
    return result


def _run_of(location: str, dataset: str) -> dict[str, Any]:
    """Return what a run of this library on this data set left beside the model; nothing for other models and data sets."""
    file, facts = Path(location, ARGUMENTS_FILE), read_facts(location)
    arguments = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = str(arguments.get("dataset"))
    paths = [Path(name).expanduser() for name in (own, dataset)]
    is_same = own == dataset or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))
    if (
        facts is None or not is_same or "seed" not in facts.dataset
    ):  # the last of a run by ETFTrainer on rows of one's own
        return {}
    options = {name: arguments[name] for name in _OPTIONS_OF_ROWS if arguments.get(name) is not None}
    return {
        "options": {**options, "seed": facts.dataset["seed"]},
        "freeze": arguments.get("freeze"),
        "row_ids": facts.dataset["row_ids_sha256"],
    }


def _find_judge(held_out: str, data: ClassificationData, run: Mapping[str, Any]) -> _Judge:
    ids, has = data.description["row_ids_sha256"], data.validation is not None
    is_own = data.description["validation_origin"] == "its own split"
    is_known = bool(run) and all(run["row_ids"].get(split) == ids.get(split) for split in ("train", "validation"))
    if held_out == "share":
        if is_own or not has:
            raise DataError("`held_out` (='share') is for data sets without a validation split: leave it out.")
        return _Judge("a share of the training rows, unseen by the model as you say", "validation", joins=True)
    if held_out == "auto" and has and (is_own or is_known):
        what = "of the run that made the model" if is_known else "of the data set, taken as unseen by the model"
        return _Judge(f"validation rows {what}", "validation", joins=not is_own)
    words = "rows that the model was trained on, which say little of new ones"
    return _Judge(words, "validation" if has and not is_own else None, is_seen=True, joins=has and not is_own)


def _take_old_heads(model: Any, paths: Sequence[str], location: str) -> list[_Layer]:
    """Return the layers of the model's own head, calibration included."""
    is_ours = getattr(model.config, ENTRY, None) is not None
    new = tuple(getattr(model, "_new_weights", ()))
    if is_ours:
        model.fold_heads()
    else:
        restore_head(model)  # the layer that our head had replaced
    lacks = isinstance(model, PooledEncoder) and (model.lacks_layer or not is_ours)
    if lacks or any(name.startswith(f"{path}.") for path in paths for name in new):
        raise ValueError(
            f"`model` (={location!r}) holds no trained classifier: with new labels (`new_labels`, --new_labels) it becomes one "
            "of the data set's classes."
        )
    return [ClassifierHead.class_vectors(cast(Any, model.get_submodule(path))) for path in paths]


def _match(label_names: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the model's class of each class of the data set, by name."""
    unknown, empty = sorted({*label_names} - {*names}), sorted({*names} - {*label_names})
    if unknown or empty:
        what = f"unknown to the model: {quoted(unknown)}" if unknown else f"without rows: {quoted(empty)}"
        raise DataError(
            f"The classes of the data set are not those of the model; {what}. Rename them, or make the model a classifier of "
            "these classes with new labels (`new_labels`, --new_labels); extend adds classes to a model that was refitted."
        )
    return [list(names).index(name) for name in label_names]


def _helps(log_loss: float, before: Tensor, labels: Tensor, counts: Tensor) -> bool:
    """Return whether held-out rows are scored better than by the old head, its scale fitted too; unseen: uneven classes."""
    if math.isnan(log_loss):
        return bool(counts.max() / counts.min() >= EVEN_IMBALANCE)
    return log_loss < fit_balanced(before, labels)[2]


def _scores(logits: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float | None]:
    if len(labels) == 0:
        return {}
    return score_rows(predictions_of(torch.arange(len(labels)), labels, logits), counts.int().numpy(), SHOT_BOUNDS)
