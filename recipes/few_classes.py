"""Make a data set of a few classes of another, for tables of binary and few-class problems.

    python recipes/few_classes.py --dataset $DATA/clinc150 --classes 2 --seed 0 --output few/clinc150_2

Writes one parquet file a split, with the rows of the drawn classes in their order and labels numbered anew by their old order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, load_dataset


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the classes and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", required=True, help="Folder of parquet files, or Hub id, with a column `label` of class names."
    )
    parser.add_argument("--classes", type=int, required=True, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    options = parser.parse_args(argv)
    splits = load_dataset(options.dataset)
    names = splits["train"].features["label"].names
    if not 2 <= options.classes <= len(names):
        parser.error(f"--classes (={options.classes}) must be 2 to {len(names)}, the number of classes.")
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(names))[: options.classes])
    new_label = np.full(len(names), -1)
    new_label[chosen] = np.arange(options.classes)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        old = np.asarray(rows["label"])
        labels = np.where(old >= 0, new_label[old], -1)  # rows without a label are left out
        kept = rows.select(np.flatnonzero(labels >= 0)).remove_columns("label")
        kept = kept.add_column(
            "label", labels[labels >= 0], feature=ClassLabel(names=[names[label] for label in chosen])
        )
        kept.to_parquet(str(options.output / f"{split}.parquet"))
        print(f"{split}: {len(kept)} rows of {', '.join(names[label] for label in chosen)}")


if __name__ == "__main__":
    main()
