"""Train with ETFTrainer, and leave what the recipe leaves: a calibrated stock checkpoint, scores, predictions and a card.

    python examples/train_and_finish.py

`finish` scores the saved folder as its users load it; `predict` gives logits, as with transformers' Trainer. Needs no network,
and takes seconds.
"""

import tempfile
from pathlib import Path

import numpy as np

from etf_adapt import (
    ETFForImageClassification,
    ETFTrainer,
    ETFTrainingArguments,
    ImageDataset,
    image_transforms,
    load_data,
)

data = load_data("digits", imbalance_factor=20)
model = ETFForImageClassification.from_pretrained("micro", id2label=data.id2label)
config = model.config.pretrained_cfg  # timm's; of a model of transformers it is model.processor
plain, augmented = (image_transforms(config, train=train, allow_flip=False) for train in (False, True))
train, validation, test = (ImageDataset(rows, plain, keep=True) for rows in (data.train, data.validation, data.test))

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
