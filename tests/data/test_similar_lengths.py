"""Draws of similar lengths change the order of a draw and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from etf_adapt.data.image_dataset import RowDraws
from etf_adapt.data.sampler import ClassBalancedSampler
from etf_adapt.data.text import EvenLengths, SimilarLengths, lengths_of

LABELS = np.repeat(np.arange(4), (600, 300, 80, 20))
LENGTHS = np.random.default_rng(0).integers(3, 60, len(LABELS))
BATCH = 16


def draw(epoch, *, lengths=LENGTHS, batch_size=BATCH, seed=0):
    sampler = ClassBalancedSampler(LABELS, power=1.0, batch_size=batch_size, seed=seed)
    grouped = SimilarLengths(sampler, lengths, batch_size=batch_size, seed=seed)
    grouped.set_epoch(epoch)
    return list(grouped), sampler


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_rows_of_an_epoch_stay_the_same(epoch):
    rows, sampler = draw(epoch)
    assert sorted(rows) == sorted(sampler.rows(epoch).tolist())
    assert rows != sampler.rows(epoch).tolist()
    assert len(rows) == len(sampler)


def test_batches_pad_little_and_come_in_no_order_of_length():
    rows, sampler = draw(0)
    longest = LENGTHS[rows].reshape(-1, BATCH).max(axis=1)
    plain = LENGTHS[sampler.rows(0)].reshape(-1, BATCH).max(axis=1)
    used = LENGTHS[rows].sum()
    assert used / (longest.sum() * BATCH) > 0.9 > 0.7 > used / (plain.sum() * BATCH)
    assert (np.diff(longest) < 0).any() and (np.diff(longest) > 0).any()


def test_the_order_is_of_seed_and_epoch_alone():
    assert draw(2)[0] == draw(2)[0]
    assert len({tuple(draw(epoch, seed=seed)[0]) for epoch in (0, 1) for seed in (0, 1)}) == 4


def test_equal_lengths_leave_a_mixture_of_classes():
    rows, _ = draw(0, lengths=np.ones(len(LABELS), int))
    classes = LABELS[rows].reshape(-1, BATCH)
    assert min(len(set(batch)) for batch in classes.tolist()) >= 3


@pytest.mark.parametrize("rows", [1000, 17, 16, 3])
def test_a_pass_in_even_lengths_holds_each_row_once_and_pads_little(rows):
    order = list(EvenLengths(LENGTHS[:rows], batch_size=BATCH))
    assert sorted(order) == list(range(rows)) and len(EvenLengths(LENGTHS[:rows], batch_size=BATCH)) == rows
    assert order == list(EvenLengths(LENGTHS[:rows], batch_size=BATCH))
    batches = [LENGTHS[order[start : start + BATCH]] for start in range(0, rows, BATCH)]
    if rows == 1000:
        assert LENGTHS.sum() / sum(len(batch) * batch.max() for batch in batches) > 0.95
        longest = [batch.max() for batch in batches]
        assert (np.diff(longest) < 0).any() and (np.diff(longest) > 0).any()
    spread = max(np.ptp(batch) for batch in batches[:-1]) if len(batches) > 1 else 0
    assert spread <= np.ptp(LENGTHS[:rows]) / max(1, len(batches) - 1) * 3


def test_draws_carry_their_epoch_through():
    sampler = SimilarLengths(ClassBalancedSampler(LABELS, batch_size=BATCH), LENGTHS, batch_size=BATCH)
    rows = RowDraws(sampler)
    rows.set_epoch(4)
    assert [int(row) for row in rows] == draw(4)[0]


def test_labels_and_lengths_are_read_from_the_columns():
    features = Features({"label": ClassLabel(names=["a", "b"]), "length": Value("int32")})
    rows = Dataset.from_dict({"label": [1, 0, 1], "length": [4, 2, 9]}, features=features)

    class Wrapped:
        dataset = rows

    assert lengths_of(rows, "length").tolist() == [4, 2, 9]
    assert lengths_of(rows, "absent") is None and lengths_of(Wrapped(), "length") is None
