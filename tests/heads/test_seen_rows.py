"""The head set from what training reads of the rows is the closed form of it, and each row can be left out."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry.closed_form import MEAN_FRAMES, closed_form_vectors
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.layers import ETFHead
from etf_adapt.heads.seen_rows import Form, SeenRows
from etf_adapt.heads.training_logits import TrainingLogits

LABELS = torch.tensor([2, 0, 1, 1, 0, 0, 2, 0, 3])  # class 3 has one row
WIDTH, CLASSES = 5, 4
FRAMES = pytest.mark.parametrize("frame", MEAN_FRAMES)
INTERCEPTS = pytest.mark.parametrize("intercept", [True, False])


def features_of(seed):
    features = torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(seed))
    return features + torch.nn.functional.one_hot(LABELS, WIDTH) * 2.0 + 0.5


def rows_of(features, frame="whitened", intercept=True, scale=0.7):
    order = torch.tensor([4, 0, 7, 2, 8, 1, 6, 3, 5])  # in any order
    means = ClassStatistics.of(features, LABELS, CLASSES).means
    return SeenRows.of(10 + order, LABELS[order], features[order], means, Form(frame, 0.3, intercept, scale))


def closed_form(features, form, labels=LABELS):
    statistics = ClassStatistics.of(features, labels, CLASSES)
    weight, bias = closed_form_vectors(statistics, form.frame, penalty=form.penalty, intercept=form.intercept)
    return form.scale * weight, form.scale * bias


@FRAMES
@INTERCEPTS
def test_a_row_left_out_is_scored_by_a_class_whose_mean_is_that_of_its_other_rows(frame, intercept, monkeypatch):
    """The slow reference sets all class vectors again, with covariance and centre of the whole."""
    features = features_of(0)
    rows = rows_of(features, frame, intercept)
    new = features_of(1).double()  # what is read now is not what the head was set from
    whole = closed_form(features, rows.form)
    plain = new @ whole[0].T + whole[1]
    left = rows.logits(plain.clone(), new, 10 + torch.arange(len(LABELS)), LABELS)
    statistics = ClassStatistics.of(features, LABELS, CLASSES)
    for name in ("within", "center"):
        value = getattr(statistics, name)
        monkeypatch.setattr(ClassStatistics, name, property(lambda self, value=value: value))
    for row, own in enumerate(LABELS.tolist()):
        others = torch.arange(CLASSES) != own
        assert torch.equal(left[row, others], plain[row, others])
        if own == 3:
            assert torch.equal(left[row], plain[row]), "the only row of its class"
            continue
        kept = torch.arange(len(LABELS)) != row
        slow = closed_form(features[kept], rows.form, LABELS[kept])
        # Class vectors are centred over the classes: against another class, the changed one has moved by its change.
        scores = new[row] @ slow[0].T + slow[1]
        moved = (scores[own] - scores[others]) - (plain[row, own] - plain[row, others])
        torch.testing.assert_close((left - plain)[row, own].expand_as(moved), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=["tokens", "convolution"])
def test_each_position_of_a_row_is_scored_without_it(shape):
    rows, ids = rows_of(features_of(0)), 10 + torch.arange(len(LABELS))
    features = torch.randn(len(LABELS), *shape, WIDTH)
    logits = torch.randn(len(LABELS), *shape, CLASSES)
    left = rows.logits(logits.clone(), features, ids, LABELS)
    for position in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        at = (slice(None), *position)
        torch.testing.assert_close(left[at], rows.logits(logits[at].clone(), features[at], ids, LABELS))
    if len(shape) == 2:
        head = torch.nn.Conv2d(WIDTH, CLASSES, 1)
        hooked = TrainingLogits({"head": head})
        hooked.rows["head"] = rows
        plain = head(features.movedim(-1, 1))
        with hooked.of(LABELS, ids):
            left = head(features.movedim(-1, 1))
        torch.testing.assert_close(
            left.movedim(1, -1), rows.logits(plain.movedim(1, -1).clone(), features, ids, LABELS)
        )


def test_rows_that_are_not_held_keep_their_logits():
    rows, logits = rows_of(features_of(0)), torch.randn(2, CLASSES)
    left = rows.logits(logits.clone(), torch.randn(2, WIDTH), torch.tensor([3, 99]), torch.tensor([0, 1]))
    assert torch.equal(left, logits)


@FRAMES
@INTERCEPTS
def test_the_head_is_set_as_the_closed_form_of_the_rows_as_they_were_seen_last(frame, intercept):
    first, later, last = (features_of(seed) for seed in range(3))
    rows, head = rows_of(first, frame, intercept), ETFHead(WIDTH, CLASSES, bias=intercept)
    assert not rows.realign(head), "nothing was read"
    seen = first.clone()
    for part, source in (([0, 3, 5], later), ([2, 3], last), ([8], later)):  # row 3 is drawn twice
        part = torch.tensor(part)
        rows.note(10 + part, source[part])
        seen[part] = source[part]
    rows.note(torch.tensor([99]), torch.randn(1, WIDTH))  # not one of these rows
    assert rows.realign(head)
    weight, bias = closed_form(seen, rows.form)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-5, atol=1e-5)
    if intercept:
        torch.testing.assert_close(head.bias.double(), bias, rtol=1e-5, atol=1e-5)
    again = rows_of(seen, frame, intercept)
    ids, logits = 10 + torch.arange(len(LABELS)), torch.randn(len(LABELS), CLASSES)
    left, expected = (each.logits(logits.clone(), last, ids, LABELS) for each in (rows, again))
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)
    assert not rows.realign(head)


def test_of_a_row_that_a_batch_holds_twice_the_later_reading_counts():
    rows, head = rows_of(features_of(0)), ETFHead(WIDTH, CLASSES)
    features = torch.randn(3, WIDTH)
    rows.note(torch.tensor([12, 11, 12]), features)
    rows.realign(head)
    assert torch.equal(rows.features[rows.row_ids == 12], features[2:])


def test_all_that_a_step_reads_moves_to_the_device_of_a_resumed_run():
    rows = rows_of(features_of(0))
    rows.note(rows.row_ids[:2], rows.features[:2])
    moved = SeenRows.restored(rows.tensors(), vars(rows.form)).to(torch.device("meta"))
    pending = [part for both in moved.gather() for part in both]
    read = (
        moved.row_ids,
        moved.features,
        moved._inverse,
        moved._center,
        moved._offsets,
        moved._solved,
        moved._counts,
        moved.passes,
        *pending,
    )
    assert {part.device.type for part in read} == {"meta"} and len(pending) == 2


def test_a_class_without_a_row_here_stands_by_its_mean():
    features = features_of(0)
    statistics = ClassStatistics.of(features, LABELS, CLASSES)
    kept = LABELS != 2
    rows = SeenRows.of(
        torch.arange(9)[kept], LABELS[kept], features[kept], statistics.means, Form("means", None, True, 1.0)
    )
    torch.testing.assert_close(rows.statistics.means, statistics.means)
    assert rows.statistics.counts.tolist() == [4, 2, 1, 1]


def test_two_rows_of_one_number_are_refused():
    with pytest.raises(ValueError, match=r"`row_id` \(=4\) is the number of two training rows"):
        SeenRows.of(
            torch.tensor([4, 1, 4]),
            torch.tensor([0, 1, 0]),
            torch.zeros(3, 5),
            torch.zeros(2, 5),
            Form("means", None, True, 1.0),
        )


@FRAMES
@INTERCEPTS
def test_rows_that_are_yet_to_be_read_have_no_part(frame, intercept):
    first, later, last = (features_of(seed) for seed in range(3))
    some, head = torch.tensor([8, 0, 2, 3, 1]), ETFHead(WIDTH, CLASSES, bias=intercept)
    means = torch.zeros(CLASSES, WIDTH)
    held = SeenRows.of(some, LABELS[some], first[some], means, Form(frame, 0.3, intercept, 0.7))
    rows = SeenRows.of(some, LABELS[some], first[some], means, held.form)
    rows.hold_all(LABELS)
    ids, logits = torch.arange(len(LABELS)), torch.randn(len(LABELS), CLASSES)
    left, expected = (each.logits(logits.clone(), last, ids, LABELS) for each in (rows, held))
    assert torch.equal(left, expected)
    assert sorted(rows.stale().tolist()) == [4, 5, 6, 7]
    rows.note(torch.tensor([4, 0]), later[[4, 0]])
    assert rows.stale().tolist() == [5, 6, 7] and not rows.realign(head), "what was noted is taken"
    rows = SeenRows.restored(rows.tensors(), vars(rows.form))
    rows.note(torch.tensor([1]), first[[1]])  # the pass reads it later
    rows.read_again(torch.tensor([7, 6, 5, 1]), last[[7, 6, 5, 1]])
    rows.set_head(head)
    assert rows.stale().tolist() == [0, 2, 3, 4, 8]
    now = torch.stack([later[0], last[1], first[2], first[3], later[4], *last[5:8], first[8]])
    weight, _ = closed_form(now, rows.form)
    torch.testing.assert_close(head.weight.double(), weight, rtol=1e-5, atol=1e-5)
    assert not rows.realign(head), "all was taken"


def test_features_that_are_not_finite_end_a_run_before_they_set_a_head():
    rows, head = rows_of(features_of(0)), ETFHead(WIDTH, CLASSES)
    rows.note(torch.tensor([12]), torch.full((1, WIDTH), torch.inf))
    with pytest.raises(FloatingPointError, match="features of the last steps are not finite"):
        rows.realign(head)
    assert bool(head.weight.isfinite().all())


@FRAMES
@INTERCEPTS
def test_in_another_form_the_mean_norm_of_the_logits_is_one(frame, intercept):
    features = features_of(0)
    rows, head = rows_of(features, frame, intercept), ETFHead(WIDTH, CLASSES, bias=intercept)
    rows.set_head(head)
    before = head.weight.clone()
    rows.set_head(head, rows.form)
    with torch.no_grad():
        logits = head(features)
    norms = (logits - logits.mean(dim=1, keepdim=True)).norm(dim=1)
    assert norms.mean().item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(head.weight, before * rows.form.scale / 0.7, rtol=1e-4, atol=1e-5)
