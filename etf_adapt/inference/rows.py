"""The splits of a data set as a model reads them: transformed images or tokens, the collator, and the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from torch.utils.data import default_collate

from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.data.load import ClassificationData
from etf_adapt.data.text import TextCollator, tokenize
from etf_adapt.data.transforms import image_transforms
from etf_adapt.models.folders import load_processor
from etf_adapt.models.image_size import set_image_size
from etf_adapt.models.positions import token_limit


@dataclass(frozen=True)
class ModelRows:
    """Rows for ``ETFTrainer``; a split that the data set lacks is None."""

    train: Any
    alignment: Any  # the training rows with the transforms of evaluation
    validation: Any
    test: Any
    collator: Any
    processor: Any  # tokenizer or image processor


def prepare_rows(
    model: Any,
    location: str,
    data: ClassificationData,
    *,
    image_size: int | None = None,
    augment: bool = True,
    max_length: int | None = None,
    seed: int = 0,
) -> ModelRows:
    """Prepare the splits of a data set for a model that was loaded from ``location``; training images are augmented."""
    processor = load_processor(location, data.task) if model.processor is None else model.processor
    splits = {"train": data.train, "alignment": data.train, "validation": data.validation, "test": data.test}
    if data.task == "image":
        if image_size is not None:
            set_image_size(model, processor, image_size)
        plain = image_transforms(processor, train=False, image_size=image_size)
        augmented = image_transforms(
            processor, train=True, image_size=image_size, augment=augment, allow_flip=data.allow_flip
        )
        # Decoded images are kept where they are read each epoch and never augmented.
        images = {
            name: None
            if split is None
            else ImageDataset(
                split,
                augmented if name == "train" else plain,
                seed=seed,
                keep=name in ("alignment", "validation"),
            )
            for name, split in splits.items()
        }
        return ModelRows(**images, collator=default_collate, processor=processor)
    length = token_limit(model, processor, max_length)
    with PartialState().main_process_first():  # the others read what it leaves in the cache
        tokens = {name: None if split is None else tokenize(split, processor, length) for name, split in splits.items()}
    return ModelRows(**tokens, collator=TextCollator(processor), processor=processor)
