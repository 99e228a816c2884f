"""The YAML metadata of a model card, with the licence and languages of the base model's card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import validate_repo_id

# Score: the Hub's id of the metric, and its title.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("accuracy", "Balanced accuracy (mean recall of the classes)"),
    "macro_f1": ("f1", "Macro F1"),
    "many": ("accuracy", "Accuracy, classes with many training examples"),
    "medium": ("accuracy", "Accuracy, classes with a medium number of training examples"),
    "few": ("accuracy", "Accuracy, classes with few training examples"),
    "head_third": ("accuracy", "Accuracy, the third of the classes with the most training examples"),
    "middle_third": ("accuracy", "Accuracy, the middle third of the classes by training examples"),
    "tail_third": ("accuracy", "Accuracy, the third of the classes with the fewest training examples"),
    "ece": ("expected_calibration_error", "Expected calibration error (15 bins of the top probability)"),
}

INHERITED = ("license", "license_name", "license_link")  # a fine-tuned model is bound by its base model's licence


def metadata(facts: Any) -> ModelCardData:
    """Return the metadata of a run's card (``facts`` is a ``CardFacts``); scores that are not finite are left out."""
    # In `model-index`: the Hub's newer `.eval_results` are for benchmarks whose data set names their tasks, which a
    # long-tailed subset of one's own is not.
    name = one_line(facts.dataset["name"])
    is_hub_data = facts.dataset.get("kind") == "Hub"
    repository, _, config = name.partition(":") if is_hub_data else (name, "", "")
    results = [
        EvalResult(
            task_type=pipeline_of(facts.task),
            dataset_type=repository if is_hub_data else "local",
            dataset_name=name,
            dataset_config=config or None,
            dataset_split=facts.split,
            dataset_revision=facts.dataset.get("revision") if is_hub_data else None,
            metric_type=metric,
            metric_name=title,
            metric_value=round(float(facts.scores[score]), 6),
        )
        for score, (metric, title) in _METRICS.items()
        if is_finite(facts.scores.get(score))
    ]
    is_hub_model = is_hub_id(facts.base_model)
    kept = {key: value for key, value in facts.inherited.items() if key != "language" or facts.task == "text"}
    return ModelCardData(
        model_name=one_line(facts.model_id).rstrip("/").split("/")[-1],
        base_model=facts.base_model if is_hub_model else None,
        base_model_relation="finetune" if is_hub_model else None,
        library_name=facts.library.replace("_", "-"),
        # transformers' pipeline does not load the head of a sentence-transformers folder
        pipeline_tag=None if facts.library == "sentence_transformers" else pipeline_of(facts.task),
        datasets=[repository] if is_hub_data else None,
        tags=["etf_adapt", "long-tail", "neural-collapse"],
        eval_results=results or None,
        **kept,
    )


def read_base_card(location: str | Path) -> dict[str, Any]:
    """Return licence and languages from the card of a base model (folder or Hub id), as far as it names them."""
    try:
        file = Path(location, "README.md")
        if not Path(location).is_dir():
            file = Path(hf_hub_download(str(location), "README.md", etag_timeout=5))
        found = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, invalid YAML, or no network
        return {}
    return {key: found[key] for key in (*INHERITED, "language") if found.get(key)}


def marked_if_folder(name: str) -> str:
    """Return a name, that of a folder so that it is no Hub id elsewhere: a card may be written anew where no such folder is."""
    return f"./{name}" if "/" in name and name[0] not in "./" and Path(name).exists() else name


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id and is no local path."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return "/" in name and not Path(name).exists()


def pipeline_of(task: str) -> str:
    """Return the name of transformers' pipeline for ``"image"`` or ``"text"``."""
    return "image-classification" if task == "image" else "text-classification"


def one_line(text: object) -> str:
    """Return a value's ``str`` with white space joined."""
    return " ".join(str(text).split())


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that is finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)
