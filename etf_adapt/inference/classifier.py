"""A finished classifier, of this library or not, on new inputs: loading, probabilities, and scores of a labelled split."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, TimmWrapperConfig

from etf_adapt.data.digits import open_data_set
from etf_adapt.data.inputs import Batch, Input, choose_split, column_of, image_batches, text_batches
from etf_adapt.data.transforms import image_transforms
from etf_adapt.errors import DataError, check_choice, nearest_names, quoted
from etf_adapt.heads.in_model import evaluation_mode, logits_of
from etf_adapt.inference.launch import choose_num_workers
from etf_adapt.inference.predictions import RowPredictions, load_stock, predict_rows, score_both
from etf_adapt.metrics.shots import SHOT_BOUNDS, ShotAccuracy
from etf_adapt.models.etf_model import ETFModel
from etf_adapt.models.folders import load_config, load_processor
from etf_adapt.models.names import ENTRY, locate_model, resolve_model_name
from etf_adapt.models.positions import token_limit
from etf_adapt.models.timm_layout import data_config
from etf_adapt.sources.columns import encode_labels, find_columns, labels_are_hidden
from etf_adapt.sources.opening import logger


@dataclass(frozen=True)
class Classifier:
    """A model with its processor and the names of its classes; ``task`` is "image" or "text"."""

    model: nn.Module
    processor: Any
    task: str
    label_names: list[str]
    device: torch.device
    bf16: bool = False

    def batches(
        self,
        inputs: Iterable[Any],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        num_workers: int | None = None,
    ) -> Iterator[Batch]:
        """Yield the inputs as the model takes them; texts out of order within a window."""
        if self.task == "image":
            transform = image_transforms(self.processor, train=False)
            if num_workers is None:
                row_bytes = transform(Image.new("RGB", (64, 64))).nbytes
                num_workers = choose_num_workers(length_hint(inputs), row_bytes, batch_size, self.device)
            return image_batches(inputs, transform, batch_size=batch_size, num_workers=num_workers)
        limit = token_limit(self.model, self.processor, max_length)
        has_mask = "attention_mask" in inspect.signature(self.model.forward).parameters
        return text_batches(inputs, self.processor, batch_size=batch_size, max_length=limit, has_mask=has_mask)

    def mixed_precision(self) -> torch.autocast:
        """Return the context that the model runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def probabilities(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """Return the probabilities (batch, num_classes) of a batch, float32."""
        with evaluation_mode(self.model), self.mixed_precision():
            output = self.model(**send_to_device(tensors, self.device))
        found = logits_of(output).float().softmax(dim=-1).cpu().numpy()
        if not np.isfinite(found).all():
            raise ArithmeticError("The model's output is not finite: its weights are damaged, or overflow in bfloat16.")
        return found


def load_classifier(
    model: str | Path | nn.Module,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    bf16: bool = False,
    revision: str | None = None,
) -> Classifier:
    """Load a folder or Hub id by stock classes, or take a model as it is with its own or the given processor."""
    if isinstance(model, nn.Module):
        network: Any = model
        processor = getattr(model, "processor", None) if processor is None else processor
        if processor is None and isinstance(getattr(model, "config", None), TimmWrapperConfig):
            processor = data_config(network.config)
        if not hasattr(model, "config") or processor is None:
            raise ValueError(
                f"`model` (={type(model).__name__}) needs the `config` of a model of transformers, and its tokenizer or image "
                "processor as `processor`; or give the folder that it was saved to."
            )
        task = "image" if network.main_input_name == "pixel_values" else "text"
        place = next(network.parameters()).device if device is None else _usable(device)
        _require_classes(network.config, str(type(model).__name__))
    else:
        location = locate_model(resolve_model_name(str(model)), revision)
        config, _ = load_config(location, fetch=True, revision=revision)
        task = _task_of(config, location)
        _require_classes(config, location)
        place = PartialState().device if device is None else _usable(device)
        if processor is None and isinstance(config, TimmWrapperConfig):
            processor = data_config(config)
        elif processor is None:
            processor = load_processor(location, task, revision=revision)
        network = load_stock(location, task, config=config, revision=revision)
        missing = ["classifier"] if getattr(network, "lacks_layer", False) else network._new_weights
        if missing:
            raise ValueError(
                f"`model` (={location!r}) lacks weights ({quoted(missing)}) and would guess: save or train it again."
            )
    network = network.to(place)
    text_config = network.config.get_text_config()
    if task == "text" and text_config.pad_token_id is None:  # by which decoders find the last token
        text_config.pad_token_id = network.config.pad_token_id = processor.pad_token_id
    names = [str(network.config.id2label[index]) for index in range(network.config.num_labels)]
    return Classifier(network, processor, task, names, place, bf16)


def _task_of(config: PreTrainedConfig, location: str) -> str:
    architecture = " ".join(config.architectures or ())
    pooling = (getattr(config, ENTRY, None) or {}).get("pooling")
    if isinstance(config, TimmWrapperConfig) or "ForImageClassification" in architecture or pooling == "pooler_output":
        return "image"
    if "ForSequenceClassification" in architecture or pooling == "mean":
        return "text"
    raise ValueError(
        f"`model` (={location!r}) is no classifier of images or texts (its architecture is {architecture or 'not named'}): "
        "fine-tune it first."
    )


def _require_classes(config: Any, name: str) -> None:
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or config.num_labels < 2:
        kind = f"problem_type={problem}, {config.num_labels} labels"
        raise ValueError(f"`model` (={name!r}) does not choose one of several classes ({kind}): take another model.")


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # of torch, of a name or of a build without the device
        raise ValueError(f"`device` (={device!r}) cannot be used here: {str(error).splitlines()[0]}") from error


def classify(classifier: Classifier, inputs: Iterable[Any], **options: Any) -> Iterator[tuple[Input, np.ndarray | str]]:
    """Yield each input, in order, with its probabilities (num_classes,), or why it cannot be read; options of ``batches``."""
    waiting: dict[int, tuple[Input, np.ndarray | str]] = {}
    due = 0
    for batch in classifier.batches(inputs, **options):
        found = classifier.probabilities(batch.tensors) if batch.inputs else ()
        waiting |= {item.row: (item, row) for item, row in zip(batch.inputs, found, strict=True)}
        waiting |= {item.row: (item, reason) for item, reason in batch.bad}
        while due in waiting:
            yield waiting.pop(due)
            due += 1


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, and what they are of."""

    split: str
    scores: dict[str, float | None]
    rows: RowPredictions  # row_ids are those of the split
    label_names: list[str]
    class_counts: np.ndarray | None  # training rows of each class
    counted: str  # where the counts are from
    left_out: int  # rows of unknown classes
    files: list[str] | None  # of each row, of images that lie in files


def evaluate_split(
    classifier: Classifier,
    dataset: str | Dataset,
    *,
    split: str | None = None,
    unknown_classes: str = "fail",
    class_counts: Sequence[int] | None = None,
    shot_bounds: tuple[float, float] = SHOT_BOUNDS,
    revision: str | None = None,
    columns: Mapping[str, Any] | None = None,
    **options: Any,
) -> Evaluation:
    """Score a classifier on a split of a data set, whose classes are matched by name; arguments as ``etf_adapt.evaluate``."""
    if isinstance(dataset, Dataset):
        split, splits, folder = split or "test", {split or "test": dataset}, None
    else:
        source = open_data_set(dataset, revision=revision, needs_train=False)
        splits, folder = source.splits, source.folder
        if len(splits) == 1 and split in (None, "test"):  # a lone file is what to test on, and says nothing of training
            splits = {"test": next(iter(splits.values()))}
        split = choose_split(splits, split, dataset=dataset)
    rows = splits[split]
    found = find_columns(rows, **(columns or {}))
    if found.task != classifier.task:
        raise DataError(f"The model reads {classifier.task}s, and column `{found.input}` holds {found.task}s.")
    if labels_are_hidden(rows, found.label):
        raise DataError(f"The labels of split {split} are hidden (-1): take another.")
    labels = match_names(rows, found.label, classifier.label_names, split=split, unknown_classes=unknown_classes)
    kept = np.flatnonzero(labels >= 0)
    counts, counted = _training_counts(classifier, splits, found.label, class_counts)
    ShotAccuracy(counts, shot_bounds=shot_bounds)  # checks them before the rows are read
    rows = rows if len(kept) == len(labels) else rows.select(kept, keep_in_memory=True)
    inputs = column_of(rows, classifier.task, column=tuple(filter(None, (found.input, found.pair))), folder=folder)
    targets, files = torch.from_numpy(labels[kept]), [""] * len(kept)

    def labelled() -> Iterator[dict[str, Tensor]]:
        for batch in classifier.batches(inputs, **options):
            if batch.bad:
                item, reason = batch.bad[0]
                raise item.unreadable(reason)
            ids = torch.tensor([item.row for item in batch.inputs])
            for item in batch.inputs:
                files[item.row] = item.name
            if batch.inputs:
                yield batch.tensors | {"labels": targets[ids], "row_id": ids}

    offsets = _entry(classifier.model).get("prior_adjustment")
    with classifier.mixed_precision():
        predicted = predict_rows(classifier.model, labelled(), num_rows=len(kept), offsets=offsets)
    scores = score_both(predicted, counts, shot_bounds)
    predicted = replace(predicted, row_ids=kept[predicted.row_ids])
    named = files if classifier.task == "image" and any(files) else None
    return Evaluation(split, scores, predicted, classifier.label_names, counts, counted, len(labels) - len(kept), named)


def match_names(
    dataset: Dataset, column: str, label_names: Sequence[str], *, split: str, unknown_classes: str
) -> np.ndarray:
    """Return labels (rows,) by a model's names of classes, -1 for rows of unknown ones, which are an error or left out."""
    check_choice("unknown_classes", unknown_classes, ("fail", "skip"))
    own, names = encode_labels(dataset, column, split=split)
    positions = {name: index for index, name in enumerate(label_names)}
    labels = np.array([positions.get(name, -1) for name in names], dtype=np.int64)[own]
    present = {names[label] for label in np.unique(own)}
    if unknown := sorted(present - positions.keys()):
        near = nearest_names(unknown[0], label_names, limit=1)
        what = (
            f"Split {split} has {int((labels < 0).sum()):,} of {len(labels):,} rows of {len(unknown)} class(es) that the model "
            f"does not know: {quoted(unknown)}{f' (nearest: `{near[0]}`)' if near else ''}"
        )
        if unknown_classes == "fail" or (labels < 0).all():
            ways = "" if (labels < 0).all() else ", or leave these rows out by unknown_classes='skip'"
            raise DataError(f"{what}; the model's classes are {quoted(label_names)}: mend the names{ways}.")
        logger.warning("%s: they are left out.", what)
    if absent := [name for name in label_names if name not in present]:
        logger.warning("Split %s has no rows of %d class(es) of the model: %s.", split, len(absent), quoted(absent))
    return labels


def _entry(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model of ours, as it is in memory or as they were saved; of other models none."""
    return model.etf_settings if isinstance(model, ETFModel) else getattr(cast(Any, model).config, ENTRY, None) or {}


def _training_counts(
    classifier: Classifier, splits: Mapping[str, Dataset], column: str, given: Sequence[int] | None
) -> tuple[np.ndarray | None, str]:
    """Return the training rows of each class, and where that is known from."""
    if given is not None:
        if len(given) != len(classifier.label_names):
            raise ValueError(
                f"`class_counts` has {len(given)} entries, the model {len(classifier.label_names)} classes."
            )
        return np.asarray(given), "given"
    saved = _entry(classifier.model).get("class_counts")
    if saved is not None:
        return np.asarray(saved), "of the model's training"
    if "train" not in splits or column not in splits["train"].column_names:
        return None, "not known"
    own, names = encode_labels(splits["train"], column, split="train")
    rows = dict(zip(names, np.bincount(own, minlength=len(names)).tolist(), strict=True))
    return np.array([rows.get(name, 0) for name in classifier.label_names]), "of the data set's train split"
