"""Laws of class counts and long-tailed subsets."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from torch.utils.data import ConcatDataset, Subset, random_split

from etf_adapt.data.long_tail import (
    arrow_column,
    check_labels,
    class_counts,
    even_cap,
    even_sample,
    labels_of,
    long_tailed_indices,
    make_long_tailed,
    read_labels,
)

LABELS = [2, 0, 3, 2, 0, 2, 3, 2]
COUNTS = [2, 0, 4, 2]
NAMES = ["ant", "bee", "cat", "dog"]


def dataset(labels, feature=None, **columns):
    features = Features({"label": feature or ClassLabel(names=NAMES)} | {name: f for name, (f, _) in columns.items()})
    return Dataset.from_dict({"label": labels} | {name: v for name, (_, v) in columns.items()}, features=features)


def balanced(num_classes, rows_per_class):
    return np.tile(np.arange(num_classes), rows_per_class)


@pytest.mark.parametrize(
    "source",
    [
        lambda: LABELS,
        lambda: tuple(LABELS),
        lambda: np.array(LABELS, dtype=np.uint8),
        lambda: np.array(LABELS, dtype=object),
        lambda: torch.tensor(LABELS),
        lambda: dataset(LABELS),
        lambda: dataset(LABELS, Value("int32")),
        lambda: dataset(LABELS)["label"],
        lambda: dataset(LABELS).shuffle(seed=1, keep_in_memory=True),
        lambda: dataset([1, 1, *LABELS, 1]).select([9, *range(2, 9)]),
        lambda: dataset([1, *LABELS]).select(range(1, 9)),
        lambda: datasets.concatenate_datasets([dataset(LABELS[:3]), dataset(LABELS[3:])]).select(list(range(8))[::-1]),
        lambda: dataset(LABELS).with_format("torch"),
        lambda: dataset(LABELS).with_transform(lambda batch: {"label": ["nonsense"]}),
    ],
)
def test_counts_are_the_same_from_every_source(source):
    counts = class_counts(source())
    assert counts.tolist() == COUNTS and counts.dtype == np.int64


def test_number_of_classes_is_that_of_the_names_unless_given():
    assert class_counts(dataset([0, 1])).tolist() == [1, 1, 0, 0]
    assert class_counts([0, 1], num_classes=3).tolist() == [1, 1, 0]
    assert class_counts(dataset([0, 1], Value("int64")), num_classes=3).tolist() == [1, 1, 0]
    assert class_counts([], num_classes=2).tolist() == [0, 0]
    assert (
        class_counts([True, False, True]).tolist() == class_counts(dataset([True, False, True], Value("bool"))).tolist()
    )
    assert read_labels(dataset(LABELS)).num_classes == len(NAMES)


def test_no_other_column_is_decoded():
    broken = dataset([0, 1] * 10, image=(Image(), [{"bytes": b"no image", "path": None}] * 20))
    with pytest.raises(OSError):
        broken[0]
    assert class_counts(broken).tolist() == [10, 10, 0, 0]
    two_names = broken.cast_column("label", ClassLabel(names=["no", "yes"]))
    assert class_counts(make_long_tailed(two_names, imbalance_factor=5)).tolist() == [10, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: [0, 1, -1, 2], r"`labels` \(=-1 at row 2\) must be at least 0"),
        (lambda: dataset([0, 1, -1, -1]), r"`label` \(=-1 at row 2\) must lie in 0\.\.3"),
        (lambda: dataset([3, -1, 1]).select([2, 0, 1]), r"`label` \(=-1 at row 2\)"),
        (lambda: np.array([0, 2**63], dtype=np.uint64), r"`labels` \(=9223372036854775808 at row 1\)"),
        (lambda: [0, None, 1], r"`labels` \(=None at row 1\) must be class ids"),
        (lambda: dataset([0, 1, None, 1]).select([1, 3, 2]), r"`label` \(=None at row 2\)"),
        (lambda: ["cat", "dog"], r"`labels` \(='cat' at row 0\).*map names to ids"),
        (lambda: dataset(["cat", "dog"], Value("string")), r"holds string, .*class_encode_column\('label'\)"),
        (lambda: dataset([0.0, 1.0], Value("float32")), r"holds float, .*class_encode_column\('label'\)"),
        (lambda: [0.5, 1.0], r"`labels` \(=0.5 at row 0\)"),
        (lambda: torch.eye(3), r"shape \(3, 3\).*one class id a row"),
        (lambda: [], r"holds no rows.*pass `num_classes`"),
        (lambda: DatasetDict(train=dataset([0]), test=dataset([0])), r"DatasetDict of splits \['train', 'test'\]"),
        (lambda: dataset([0]).to_iterable_dataset(), r"streaming=False"),
        (lambda: dataset([0]).rename_column("label", "fine"), r"\(='label'\) is not a column.*\['fine'\]"),
    ],
)
def test_bad_labels_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        class_counts(source())


def test_labels_beyond_the_given_number_of_classes_are_named():
    with pytest.raises(ValueError, match=r"`labels` \(=3 at row 2\) must lie in 0\.\.2"):
        check_labels(LABELS, num_classes=3)
    with pytest.raises(ValueError, match=r"`num_classes` \(=0\)"):
        class_counts(LABELS, num_classes=0)


def long_tailed_counts(labels, **options):
    return np.bincount(labels[long_tailed_indices(labels, **options)])


@pytest.mark.parametrize("factor", [1, 2, 7, 10, 32, 100, 500, 1000])
@pytest.mark.parametrize(("num_classes", "most"), [(2, 1000), (4, 1000), (6, 96), (10, 500), (37, 61)])
def test_exponential_counts_are_those_of_exact_arithmetic(num_classes, most, factor):
    """n_max f^(-r / (K - 1)) >= m exactly where n_max^(K - 1) >= m^(K - 1) f^r, all integers."""

    def exact(rank):
        power = num_classes - 1
        kept = (m for m in range(most, 0, -1) if most**power >= m**power * factor**rank)
        return next(kept, 1)

    counts = long_tailed_counts(balanced(num_classes, most), imbalance_factor=factor)
    assert counts.tolist() == [exact(rank) for rank in range(num_classes)]


@pytest.mark.parametrize("factor", [10, 20, 50, 100, 200, 256])
def test_counts_of_cifar_are_the_published_ones(factor):
    counts = long_tailed_counts(balanced(100, 500), imbalance_factor=factor)
    assert counts.tolist() == [int(500 * (1 / factor) ** (k / 99)) for k in range(100)]


@pytest.mark.parametrize("num_classes", [2, 5, 8])
def test_step_cuts_the_smaller_half_of_the_ranks(num_classes):
    counts = long_tailed_counts(balanced(num_classes, 30), imbalance_factor=7, profile="step")
    cut = num_classes // 2
    assert counts.tolist() == [30] * (num_classes - cut) + [30 // 7] * cut


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_no_class_gains_rows_or_loses_its_last(profile):
    labels = np.repeat(np.arange(4), [50, 3, 1, 40])
    counts = long_tailed_counts(labels, imbalance_factor=1000, profile=profile)
    assert (counts >= 1).all() and (counts <= [50, 3, 1, 40]).all() and counts[3] == 1
    assert long_tailed_indices(labels, imbalance_factor=1, profile=profile).tolist() == list(range(94))


def test_rows_keep_their_order():
    rows = make_long_tailed(
        dataset(balanced(4, 100), position=(Value("int64"), range(400))), imbalance_factor=10, seed=3
    )
    positions = rows["position"][:]
    assert positions == sorted(positions)
    assert rows["label"][:] == [position % 4 for position in positions]


def test_seed_and_order_decide_the_rows_and_factors_nest_them():
    labels = balanced(10, 50)

    def choose(factor, seed=0, order="label"):
        return set(long_tailed_indices(labels, imbalance_factor=factor, seed=seed, class_order=order).tolist())

    for order in ("label", "permuted"):
        assert choose(10, order=order) == choose(10, order=order)
        assert choose(10, order=order) != choose(10, seed=1, order=order)
        assert choose(50, order=order) < choose(10, order=order) < choose(2, order=order)


def test_permuted_order_permutes_the_counts():
    labels = balanced(10, 50)
    by_label = long_tailed_counts(labels, imbalance_factor=25)
    permuted = [long_tailed_counts(labels, imbalance_factor=25, class_order="permuted", seed=s) for s in range(3)]
    assert all(sorted(counts) == sorted(by_label) for counts in permuted)
    assert len({tuple(counts) for counts in [by_label, *permuted]}) == 4


def test_each_row_of_a_class_is_as_likely_to_stay():
    labels = balanced(2, 20)
    kept = np.zeros(40)
    for seed in range(400):
        kept[long_tailed_indices(labels, imbalance_factor=4, seed=seed)] += 1
    assert (kept[labels == 0] == 400).all()
    assert np.abs(kept[labels == 1] - 100).max() < 4 * np.sqrt(400 * 0.25 * 0.75)


def test_nothing_is_written_beside_the_data(tmp_path):
    dataset(balanced(4, 25)).save_to_disk(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    make_long_tailed(datasets.load_from_disk(tmp_path / "data"), imbalance_factor=10)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("factor", [0, -1, 0.01, float("nan"), float("inf"), "100", None])
def test_factor_below_one_is_refused(factor):
    with pytest.raises(ValueError, match=r"`imbalance_factor` \(=.*at least 1.*100, not 0\.01"):
        long_tailed_indices([0, 1], imbalance_factor=factor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": [0, 0]}, r"number of classes \(=1\) must be at least 2"),
        ({"data": dataset([0, 2, 3])}, r"Of 4 classes these have no rows: `1`\. "),
        ({"data": dataset([0, 2])}, r"Of 4 classes these have no rows: `1`, `3`"),
        ({"data": [0, 2]}, r"no rows: `1`\. Drop"),
        ({"profile": "pareto"}, r"`profile` \(='pareto'\) must be one of 'exponential', 'step'"),
        ({"class_order": "random"}, r"`class_order` \(='random'\)"),
        ({"seed": -1}, r"`seed` \(=-1\)"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        long_tailed_indices(**{"data": [0, 1], "imbalance_factor": 2} | options)


class TestLabelsOf:
    """One function answers which label a row has, as the data set is indexed."""

    rows = Dataset.from_dict({"label": [1, 0, 1, 2, 2, 0]})

    def sets(self):
        class Transformed(torch.utils.data.Dataset):
            def __init__(self, dataset):
                self.dataset = dataset

            def __len__(self):
                return len(self.dataset)

            def __getitem__(self, row):
                return {"labels": self.dataset[row]["label"]}

        vision = torchvision.datasets.FakeData(size=6)
        vision.targets = torch.tensor([2, 2, 0, 1, 1, 0])  # as those that lie on disk have
        subset = Subset(Transformed(self.rows), [3, 3, 0])
        yield self.rows, [1, 0, 1, 2, 2, 0]
        yield self.rows.select([5, 3]), [0, 2]
        yield self.rows.with_transform(lambda rows: {"labels": rows["label"]}), [1, 0, 1, 2, 2, 0]
        yield Transformed(self.rows), [1, 0, 1, 2, 2, 0]
        yield Subset(self.rows, torch.tensor([4, 1])), [2, 0]
        yield subset, [2, 2, 1]
        yield Subset(subset, [2, 0]), [1, 2]
        yield ConcatDataset([subset, self.rows]), [2, 2, 1, 1, 0, 1, 2, 2, 0]
        yield Subset(ConcatDataset([self.rows, self.rows]), range(4, 8)), [2, 0, 1, 0]
        yield vision, [2, 2, 0, 1, 1, 0]
        yield Subset(vision, [0, 2]), [2, 0]

    def test_labels_follow_the_rows(self):
        for dataset, labels in self.sets():
            assert labels_of(dataset).tolist() == labels, dataset
            assert class_counts(dataset, num_classes=3).tolist() == np.bincount(labels, minlength=3).tolist()
            parts = random_split(dataset, [len(dataset) - 1, 1], generator=torch.Generator().manual_seed(0))
            assert sorted(np.concatenate([labels_of(part) for part in parts]).tolist()) == sorted(labels)

    def test_what_does_not_tell_its_rows_is_refused(self):
        class Half(torch.utils.data.Dataset):
            dataset = self.rows

            def __len__(self):
                return 3

        changed = torchvision.datasets.FakeData(size=6, target_transform=lambda label: 0)
        changed.targets = [0, 1, 2, 0, 1, 2]
        wrapped, longer = Half(), torchvision.datasets.FakeData(size=2)
        wrapped.target_transform, longer.targets = (lambda label: 0), changed.targets
        for dataset, words in (
            (Half(), "Half are unknown: of the 6 rows of its `dataset` it has 3. Pass `labels`"),
            (changed, "FakeData are unknown: its `target_transform` may change them. Pass `labels`"),
            (wrapped, "Half are unknown: its `target_transform`"),
            (longer, "FakeData are unknown"),
            (self.rows.with_transform(lambda rows: {"labels": [1 - x for x in rows["label"]]}), "row 1: 0 to 1"),
            ([1, 2], "list are unknown"),
            (Dataset.from_dict({"kind": [0]}), "no column `label`"),
        ):
            with pytest.raises(ValueError, match=words):
                labels_of(dataset)


def test_selected_text_has_offsets_for_more_than_2_gib():
    rows = Dataset.from_dict({"name": ["b", "a", None, "c"]})
    selected = arrow_column(rows.select([3, 0, 2], keep_in_memory=True), "name")
    assert selected.type == pa.large_string() and selected.to_pylist() == ["c", "b", None]
    assert arrow_column(rows, "name").to_pylist() == rows["name"][:]


def test_an_even_sample_keeps_rare_classes_whole_and_as_many_rows_of_the_others():
    counts = np.array([1000, 500, 10, 1])
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    rows = even_sample(ids, 4, 211)
    assert np.bincount(ids[rows]).tolist() == [100, 100, 10, 1] and (np.diff(rows) > 0).all()
    assert rows.tolist() == even_sample(ids, 4, 211).tolist() != even_sample(ids, 4, 211, seed=1).tolist()
    assert np.bincount(ids[even_sample(ids, 4, 2)]).tolist() == [1, 1, 1, 1]  # no class is lost
    assert len(even_sample(ids, 4, 1511)) == 1511 and even_cap(np.array([5, 2]), 100) == np.inf
