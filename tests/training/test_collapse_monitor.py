"""Laws of the collapse monitor: it measures what the metric does on a fixed sample, and leaves the run as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from small_run import COUNTS, NoisyRows, collate, make_model, make_trainer, weights

from etf_adapt import swap_head
from etf_adapt.metrics.collapse import NeuralCollapse
from etf_adapt.training.collapse_monitor import MEASURES, CollapseMonitor


def monitor(rows, size=18, **options):
    return CollapseMonitor(rows, rows.labels, num_classes=len(COUNTS), max_rows=size, collate=collate, **options)


def test_it_is_the_metric_on_features_and_on_centred_logits():
    rows, model = NoisyRows(COUNTS, seed=0), make_model()
    found = monitor(rows, batch_size=5)
    images = torch.stack([rows[row]["pixel_values"] for row in found.rows])
    labels = rows.labels[found.rows]
    model.eval()
    with torch.no_grad():
        features = model.vit(pixel_values=images).last_hidden_state[:, 0]
        logits = model.classifier(features).double()
    expected = NeuralCollapse(model.classifier.weight, model.classifier.bias).compute(
        features=features, references=labels
    )
    centred = logits - logits.mean(dim=1, keepdim=True)
    in_logits = NeuralCollapse(np.eye(3)).compute(features=centred, references=labels)
    expected = {name: expected[name] for name in MEASURES} | {f"logit_{name}": in_logits[name] for name in MEASURES}
    measured = found.measure(model)
    assert list(measured) == list(expected)
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_sample_is_seeded_and_as_even_as_the_classes_allow():
    rows = NoisyRows(COUNTS, seed=0)
    assert np.bincount(rows.labels[monitor(rows, 30).rows]).tolist() == [10, 10, 7]
    assert np.array_equal(monitor(rows, seed=3).rows, monitor(rows, seed=3).rows)
    assert not np.array_equal(monitor(rows, seed=3).rows, monitor(rows, seed=4).rows)
    labels = np.repeat(np.arange(50), 3)
    some = CollapseMonitor(rows, labels, num_classes=50, max_rows=20)
    assert np.bincount(np.bincount(labels[some.rows], minlength=50)).tolist() == [40, 0, 10]


def test_where_nothing_can_be_measured_it_says_nothing():
    rows = NoisyRows((9, 1, 1), seed=0)
    assert monitor(rows).measure(make_model()) == {}
    two_heads = swap_head(timm.create_model("levit_128s"), 3)
    even = NoisyRows((9, 9, 9), seed=0)
    assert CollapseMonitor(even, even.labels, num_classes=3, max_rows=9).measure(two_heads) == {}


@pytest.mark.parametrize("kind", ["cosine", "paper", "linear"])
def test_every_kind_of_head_is_measured(kind):
    found = monitor(NoisyRows(COUNTS, seed=0)).measure(make_model(head=kind))
    assert all(value is not None and np.isfinite(value) for value in found.values()) and len(found) == 8


def test_a_head_that_is_a_convolution_is_measured():
    images = [{"x": torch.randn(3, 64, 64), "labels": row % 3} for row in range(12)]
    model = swap_head(timm.create_model("resnetv2_50"), 3)
    assert isinstance(model.head.fc, torch.nn.Conv2d)
    assert len(CollapseMonitor(images, np.arange(12) % 3, num_classes=3, max_rows=12).measure(model)) == 8


def test_a_run_logs_it_and_ends_in_the_same_weights_without_it(tmp_path):
    watched = make_trainer(tmp_path / "a", collapse_rows=512)
    watched.train()
    plain = make_trainer(tmp_path / "b")
    plain.train()
    assert all(torch.equal(one, other) for one, other in zip(weights(watched).values(), weights(plain).values()))
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    names = {f"eval_train_{space}{name}" for space in ("", "logit_") for name in MEASURES}
    assert all(names <= set(entry) for entry in log if "eval_accuracy" in entry)
    assert not any("nc1" in name for entry in plain.state.log_history for name in entry)
