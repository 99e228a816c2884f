"""The model card of a finished run: what the model is, how good it is, how to load it, how it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from etf_adapt.results import run_folder
from etf_adapt.results.card_metadata import is_finite, metadata, one_line, pipeline_of
from etf_adapt.results.claim import read_object
from etf_adapt.results.figures import draw_class_counts, draw_recalls
from etf_adapt.results.tables import percent

logger = logging.getLogger(__name__)

CARD_FILES = (run_folder.CARD_FILE, run_folder.FACTS_FILE, run_folder.COUNTS_FIGURE, run_folder.RECALLS_FIGURE)

_NUM_WORST = 10
_STATISTICS_NOTE = (
    f"`{run_folder.STATISTICS_FILE}` holds the sum of each class's features in the training examples, by which "
    "`etf_adapt.extend` adds examples and classes: of a class of few examples it tells nearly as much as these themselves.\n\n"
)
_DIGEST = "<!-- Written by etf_adapt, which does not overwrite it once it is edited. SHA-256 of the above: {} -->\n"


@dataclass(frozen=True)
class CardFacts:
    """What a card shows; class names, data set names and paths may contain anything."""

    model_id: str  # Hub id or folder name that loads the model
    on_hub: bool  # whether ``model_id`` is a Hub id
    task: str  # "image" or "text"
    library: str  # layout of the folder: "transformers", "timm" or "sentence_transformers"
    base_model: str  # Hub id or another name
    dataset: Mapping[str, Any]  # its ``name`` and what else the data loader reports
    label_names: Sequence[str]
    class_counts: Sequence[int]  # training rows of each class
    head: Mapping[str, Any]  # settings: ``kind``, ``frame``, ``trainable``
    loss: Mapping[str, Any]  # settings, with its ``name``
    split: str  # of the scores: "test" or "validation"
    scores: Mapping[str, Any]  # on that split, without prefix
    table: Sequence[Sequence[Any]]  # ``etf_adapt.results.tables.shot_table`` of that split
    is_adjusted: bool  # whether the bias adjusts for the class frequencies
    calibrated_rows: int  # validation rows that calibrated the confidences
    command: str  # without private paths; empty where there is none
    seeds: Mapping[str, Any]  # by name
    environment: Mapping[str, Any]  # versions and hardware
    # Of each class on the split; None or NaN where it has no row; empty without a split.
    recalls: Sequence[float | None] = ()
    row_counts: Sequence[int] = ()  # rows of each class in the split
    shot_bounds: Sequence[int] = (20, 100)  # training rows (at least, at most) of a medium class
    logit_scale: float = 1.0  # factor of the logits from calibration
    alignment: Mapping[str, Any] = field(default_factory=dict)  # fields of the last ``AlignmentResult``
    collapse: Mapping[str, Any] = field(default_factory=dict)  # measures of neural collapse by name
    inherited: Mapping[str, Any] = field(default_factory=dict)  # ``card_metadata.read_base_card``


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> Path:
    """Write card, figures and facts beside a model; return the card's file, ``README.new.md`` beside one that was edited."""
    bounds = {"shot_bounds": facts.shot_bounds}
    draw_class_counts(Path(folder, run_folder.COUNTS_FIGURE), facts.class_counts, **bounds)
    if any(map(is_finite, facts.recalls)):
        draw_recalls(Path(folder, run_folder.RECALLS_FIGURE), facts.class_counts, facts.recalls, **bounds)
    _write_state(folder, facts=dataclasses.asdict(facts))
    file = Path(folder, run_folder.CARD_FILE)
    if is_edited(file):
        file = Path(folder, run_folder.NEW_CARD_FILE)
        logger.warning("%s was edited and stays as it is; the new card is %s.", run_folder.CARD_FILE, file.name)
    file.write_text(make_card(facts), encoding="utf-8")
    return file


def write_short_card(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    library: str,
    task: str,
    lines: Sequence[str] = (),
    inherited: Mapping[str, Any] | None = None,
) -> None:
    """Write the card of a model without a run: what loads it, and lines of what was done to it."""
    tag = None if library == "sentence_transformers" else pipeline_of(task)
    data = ModelCardData(
        library_name=library.replace("_", "-"), pipeline_tag=tag, tags=["etf_adapt"], **(inherited or {})
    )
    loaders = {"sentence_transformers": "sentence-transformers", "timm": "transformers and timm"}.get(library, library)
    factory = "ETFForImageClassification" if task == "image" else "ETFForSequenceClassification"
    text = (
        f"---\n{data}\n---\n\n# {repo_id.split('/')[-1]}\n\nLoads in {loaders}; with its head and loss by "
        f"`etf_adapt.{factory}.from_pretrained`.\n"
    )
    if lines:
        text += "\n## How it was made\n\n" + "".join(f"- {escape_markdown(line)}\n" for line in lines)
    Path(folder, run_folder.CARD_FILE).write_text(with_digest(text), encoding="utf-8")


def read_facts(folder: str | os.PathLike[str]) -> CardFacts | None:
    """Return the facts that ``write_card`` left in a folder; None where there are none."""
    try:
        return CardFacts(**_read_state(folder)["facts"])
    except (TypeError, KeyError):
        return None


def note_published(folder: str | os.PathLike[str]) -> None:
    """Record that the card went to the Hub as it is now, so that a later edit there is recognised."""
    if read_facts(folder) is not None:
        _write_state(folder, published_sha256=_digest(Path(folder, run_folder.CARD_FILE).read_text(encoding="utf-8")))


def note_statistics(folder: str | os.PathLike[str], *, are_published: bool) -> None:
    """Let a card that no person edited say whether the statistics of the head's rows go out with the model."""
    file = Path(folder, run_folder.CARD_FILE)
    if file.is_file() and not is_edited(file):
        body = file.read_text(encoding="utf-8").rstrip().rpartition("\n")[0] + "\n"
        body = body.replace(_STATISTICS_NOTE, "") + (_STATISTICS_NOTE if are_published else "")
        file.write_text(with_digest(body), encoding="utf-8")


def is_edited_on_hub(folder: str | os.PathLike[str], card: Path) -> bool:
    """Return whether a repository's card was edited there: neither written by us nor published from this folder."""
    own, text = Path(folder, run_folder.CARD_FILE), card.read_text(encoding="utf-8")
    is_same = own.is_file() and own.read_text(encoding="utf-8") == text
    return is_edited(card) and not is_same and _digest(text) != _read_state(folder).get("published_sha256")


def is_edited(card: Path) -> bool:
    """Return whether a file is a card that a person has written or changed."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    body = text.rstrip().rpartition("\n")[0] + "\n"
    return text.rstrip() != with_digest(body).rstrip()


def with_digest(text: str) -> str:
    """Add to a card the line that tells an edited card from an unedited one, wherever the file is."""
    return (body := text.rstrip() + "\n\n") + _DIGEST.format(_digest(body))


def make_card(facts: CardFacts) -> str:
    """Return the card of a run without its figures. Values that are not finite are left out; all names are escaped."""
    from jinja2 import Environment, StrictUndefined

    counts, data = facts.class_counts, facts.dataset
    parts = {
        "Rows": data.get("rows"),
        "Made long-tailed": data.get("long_tail"),
        "SHA-256 of the numbers of the chosen rows": data.get("row_ids_sha256"),
    }
    scores = {
        "balanced_accuracy": "balanced accuracy (mean recall of the classes)",
        "few": f"classes with fewer than {facts.shot_bounds[0]} training examples",
        "tail_third": "the third of the classes with the fewest training examples",
    }
    known = {title: facts.scores.get(name) for name, title in scores.items()}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)  # we escape Markdown
    environment.filters |= {"md": escape_markdown, "settings": _settings, "quoted": json.dumps}
    environment.filters |= {"count": "{:,}".format, "percent": percent}
    environment.tests["finite"] = is_finite
    text = files("etf_adapt.results").joinpath("card_template.md").read_text(encoding="utf-8")
    card = environment.from_string(text).render(
        facts=facts,
        metadata=metadata(facts),
        title=facts.model_id.rstrip("/").split("/")[-1],
        imbalance=f"{max(counts) / max(1, min(counts)):.3g}",
        headline=", ".join(f"{title} **{percent(share)} %**" for title, share in known.items() if is_finite(share)),
        pipeline=pipeline_of(facts.task),
        recalls_figure=run_folder.RECALLS_FIGURE if any(map(is_finite, facts.recalls)) else None,
        counts_figure=run_folder.COUNTS_FIGURE,
        worst=_worst_classes(facts),
        collapse=", ".join(f"{name} {value:.3g}" for name, value in facts.collapse.items() if is_finite(value)),
        dataset={key: value for key, value in _short(data).items() if key not in ("name", "num_classes", "task")},
        data_parts={title: _short(values) for title, values in parts.items() if isinstance(values, Mapping)},
        penalties=[value for value in facts.alignment.get("penalties") or () if is_finite(value)],
        num_rough=sum(0 < count < 10 for count in facts.row_counts),
        num_unseen=sum(count == 0 for count in facts.row_counts),
        num_rare=sum(count < facts.shot_bounds[0] for count in counts),
        code=_code,
    )
    return with_digest(card)


def escape_markdown(text: object) -> str:
    """Return any value as one line of plain text that neither Markdown nor HTML takes for markup."""
    line = html.escape(one_line(text), quote=False)
    within_word = r"(?<=[^\W_])_(?=[^\W_])"  # no markup there, and common in names
    return re.sub(within_word + r"|([\\`*_{}\[\]|~$])", lambda match: "\\" + match[0] if match[1] else match[0], line)


def _read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    return read_object(Path(folder, run_folder.FACTS_FILE))


def _write_state(folder: str | os.PathLike[str], **changes: Any) -> None:
    run_folder.write_json(Path(folder, run_folder.FACTS_FILE), _read_state(folder) | changes)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _worst_classes(facts: CardFacts) -> list[int]:
    """Return the classes of the lowest recall, at most half of them; of equals those with the most rows first."""
    known = [index for index, recall in enumerate(facts.recalls) if is_finite(recall)]
    worst = sorted(known, key=lambda index: (facts.recalls[index], -facts.row_counts[index], index))
    return [index for index in worst[: min(_NUM_WORST, (len(known) + 1) // 2)] if (facts.recalls[index] or 0.0) < 1]


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, str) or is_finite(value)}


def _settings(values: Mapping[str, Any]) -> str:
    known = {key: value for key, value in values.items() if value is not None}
    return ", ".join(f"{escape_markdown(key)} {escape_markdown(value)}" for key, value in known.items())


def _code(language: str, *, caller: Callable[[], str]) -> str:
    """Fence the code of a ``call`` block with more backticks than any run in it."""
    text = caller().strip()
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"
