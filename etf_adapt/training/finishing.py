"""After training: calibrate, save, score what was saved, and write results and model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from etf_adapt.data.progress import progress
from etf_adapt.errors import DataError, check_choice, message_of
from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.heads.alignment import TrainingRows
from etf_adapt.inference.head_statistics import describe_heads, save_statistics, set_heads
from etf_adapt.inference.held_out import choose_by_log_loss, score_features
from etf_adapt.inference.predictions import (
    RowPredictions,
    calibrate,
    load_stock,
    predict_rows,
    predictions_of,
    score_both,
)
from etf_adapt.metrics.shots import ShotAccuracy
from etf_adapt.models.adapters import merge_adapters
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.names import micro_folder
from etf_adapt.results import run_folder, tables
from etf_adapt.results.card import CardFacts, write_card
from etf_adapt.results.card_metadata import marked_if_folder, read_base_card
from etf_adapt.training.aligning import AligningTrainer

_COMPARED_BATCHES = 2

Scored = tuple[dict[str, float | None], RowPredictions]


def finish(
    trainer: AligningTrainer,
    test_dataset: Any = None,
    *,
    eval_dataset: Any = None,
    prior_adjustment: str = "auto",
    dataset: str | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Calibrate the trained model, save it, score what was saved, write results and card; once, after ``train``.

    Of a whitened head the penalty is chosen with the calibration, by the class-balanced log loss of the validation rows: the
    features have seen the training rows. ``args.output_dir`` then holds the model as stock classes read it,
    ``all_results.json``, ``README.md`` with its figures, ``predictions.csv`` (of test rows), ``log.jsonl`` and
    ``arguments.json``; ``push_to_hub`` or ``etf-adapt publish`` publishes it. To be called on every process.

    Args:
        trainer: The trainer, after ``train``.
        test_dataset: Rows that nothing was chosen by, with labels; where None, the validation rows are reported.
        eval_dataset: Validation rows to calibrate on, where they are not those of the constructor, or these are a dict.
        prior_adjustment: ``"fit"`` an adjustment by the class frequencies on the validation rows, ``"none"``, or
            ``"auto"``: fit it for ETF heads that can take it.
        dataset: What the card says of the data: a name, or ``load_data(...).description``.
        base_model: Hub id, folder or name of what was fine-tuned, for the card, where it is not what the model was loaded
            from.
        command: Command line that repeats the run, for the card.

    Returns:
        What ``all_results.json`` holds: figures of training, ``eval_<score>`` and ``test_<score>`` of the saved model.

    Raises:
        ValueError: There are no training rows, several validation sets, no validation rows to fit on, or rows without
            labels.
        DataError: A row could not be read; what does not need it was written all the same.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    held_out = trainer.eval_dataset if eval_dataset is None else eval_dataset
    if trainer.class_counts is None:
        raise ValueError("`train_dataset` (=None) is needed: results are reported by the training rows of the classes.")
    if isinstance(held_out, dict):
        raise ValueError(f"`eval_dataset` has several data sets: pass the one to calibrate on, of {[*held_out]}.")
    adjusts = is_adjusted(model, prior_adjustment, trainer.class_counts, has_validation=held_out is not None)
    merge_adapters(model)
    trained = model.etf_settings  # calibration makes any head an ordinary layer
    unread: dict[str, str] = {}  # why a split has no scores
    known: dict[str, TrainingRows | None] = {}  # what the head reads of a split, where that is at hand
    if held_out is not None:
        with _noted(unread, "validation"):
            words, known["validation"] = _fit_head(trainer, model, held_out, adjusts)
            trainer.print(words)
    rows = trainer.final_rows()
    heads = describe_heads(model, rows, trainer.alignment["penalties"]) if rows else {}

    trainer.save_model(_internal_call=True)
    if trainer.args.should_save and trainer.args.keep_statistics:
        save_statistics(str(trainer.args.output_dir), heads)
    trainer.accelerator.wait_for_everyone()
    stock = load_stock(str(trainer.args.output_dir), model._task, trust_remote_code=model.trusts_code)
    stock = stock.to(trainer.args.device)  # type: ignore[arg-type]
    scored: dict[str, Scored] = {}
    for split, rows in {"validation": held_out, "test": test_dataset}.items():
        if rows is not None and split not in unread:
            with _noted(unread, split):
                found = _predict_saved(trainer, stock, split, rows, known.get(split))
                scored[split] = score_both(found, trainer.class_counts, trainer.args.shot_bounds), found
    scores = {split: found for split, (found, _) in scored.items()}
    results = tables.flat_results(trainer.train_metrics, scores.get("validation"), scores.get("test"))
    if trainer.is_world_process_zero():
        _report(trainer, results, scored, trained, dataset, base_model, command)
    trainer.accelerator.wait_for_everyone()
    if unread:
        lacks = ["not published"] if trainer.args.push_to_hub else []
        lacks += [f"no {split} scores: {reason}" for split, reason in unread.items()]
        raise DataError(f"trained and saved, but {'; '.join(lacks)}")
    return results


def _fit_head(
    trainer: AligningTrainer, model: ETFModel, held_out: Any, adjusts: bool
) -> tuple[str, TrainingRows | None]:
    """Fit logit scale and prior adjustment on validation rows, and the penalty of a closed form; say what was done.

    Return what the head reads of these rows too, where that was needed.
    """
    args, chosen = trainer.args, ""
    counts, rows, judged = torch.as_tensor(trainer.class_counts), trainer.final_rows(), None
    if rows and trainer.first_head.frame == "whitened":
        # Training rows say too little of it now: the features have seen them, unless nothing of the backbone was trained.
        has_learned = args.freeze != "backbone" and trainer.state.global_step > 0
        known = args.frame_penalty is not None or not has_learned
        penalties = trainer.alignment["penalties"][:1] if known else PENALTIES
        judged = trainer.read_held_out(held_out)
        intercepts = [head.bias is not None for head in trainer.heads.values()]
        score = score_features(rows, judged.features, intercepts)
        choice = choose_by_log_loss(score, judged.labels, counts, penalties=penalties, adjusts=adjusts)
        parts = zip(trainer.heads, rows, intercepts, strict=True)
        set_heads(model, {path: choice.head(part, has_bias) for path, part, has_bias in parts})
        trainer.alignment["penalties"] = (choice.penalty,) * len(rows)
        factor, strength = choice.logit_scale, choice.prior_strength
        chosen = "" if known else f"; penalty {choice.penalty:g} by their log loss"
    else:
        # The loader of training may have been kept with its workers.
        batches = progress(trainer.get_test_dataloader(held_out), "calibrating, batches")
        factor, strength = calibrate(model, batches, trainer.class_counts if adjusts else None)
    adjustment = f" - {strength:.3g} log(class frequency)" if adjusts else ""
    return f"calibrated on validation rows: logits x {factor:.4g}{adjustment}{chosen}", judged


def _predict_saved(
    trainer: AligningTrainer, stock: Any, split: str, rows: Any, known: TrainingRows | None
) -> RowPredictions:
    """Predict a split by the saved folder as its users load it: without this library.

    Where what the head reads of all rows is known, its logits are those of the folder if they are for two batches.
    """
    offsets = trainer.accelerator.unwrap_model(trainer.model).etf_settings["prior_adjustment"]
    batches = trainer.get_test_dataloader(rows)
    if known is not None and known.row_ids is not None and len(known.labels) == len(rows) and len(trainer.heads) == 1:
        head = trainer.first_head
        with torch.no_grad():
            features = known.features[0].to(head.weight)
            logits = torch.nn.functional.linear(features, head.weight.flatten(1), head.bias).float().cpu()
        found = predictions_of(known.row_ids, known.labels, logits, offsets)
        some = predict_rows(stock, islice(batches, _COMPARED_BATCHES), offsets=offsets)
        same = np.isin(found.row_ids, some.row_ids)
        if np.allclose(found.losses[same], some.losses, rtol=1e-3, atol=1e-3):
            return found
    return predict_rows(stock, progress(batches, f"scoring {split}, batches"), num_rows=len(rows), offsets=offsets)


def _report(
    trainer: AligningTrainer,
    results: Mapping[str, Any],
    scored: Mapping[str, Scored],
    trained: Mapping[str, Any],  # settings of the head before calibration
    dataset: str | Mapping[str, Any] | None,
    base_model: str | None,
    command: str,
) -> None:
    """Write results, predictions and the model card beside the model; print the scores."""
    args, folder, counts = trainer.args, Path(str(trainer.args.output_dir)), np.asarray(trainer.class_counts)
    names = [trainer.model.config.id2label[label] for label in range(len(counts))]  # type: ignore[index]
    calibrated = trainer.model.etf_settings
    run_folder.write_json(folder / run_folder.RESULTS_FILE, results)
    if not (folder / run_folder.ARGUMENTS_FILE).exists():
        run_folder.write_json(folder / run_folder.ARGUMENTS_FILE, run_folder.public_arguments(args))
    split = "test" if "test" in scored else "validation"
    figures: dict[str, Any] = {"scores": {}, "table": []}
    if split in scored:
        scores, rows = scored[split]
        evaluated = np.bincount(rows.labels, minlength=len(counts))
        metric = ShotAccuracy(counts)
        metric.add_batch(predictions=rows.predictions, references=rows.labels)
        table = tables.shot_table(scores, counts, evaluated, shot_bounds=args.shot_bounds)
        figures = {"scores": scores, "table": table, "recalls": metric.class_recalls().tolist()}
        figures["row_counts"] = evaluated.tolist()
        trainer.print(f"\n{split} accuracy, by the training rows of the classes:\n{tables.format_table(table)}")
    if "test" in scored:
        columns = {name: getattr(rows, name) for name in ("row_ids", "labels", "predictions", "confidences")}
        run_folder.write_predictions(folder / run_folder.PREDICTIONS_FILE, **columns, label_names=names)
    origin = str(getattr(trainer.model.config, "_name_or_path", ""))
    public_origin = "micro" if origin == micro_folder() else run_folder.public_value(origin)
    description = {"name": dataset or "own data"} if dataset is None or isinstance(dataset, str) else dataset
    repo_id = args.hub_model_id if args.push_to_hub else None
    write_card(
        folder,
        CardFacts(
            model_id=repo_id or run_folder.public_value(str(folder)),
            on_hub=repo_id is not None,
            task=trainer.model._task,
            base_model=marked_if_folder(base_model or public_origin or type(trainer.model).__name__),
            dataset={**description, "name": run_folder.public_value(description["name"])},
            label_names=names,
            class_counts=counts.tolist(),
            **{name: trained[name] for name in ("library", "head", "loss")},
            split=split,
            **figures,
            is_adjusted=calibrated["prior_adjustment"] is not None,
            calibrated_rows=len(scored["validation"][1].labels) if "validation" in scored else 0,
            command=command,
            seeds={"seed": args.seed, "data_seed": args.data_seed},
            environment=run_folder.describe_environment(),
            shot_bounds=args.shot_bounds,
            logit_scale=calibrated["logit_scale"],
            alignment=trainer.alignment,
            collapse=_last_collapse(trainer.state.log_history),
            inherited=read_base_card(base_model or origin) if base_model or origin else {},
        ),
    )
    lines = run_folder.loading_lines(folder, trained["library"], trainer.model._task).replace("\n", "\n    ")
    trainer.print(f"\nmodel, card (README.md), {run_folder.RESULTS_FILE}: {folder}\nload it:\n\n    {lines}")


@contextmanager
def _noted(unread: dict[str, str], split: str) -> Iterator[None]:
    """Note a row that cannot be read, such as a damaged image: it costs the scores of its split, and nothing else."""
    try:
        yield
    except DataError as error:
        unread[split] = message_of(error)


def is_adjusted(model: ETFModel, choice: str, class_counts: NDArray[np.int64], *, has_validation: bool) -> bool:
    """Return whether the prior is adjusted for after training; auto: for ETF heads that allow it."""
    if choice == "auto":
        is_etf = model.etf_settings["head"]["kind"] == "etf"
        return bool(has_validation and is_etf and model.is_adjustable and (class_counts > 0).all())
    check_choice("prior_adjustment", choice, ("auto", "fit", "none"))
    if choice == "fit":
        model.require_adjustable()
        if not has_validation:
            raise ValueError(f"`prior_adjustment` (={choice!r}) is fitted on validation rows: give some.")
        if (class_counts == 0).any():
            empty = int((class_counts == 0).argmax())
            raise ValueError(
                f"`prior_adjustment` (={choice!r}) needs training rows of each class, and class {empty} has none: take 'none'."
            )
    return choice == "fit"


def _last_collapse(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last measures of neural collapse on validation rows, in feature and logit space; none unless asked for."""
    logged: Mapping[str, Any] = next((entry for entry in reversed(history) if "eval_nc1" in entry), {})
    spaces = {"eval_": "", "eval_logit_": "logit "}
    names = {f"{prefix}nc{number}": f"{space}NC{number}" for prefix, space in spaces.items() for number in range(1, 5)}
    return {shown: logged[name] for name, shown in names.items() if name in logged}
