"""Train with transformers' own Trainer: two lines differ from a usual script, and the head is aligned once more at the end.

    python examples/use_hf_trainer.py

    - model = AutoModelForImageClassification.from_pretrained(folder, num_labels=10, ignore_mismatched_sizes=True)
    + model = ETFForImageClassification.from_pretrained(folder, num_labels=10)
    + align_head(model, trainer.get_eval_dataloader(train))

The result is a stock checkpoint: it is loaded below without etf_adapt. Needs no network, and takes seconds.
"""

import tempfile

import numpy as np
from transformers import AutoModelForImageClassification, EvalPrediction, Trainer, TrainingArguments

from etf_adapt import ETFForImageClassification, align_head, image_transforms, load_data

data = load_data("digits", imbalance_factor=20)
# A pretrained image model inside the package; any Hub id would do.
model = ETFForImageClassification.from_pretrained("micro", id2label=data.id2label)
to_tensor = image_transforms(model.config.pretrained_cfg, train=False)


def transform(rows: dict) -> dict:
    return {"pixel_values": [to_tensor(image) for image in rows["image"]], "labels": rows["label"]}


def balanced_accuracy(outputs: EvalPrediction) -> dict[str, float]:
    right = outputs.predictions.argmax(axis=1) == outputs.label_ids
    return {"balanced_accuracy": float(np.mean([right[outputs.label_ids == label].mean() for label in range(10)]))}


train, test = data.train.with_transform(transform), data.test.with_transform(transform)

with tempfile.TemporaryDirectory() as output_dir:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir,
            num_train_epochs=4,
            per_device_train_batch_size=32,
            learning_rate=5e-4,
            remove_unused_columns=False,  # the transform needs the column of images
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=balanced_accuracy,
    )
    alignment = align_head(model, trainer.get_eval_dataloader(train), class_counts=data.class_counts)
    before = trainer.evaluate()["eval_balanced_accuracy"]
    trainer.train()
    align_head(model, trainer.get_eval_dataloader(train), class_counts=data.class_counts)  # ETFTrainer: every ten steps
    after = trainer.evaluate()["eval_balanced_accuracy"]
    print(f"aligned on {alignment.rows} rows; balanced accuracy {before:.3f}, and {after:.3f} after training")
    assert after > before, "training made it worse"

    trainer.save_model(f"{output_dir}/result")
    stock = AutoModelForImageClassification.from_pretrained(f"{output_dir}/result")  # knows nothing of etf_adapt
    pixels = test[0]["pixel_values"][None]
    print(type(stock).__name__, "predicts", stock.config.id2label[stock(pixel_values=pixels).logits.argmax().item()])
