"""Train with ETFTrainer, and leave what the recipe leaves: a calibrated stock checkpoint, scores, predictions and a card.

    python examples/train_and_finish.py

`finish` scores the saved folder as its users load it; `predict` gives logits, as with transformers' Trainer. Needs no network,
and takes seconds.
"""

import tempfile
from pathlib import Path

import numpy as np

from etf_adapt import ETFForImageClassification, ETFTrainer, ETFTrainingArguments, load_data
from etf_adapt.data.image_dataset import ImageDataset
from etf_adapt.data.transforms import image_transforms
from etf_adapt.models.folders import load_processor
from etf_adapt.models.names import micro_folder

data = load_data("digits", imbalance_factor=20)
processor = load_processor(micro_folder(), "image")
plain, augmented = (image_transforms(processor, train=train, allow_flip=False) for train in (False, True))
train, validation, test = (ImageDataset(rows, plain, keep=True) for rows in (data.train, data.validation, data.test))
model = ETFForImageClassification.from_pretrained(micro_folder(), id2label=data.id2label)

with tempfile.TemporaryDirectory() as output_dir:
    trainer = ETFTrainer(
        model,
        ETFTrainingArguments(output_dir, num_train_epochs=2),
        train_dataset=ImageDataset(data.train, augmented),
        alignment_dataset=train,
        eval_dataset=validation,
    )
    trainer.train()
    results = trainer.finish(test, dataset=data.description)
    predictions = np.argmax(trainer.predict(test).predictions, axis=-1)
    assert np.mean(predictions == data.test["label"]) == results["test_accuracy"]  # of the folder, in its stock class
    print("left:", *sorted(path.name for path in Path(output_dir).glob("[!.]*") if path.is_file()))
