"""Scikit-learn's handwritten digits as a data set of images: real, small, and installed with the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from etf_adapt.data.splits import take_per_class
from etf_adapt.sources.opening import Source, open_source

DIGITS_IMBALANCE = 20.0  # 120 rows of the first class, 6 of the last, one of which goes to validation


def open_data_set(dataset: str, **options: Any) -> Source:
    """Open a data set by name: the embedded digits, or by ``open_source`` with its options."""
    if dataset == "digits":
        return Source("embedded", make_digits(), imbalance_factor=DIGITS_IMBALANCE, allow_flip=False)
    return open_source(dataset, **options)


def make_digits() -> dict[str, Dataset]:
    """Make 1,797 scanned digits, 8 x 8 pixels, a data set of RGB images: "train" (1,198 rows) and "test" (599), stratified."""
    # Alpaydin, Kaynak (1998). Optical Recognition of Handwritten Digits. https://archive.ics.uci.edu/dataset/80
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0 .. 16 in the source
    images = [PILImage.fromarray(image).convert("RGB") for image in pixels]
    names = [str(name) for name in digits.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    # The test rows belong to the definition of the data set: the same for every seed of a run.
    test = take_per_class(digits.target, np.rint(np.bincount(digits.target) / 3).astype(np.int64), seed=0)
    rows = {"train": np.delete(np.arange(len(images)), test), "test": test}
    return {
        split: Dataset.from_dict({"image": [images[id] for id in ids], "label": digits.target[ids]}, features=features)
        for split, ids in rows.items()
    }
