"""Laws of the simplex: its Gram matrix, and the cosines of logits with its vertices."""

from __future__ import annotations

import pytest
import torch

from etf_adapt.geometry.simplex import reachable_cosine, simplex_cosines, simplex_etf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (2, 7), (3, 2), (10, 9), (10, 10), (10, 64), (129, 128)])
def test_gram_matrix_is_the_definition(num_classes, dim):
    vertices = simplex_etf(num_classes, dim, generator=generator(), dtype=torch.float64)
    expected = torch.eye(num_classes, dtype=torch.float64) * num_classes / (num_classes - 1) - 1.0 / (num_classes - 1)
    torch.testing.assert_close(vertices @ vertices.T, expected, atol=1e-13, rtol=0)


def test_below_its_dimension_the_frame_stays_centred_and_tight():
    vertices = simplex_etf(100, 16, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(vertices.sum(dim=0), torch.zeros(16, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(vertices.T @ vertices, torch.eye(16, dtype=torch.float64) * 100 / 99)


@pytest.mark.parametrize(("num_classes", "dim"), [(100, 16), (300, 4), (5, 4), (5, 9)])
def test_the_reachable_cosine_is_that_of_the_best_logits_of_a_random_layer(num_classes, dim):
    weight = torch.randn(num_classes, dim, generator=generator(), dtype=torch.float64)
    centred = weight - weight.mean(dim=0)
    basis = torch.linalg.svd(centred, full_matrices=False).U[:, : min(dim, num_classes - 1)]
    vertices = torch.eye(num_classes, dtype=torch.float64) - 1.0 / num_classes
    best = simplex_cosines((basis @ basis.T @ vertices).T).diagonal()  # of the vertices' projections
    assert float((best**2).mean().sqrt()) == pytest.approx(reachable_cosine(num_classes, dim), rel=1e-9)


def test_the_draw_depends_on_the_generator_alone():
    assert torch.equal(simplex_etf(5, 8, generator=generator(3)), simplex_etf(5, 8, generator=generator(3)))
    assert not torch.equal(simplex_etf(5, 8, generator=generator(3)), simplex_etf(5, 8, generator=generator(4)))


def test_the_rotation_is_uniform():
    """No direction is preferred: the mean of a vertex over draws vanishes, as it does not for a uniform QR draw."""
    first = torch.stack([simplex_etf(4, 6, generator=generator(seed))[0] for seed in range(400)])
    assert first.mean(dim=0).norm() < 3 / 400**0.5


def test_cosines_of_logits_are_those_of_the_vertices_in_any_rotation():
    vertices = simplex_etf(6, 11, generator=generator(), dtype=torch.float64)
    features = torch.randn(40, 5, generator=generator(1), dtype=torch.float64) @ vertices[:5]  # in the frame's span
    expected = torch.nn.functional.cosine_similarity(features.unsqueeze(1), vertices.unsqueeze(0), dim=-1)
    torch.testing.assert_close(simplex_cosines(features @ vertices.T), expected)


def test_cosines_ignore_scale_and_mean_and_keep_the_order():
    logits = torch.randn(30, 7, generator=generator(), dtype=torch.float64)
    cosines = simplex_cosines(logits)
    torch.testing.assert_close(simplex_cosines(9.0 * logits + 4.0), cosines)
    assert torch.equal(cosines.argsort(dim=1), logits.argsort(dim=1))
    assert cosines.abs().max() <= 1.0 + 1e-12


def test_equal_logits_have_no_direction():
    assert torch.equal(simplex_cosines(torch.full((2, 4), 3.0)), torch.zeros(2, 4))


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(4, 5, generator=generator()).to(torch.bfloat16)
    torch.testing.assert_close(simplex_cosines(logits), simplex_cosines(logits.float()))


@pytest.mark.parametrize(("num_classes", "dim", "name"), [(1, 4, "num_classes"), (3, 0, "dim")])
def test_errors_name_the_value(num_classes, dim, name):
    with pytest.raises(ValueError, match=rf"`{name}` \(={num_classes if name == 'num_classes' else dim}\)"):
        simplex_etf(num_classes, dim)


def test_the_default_device_of_the_caller_changes_no_frame():
    expected = simplex_etf(4, 6, generator=generator())
    with torch.device("meta"):  # as a GPU would be, on any machine
        frame = simplex_etf(4, 6, generator=generator())
    assert torch.equal(frame, expected)
