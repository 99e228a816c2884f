r"""Time whole runs side by side: ours, transformers' Trainer as its example scripts call it, and a bare loop.

    python recipes/benchmarks/training.py --data $DATA --models $MODELS --rounds 5

Same rows (the long tail that ``load_data`` makes), model, image size, batch, epochs and evaluation of the validation rows
after each epoch; ours aligns, calibrates, scores what it saved and writes a card besides. One thread each, in turns; medians
of the rounds. ``loop`` is from the first batch, our first alignment included, to the end of the last evaluation; ``process``
is all of it, imports included. Seconds are of the CPU and of the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETS = {
    "images": ("vit_tiny_patch16_224.timm", "cifar100", {"validation_before_long_tail": True}),
    "texts": ("all-MiniLM-L6-v2", "clinc150", {}),
}
IMAGE_SIZE, BATCH, EVAL_BATCH, RATE = 64, 64, 128, 1e-4
WAYS = ("bare", "trainer", "ours")


def main() -> None:
    """Run the ways in turns and print their medians, or one of them (``--way``)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--models", required=True, help="folder of the backbones")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help="run this one alone, and print its seconds as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.way, options.sets[0], options)))
        return
    for name in options.sets:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(timed([sys.executable, *sys.argv, "--sets", name, "--way", way]))
                print(name, way, {key: round(value, 1) for key, value in found[way][-1].items()}, flush=True)
        medians = {
            way: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            for way, rounds in found.items()
        }
        print(f"\n{name}, {options.epochs} epochs: medians of {options.rounds}, and over ours\n")
        print("| way | " + " | ".join(medians["ours"]) + " |")
        print("|---" * (len(medians["ours"]) + 1) + "|")
        for way, values in medians.items():
            cells = [f"{value:,.1f} ({value / medians['ours'][key]:.2f})" for key, value in values.items()]
            print(f"| {way} | " + " | ".join(cells) + " |")


def timed(command: list[str]) -> dict[str, float]:
    """Run a command in one thread; return what it prints as JSON, with CPU and wall seconds and peak memory."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**seconds, "process CPU": cpu, "process wall": time.monotonic() - start}


def run(way: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train one way and return the seconds of its loop and the peak memory of the process."""
    model, data, cut = SETS[name]
    seconds: dict[str, float] = {}

    def clocked(loop: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.monotonic(), time.process_time()
            result = loop(*args, **kwargs)
            seconds.update({"loop CPU": time.process_time() - cpu, "loop wall": time.monotonic() - wall})
            return result

        return call

    place = {"model": str(Path(options.models, model)), "dataset": str(Path(options.data, data))}
    with tempfile.TemporaryDirectory() as folder:
        if way == "ours":
            ours(folder, place, cut, options.epochs, clocked)
        else:
            stock(folder, place, cut, options.epochs, clocked, is_bare=way == "bare")
    return {**seconds, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ours(folder: str, place: dict[str, str], cut: dict[str, Any], epochs: int, clocked: Any) -> None:
    """Run ``etf_adapt.finetune``, its checkpoints left out as those of the others are."""
    import etf_adapt

    etf_adapt.ETFTrainer.train = clocked(etf_adapt.ETFTrainer.train)  # type: ignore[method-assign]
    settings = {"imbalance_factor": 100, "num_train_epochs": epochs, "learning_rate": RATE, "torch_threads": 1, **cut}
    settings |= {"image_size": IMAGE_SIZE} if "vit" in place["model"] else {}
    settings |= {"save_strategy": "no", "load_best_model_at_end": False, "evaluate_test": False}
    etf_adapt.finetune(**place, output_dir=str(Path(folder, "run")), **settings)


def stock(folder: str, place: dict[str, str], cut: dict[str, Any], epochs: int, clocked: Any, *, is_bare: bool) -> None:
    """Train a linear head by transformers' Trainer, or by a loop of its own."""
    import torch
    from transformers import (
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from etf_adapt import load_data
    from etf_adapt.data.transforms import image_transforms
    from etf_adapt.models.folders import load_processor

    torch.set_num_threads(1)
    data = load_data(place["dataset"], imbalance_factor=100, seed=0, **cut)
    options = {"num_labels": len(data.label_names), "ignore_mismatched_sizes": True}
    collate: Any = None
    if data.task == "image":
        # The wrapper of a timm model takes the size from its configuration.
        model: Any = AutoModelForImageClassification.from_pretrained(
            place["model"], model_args={"img_size": IMAGE_SIZE}, **options
        )
        processor = load_processor(place["model"], "image")
        splits = {}
        for split, train in (("train", True), ("validation", False)):
            transform = image_transforms(processor, train=train, image_size=IMAGE_SIZE)

            def apply(rows: dict[str, Any], transform: Any = transform) -> dict[str, Any]:
                return {
                    "pixel_values": [transform(image.convert("RGB")) for image in rows["image"]],
                    "labels": rows["label"],
                }

            splits[split] = getattr(data, split).with_transform(apply)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(place["model"], **options)
        tokenizer = AutoTokenizer.from_pretrained(place["model"])
        collate = DataCollatorWithPadding(tokenizer)
        splits = {
            split: getattr(data, split)
            .map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
            .select_columns(["input_ids", "attention_mask", "label"])
            .rename_column("label", "labels")
            for split in ("train", "validation")
        }
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, learning_rate=RATE, per_device_train_batch_size=BATCH, eval_strategy="epoch",
        per_device_eval_batch_size=EVAL_BATCH, save_strategy="no", report_to="none", remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, splits["train"], splits["validation"])
    if not is_bare:
        clocked(trainer.train)()
        trainer.save_model()
        return

    def loop() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        train, validation = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
        for _ in range(epochs):
            model.train()
            for batch in train:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for batch in validation:
                    model(**batch).logits.argmax(dim=1)

    clocked(loop)()


if __name__ == "__main__":
    main()
