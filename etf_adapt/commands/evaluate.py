"""``etf-adapt evaluate MODEL DATASET``: scores of a model on a split of a data set, as after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etf_adapt.commands.parser import Parser, add_data_flags, add_model_flags, start
from etf_adapt.errors import OutputFolderError, one_line_errors
from etf_adapt.results import run_folder, tables

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn

    from etf_adapt.inference.classifier import Evaluation

FILES = (run_folder.RESULTS_FILE, run_folder.PREDICTIONS_FILE)


def evaluate(
    model: str | Path | nn.Module,
    dataset: str | Dataset,
    *,
    split: str | None = None,
    unknown_classes: str = "fail",
    class_counts: Sequence[int] | None = None,
    shot_bounds: Sequence[int] = (20, 100),
    image_column: str | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    dataset_revision: str | None = None,
    revision: str | None = None,
    processor: Any = None,
    device: str | torch.device | None = None,
    bf16: bool = False,
    **options: Any,
) -> Evaluation:
    """Score a classification model on a split of a data set, whose classes are matched to the model's by name.

    Args:
        model: Folder, Hub id or short name of a model; or the model itself.
        dataset: Any name that ``etf_adapt.load_data`` takes, whose rows are taken as they are; or a ``datasets.Dataset``.
        split: "train", "validation" or "test"; by default test, else validation, else train.
        unknown_classes: Rows of classes that the model does not know: "fail", or "skip", which leaves them out and says so.
        class_counts: Training rows of each class (num_classes,), for the groups of classes; by default what this library
            saved in the model's configuration, else those of the data set's train split.
        shot_bounds: Least and greatest count of a medium class.
        image_column: Column of images, where it is not found by itself.
        text_column: Column of texts, likewise; or the two columns of pairs, for a model that was trained on pairs.
        label_column: Column of classes, likewise.
        dataset_revision: Branch, tag or commit of a Hub data set.
        revision: Branch, tag or commit of a Hub model.
        processor: Tokenizer or image processor; by default the one beside the model.
        device: Where the model runs; by default an accelerator where there is one, or where a given model is.
        bf16: Whether to compute in mixed precision with bfloat16.
        options: ``batch_size``, ``num_workers`` and ``max_length``, as of ``etf_adapt.predict``.

    Returns:
        ``scores``, those of ``etf_adapt.ShotAccuracy``, with the ending ``_unadjusted`` before the prior adjustment; ``rows``,
        the prediction of each row; ``split``, ``class_counts``, and what else the scores are of.

    Raises:
        DataError: A `ValueError`: the data set breaks a rule, or has rows of classes that the model does not know.
        ValueError: The model is no classifier, or an option is invalid.
        OSError: The model or the data set is not there.

    Example:
        >>> from etf_adapt import ETFForImageClassification, load_data
        >>> digits = load_data("digits")
        >>> model = ETFForImageClassification.from_pretrained("micro", id2label=digits.id2label)
        >>> found = evaluate(model, digits.test.select(range(40)))
        >>> 0.0 <= found.scores["accuracy"] <= 1.0
        True
    """
    from etf_adapt.inference.classifier import evaluate_split, load_classifier

    classifier = load_classifier(model, processor=processor, device=device, bf16=bf16, revision=revision)
    columns = {"image_column": image_column, "text_column": text_column, "label_column": label_column}
    options |= {"unknown_classes": unknown_classes, "class_counts": class_counts, "shot_bounds": shot_bounds}
    return evaluate_split(classifier, dataset, split=split, columns=columns, revision=dataset_revision, **options)


def main(argv: Sequence[str]) -> None:
    """Evaluate as the command line says."""
    with one_line_errors(stopped="stopped; nothing was written"):
        options = vars(_parser().parse(argv))
        folder = options.pop("output_dir")
        if folder is not None:
            _check_output_dir(folder)
        start("evaluate")
        found = evaluate(**options)
        print(describe(found, options["dataset"], options["shot_bounds"]))
        if folder is not None:
            _write(found, Path(folder), options["model"], options["dataset"])


def _parser() -> Parser:
    parser = Parser("evaluate", description="Score a model on a split of a data set; classes are matched by name.")
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id or short name of any classification model")
    parser.add_argument("dataset", metavar="DATASET", help="digits, a Hub id, a file or a folder")
    group = parser.add_argument_group("results")
    group.add_argument("--output_dir", metavar="FOLDER", help=f"where to write {' and '.join(FILES)}")
    group.add_argument(
        "--unknown_classes",
        choices=("fail", "skip"),
        default="fail",
        help="rows of classes that the model does not know are an error; or are left out and counted",
    )
    group.add_argument(
        "--shot_bounds", type=int, nargs=2, default=[20, 100], metavar="N", help="training rows of a medium class"
    )
    add_data_flags(parser).add_argument("--label_column", help="column of the labels, if it is not found")
    add_model_flags(parser)
    return parser


def describe(found: Evaluation, dataset: str, shot_bounds: Sequence[int]) -> str:
    """Return the report of an evaluation: rows, accuracy by groups of classes, and the scores that no group has."""
    import numpy as np

    num_classes, scores = len(found.label_names), found.scores
    counts = [0] * num_classes if found.class_counts is None else found.class_counts
    evaluated = np.bincount(found.rows.labels, minlength=num_classes)
    table = tables.shot_table(scores, counts, evaluated, shot_bounds=shot_bounds)
    if found.class_counts is None:
        table = [(line[0], "-", *line[2:]) for line in table if line[0].startswith("mean of")]
    left_out = f", {found.left_out:,} of unknown classes left out" if found.left_out else ""
    return "\n".join(
        [
            f"{found.split} split of {dataset}: {len(found.rows.labels):,} rows{left_out}; {num_classes} classes",
            f"accuracy by the training rows of the classes ({found.counted}):",
            tables.format_table(table),
            f"macro F1 {tables.percent(scores['macro_f1'])} %, calibration error {tables.percent(scores['ece'])} %, loss "
            f"{scores['loss']:.4g}",
        ]
    )


def _check_output_dir(folder: str) -> None:
    path = Path(folder)
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in FILES) if path.is_dir() else []
    if others or path.is_file():
        what = f"holds {others[0]!r}, which no evaluation wrote" if others else "is a file"
        raise OutputFolderError(f"`output_dir` (={folder!r}) {what}: choose another folder, or an empty one.")


def _write(found: Evaluation, folder: Path, model: str, dataset: str) -> None:
    prefix = "eval" if found.split == "validation" else found.split  # as after training
    scores = {f"{prefix}_{name}": found.scores.get(name) for name in tables.SCORES}
    about = {"model": model, "dataset": dataset, "split": found.split, "rows": len(found.rows.labels)}
    about |= {"rows_left_out": found.left_out, "class_counts": found.class_counts, "counts_origin": found.counted}
    run_folder.write_json(folder / run_folder.RESULTS_FILE, scores | about)
    file = folder / run_folder.PREDICTIONS_FILE
    columns = {name: getattr(found.rows, name) for name in ("row_ids", "labels", "predictions", "confidences")}
    run_folder.write_predictions(file, **columns, label_names=found.label_names, files=found.files)
    print(f"{', '.join(FILES)}: {folder}")
