"""Laws of the losses on margins: the soft margin, margin dot regression and its relatives, LDAM and its weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.geometry.simplex import simplex_cosines, vertex_products
from etf_adapt.losses.dot_regression import MARGIN_FORMS, margin_dot_regression_loss
from etf_adapt.losses.registry import LOSS_NAMES, make_loss
from etf_adapt.losses.softmax import effective_number_weights, ldam_loss, logit_adjusted_loss
from etf_adapt.losses.terms import log_prior, soft_margins

forms = pytest.mark.parametrize("form", MARGIN_FORMS)
temperatures = pytest.mark.parametrize("temperature", [0.0, 0.05, 1.0])


def draw(num_classes, batch=32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


def counts_of(num_classes):
    return torch.logspace(2, 0, num_classes, dtype=torch.float64).round().long()


def vertices(num_classes):
    centred = torch.eye(num_classes, dtype=torch.float64) - 1.0 / num_classes
    return math.sqrt(num_classes / (num_classes - 1)) * centred


def slow_margins(scores, temperature):
    """Return the margin of each class by one sum over its rivals."""
    columns = []
    for k in range(scores.shape[1]):
        rivals = torch.cat([scores[:, :k], scores[:, k + 1 :]], dim=1)
        best = rivals.amax(1) if temperature == 0.0 else temperature * torch.logsumexp(rivals / temperature, 1)
        columns.append(scores[:, k] - best)
    return torch.stack(columns, dim=1)


class TestSoftMargins:
    @temperatures
    @pytest.mark.parametrize("num_classes", [2, 3, 40])
    def test_they_are_the_scores_less_the_soft_maximum_of_the_others(self, num_classes, temperature):
        scores, labels = draw(num_classes, scale=3.0)
        slow = slow_margins(scores, temperature)
        torch.testing.assert_close(soft_margins(scores, temperature=temperature), slow)
        own = soft_margins(scores, labels, temperature=temperature)
        torch.testing.assert_close(own, slow.gather(1, labels[:, None]))

    @temperatures
    def test_all_of_them_have_finite_gradients_also_for_ties_and_certainty(self, temperature):
        scores = torch.tensor([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0], [-500.0, 1.0, 1.0]], requires_grad=True)
        margins = soft_margins(scores, temperature=temperature)
        (gradient,) = torch.autograd.grad(margins.sum(), scores)
        assert torch.isfinite(margins).all() and torch.isfinite(gradient).all()

    def test_the_gradient_of_one_is_that_of_all(self):
        scores, labels = draw(5)
        scores.requires_grad_()
        (one,) = torch.autograd.grad(soft_margins(scores, labels).sum(), scores)
        (of_all,) = torch.autograd.grad(soft_margins(scores).gather(1, labels[:, None]).sum(), scores)
        torch.testing.assert_close(one, of_all)

    def test_they_are_all_that_a_cross_entropy_sees(self):
        scores, labels = draw(6)
        for temperature in (0.1, 1.0):
            expected = F.cross_entropy(scores / temperature, labels, reduction="none")
            margins = soft_margins(scores, labels, temperature=temperature).squeeze(1)
            torch.testing.assert_close(F.softplus(-margins / temperature), expected)

    def test_a_negative_temperature_is_refused(self):
        with pytest.raises(ValueError, match=r"`temperature` \(=-1.0\)"):
            soft_margins(torch.zeros(1, 2), temperature=-1.0)


class TestMarginDotRegression:
    @forms
    def test_it_is_half_the_squared_shortfall_of_the_prior_adjusted_margin(self, form):
        logits, labels = draw(5)
        counts = counts_of(5)
        products, lengths = vertex_products(logits)
        scores = {
            "open": products,
            "ball": products / lengths.clamp_min(1.0)[:, None],
            "sphere": simplex_cosines(logits),
        }[form]
        margins = slow_margins(scores + 0.1 * torch.log(counts / counts.sum()), 0.2)
        expected = 0.5 * (0.7 - margins).clamp_min(0.0).gather(1, labels[:, None]).squeeze(1) ** 2
        options = {"margin": 0.7, "temperature": 0.2, "prior_strength": 0.1, "form": form}
        rows = margin_dot_regression_loss(logits, labels, class_counts=counts, reduction="none", **options)
        torch.testing.assert_close(rows, expected)

    @forms
    @pytest.mark.parametrize("num_classes", [2, 3, 20])
    def test_a_vertex_has_the_greatest_margin_of_the_ball(self, form, num_classes):
        labels = torch.arange(num_classes)
        reach = num_classes / (num_classes - 1)
        options = {"temperature": 0.0, "form": form, "reduction": "none"}
        for margin, expected in ((reach - 1e-9, 0.0), (reach + 0.2, 0.02)):
            rows = margin_dot_regression_loss(vertices(num_classes), labels, margin=margin, **options)
            torch.testing.assert_close(rows, torch.full_like(rows, expected), atol=1e-9, rtol=0)

    @pytest.mark.parametrize("num_classes", [2, 3, 50])
    def test_it_is_still_once_the_margin_is_reached_and_pulls_and_pushes_until_then(self, num_classes):
        logits, labels = draw(num_classes, batch=200, scale=2.0)
        logits.requires_grad_()
        options = {"margin": 0.5, "temperature": 0.1, "prior_strength": 0.1, "class_counts": counts_of(num_classes)}
        rows = margin_dot_regression_loss(logits, labels, reduction="none", **options)
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        reached = rows.detach() == 0.0
        assert 0 < reached.sum() < 200
        assert (gradient[reached] == 0.0).all()
        own = gradient.gather(1, labels[:, None]).squeeze(1)
        assert (own[~reached] < 0.0).all()
        others = gradient[~reached].scatter(1, labels[~reached][:, None], 0.0)
        assert (others >= -1e-12).all() and (others.amax(dim=1) > 0.0).all()

    def test_its_gradient_is_the_shortfall_times_vertex_less_rivals(self):
        logits, labels = draw(6)
        logits.requires_grad_()
        rows = margin_dot_regression_loss(logits, labels, margin=3.0, temperature=0.5, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        scores, _ = vertex_products(logits.detach())
        rivals = (scores / 0.5).scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
        direction = F.one_hot(labels, 6).double() - rivals
        shortfall = 3.0 - soft_margins(scores, labels, temperature=0.5)
        torch.testing.assert_close(gradient, -shortfall * math.sqrt(6 / 5) * direction)

    def test_it_pulls_as_logit_adjustment_does(self):
        logits, labels = draw(7)
        counts = counts_of(7)
        logits.requires_grad_()
        scale = math.sqrt(7 / 6)
        ours = margin_dot_regression_loss(
            logits, labels, class_counts=counts, margin=100.0, temperature=0.1, prior_strength=0.1, reduction="none"
        )
        theirs = [
            logit_adjusted_loss(scale * row[None] / 0.1, label[None], class_counts=counts)
            for row, label in zip(logits, labels, strict=True)
        ]
        (one,) = torch.autograd.grad(ours.sum(), logits)
        (other,) = torch.autograd.grad(torch.stack(theirs).sum(), logits)
        torch.testing.assert_close(F.normalize(one, dim=1), F.normalize(other, dim=1))

    def test_with_two_classes_it_is_a_squared_hinge_on_the_difference(self):
        logits, labels = draw(2)
        difference = (logits[:, 0] - logits[:, 1]) * (1 - 2 * labels) * math.sqrt(2)
        expected = 0.5 * (0.25 - difference).clamp_min(0.0) ** 2
        torch.testing.assert_close(margin_dot_regression_loss(logits, labels, reduction="none"), expected)

    @forms
    def test_the_mean_of_the_logits_is_nothing_to_it(self, form):
        logits, labels = draw(5)
        loss = margin_dot_regression_loss(logits, labels, form=form)
        torch.testing.assert_close(margin_dot_regression_loss(logits + 5.0, labels, form=form), loss)

    def test_relabelling_the_classes_changes_nothing(self):
        logits, labels = draw(5)
        counts = counts_of(5)
        order = torch.tensor([4, 2, 0, 1, 3])
        renamed, renamed_counts = torch.empty_like(logits), torch.empty_like(counts)
        renamed[:, order], renamed_counts[order] = logits, counts
        torch.testing.assert_close(
            margin_dot_regression_loss(renamed, order[labels], class_counts=renamed_counts),
            margin_dot_regression_loss(logits, labels, class_counts=counts),
        )

    def test_hubers_line_goes_on_from_the_square_with_its_slope(self):
        logits = torch.tensor([[-x, 0.0] for x in (0.1, 0.2, 0.9)], dtype=torch.float64) / math.sqrt(2)
        labels = torch.zeros(3, dtype=torch.long)
        rows = margin_dot_regression_loss(logits, labels, margin=0.1, huber=0.5, reduction="none")
        torch.testing.assert_close(rows, torch.tensor([0.02, 0.045, 0.5 * 1.0 - 0.125], dtype=torch.float64))


CASES = {
    "margin_dot_regression": lambda u, y, **o: margin_dot_regression_loss(
        u, y, class_counts=counts_of(u.shape[1]), **o
    ),
    "ldam": lambda u, y, **o: ldam_loss(u, y, class_counts=counts_of(u.shape[1]), max_margin=2.0, **o),
}
losses = pytest.mark.parametrize("loss", CASES.values(), ids=CASES)


class TestBoth:
    @losses
    @pytest.mark.parametrize("num_classes", [2, 5])
    def test_soft_labels_extend_hard_ones(self, loss, num_classes):
        logits, labels = draw(num_classes)
        weights = torch.rand(num_classes, dtype=torch.float64)
        hard = loss(logits, labels, class_weights=weights)
        soft = loss(logits, F.one_hot(labels, num_classes).double(), class_weights=weights)
        torch.testing.assert_close(hard, soft)

    @losses
    def test_label_smoothing_is_the_smoothed_label(self, loss):
        logits, labels = draw(4)
        smoothed = 0.9 * F.one_hot(labels, 4).double() + 0.1 / 4
        torch.testing.assert_close(loss(logits, labels, label_smoothing=0.1), loss(logits, smoothed))

    @losses
    def test_gradients_agree_with_finite_differences(self, loss):
        logits, labels = draw(4, batch=6)
        soft = torch.rand(6, 4, dtype=torch.float64).softmax(dim=1)
        logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda u: loss(u, labels), logits)
        assert torch.autograd.gradcheck(lambda u: loss(u, soft), logits)

    @losses
    def test_a_batch_is_the_mean_of_its_halves(self, loss):
        logits, labels = draw(5)
        halves = [loss(logits[i::2], labels[i::2]) for i in (0, 1)]
        torch.testing.assert_close(loss(logits, labels), sum(halves) / 2)

    @losses
    def test_half_precision_logits_give_a_float32_loss(self, loss):
        logits, labels = draw(4)
        half = logits.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(half, labels), loss(half.float(), labels))

    @losses
    def test_it_compiles_as_one_graph(self, loss):
        logits, labels = draw(5)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


def test_ldam_is_the_cross_entropy_of_logits_less_the_labels_margin():
    logits, labels = draw(5, scale=4.0)
    counts = counts_of(5)
    wanted = 3.0 * (counts.min() / counts) ** 0.25
    shifted = logits - F.one_hot(labels, 5) * wanted
    torch.testing.assert_close(
        ldam_loss(logits, labels, class_counts=counts, max_margin=3.0), F.cross_entropy(shifted, labels)
    )
    assert wanted[-1] == 3.0


def test_effective_numbers_go_from_even_weights_to_inverse_counts():
    counts = counts_of(6)
    inverse = 1.0 / counts.double()
    torch.testing.assert_close(effective_number_weights(counts, beta=0.0), torch.ones(6, dtype=torch.float64))
    near_one = effective_number_weights(counts, beta=1.0 - 1e-9)
    torch.testing.assert_close(near_one, inverse / inverse.mean(), rtol=1e-5, atol=0)
    weights = effective_number_weights(counts)
    assert (weights.diff() > 0).all() and weights.mean().item() == pytest.approx(1.0)


def test_log_priors_are_those_of_the_counts():
    prior = log_prior([3, 1], torch.zeros(1, 2))
    torch.testing.assert_close(prior.exp(), torch.tensor([0.75, 0.25]))
    with pytest.raises(ValueError, match="one count for each class"):
        log_prior([3, 1], torch.zeros(1, 3))


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_name_makes_a_loss_with_a_gradient(name):
    logits, labels = draw(3)
    logits = logits.float().requires_grad_()
    (gradient,) = torch.autograd.grad(make_loss({"name": name}, class_counts=[9, 3, 1])(logits, labels), logits)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "margin_dot_regression", "form": "cube"}, "'cube'"),
        ({"name": "margin_dot_regression", "huber": -1.0}, "`huber`"),
        ({"name": "margin_dot_regression", "temperature": -1.0}, "`temperature`"),
        ({"name": "ldam", "max_margin": -1.0}, "`max_margin`"),
        ({"name": "ldam", "class_weights": "inverse"}, "'effective_number'"),
    ],
)
def test_options_that_cannot_be_are_named_when_the_loss_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loss(settings, class_counts=[9, 3, 1])


def test_class_weights_by_name_are_effective_numbers():
    logits, labels = draw(3)
    named = make_loss({"name": "ldam", "class_weights": "effective_number"}, class_counts=[9, 3, 1])(logits, labels)
    weights = effective_number_weights([9, 3, 1])
    torch.testing.assert_close(named, ldam_loss(logits, labels, class_counts=[9, 3, 1], class_weights=weights))
