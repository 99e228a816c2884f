"""The splits of a data set as a model reads them: transformed images or tokens, the collator, and the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from torch.utils.data import default_collate
from transformers import TimmWrapperConfig

from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.data.load import ClassificationData
from etf_adapt.data.text import DEFAULT_MAX_LENGTH, TextCollator, tokenize
from etf_adapt.data.transforms import image_transforms
from etf_adapt.models.folders import load_processor
from etf_adapt.models.image_size import set_image_size
from etf_adapt.models.names import ENTRY
from etf_adapt.models.positions import token_limit
from etf_adapt.models.timm_layout import data_config


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
    processor = model.processor
    if processor is None:
        is_timm = isinstance(model.config, TimmWrapperConfig)
        processor = data_config(model.config) if is_timm else load_processor(location, data.task)
    splits = {"train": data.train, "alignment": data.train, "validation": data.validation, "test": data.test}
    if data.task == "image":
        if image_size is not None:
            set_image_size(model, processor, image_size)
        options: dict[str, Any] = {"image_size": image_size, "augment": augment, "allow_flip": data.allow_flip}
        images: dict[str, ImageDataset | None] = {}
        for name, split in splits.items():
            transform = image_transforms(processor, train=name == "train", **options)
            keep = name != "test"  # in memory: the others are read each epoch
            twin = images["train"] if name == "alignment" else None
            rows = None if split is None else ImageDataset(split, transform, seed=seed, keep=keep, images_of=twin)
            images[name] = rows
        return ModelRows(**images, collator=default_collate, processor=processor)
    length = token_limit(model, processor, max_length)
    if max_length is None and getattr(model.config, ENTRY, None) is None:  # those of this library keep their length
        length = min(length, DEFAULT_MAX_LENGTH)
    processor.model_max_length = length  # by which all that read the finished folder cut texts, stock pipelines too
    with PartialState().main_process_first():  # the others read what it leaves in the cache
        tokens = {name: None if split is None else tokenize(split, processor, length) for name, split in splits.items()}
    return ModelRows(**tokens, collator=TextCollator(processor), processor=processor)
