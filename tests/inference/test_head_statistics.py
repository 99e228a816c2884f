"""Laws of a head's statistics: a head of rows is the same however the rows came together, and finds its way back from disk."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from small_models import bert, micro, the_head, vit

from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.in_model import head_modules
from etf_adapt.inference.head_statistics import (
    HeadStatistics,
    by_classes,
    describe_heads,
    follows,
    load_statistics,
    save_statistics,
    set_heads,
)
from etf_adapt.losses.terms import log_prior
from etf_adapt.results.run_folder import STATISTICS_FILE

COUNTS = (9, 5, 1)


def draw(counts, in_features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centers = torch.randn(len(counts), in_features, generator=generator)
    features = centers[labels] + 0.5 * torch.randn(len(labels), in_features, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return features[order], labels[order]


def head_of(statistics, **settings):
    return HeadStatistics(statistics, **{"frame": "whitened", "penalty": 0.3, "intercept": True, **settings})


def close(left, right, tolerance=1e-12):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("frame", ["whitened", "means"])
@pytest.mark.parametrize("intercept", [True, False])
def test_a_head_does_not_depend_on_how_its_rows_came_together(frame, intercept):
    features, labels = draw(COUNTS)
    settings = {"frame": frame, "intercept": intercept, "logit_scale": 3.0}
    whole = head_of(ClassStatistics.of(features, labels, 3), **settings)
    parts = [ClassStatistics.of(features[rows], labels[rows], 3) for rows in torch.arange(15).split(4)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        made = sum((parts[index] for index in order), ClassStatistics.empty(3, 6))
        assert close(head_of(made, **settings).class_vectors(), whole.class_vectors())
    less = whole.rows + parts[1] - parts[1]
    assert close(head_of(less, **settings).class_vectors(), whole.class_vectors())


def test_a_new_class_gives_the_head_that_had_known_it_from_the_start():
    features, labels = draw((9, 5, 3, 1))
    old, settings = labels < 2, {"logit_scale": 2.0, "prior_strength": 0.7}
    before = by_classes(ClassStatistics.of(features[old], labels[old], 2), torch.tensor([0, 1, -1, -1]))
    after = before + ClassStatistics.of(features[~old], labels[~old], 4)
    whole = head_of(ClassStatistics.of(features, labels, 4), **settings).class_vectors()
    assert close(head_of(after, **settings).class_vectors(), whole)
    removed = after - ClassStatistics.of(features[~old], labels[~old], 4)
    again = head_of(by_classes(removed, torch.tensor([0, 1])), **settings)
    assert close(
        again.class_vectors(), head_of(ClassStatistics.of(features[old], labels[old], 2), **settings).class_vectors()
    )


def test_the_scale_is_the_norm_of_the_centred_logits_and_the_prior_that_of_the_counts():
    features, labels = draw(COUNTS)
    statistics = ClassStatistics.of(features, labels, 3)
    weight, bias = head_of(statistics, logit_scale=3.0).class_vectors()
    logits = features.double() @ weight.T + bias
    norms = (logits - logits.mean(dim=1, keepdim=True)).square().sum(dim=1)
    assert float(norms.mean().sqrt()) == pytest.approx(3.0)
    adjusted = head_of(statistics, logit_scale=3.0, prior_strength=0.5).class_vectors()[1]
    assert torch.allclose(adjusted - bias, -0.5 * log_prior(list(COUNTS), bias))


def test_ten_thousand_classes_take_a_second():
    features, labels = draw((2,) * 10_000, in_features=64)
    statistics = ClassStatistics.of(features, labels, 10_000)
    start = time.process_time()
    more = by_classes(statistics, torch.tensor([*range(10_000), -1])) + ClassStatistics.of(
        features[:3], torch.full((3,), 10_000), 10_001
    )
    assert head_of(more).class_vectors()[0].shape == (10_001, 64)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("make", [vit, bert, micro])
def test_a_calibrated_head_is_described_and_comes_back_from_disk(make, tmp_path):
    model = make()
    head = the_head(model)
    features, labels = draw(COUNTS, in_features=head.weight.shape[1])
    statistics = ClassStatistics.of(features, labels, 3)
    made = head_of(statistics, logit_scale=4.0, prior_strength=0.8)
    path = next(iter(head_modules(model)))
    set_heads(model, {path: made})
    assert torch.equal(head.weight.double().flatten(1), made.class_vectors()[0].float().double())  # rounded once
    assert model.etf_settings["logit_scale"] == 4.0
    found = describe_heads(model, [statistics], [0.3])[path]
    assert (found.logit_scale, found.prior_strength) == (pytest.approx(4.0, rel=1e-5), pytest.approx(0.8, rel=1e-5))
    save_statistics(tmp_path, {path: made})
    again = load_statistics(tmp_path)[path]
    assert close(again.class_vectors(), made.class_vectors(), 0.0)
    assert dataclasses.replace(again, rows=statistics) == dataclasses.replace(made, rows=statistics)


def test_a_head_that_changed_does_not_follow_from_its_statistics(tmp_path):
    model = vit()
    head = the_head(model)
    statistics = ClassStatistics.of(*draw(COUNTS, in_features=16), 3)
    made = head_of(statistics)
    set_heads(model, {"classifier": made})
    assert follows(head, made)
    with torch.no_grad():
        head.weight[0, 0] += 0.01 * head.weight.abs().max()
    assert not follows(head, made)
    save_statistics(tmp_path, {})
    assert load_statistics(tmp_path) == {} and not (tmp_path / STATISTICS_FILE).exists()
