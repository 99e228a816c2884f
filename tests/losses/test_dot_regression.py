"""Laws of dot regression on vertices and on edges: zero at the goal, a pull elsewhere, soft labels that extend hard ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.geometry.simplex import simplex_cosines, simplex_etf, vertex_products
from etf_adapt.losses.dot_regression import DOT_REGRESSION_FORMS, dot_regression_loss, margin_dot_regression_loss
from etf_adapt.losses.softmax import logit_adjusted_loss
from etf_adapt.losses.terms import soft_margins

forms = pytest.mark.parametrize("form", DOT_REGRESSION_FORMS)
balances = pytest.mark.parametrize("balance", ["none", "in_batch"])


def draw(num_classes, batch=32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


def vertex(label, num_classes):
    """Return the vertex of a class in logit space: norm one, centred."""
    centred = torch.eye(num_classes, dtype=torch.float64) - 1.0 / num_classes
    return math.sqrt(num_classes / (num_classes - 1)) * centred[label]


def counts_of(num_classes):
    return torch.logspace(2, 0, num_classes, dtype=torch.float64).round().long()


def margin_loss(logits, labels, **options):
    return margin_dot_regression_loss(logits, labels, class_counts=counts_of(logits.shape[1]), **options)


CASES = {
    "one_sided": dot_regression_loss,
    "sphere": lambda u, y, **options: dot_regression_loss(u, y, form="sphere", **options),
    "margin": margin_loss,
}
losses = pytest.mark.parametrize("loss", CASES.values(), ids=CASES)


class TestAll:
    @losses
    @pytest.mark.parametrize("num_classes", [2, 5])
    def test_soft_labels_extend_hard_ones(self, loss, num_classes):
        logits, labels = draw(num_classes)
        weights = torch.rand(num_classes, dtype=torch.float64)
        hard = loss(logits, labels, class_weights=weights)
        torch.testing.assert_close(loss(logits, F.one_hot(labels, num_classes).double(), class_weights=weights), hard)

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
    def test_a_batch_is_the_mean_of_its_halves_also_with_class_weights(self, loss):
        logits, labels = draw(5)
        weights = torch.rand(5, dtype=torch.float64)
        halves = [loss(logits[i::2], labels[i::2], class_weights=weights) for i in (0, 1)]
        torch.testing.assert_close(loss(logits, labels, class_weights=weights), sum(halves) / 2)

    @losses
    def test_the_mean_of_the_logits_is_nothing_to_it(self, loss):
        logits, labels = draw(7)
        torch.testing.assert_close(loss(logits + 5.0, labels), loss(logits, labels))

    @losses
    def test_half_precision_logits_give_a_float32_loss(self, loss):
        logits, labels = draw(4)
        half = logits.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(half, labels), loss(half.float(), labels))

    @losses
    def test_it_compiles_as_one_graph_with_the_same_value(self, loss):
        logits, labels = draw(5)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


class TestVertices:
    @forms
    @pytest.mark.parametrize("num_classes", [2, 3, 50])
    def test_zero_at_the_vertex_and_two_at_its_antipode(self, form, num_classes):
        labels = torch.arange(num_classes)
        at_vertex = dot_regression_loss(vertex(labels, num_classes), labels, form=form)
        opposite = dot_regression_loss(-vertex(labels, num_classes), labels, form=form)
        assert at_vertex.item() == pytest.approx(0.0, abs=1e-15)
        assert opposite.item() == pytest.approx(2.0)

    def test_sphere_is_half_the_squared_distance_of_the_cosine_from_the_target(self):
        logits, labels = draw(7)
        cosines = simplex_cosines(logits).gather(1, labels.unsqueeze(1)).squeeze(1)
        for target in (1.0, 0.4):
            rows = dot_regression_loss(logits, labels, form="sphere", target=target, reduction="none")
            torch.testing.assert_close(rows, 0.5 * (target - cosines) ** 2)
        with pytest.raises(ValueError, match=r"`target` \(=1.5\) must lie in \(0, 1\]"):
            dot_regression_loss(logits, labels, target=1.5)

    def test_sphere_ignores_the_scale(self):
        logits, labels = draw(7)
        sphere = dot_regression_loss(logits, labels, form="sphere")
        torch.testing.assert_close(dot_regression_loss(30.0 * logits, labels, form="sphere"), sphere)

    @forms
    @balances
    def test_relabelling_the_classes_changes_nothing(self, form, balance):
        logits, labels = draw(5)
        order = torch.tensor([4, 2, 0, 1, 3])
        renamed = torch.empty_like(logits)
        renamed[:, order] = logits
        torch.testing.assert_close(
            dot_regression_loss(renamed, order[labels], form=form, balance=balance),
            dot_regression_loss(logits, labels, form=form, balance=balance),
        )

    def test_the_gradient_of_the_sphere_is_a_pull_along_the_sphere(self):
        logits, labels = draw(6)
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(dot_regression_loss(logits, labels, form="sphere"), logits)
        centred = (logits - logits.mean(dim=1, keepdim=True)).detach()
        target = vertex(labels, 6)
        assert (gradient * centred).sum(dim=1).abs().max() < 1e-12
        for row in range(32):  # in the span of the row and its vertex
            basis = torch.stack([centred[row], target[row]]).T
            residual = gradient[row] - basis @ torch.linalg.lstsq(basis, gradient[row]).solution
            assert residual.norm() < 1e-12
        assert ((gradient * target).sum(dim=1) < 0).all()

    @pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
    def test_the_default_form_pulls_every_row_that_is_not_at_its_vertex(self, num_classes):
        logits, labels = draw(num_classes, batch=200)
        for scale in (0.01, 1.0, 30.0):
            scaled = (scale * logits).requires_grad_()
            rows = dot_regression_loss(scaled, labels, reduction="none")
            (gradient,) = torch.autograd.grad(rows.sum(), scaled)
            away = rows.detach() > 1e-12
            assert away.sum() > 50
            assert (gradient.norm(dim=1)[away] > 0).all()
            assert ((gradient * vertex(labels, num_classes)).sum(dim=1)[away] < 0).all()

    def test_with_two_classes_the_sphere_leaves_wrong_rows_alone(self):
        logits, labels = torch.tensor([[6.0, -6.0]], dtype=torch.float64, requires_grad=True), torch.tensor([1])
        for form, alive in (("sphere", False), ("one_sided", True)):
            (gradient,) = torch.autograd.grad(dot_regression_loss(logits, labels, form=form), logits)
            assert bool(gradient.norm() > 1e-12) is alive

    def test_in_batch_balance_is_the_mean_over_the_present_classes_of_their_means(self):
        logits, labels = draw(6)
        labels[labels == 3] = 0
        rows = dot_regression_loss(logits, labels, form="sphere", reduction="none")
        expected = torch.stack([rows[labels == label].mean() for label in labels.unique()]).mean()
        for given in (labels, F.one_hot(labels, 6).double()):
            loss = dot_regression_loss(logits, given, form="sphere", balance="in_batch")
            torch.testing.assert_close(loss, expected)

    def test_norms_of_the_feature_give_the_papers_loss(self):
        generator = torch.Generator().manual_seed(0)
        vertices = simplex_etf(5, 12, generator=generator, dtype=torch.float64)
        features = torch.randn(9, 12, generator=generator, dtype=torch.float64)
        labels = torch.arange(9) % 5
        cosines = F.cosine_similarity(features, vertices[labels])
        lengths = math.sqrt(5 / 4) * features.norm(dim=1)
        loss = dot_regression_loss(features @ vertices.T, labels, lengths=lengths, form="sphere", reduction="none")
        torch.testing.assert_close(loss, 0.5 * (1.0 - cosines) ** 2)


class TestMargin:
    def test_it_is_half_the_squared_shortfall_of_the_prior_adjusted_margin(self):
        logits, labels = draw(5)
        counts = counts_of(5)
        products, _ = vertex_products(logits)
        scores = products + 0.1 * torch.log(counts / counts.sum())
        expected = (
            0.5
            * (0.7 - soft_margins(scores, temperature=0.2).gather(1, labels[:, None]).squeeze(1)).clamp_min(0.0) ** 2
        )
        options = {"margin": 0.7, "temperature": 0.2, "prior_strength": 0.1}
        torch.testing.assert_close(margin_loss(logits, labels, reduction="none", **options), expected)

    @pytest.mark.parametrize("num_classes", [2, 3, 20])
    def test_a_vertex_has_the_margin_of_an_edge(self, num_classes):
        labels = torch.arange(num_classes)
        reach = num_classes / (num_classes - 1)
        for margin, expected in ((reach - 1e-9, 0.0), (reach + 0.2, 0.02)):
            options = {"margin": margin, "temperature": 0.0, "reduction": "none"}
            rows = margin_dot_regression_loss(vertex(labels, num_classes), labels, **options)
            torch.testing.assert_close(rows, torch.full_like(rows, expected), atol=1e-9, rtol=0)

    @pytest.mark.parametrize("num_classes", [2, 3, 50])
    def test_it_is_still_once_the_margin_is_reached_and_pulls_and_pushes_until_then(self, num_classes):
        logits, labels = draw(num_classes, batch=200, scale=2.0)
        logits.requires_grad_()
        rows = margin_loss(logits, labels, margin=0.5, temperature=0.1, prior_strength=0.1, reduction="none")
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
        shortfall = 3.0 - soft_margins(scores, temperature=0.5).gather(1, labels[:, None])
        torch.testing.assert_close(gradient, -shortfall * math.sqrt(6 / 5) * direction)

    def test_it_pulls_as_logit_adjustment_does(self):
        logits, labels = draw(7)
        logits.requires_grad_()
        options = {"margin": 100.0, "temperature": 0.1, "prior_strength": 0.1, "reduction": "none"}
        (one,) = torch.autograd.grad(margin_loss(logits, labels, **options).sum(), logits)
        scaled = math.sqrt(7 / 6) * logits / 0.1
        theirs = 32 * logit_adjusted_loss(scaled, labels, class_counts=counts_of(7))
        (other,) = torch.autograd.grad(theirs, logits)
        torch.testing.assert_close(F.normalize(one, dim=1), F.normalize(other, dim=1))

    def test_with_two_classes_it_is_a_squared_hinge_on_the_difference(self):
        logits, labels = draw(2)
        difference = (logits[:, 0] - logits[:, 1]) * (1 - 2 * labels) * math.sqrt(2)
        expected = 0.5 * (0.25 - difference).clamp_min(0.0) ** 2
        torch.testing.assert_close(margin_dot_regression_loss(logits, labels, reduction="none"), expected)

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
