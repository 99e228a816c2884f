"""What a run of recipes/finetune.py leaves beside the model: results, predictions, model card; and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from finetune_arguments import ModelArguments

from etf_adapt.metrics.shots import ShotAccuracy
from etf_adapt.results import run_folder, tables
from etf_adapt.results.card import CardFacts, write_card
from etf_adapt.results.card_metadata import read_base_card

if TYPE_CHECKING:
    from etf_adapt.data.load import ClassificationData
    from etf_adapt.training.evaluation import RowPredictions
    from etf_adapt.training.trainer import ETFTrainer


def leave_report(
    trainer: ETFTrainer,
    training: dict[str, float],
    scored: dict[str, tuple[dict[str, float | None], RowPredictions]],
    trained: dict[str, Any],  # settings of the head before calibration
    data: ClassificationData,
    model_args: ModelArguments,
    location: str,
    repo_id: str | None,
    argv: Sequence[str],
) -> None:
    """Write results, predictions and the model card beside the model; print the scores."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    calibrated = trainer.accelerator.unwrap_model(trainer.model).etf_settings
    num_classes = len(data.label_names)
    scores = {split: scored[split][0] for split in scored}
    run_folder.write_json(
        folder / run_folder.RESULTS_FILE, tables.flat_results(training, scores.get("validation"), scores.get("test"))
    )
    split = "test" if "test" in scored else "validation"
    table, recalls, evaluated = [], [], np.zeros(0, dtype=int)
    if split in scored:
        rows = scored[split][1]
        evaluated = np.bincount(rows.labels, minlength=num_classes)
        metric = ShotAccuracy(data.class_counts)
        metric.add_batch(predictions=rows.predictions, references=rows.labels)
        recalls = metric.class_recalls().tolist()
        table = tables.shot_table(scores[split], data.class_counts, evaluated, shot_bounds=args.shot_bounds)
        print(f"\n{split} accuracy, by the training rows of the classes:\n{tables.format_table(table)}")
    if "test" in scored:
        run_folder.write_predictions(
            folder / run_folder.PREDICTIONS_FILE,
            row_ids=rows.row_ids,
            labels=rows.labels,
            predictions=rows.predictions,
            confidences=rows.confidences,
            label_names=data.label_names,
        )
    public = run_folder.public_arguments(model_args, args)
    write_card(
        folder,
        CardFacts(
            model_id=repo_id or public["output_dir"],
            on_hub=repo_id is not None,
            task=data.task,
            library=trained["library"],
            base_model=name_base(model_args, location, public["model"]),
            dataset=data.description | {"name": run_folder.public_value(data.description["name"])},
            label_names=data.label_names,
            class_counts=data.class_counts.tolist(),
            head=trained["head"],
            loss=trained["loss"],
            split=split,
            scores=scores.get(split, {}),
            table=table,
            is_adjusted=calibrated["prior_adjustment"] is not None,
            calibrated_rows=len(scored["validation"][1].labels) if "validation" in scored else 0,
            command=run_folder.public_command(argv),
            seeds={"seed": args.seed, "data_seed": args.data_seed},
            environment=run_folder.describe_environment(),
            recalls=recalls,
            row_counts=evaluated.tolist(),
            shot_bounds=args.shot_bounds,
            logit_scale=calibrated["logit_scale"],
            alignment=trainer.alignment or {},
            collapse=last_collapse(trainer.state.log_history),
            inherited=read_base_card(location) if is_base(model_args) else {},
        ),
    )
    lines = run_folder.loading_lines(folder, trained["library"], data.task).replace("\n", "\n    ")
    print(f"\nmodel, card (README.md), {run_folder.RESULTS_FILE}: {folder}\nload it:\n\n    {lines}")


def is_base(model_args: ModelArguments) -> bool:
    """Return whether the run started from the pretrained weights of the model's name."""
    return model_args.pretrained and model_args.checkpoint_path is None


def name_base(model_args: ModelArguments, location: str, public: str) -> str:
    """Return the origin of the weights as it may be published: a Hub id, a name, or neither."""
    if not is_base(model_args):
        origin = "random weights" if model_args.checkpoint_path is None else "a file of weights"
        return f"{public} from {origin}"
    return public if Path(location).is_dir() else location


def last_collapse(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the last measures of neural collapse on validation rows, in feature and logit space; none unless asked for."""
    logged = next((entry for entry in reversed(history) if "eval_nc1" in entry), {})
    names = [f"{space}nc{number}" for space in ("", "logit_") for number in range(1, 5)]
    return {
        name.replace("nc", "NC").replace("_", " "): logged[f"eval_{name}"] for name in names if f"eval_{name}" in logged
    }
