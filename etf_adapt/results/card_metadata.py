"""What the Hub reads of a model card: its YAML head, with what the base model's own card says of its licence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import validate_repo_id

_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("accuracy", "Balanced accuracy (mean recall of the classes)"),
    "macro_f1": ("f1", "Macro F1"),
    "many": ("accuracy", "Accuracy, classes with many training rows"),
    "medium": ("accuracy", "Accuracy, classes with a medium number of training rows"),
    "few": ("accuracy", "Accuracy, classes with few training rows"),
    "head_third": ("accuracy", "Accuracy, the third of the classes with the most training rows"),
    "middle_third": ("accuracy", "Accuracy, the middle third of the classes by training rows"),
    "tail_third": ("accuracy", "Accuracy, the third of the classes with the fewest training rows"),
    "ece": ("expected_calibration_error", "Expected calibration error (15 bins of the top probability)"),
}
"""Scores that stand in the metadata: the Hub's id of their metric, and their name."""

INHERITED = ("license", "license_name", "license_link")
"""What is taken over of the base model's card: an adapted model is bound by its licence."""

_OWNED = ("base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def metadata(facts: Any, *, inherited: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata of a run's card.

    The results stand in ``model-index``. The Hub's newer ``.eval_results`` are for benchmarks whose data set names their
    tasks, which a long-tailed subset of one's own is not.

    Args:
        facts: An ``etf_adapt.results.card.CardFacts``.
        inherited: What ``read_base_card`` found.

    Returns:
        The metadata; scores that are not finite are left out.
    """
    name = one_line(facts.dataset["name"])
    is_hub_data = facts.dataset.get("kind") == "Hub"
    results = [
        EvalResult(
            task_type=pipeline_of(facts.task),
            dataset_type=name if is_hub_data else "local",
            dataset_name=name,
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
    kept = {key: value for key, value in inherited.items() if key != "language" or facts.task == "text"}
    return ModelCardData(
        model_name=one_line(facts.model_id).rstrip("/").split("/")[-1],
        base_model=facts.base_model if is_hub_model else None,
        base_model_relation="finetune" if is_hub_model else None,
        library_name=facts.library.replace("_", "-"),
        # None for a folder whose head transformers' pipeline does not read.
        pipeline_tag=None if facts.library == "sentence_transformers" else pipeline_of(facts.task),
        datasets=[name] if is_hub_data else None,
        tags=["etf_adapt", "long-tail", "neural-collapse"],
        eval_results=results or None,
        **kept,
    )


def merged_metadata(old: CardData, new: CardData, earlier: Mapping[str, Any]) -> ModelCardData:
    """Renew the metadata of a card that a person may have edited: what the run knows is new, all else stays.

    Args:
        old: Metadata of the card that is there.
        new: Metadata of the run.
        earlier: What ``old`` was before a person edited it; empty where that is not known.

    Returns:
        ``new``, with what a person changed or added in ``old``, and the tags of both. Results are those of ``new`` alone.
    """
    before, after = old.to_dict(), new.to_dict()
    ours = {"model-index", *(() if earlier else _OWNED)}
    kept = {key: value for key, value in before.items() if key not in ours and value != earlier.get(key)}
    tags = [*(before.get("tags") or []), *(after.get("tags") or [])]
    return ModelCardData(**{**after, **kept, "tags": list(dict.fromkeys(tags))}, ignore_metadata_errors=True)


def read_base_card(location: str | Path) -> dict[str, Any]:
    """Return what the base model's own card says of its licence and languages; nothing is made up where it says nothing.

    Args:
        location: Folder or Hub id. Of a Hub id the cached card is read, or fetched.

    Returns:
        Those of ``INHERITED`` and ``language`` that are there.
    """
    try:
        file = Path(location, "README.md")
        if not Path(location).is_dir():
            file = Path(hf_hub_download(str(location), "README.md", etag_timeout=5))
        found = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, one that is no YAML, or no network: then nothing is known
        return {}
    return {key: found[key] for key in (*INHERITED, "language") if found.get(key)}


def is_hub_id(name: str) -> bool:
    """Return whether a name is the id of a model on the Hub, as far as its form tells.

    Example:
        >>> is_hub_id("google/vit-base-patch16-224"), is_hub_id("./encoder"), is_hub_id("vit")
        (True, False, False)
    """
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def pipeline_of(task: str) -> str:
    """Return the name of transformers' pipeline for ``"image"`` or ``"text"``."""
    return "image-classification" if task == "image" else "text-classification"


def one_line(text: object) -> str:
    """Return a value's ``str`` with white space joined."""
    return " ".join(str(text).split())


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number that is finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)
