"""The model card of a finished run: metadata for the Hub; for a reader what it is, how good it is, how to load it."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from etf_adapt.report import percent

_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("accuracy", "Balanced accuracy (mean recall of the classes)"),
    "macro_f1": ("f1", "Macro F1"),
    "many": ("accuracy", "Accuracy, classes with many training rows"),
    "medium": ("accuracy", "Accuracy, classes with a medium number of training rows"),
    "few": ("accuracy", "Accuracy, classes with few training rows"),
}
"""Scores that stand in the metadata: the Hub's id of their metric, and their name."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

{% if table %}## Results

On the {{ split }} rows, by the number of training rows that a class had:

| classes | training rows | classes | rows | accuracy (%) |
|---|---|---|---|---|
{% for row in table %}| {{ row | join(" | ") }} |
{% endfor %}
Expected calibration error {{ ece }}. Recalls are averaged over the classes of a group; a dash marks an empty group.

{% endif %}## How to load it

A stock checkpoint: no other library is needed than one of these.

{{ usage }}

With `etf_adapt` the head, its loss and its settings come back as well, for training on:

{{ own_usage }}

## How it was made

{% for fact in facts %}- {{ fact }}
{% endfor %}
{{ command }}

<details><summary>The {{ num_classes }} classes and their training rows</summary>

{{ classes }}

</details>

## Limits

It knows these {{ num_classes }} classes and gives one of them to any input. Confidences were calibrated on {{ calibration }},
and hold for inputs like those alone. Accuracies of small groups rest on few rows.
"""


@dataclass(frozen=True)
class CardFacts:
    """Hold what a card tells; class names, data set names and paths may contain anything.

    Attributes:
        model_id: Hub id or folder name under which the model will be loaded.
        on_hub: Whether that is a Hub id.
        task: ``"image"`` or ``"text"``.
        library: ``"transformers"``, ``"timm"`` or ``"sentence_transformers"``: whose layout the folder has.
        base_model: The model that it started from: a Hub id or another name.
        dataset: Name, and what else the data loader says of the rows.
        label_names: Name of each class.
        class_counts: Training rows of each class.
        head: Settings of the head: ``kind``, ``frame``, ``trainable``.
        loss: Settings of the loss, with its ``name``.
        split: The split of the scores, ``"test"`` or ``"validation"``.
        scores: Scores on that split, without prefix.
        table: ``etf_adapt.report.shot_table`` of that split.
        is_adjusted: Whether the prior of the classes is adjusted for in the bias.
        calibrated_rows: Validation rows that the confidences were calibrated on.
        command: The command line, free of private paths.
        seeds: Seed by name.
        environment: Versions and hardware.
    """

    model_id: str
    on_hub: bool
    task: str
    library: str
    base_model: str
    dataset: Mapping[str, Any]
    label_names: Sequence[str]
    class_counts: Sequence[int]
    head: Mapping[str, Any]
    loss: Mapping[str, Any]
    split: str
    scores: Mapping[str, Any]
    table: Sequence[tuple[str, str, int, int, float | None]]
    is_adjusted: bool
    calibrated_rows: int
    command: str
    seeds: Mapping[str, Any]
    environment: Mapping[str, Any]


def make_card(facts: CardFacts) -> ModelCard:
    """Write the model card of a run.

    Args:
        facts: What there is to tell. Values that are not finite are left out; all names are escaped.

    Returns:
        The card; ``card.save(folder / "README.md")`` writes it.
    """
    rows = [
        (name, escape_markdown(span), f"{classes:,}", f"{count:,}", percent(accuracy))
        for name, span, classes, count, accuracy in facts.table
    ]
    base, data = escape_markdown(facts.base_model), escape_markdown(facts.dataset["name"])
    counts = facts.class_counts
    imbalance = f"{max(counts) / max(1, min(counts)):.3g}"
    return ModelCard.from_template(
        _metadata(facts),
        template_str=_TEMPLATE,
        title=escape_markdown(facts.model_id.rstrip("/").split("/")[-1]),
        summary=(
            f"{base}, fine-tuned on {data}: {len(facts.label_names)} classes with {min(counts):,} to {max(counts):,} "
            f"training rows each (imbalance {imbalance})."
        ),
        table=rows,
        split=facts.split,
        ece=percent(facts.scores.get("ece")) + " %",
        usage=_code(_usage(facts), "python"),
        own_usage=_code(_own_usage(facts), "python"),
        facts=_training_facts(facts),
        command=_code(facts.command, "sh"),
        num_classes=len(facts.label_names),
        classes=", ".join(
            f"{escape_markdown(name)} {count:,}" for name, count in zip(facts.label_names, counts, strict=True)
        ),
        calibration=f"{facts.calibrated_rows:,} validation rows" if facts.calibrated_rows else "no rows",
    )


def escape_markdown(text: object) -> str:
    r"""Write any value as one line of plain text that neither Markdown nor HTML takes for markup.

    Args:
        text: The value.

    Returns:
        Its ``str`` with white space joined and every character of markup escaped.

    Example:
        >>> print(escape_markdown("a|b <script> my_class\n_x_"))
        a\|b &lt;script&gt; my_class \_x\_
    """
    line = html.escape(" ".join(str(text).split()), quote=False)
    within_word = r"(?<=[^\W_])_(?=[^\W_])"  # no markup there, and common in names
    return re.sub(within_word + r"|([\\`*_{}\[\]|~$])", lambda match: "\\" + match[0] if match[1] else match[0], line)


def _metadata(facts: CardFacts) -> ModelCardData:
    pipeline = _pipeline(facts.task)
    name = " ".join(str(facts.dataset["name"]).split())
    is_hub_data = facts.dataset.get("kind") == "Hub"
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=name if is_hub_data else "local",
            dataset_name=name,
            dataset_split=facts.split,
            metric_type=metric,
            metric_name=title,
            metric_value=round(float(facts.scores[score]), 6),
        )
        for score, (metric, title) in _METRICS.items()
        if _is_finite(facts.scores.get(score))
    ]
    return ModelCardData(
        model_name=facts.model_id.rstrip("/").split("/")[-1],
        base_model=facts.base_model if _HUB_ID.fullmatch(facts.base_model) else None,
        library_name=facts.library.replace("_", "-"),
        pipeline_tag=_tag(facts),
        datasets=[name] if is_hub_data else None,
        tags=["etf_adapt", "long-tail", "neural-collapse"],
        eval_results=results or None,
    )


def _training_facts(facts: CardFacts) -> list[str]:
    head, loss = facts.head, facts.loss
    state = "trained" if head.get("trainable") else "fixed"
    told = [
        f"Head: `{head.get('kind')}`, rows {state}, from: {escape_markdown(head.get('frame'))}.",
        f"Loss: {_settings(loss)}.",
        f"Data: {_settings({key: value for key, value in facts.dataset.items() if _is_short(value)})}.",
        f"Seeds: {_settings(facts.seeds)}.",
        f"Made with: {_settings(facts.environment)}.",
    ]
    if facts.is_adjusted:
        told.insert(2, "Prior: predictions are adjusted for how rare a class was, by offsets in the bias.")
    return told


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape_markdown(key)} {escape_markdown(value)}" for key, value in values.items())


def _usage(facts: CardFacts) -> str:
    model = json.dumps(facts.model_id)
    example = '"photo.jpg"' if facts.task == "image" else '"a text"'
    if facts.library == "sentence_transformers":
        reader = ["from PIL import Image"] if facts.task == "image" else []
        row = f"Image.open({example})" if facts.task == "image" else example
        return "\n".join(
            [
                *reader,
                "from sentence_transformers import SentenceTransformer",
                "",
                f"model = SentenceTransformer({model})",
                f"logits = model.encode([{row}], convert_to_tensor=True)  # one row an input, one column a class",
                "names = model[0].auto_model.config.id2label",
                "print([names[index] for index in logits.argmax(dim=1).tolist()])",
            ]
        )
    lines = [
        "from transformers import pipeline",
        "",
        f'classify = pipeline("{_pipeline(facts.task)}", model={model})',
        f"classify({example})",
    ]
    if facts.library == "timm":
        place = "hf-hub:" if facts.on_hub else "local-dir:"
        lines += [
            "",
            "import timm",
            "",
            f"model = timm.create_model({json.dumps(place + facts.model_id)}, pretrained=True)",
        ]
    return "\n".join(lines)


def _own_usage(facts: CardFacts) -> str:
    name = "ETFForImageClassification" if facts.task == "image" else "ETFForSequenceClassification"
    return f"from etf_adapt import {name}\n\nmodel = {name}.from_pretrained({json.dumps(facts.model_id)})"


def _tag(facts: CardFacts) -> str | None:
    """Return the pipeline that the Hub may offer; none for a folder whose head transformers does not read."""
    return None if facts.library == "sentence_transformers" else _pipeline(facts.task)


def _pipeline(task: str) -> str:
    return "image-classification" if task == "image" else "text-classification"


def _code(text: str, language: str) -> str:
    """Fence a block of code with more backticks than any that stand in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and (not isinstance(value, float) or math.isfinite(value))
