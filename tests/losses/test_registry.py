"""Laws of the losses: zero at the vertex, a pull elsewhere, soft labels that extend hard ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etf_adapt.geometry.simplex import simplex_cosines, simplex_etf
from etf_adapt.losses.dot_regression import DOT_REGRESSION_FORMS, dot_regression_loss
from etf_adapt.losses.registry import make_loss
from etf_adapt.losses.softmax import logit_adjusted_loss

forms = pytest.mark.parametrize("form", DOT_REGRESSION_FORMS)


def draw(num_classes, batch=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


def vertex(label, num_classes):
    """Return the vertex of a class in logit space: length one, centred."""
    centred = torch.eye(num_classes, dtype=torch.float64) - 1.0 / num_classes
    return math.sqrt(num_classes / (num_classes - 1)) * centred[label]


@forms
@pytest.mark.parametrize("num_classes", [2, 3, 50])
def test_zero_at_the_vertex_and_two_at_its_antipode(form, num_classes):
    labels = torch.arange(num_classes)
    at_vertex = dot_regression_loss(vertex(labels, num_classes), labels, form=form)
    opposite = dot_regression_loss(-vertex(labels, num_classes), labels, form=form)
    assert at_vertex.item() == pytest.approx(0.0, abs=1e-15)
    assert opposite.item() == pytest.approx(2.0)


def test_sphere_is_half_the_squared_distance_of_the_cosine_from_one():
    logits, labels = draw(7)
    cosines = simplex_cosines(logits).gather(1, labels.unsqueeze(1)).squeeze(1)
    rows = dot_regression_loss(logits, labels, form="sphere", reduction="none")
    torch.testing.assert_close(rows, 0.5 * (cosines - 1.0) ** 2)


def test_a_cosine_that_can_be_reached_is_a_target():
    logits, labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]).double(), torch.tensor([0, 2, 1])
    cosines = simplex_cosines(logits).gather(1, labels.unsqueeze(1)).squeeze(1)
    loss = dot_regression_loss(logits, labels, form="sphere", target=0.4, reduction="none")
    torch.testing.assert_close(loss, 0.5 * (0.4 - cosines) ** 2)
    with pytest.raises(ValueError, match=r"`target` \(=1.5\) must lie in \(0, 1\]"):
        dot_regression_loss(logits, labels, target=1.5)


def test_sphere_ignores_scale_and_every_form_the_mean():
    logits, labels = draw(7)
    for form in DOT_REGRESSION_FORMS:
        loss = dot_regression_loss(logits, labels, form=form)
        torch.testing.assert_close(dot_regression_loss(logits + 5.0, labels, form=form), loss)
    sphere = dot_regression_loss(logits, labels, form="sphere")
    torch.testing.assert_close(dot_regression_loss(30.0 * logits, labels, form="sphere"), sphere)


@forms
@pytest.mark.parametrize("balance", ["none", "in_batch"])
def test_relabelling_the_classes_changes_nothing(form, balance):
    logits, labels = draw(5)
    order = torch.tensor([4, 2, 0, 1, 3])
    renamed = torch.empty_like(logits)
    renamed[:, order] = logits
    torch.testing.assert_close(
        dot_regression_loss(renamed, order[labels], form=form, balance=balance),
        dot_regression_loss(logits, labels, form=form, balance=balance),
    )


def test_the_gradient_of_the_sphere_is_a_pull_along_the_sphere():
    logits, labels = draw(6)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(dot_regression_loss(logits, labels, form="sphere"), logits)
    centred = (logits - logits.mean(dim=1, keepdim=True)).detach()
    target = vertex(labels, 6)
    torch.testing.assert_close(
        (gradient * centred).sum(dim=1), torch.zeros(32, dtype=torch.float64), atol=1e-12, rtol=0
    )
    for row in range(32):  # in the span of the row and its vertex
        basis = torch.stack([centred[row], target[row]]).T
        residual = gradient[row] - basis @ torch.linalg.lstsq(basis, gradient[row]).solution
        assert residual.norm() < 1e-12
    assert ((gradient * target).sum(dim=1) < 0).all()


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_the_default_form_pulls_every_row_that_is_not_at_its_vertex(num_classes):
    logits, labels = draw(num_classes, batch=200)
    for scale in (0.01, 1.0, 30.0):
        scaled = (scale * logits).requires_grad_()
        rows = dot_regression_loss(scaled, labels, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), scaled)
        away = rows.detach() > 1e-12
        assert away.sum() > 50
        assert (gradient.norm(dim=1)[away] > 0).all()
        assert ((gradient * vertex(labels, num_classes)).sum(dim=1)[away] < 0).all()


def test_with_two_classes_the_other_forms_leave_wrong_rows_alone():
    logits, labels = torch.tensor([[6.0, -6.0]], dtype=torch.float64), torch.tensor([1])
    for form, alive in (("sphere", False), ("ball", False), ("one_sided", True)):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(dot_regression_loss(logits, labels, form=form), logits)
        assert bool(gradient.norm() > 1e-12) is alive


@forms
@pytest.mark.parametrize("balance", ["none", "in_batch"])
def test_soft_labels_extend_hard_ones(form, balance):
    logits, labels = draw(5)
    weights = torch.rand(5, dtype=torch.float64)
    options = {"form": form, "balance": balance, "class_weights": weights}
    hard = dot_regression_loss(logits, labels, **options)
    soft = dot_regression_loss(logits, F.one_hot(labels, 5).double(), **options)
    torch.testing.assert_close(hard, soft)


@forms
def test_gradients_agree_with_finite_differences(form):
    logits, labels = draw(4, batch=6)
    soft = torch.rand(6, 4, dtype=torch.float64).softmax(dim=1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: dot_regression_loss(u, labels, form=form), logits)
    assert torch.autograd.gradcheck(lambda u: dot_regression_loss(u, soft, form=form), logits)


@forms
def test_a_batch_is_the_mean_of_its_halves_also_with_class_weights(form):
    logits, labels = draw(5)
    weights = torch.rand(5, dtype=torch.float64)
    whole = dot_regression_loss(logits, labels, form=form, class_weights=weights)
    halves = [dot_regression_loss(logits[i::2], labels[i::2], form=form, class_weights=weights) for i in (0, 1)]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_in_batch_balance_is_the_mean_over_the_present_classes_of_their_means():
    logits, labels = draw(6)
    labels[labels == 3] = 0
    rows = dot_regression_loss(logits, labels, form="sphere", reduction="none")
    by_class = [rows[labels == label].mean() for label in labels.unique()]
    torch.testing.assert_close(
        dot_regression_loss(logits, labels, form="sphere", balance="in_batch"), torch.stack(by_class).mean()
    )


def test_lengths_of_the_feature_give_the_papers_loss():
    generator = torch.Generator().manual_seed(0)
    vertices = simplex_etf(5, 12, generator=generator, dtype=torch.float64)
    features = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    labels = torch.arange(9) % 5
    cosines = F.cosine_similarity(features, vertices[labels])
    lengths = math.sqrt(5 / 4) * features.norm(dim=1)
    loss = dot_regression_loss(features @ vertices.T, labels, lengths=lengths, form="sphere", reduction="none")
    torch.testing.assert_close(loss, 0.5 * (1.0 - cosines) ** 2)
    unit = make_loss({"name": "dot_regression", "form": "sphere", "unit_features": True})
    torch.testing.assert_close(unit(F.normalize(features) @ vertices.T, labels), loss.mean())


def test_label_smoothing_is_the_smoothed_label():
    logits, labels = draw(4)
    smoothed = 0.9 * F.one_hot(labels, 4).double() + 0.1 / 4
    torch.testing.assert_close(
        dot_regression_loss(logits, labels, label_smoothing=0.1), dot_regression_loss(logits, smoothed)
    )


def test_half_precision_logits_give_a_float32_loss():
    logits, labels = draw(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dot_regression_loss(logits.to(torch.bfloat16), labels)
    torch.testing.assert_close(loss, dot_regression_loss(logits.to(torch.bfloat16).float(), labels))


def test_logit_adjustment_with_even_counts_is_cross_entropy():
    logits, labels = draw(4)
    torch.testing.assert_close(
        logit_adjusted_loss(logits, labels, class_counts=[7] * 4), F.cross_entropy(logits, labels)
    )


def test_logit_adjustment_is_the_balanced_softmax():
    logits, labels = draw(3)
    counts = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    weighted = counts * logits.exp()
    expected = -(weighted.gather(1, labels[:, None]).squeeze(1) / weighted.sum(dim=1)).log().mean()
    torch.testing.assert_close(logit_adjusted_loss(logits, labels, class_counts=counts), expected)


def test_settings_make_each_loss():
    logits, labels = draw(3)
    logits = logits.float()
    adjusted = make_loss({"name": "logit_adjusted", "scale": 2.0, "tau": 0.5}, class_counts=[5, 3, 1])
    torch.testing.assert_close(
        adjusted(logits, labels), logit_adjusted_loss(2.0 * logits, labels, class_counts=[5, 3, 1], tau=0.5)
    )
    smoothed = make_loss({"name": "cross_entropy", "label_smoothing": 0.1})
    torch.testing.assert_close(smoothed(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "focal"}, "'focal'"),
        ({"name": "dot_regression", "form": "cube"}, "'cube'"),
        ({"name": "dot_regression", "tau": 1.0}, "no option 'tau'"),
        ({"name": "logit_adjusted"}, "class_counts"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loss(settings)


def test_labels_that_do_not_fit_are_named():
    logits, _ = draw(3, batch=2)
    with pytest.raises(ValueError, match="from 0 to 3"):
        dot_regression_loss(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="shape"):
        dot_regression_loss(logits, torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"class_counts\[1\]"):
        make_loss({"name": "logit_adjusted"}, class_counts=[3, 0, 1])


def test_the_loss_compiles_as_one_graph_with_the_same_value():
    logits, labels = draw(5)
    compiled = torch.compile(dot_regression_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), dot_regression_loss(logits, labels))
