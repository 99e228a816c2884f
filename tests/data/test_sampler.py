"""Laws of the class-balanced sampler."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader

from etf_adapt.data.sampler import ClassBalancedSampler, _points_below

COUNTS = np.array([61, 23, 9, 5, 2, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
POWERS = (0.0, 0.3, 0.5, 1.0)


def targets(sampler, power):
    weights = COUNTS ** (1.0 - power)
    return len(sampler) * weights / weights.sum()


@pytest.mark.parametrize("power", POWERS)
def test_each_epoch_draws_a_class_its_share_rounded_down_or_up(power):
    sampler = ClassBalancedSampler(LABELS, power=power, batch_size=8)
    for epoch in range(50):
        quotas = sampler.quotas(epoch)
        assert np.bincount(LABELS[sampler.rows(epoch)], minlength=len(COUNTS)).tolist() == quotas.tolist()
        assert quotas.sum() == len(sampler)
        assert (np.abs(quotas - targets(sampler, power)) < 1).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("power", POWERS)
def test_shares_are_right_in_the_long_run(power, seed):
    sampler = ClassBalancedSampler(LABELS, power=power, batch_size=8, seed=seed)
    drawn = np.zeros(len(COUNTS))
    for epoch in range(300):
        drawn += sampler.quotas(epoch)
        excess = np.abs(drawn - (epoch + 1) * targets(sampler, power))
        assert excess.max() < 1 + np.log2(epoch + 2) / 2


def test_closed_form_of_the_rotation_equals_its_definition():
    def van_der_corput(epoch):
        return sum((Fraction(int(bit), 2 ** (i + 1)) for i, bit in enumerate(f"{epoch:b}"[::-1])), Fraction(0))

    unit = 2**40
    edges = np.array([0, 1, unit // 3, unit // 2, unit - 1, unit, 7 * unit // 5, 9 * unit], dtype=np.int64)
    for epochs in (0, 1, 2, 3, 7, 8, 21, 64):
        offsets = [van_der_corput(epoch) for epoch in range(epochs)]
        slow = [sum(max(0, -((u - Fraction(int(edge), unit)) // 1)) for u in offsets) for edge in edges]
        assert _points_below(edges, epochs).tolist() == slow


@pytest.mark.parametrize("power", POWERS)
def test_no_row_repeats_before_all_of_its_class_were_seen(power):
    sampler = ClassBalancedSampler(LABELS, power=power, batch_size=8, seed=2)
    seen = np.zeros(len(LABELS), dtype=int)
    for epoch in range(40):
        in_epoch = np.bincount(sampler.rows(epoch), minlength=len(LABELS))
        seen += in_epoch
        for label in range(len(COUNTS)):
            own = np.flatnonzero(np.equal(LABELS, label))
            assert np.ptp(in_epoch[own]) <= 1
            assert np.ptp(seen[own]) <= 1


@pytest.mark.parametrize("batch_size", [1, 8, 101])
def test_natural_sampling_draws_every_row(batch_size):
    sampler = ClassBalancedSampler(LABELS, power=0, batch_size=batch_size)
    for epoch in range(12):
        times = np.bincount(sampler.rows(epoch), minlength=len(LABELS))
        assert times.min() == 1 and times.sum() - len(LABELS) < batch_size


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_together_what_one_sees(processes, accumulation):
    """Process i of n takes batches i, i + n, ...: at each step their union is the batch of one process, in order."""
    size = 5
    sampler = ClassBalancedSampler(LABELS, batch_size=size * processes * accumulation, seed=4)
    alone = BatchSampler(sampler, size * processes, drop_last=False)
    shared = BatchSampler(sampler, size, drop_last=False)
    shards = [BatchSamplerShard(shared, processes, i) for i in range(processes)]
    for epoch in (0, 1, 5):
        shared.sampler.set_epoch(epoch)
        steps = [[row for part in parts for row in part] for parts in zip(*shards, strict=True)]
        assert steps == list(alone)
        assert len(steps) % accumulation == 0 and all(len(step) == size * processes for step in steps)


def test_an_epoch_is_computed_without_those_before():
    walked, resumed = (ClassBalancedSampler(LABELS, power=0.5, batch_size=8, seed=1) for _ in range(2))
    epochs = []
    for epoch in range(8):
        walked.set_epoch(epoch)
        epochs.append(list(walked))
    resumed.set_epoch(7)
    assert list(resumed) == epochs[7] == list(resumed)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_the_draw_is_a_function_of_seed_and_epoch():
    sampler = ClassBalancedSampler(LABELS, batch_size=8, seed=5)
    first = list(sampler)
    torch.manual_seed(1)
    np.random.seed(1)
    torch.rand(3)
    assert list(sampler) == first
    assert list(ClassBalancedSampler(LABELS.tolist(), batch_size=8, seed=5)) == first
    assert list(ClassBalancedSampler(torch.tensor(LABELS), batch_size=8, seed=5)) == first
    assert list(ClassBalancedSampler(Dataset.from_dict({"y": LABELS}), label_column="y", batch_size=8, seed=5)) == first
    assert list(ClassBalancedSampler(LABELS, batch_size=8, seed=6)) != first


def test_the_draw_stays_the_same_over_versions():
    """A changed draw changes every published figure: change these numbers only together with those."""
    sampler = ClassBalancedSampler([0] * 5 + [1] * 3, batch_size=4)
    assert [sampler.rows(epoch).tolist() for epoch in range(2)] == [
        [1, 7, 5, 5, 4, 0, 2, 6],
        [6, 4, 3, 5, 7, 2, 7, 1],
    ]


def test_length_is_in_whole_global_batches():
    for rows, size, expected in [(None, 8, 104), (None, 101, 101), (None, 1000, 1000), (7, 4, 8), (500, 8, 504)]:
        sampler = ClassBalancedSampler(LABELS, batch_size=size, num_samples=rows)
        assert len(sampler) == expected == len(list(sampler))


def test_rows_are_mixed_within_the_epoch():
    sampler = ClassBalancedSampler([0] * 500 + [1] * 500, batch_size=1000)
    shares = (np.array(list(sampler)).reshape(10, 100) < 500).mean(axis=1)
    assert np.abs(shares - 0.5).max() < 0.2


def test_classes_without_rows_are_left_out():
    sampler = ClassBalancedSampler([0, 3, 3, 3], batch_size=4)
    assert sampler.quotas(0).tolist() == [2, 0, 0, 2]
    assert list(ClassBalancedSampler([2, 2], batch_size=2)).count(0) == 1


def test_it_drives_a_data_loader():
    sampler = ClassBalancedSampler(LABELS, batch_size=8)
    batches = list(DataLoader(torch.tensor(LABELS), batch_size=8, sampler=sampler))
    assert torch.cat(batches).tolist() == LABELS[list(sampler)].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -0.1}, r"`power` \(=-0.1\) must lie in 0\.\.1"),
        ({"power": float("nan")}, r"`power` \(=nan\)"),
        ({"power": "balanced"}, r"`power` \(='balanced'\)"),
        ({"batch_size": 0}, r"`batch_size` \(=0\)"),
        ({"batch_size": 4.0}, r"`batch_size` \(=4.0\)"),
        ({"num_samples": 0}, r"`num_samples` \(=0\)"),
        ({"seed": -1}, r"`seed` \(=-1\)"),
        ({"labels": np.array([], dtype=int)}, r"holds no rows"),
        ({"labels": [0, -1]}, r"`labels` \(=-1 at row 1\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClassBalancedSampler(**{"labels": [0, 1], "batch_size": 2} | options)


def test_a_negative_epoch_is_refused():
    sampler = ClassBalancedSampler([0, 1], batch_size=2)
    for call in (sampler.set_epoch, sampler.quotas, sampler.rows):
        with pytest.raises(ValueError, match=r"`epoch` \(=-1\)"):
            call(-1)
