"""Laws of batches: the same parts in whatever form they come, and one message for what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import Subset, TensorDataset

from etf_adapt.data.batches import as_batches, read_counts, split_batch
from etf_adapt.errors import DataError

IMAGES, LABELS = torch.randn(5, 2), torch.tensor([2, 0, 0, 1, 2])


@pytest.mark.parametrize(
    "batch",
    [
        {"x": IMAGES, "labels": LABELS},
        {"x": IMAGES, "label": LABELS.tolist()},
        {"x": IMAGES, "labels": LABELS.numpy(), "row_id": [4, 3, 2, 1, 0]},
        (IMAGES, LABELS),
        [{"x": IMAGES}, LABELS],
    ],
)
def test_a_batch_is_split_whatever_its_form(batch):
    inputs, labels, row_ids = split_batch(batch)
    assert (inputs["x"] if isinstance(inputs, dict) else inputs) is IMAGES and torch.equal(labels, LABELS)
    assert (row_ids is not None) == (isinstance(batch, dict) and "row_id" in batch)


@pytest.mark.parametrize(
    "batch", [{"x": IMAGES}, (IMAGES, LABELS, LABELS), IMAGES, {"x": IMAGES[0], "labels": 2}, (IMAGES, torch.eye(5))]
)
def test_what_is_no_batch_is_told(batch):
    with pytest.raises(DataError, match="must be a mapping with `labels`, or a pair"):
        split_batch(batch)


def test_rows_become_batches_of_the_models_inputs():
    rows = Dataset.from_dict({"x": IMAGES.tolist(), "text": list("abcde"), "label": LABELS.tolist()})
    (batch,) = as_batches(rows, ["x"])
    assert batch.keys() == {"x", "label"}
    torch.testing.assert_close(batch["x"], IMAGES)
    ((inputs, labels),) = as_batches(TensorDataset(IMAGES, LABELS), ["x"])
    assert torch.equal(inputs, IMAGES) and torch.equal(labels, LABELS)
    batches = [{"x": IMAGES, "labels": LABELS}]
    assert as_batches(batches, ["x"]) is batches
    assert [*as_batches([1, 2, 3], ["x"], sum)] == [6]


def test_rows_that_torch_cannot_put_together_ask_for_a_collator():
    with pytest.raises(DataError, match=r"give a `collator`"):
        next(iter(as_batches(Dataset.from_dict({"x": [[1, 2], [3]], "label": [0, 1]}), ["x"])))
    with pytest.raises(DataError, match=r"\['text', 'label'\], none of them an input of the model \(x\)"):
        next(iter(as_batches(Dataset.from_dict({"text": ["a"], "label": [0]}), ["x"])))


class Pictures(torch.utils.data.Dataset):
    targets = LABELS.tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        raise AssertionError("no row is read")


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ([7, 5, 3], [7, 5, 3]),
        (np.array([7, 5, 3]), [7, 5, 3]),
        (LABELS, [2, 1, 2]),
        (LABELS.tolist(), [2, 1, 2]),
        (Dataset.from_dict({"label": LABELS.tolist()})["label"], [2, 1, 2]),
        (Dataset.from_dict({"labels": LABELS.tolist()}), [2, 1, 2]),
        (Pictures(), [2, 1, 2]),
        (Subset(Pictures(), [0, 3]), [0, 1, 1]),
    ],
)
def test_counts_are_taken_as_they_are_or_counted(given, counts):
    assert read_counts(given, 3).tolist() == counts


def test_counts_of_other_classes_are_told():
    with pytest.raises(ValueError, match=r"`class_counts` \(=7 at row 0\) must lie in 0..2"):
        read_counts([7, 5, 3, 1], 3)
