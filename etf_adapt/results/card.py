"""The model card of a finished run: metadata for the Hub; for a reader what it is, how good it is, how to load it."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from etf_adapt.results.card_metadata import is_finite, merged_metadata, metadata, one_line, pipeline_of
from etf_adapt.results.figures import draw_class_counts, draw_recalls
from etf_adapt.results.run_folder import write_json
from etf_adapt.results.tables import percent

CARD_FILE = "README.md"
FACTS_FILE = "card.json"
COUNTS_FIGURE, RECALLS_FIGURE = "class_counts.png", "recalls.png"
CARD_FILES = (CARD_FILE, FACTS_FILE, COUNTS_FIGURE, RECALLS_FIGURE)

_WORST = 10
_SECTION = re.compile(r"^<!-- etf_adapt: (\w+) .*?-->\n.*?^<!-- /etf_adapt: \1 -->$", re.DOTALL | re.MULTILINE)
_NOTE = "renewed by etf_adapt; what stands outside of its comments is kept"

_TEMPLATE = """\
---
{{ card_data }}
---

<!-- etf_adapt: summary ({{ note }}) -->

# {{ title }}

{{ summary }}

{% for point in points %}- {{ point }}
{% endfor %}
<!-- /etf_adapt: summary -->

<!-- etf_adapt: loading ({{ note }}) -->

## How to load it

{{ reader }}

{{ usage }}

With `etf_adapt` the head, its loss and its settings come back as well, for training on:

{{ own_usage }}

<!-- /etf_adapt: loading -->

<!-- etf_adapt: results ({{ note }}) -->

## Results

{% if table %}On the {{ split }} rows, by the number of training rows that a class had:

| classes | training rows | classes | rows | accuracy (%) |
|---|---|---|---|---|
{% for row in table %}| {{ row | join(" | ") }} |
{% endfor %}
Recalls are averaged over the classes of a group; a dash marks an empty group. {{ confidence }}

{% if recalls_figure %}![Recall of each class over its training rows]({{ recalls_figure }})

{% endif %}{% if worst %}The classes that it knows worst, of those with {{ split }} rows:

| class | training rows | {{ split }} rows | recall (%) |
|---|---|---|---|
{% for row in worst %}| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}{% if collapse %}Neural collapse at the last evaluation (0 is full collapse): {{ collapse }}.
{% endif %}{% else %}It was not evaluated.
{% endif %}
<!-- /etf_adapt: results -->

<!-- etf_adapt: data ({{ note }}) -->

## Training data

{% for fact in data_facts %}- {{ fact }}
{% endfor %}
{% if counts_figure %}![Training rows of each class]({{ counts_figure }})

{% endif %}<details><summary>The {{ num_classes }} classes and their training rows</summary>

{{ classes }}

</details>

<!-- /etf_adapt: data -->

<!-- etf_adapt: making ({{ note }}) -->

## How it was made

{% for fact in facts %}- {{ fact }}
{% endfor %}
{{ command }}

<!-- /etf_adapt: making -->

<!-- etf_adapt: limits ({{ note }}) -->

## Limits

{% for limit in limits %}- {{ limit }}
{% endfor %}
<!-- /etf_adapt: limits -->
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
        table: ``etf_adapt.results.tables.shot_table`` of that split.
        is_adjusted: Whether the prior of the classes is adjusted for in the bias.
        calibrated_rows: Validation rows that the confidences were calibrated on.
        command: The command line, free of private paths.
        seeds: Seed by name.
        environment: Versions and hardware.
        recalls: Recall of each class on that split; None or NaN where it has no row. Empty where there is no split.
        row_counts: Rows of each class in that split.
        shot_bounds: Training rows (at least, at most) of a medium class.
        temperature: What the logits were multiplied by after training.
        alignment: Fields of the last ``etf_adapt.heads.alignment.AlignmentResult``.
        collapse: Measures of neural collapse by name.
        inherited: What the base model's card says of licence and languages
            (``etf_adapt.results.card_metadata.read_base_card``).
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
    table: Sequence[Sequence[Any]]
    is_adjusted: bool
    calibrated_rows: int
    command: str
    seeds: Mapping[str, Any]
    environment: Mapping[str, Any]
    recalls: Sequence[float | None] = ()
    row_counts: Sequence[int] = ()
    shot_bounds: Sequence[int] = (20, 100)
    temperature: float = 1.0
    alignment: Mapping[str, Any] = field(default_factory=dict)
    collapse: Mapping[str, Any] = field(default_factory=dict)
    inherited: Mapping[str, Any] = field(default_factory=dict)


def write_card(folder: str | os.PathLike[str], facts: CardFacts, *, there: str | None = None) -> ModelCard:
    """Write the card, its figures and its facts beside a model; of a card that is there, our sections alone are renewed.

    A card whose head is no YAML is moved to ``README.edited.md``.

    Args:
        folder: The model's folder.
        facts: What there is to tell.
        there: The card to renew, as the one that the Hub has; the one in the folder where None.

    Returns:
        The card.
    """
    bounds = {"shot_bounds": facts.shot_bounds}
    draw_class_counts(Path(folder, COUNTS_FIGURE), facts.class_counts, **bounds)
    if any(is_finite(recall) for recall in facts.recalls):
        draw_recalls(Path(folder, RECALLS_FIGURE), facts.class_counts, facts.recalls, **bounds)
    file, earlier = Path(folder, CARD_FILE), read_facts(folder)
    is_edited = there is None and file.is_file() and (earlier is None or earlier[1])
    card, text = make_card(facts), file.read_text(encoding="utf-8") if there is None and file.is_file() else there
    if text is not None:
        try:
            old = ModelCard(text, ignore_metadata_errors=True)
            card = renew_card(old, card, earlier=None if earlier is None else make_card(earlier[0]))
        except (YAMLError, ValueError) as error:
            Path(folder, "README.edited.md").write_text(text, encoding="utf-8")
            warnings.warn(
                f"The card's head is no YAML ({one_line(error)}): it was moved to README.edited.md, and a new card written.",
                stacklevel=2,
            )
    card.save(file)
    _write_facts(folder, facts, None if is_edited else _digest(file))
    return card


def read_facts(folder: str | os.PathLike[str]) -> tuple[CardFacts, bool] | None:
    """Return the facts that ``write_card`` left in a folder, as for a card under another name.

    Args:
        folder: The model's folder.

    Returns:
        The facts, and whether a person has edited the card since it was last published; None where there are no facts, or
        those of another version.
    """
    try:
        written = json.loads(Path(folder, FACTS_FILE).read_text(encoding="utf-8"))
        known = {name.name for name in dataclasses.fields(CardFacts)}
        facts = CardFacts(**{name: value for name, value in written["facts"].items() if name in known})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return facts, _digest(Path(folder, CARD_FILE)) != written.get("card_sha256")


def note_published(folder: str | os.PathLike[str]) -> None:
    """Note that the card is now on the Hub as it is here, so that edits of either are known from now on."""
    if (found := read_facts(folder)) is not None:
        _write_facts(folder, found[0], _digest(Path(folder, CARD_FILE)))


def _write_facts(folder: str | os.PathLike[str], facts: CardFacts, digest: str | None) -> None:
    write_json(Path(folder, FACTS_FILE), {"facts": dataclasses.asdict(facts), "card_sha256": digest})


def renew_card(old: ModelCard, new: ModelCard, *, earlier: ModelCard | None = None) -> ModelCard:
    """Put the sections of a new card into the places that they have in an old one, and keep all else of that.

    Args:
        old: A card that a person may have edited. A section of ours that was taken out stays out.
        new: The run's card.
        earlier: The card that the old one was before a person edited it, if that is known.

    Returns:
        The old card with our sections, and what no person changed of its metadata, renewed; the new card where the old one has
        no text.
    """
    sections = {match[1]: match[0] for match in _SECTION.finditer(new.text)}
    if not old.text.strip():
        return new
    sections["short"] = new.text.strip()  # of a model that was published without a run's card
    text = _SECTION.sub(lambda match: sections.get(match[1], match[0]), old.text)
    data = merged_metadata(old.data, new.data, {} if earlier is None else earlier.data.to_dict())
    return ModelCard(f"---\n{data}\n---\n{text}", ignore_metadata_errors=True)


def make_card(facts: CardFacts) -> ModelCard:
    """Write the model card of a run.

    Args:
        facts: What there is to tell. Values that are not finite are left out; all names are escaped.

    Returns:
        The card, without the figures that it shows; ``write_card`` writes both.
    """
    rows = [
        (name, escape_markdown(span), f"{classes:,}", f"{count:,}", percent(accuracy))
        for name, span, classes, count, accuracy in facts.table
    ]
    counts = facts.class_counts
    return ModelCard.from_template(
        metadata(facts, inherited=facts.inherited),
        template_str=_TEMPLATE,
        note=_NOTE,
        title=escape_markdown(facts.model_id.rstrip("/").split("/")[-1]),
        summary=_summary(facts),
        points=_points(facts),
        reader=_reader(facts),
        usage=_code(_usage(facts), "python"),
        own_usage=_code(_own_usage(facts), "python"),
        table=rows,
        split=facts.split,
        confidence=_confidence(facts),
        recalls_figure=RECALLS_FIGURE if any(is_finite(recall) for recall in facts.recalls) else None,
        worst=_worst(facts),
        collapse=", ".join(f"{key} {value:.3g}" for key, value in facts.collapse.items() if is_finite(value)),
        data_facts=_data_facts(facts),
        counts_figure=COUNTS_FIGURE,
        num_classes=len(facts.label_names),
        classes=", ".join(
            f"{escape_markdown(name)} {count:,}" for name, count in zip(facts.label_names, counts, strict=True)
        ),
        facts=_training_facts(facts),
        command=_code(facts.command, "sh"),
        limits=_limits(facts),
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
    line = html.escape(one_line(text), quote=False)
    within_word = r"(?<=[^\W_])_(?=[^\W_])"  # no markup there, and common in names
    return re.sub(within_word + r"|([\\`*_{}\[\]|~$])", lambda match: "\\" + match[0] if match[1] else match[0], line)


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _summary(facts: CardFacts) -> str:
    counts = facts.class_counts
    things = "images" if facts.task == "image" else "texts"
    return (
        f"Puts {things} into {len(facts.label_names)} classes: {escape_markdown(facts.base_model)}, fine-tuned on "
        f"{escape_markdown(facts.dataset['name'])}, of which a class has {min(counts):,} to {max(counts):,} training rows "
        f"(imbalance {max(counts) / max(1, min(counts)):.3g})."
    )


def _points(facts: CardFacts) -> list[str]:
    """Return what a reader wants to know first: how good it is on rare classes, and what it is not for."""
    names = {
        "balanced_accuracy": "balanced accuracy (mean recall of the classes)",
        "few": f"classes with fewer than {facts.shot_bounds[0]} training rows",
        "tail_third": "the third of the classes with the fewest",
    }
    known = [
        f"{name} **{percent(facts.scores[key])} %**" for key, name in names.items() if is_finite(facts.scores.get(key))
    ]
    told = [f"On the {facts.split} rows: {', '.join(known)}."] if known else ["It was not evaluated."]
    if facts.library == "sentence_transformers":
        told.append("Read by sentence-transformers, and by `etf_adapt`; transformers reads the encoder alone.")
    else:
        also = " and timm" if facts.library == "timm" else ""
        told.append(f"A stock checkpoint: read by transformers{also}, without further code.")
    told.append(
        "Not for inputs of other classes, which it would give one of these, nor where an error does harm unseen."
    )
    return told


def _reader(facts: CardFacts) -> str:
    if facts.library == "sentence_transformers":
        return "No other library is needed than this one."
    return "A stock checkpoint: no other library is needed than one of these."


def _confidence(facts: CardFacts) -> str:
    if not is_finite(facts.scores.get("ece")):
        return ""
    return f"Expected calibration error {percent(facts.scores['ece'])} % (15 bins of the top probability)."


def _worst(facts: CardFacts) -> list[tuple[str, str, str, str]]:
    """Return the classes of the lowest recall, of equals those with the most evaluated rows first."""
    known = [
        (recall, -facts.row_counts[index], index) for index, recall in enumerate(facts.recalls) if is_finite(recall)
    ]
    return [
        (escape_markdown(facts.label_names[index]), f"{facts.class_counts[index]:,}", f"{-rows:,}", percent(recall))
        for recall, rows, index in sorted(known)[: min(_WORST, (len(known) + 1) // 2)]
        if recall < 1
    ]


def _data_facts(facts: CardFacts) -> list[str]:
    data = facts.dataset
    known = {
        key: value for key, value in data.items() if _is_short(value) and key not in ("name", "num_classes", "task")
    }
    told = [f"{escape_markdown(data['name'])}: {_settings(known)}." if known else f"{escape_markdown(data['name'])}."]
    if isinstance(rows := data.get("rows"), Mapping):
        told.append(f"Rows: {_settings(rows)}.")
    if isinstance(tail := data.get("long_tail"), Mapping):
        told.append(f"Made long-tailed: {_settings({key: value for key, value in tail.items() if _is_short(value)})}.")
    if isinstance(hashes := data.get("row_ids_sha256"), Mapping):
        told.append(f"SHA-256 of the numbers of the rows that were chosen: {_settings(hashes)}.")
    return told


def _training_facts(facts: CardFacts) -> list[str]:
    head = facts.head
    state = "trained" if head.get("trainable") else "fixed"
    told = [f"Head: `{head.get('kind')}`, rows {state}, from: {escape_markdown(head.get('frame'))}."]
    penalties = [value for value in facts.alignment.get("penalties") or () if is_finite(value)]
    if facts.alignment.get("rows"):
        penalty = f", penalty {penalties[0]:.4g} mean eigenvalues" if penalties else ""
        told.append(f"Last alignment: on {facts.alignment['rows']:,} training rows{penalty}.")
    told.append(f"Loss: {_settings(facts.loss)}.")
    told.append(
        f"Confidences: logits times {facts.temperature:.4g}, fitted on {facts.calibrated_rows:,} validation rows."
        if facts.calibrated_rows
        else "Confidences: not calibrated."
    )
    if facts.is_adjusted:
        told.append("Prior: predictions are adjusted for how rare a class was, by offsets in the bias.")
    told.append(f"Seeds: {_settings(facts.seeds)}.")
    told.append(f"Made with: {_settings(facts.environment)}.")
    return told


def _limits(facts: CardFacts) -> list[str]:
    told = [f"It knows these {len(facts.label_names)} classes and gives one of them to any input."]
    if facts.calibrated_rows:
        told.append("Its confidences hold for inputs like the validation rows alone.")
    small = sum(1 for count in facts.row_counts if 0 < count < 10)
    if small:
        told.append(f"{small:,} classes were scored on fewer than 10 {facts.split} rows each: their recalls are rough.")
    unseen = sum(1 for count in facts.row_counts if count == 0)
    if unseen:
        told.append(f"{unseen:,} classes have no {facts.split} rows: nothing is known of how good it is on them.")
    rare = sum(1 for count in facts.class_counts if count < facts.shot_bounds[0])
    if rare:
        told.append(
            f"{rare:,} classes were learned from fewer than {facts.shot_bounds[0]} rows: look at theirs before use."
        )
    told.append("What the base model and the data hold of bias is in it too; nobody has looked for it here.")
    return told


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{escape_markdown(key)} {escape_markdown(value)}" for key, value in values.items() if value is not None
    )


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
        f'classify = pipeline("{pipeline_of(facts.task)}", model={model})',
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


def _code(text: str, language: str) -> str:
    """Fence a block of code with more backticks than any that stand in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    text = re.sub(r"^(?=<!-- /?etf_adapt)", " ", text, flags=re.MULTILINE)  # no end of a section
    return f"{fence}{language}\n{text}\n{fence}"


def _is_short(value: Any) -> bool:
    return isinstance(value, str) or is_finite(value)
