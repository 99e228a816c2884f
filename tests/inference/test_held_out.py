"""Laws of what held-out rows choose: the least log loss, and scores of the heads that were set without them."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry.closed_form import closed_form_vectors
from etf_adapt.geometry.leave_one_out import PENALTIES
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.inference.head_statistics import logit_norm
from etf_adapt.inference.held_out import choose_by_log_loss, score_features, score_left_out
from etf_adapt.metrics.calibration import fit_balanced, fit_prior_adjustment


def draw(counts, seed, in_features=8):
    centers = torch.randn(len(counts), in_features, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return centers[labels] + torch.randn(len(labels), in_features, generator=generator), labels


@pytest.mark.parametrize("intercept", [True, False])
def test_left_out_scores_are_those_of_a_head_set_without_the_row(intercept):
    features, labels = draw((6, 4, 3), seed=0)
    statistics = ClassStatistics.of(features, labels, 3)
    found = score_left_out([statistics], [features], labels, [intercept])(0.3, torch.arange(len(labels)))
    norm = logit_norm(statistics, *closed_form_vectors(statistics, "whitened", penalty=0.3, intercept=intercept))
    ridge = 0.3 * statistics.within.diagonal().mean()  # the absolute penalty and the divisor of the covariance stay
    for row in range(len(labels)):
        rest = statistics - ClassStatistics.of(features[row : row + 1], labels[row : row + 1], 3)
        means, total = rest.means, statistics.counts.sum()
        center = rest.center if intercept else torch.zeros(8)
        within = (rest.moment - (rest.counts.unsqueeze(1) * means).T @ means) / total + ridge * torch.eye(8)
        offsets = means - center
        solved = torch.linalg.solve(within, offsets.T).T
        weight = solved / (solved * offsets).sum(dim=1, keepdim=True).sqrt()
        logits = weight @ (features[row].double() - center) / norm
        assert torch.allclose(found[row] - found[row].mean(), logits - logits.mean(), atol=1e-6)


def test_the_penalty_is_that_of_the_least_log_loss_and_the_grid_goes_on_where_its_end_is_best():
    train, held = draw((30, 8, 4), seed=1), draw((10, 10, 10), seed=2)
    statistics = ClassStatistics.of(*train, 3)
    score = score_features([statistics], [held[0]], [True])
    every = torch.arange(30)
    choice = choose_by_log_loss(score, held[1], statistics.counts)
    losses = {penalty: fit_balanced(score(penalty, every), held[1], statistics.counts)[2] for penalty in PENALTIES}
    assert choice.log_loss <= min(losses.values())
    assert choice.penalty == min(losses, key=losses.get) or choice.penalty > PENALTIES[-1]
    assert choose_by_log_loss(score, held[1], statistics.counts, penalties=[0.3]).penalty == 0.3
    # Logits that get better with the penalty without end.
    right = torch.nn.functional.one_hot(held[1], 3).double() + torch.randn(30, 3, dtype=torch.float64)
    endless = choose_by_log_loss(
        lambda penalty, rows: (right + 9 / penalty * torch.flip(right, [0]))[rows], held[1], statistics.counts
    )
    assert endless.penalty > PENALTIES[-1]


def test_without_adjustment_the_scale_alone_is_fitted():
    held = draw((10, 10, 10), seed=2)
    statistics = ClassStatistics.of(*draw((30, 8, 4), seed=1), 3)
    choice = choose_by_log_loss(
        score_features([statistics], [held[0]], [True]), held[1], statistics.counts, adjusts=False
    )
    assert choice.prior_strength == 0.0 and choice.logit_scale > 0


def test_classes_of_few_rows_share_their_weight_in_the_balanced_fit():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 4, generator=generator), torch.tensor([0] * 20 + [1] * 17 + [2] * 2 + [3])
    counts = torch.tensor([50, 20, 3, 2])
    assert fit_balanced(logits, labels, counts, min_rows=1)[:2] == pytest.approx(
        fit_prior_adjustment(logits, labels, counts)
    )
    scale, strength, loss = fit_balanced(logits, labels, counts)
    prior = (counts / counts.sum()).double().log()
    logs = (scale * logits.double() - strength * prior).log_softmax(dim=1)
    own = -logs[torch.arange(40), labels]
    mean = (own[:20].mean() + own[20:37].mean() + 2 * own[37:].mean()) / 4
    assert loss == pytest.approx(float(mean - logs.mean() / 40))
