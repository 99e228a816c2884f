"""Laws of the experiments beside compare.py: remedies are what they are called, tables say what the runs hold."""

from __future__ import annotations

import json

import grow_table
import numpy as np
import pytest
import refit_table
import torch
import variants_table
from comparison import pack_rows


def test_the_retrained_classifier_is_at_its_optimum_and_counts_classes_alike():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 5, generator=generator)
    y = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 8, 3]))
    x = (centers[y] + torch.randn(51, 5, generator=generator)).double()
    counts = torch.bincount(y).double()
    weight, bias = refit_table.retrained(x, y, counts, 1e-2)
    probabilities = (x @ weight.T + bias).softmax(
        dim=1
    )  # whose weighted sums are those of the labels, where the bias is free
    assert torch.allclose((probabilities / counts[y, None]).sum(dim=0), torch.ones(3).double(), atol=1e-4)


def test_the_table_of_refits_has_means_over_seeds_and_the_paired_gain(tmp_path):
    for seed, (before, after) in enumerate([([1, 0, 0, 1], [1, 1, 0, 1]), ([1, 1, 0, 0], [1, 1, 1, 0])]):
        correct = {name: pack_rows(np.array(before, bool)) for name in refit_table.REMEDIES}
        correct["refit"] = pack_rows(np.array(after, bool))
        scores = {name: {"balanced_accuracy": 0.5, "tail_third": 0.25} for name in refit_table.REMEDIES}
        scores["refit"] = {"balanced_accuracy": 0.75, "tail_third": 0.5}
        record = {"set": "digits", "kind": "linear", "seed": seed, "scores": scores, "correct": correct}
        record |= {"train_seconds": 60.0, "refit_seconds": 4.0}
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"{seed}.json").write_text(json.dumps(record))
    (tmp_path / "labels_digits.json").write_text("[0, 0, 1, 1]")
    table = refit_table.make_table(tmp_path)
    assert "| digits | linear, cross-entropy | 2 | 50.0 ± 0.0 |" in table and "| 75.0 ± 0.0 | +25.0 [" in table.replace(
        "**", ""
    )
    assert "| 60 + 4 |" in table


def test_scores_of_growing_are_recalls_of_old_and_new_classes():
    logits = torch.eye(4)[[0, 1, 2, 0, 1]]
    found = grow_table.scored(logits, torch.tensor([0, 1, 2, 3, 3]), ["a", "b", "c", "d"], {"c", "d"})
    assert (found["old"], found["new"], found["all"]) == (1.0, 0.5, 0.75)
    assert found["harmonic"] == pytest.approx(2 / 3)


def test_a_head_trained_on_the_new_rows_alone_forgets():
    x = torch.eye(4).double()
    weight, bias = grow_table.trained_on(
        x[:2], torch.zeros(2).double(), x[2:].repeat(5, 1), torch.tensor([2, 3] * 5), 4
    )
    assert weight.shape == (4, 4) and (x[2:] @ weight.T + bias).argmax(dim=1).tolist() == [2, 3]
    assert bias[2:].min() > bias[:2].max()


def test_the_table_of_growing_averages_draws_then_seeds(tmp_path):
    scores = {
        f"extend-5-{draw}": {"old": 0.8, "new": 0.2 * draw, "harmonic": 0.4, "all": 0.6, "seconds": 3.0}
        for draw in range(3)
    }
    (tmp_path / "runs").mkdir()
    for seed in range(2):
        record = {"set": "clinc150", "seed": seed, "new_share": 0.2, "scores": scores}
        (tmp_path / "runs" / f"{seed}.json").write_text(json.dumps(record))
    row = "| clinc150 | 0.2 | 5 | **extend** | 2 | 80.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 | 60.0 ± 0.0 | 3 |"
    assert row in grow_table.make_table(tmp_path)


def test_the_table_of_variants_has_their_paired_distance_from_the_default(tmp_path):
    scores = {("default", 0): 0.8, ("default", 1): 0.6, ("once", 0): 0.7, ("once", 1): 0.4, ("once", 2): 0.9}
    for (variant, seed), score in scores.items():
        record = {"set": "clinc150", "variant": variant, "seed": seed, "trained": "9", "rate": "1e-3", "seconds": 60.0}
        record |= {"megabytes": 1500.0, "balanced_accuracy": score, "tail_third": score / 2}
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"{variant}-{seed}.json").write_text(json.dumps(record))
    lines = variants_table.make_table(tmp_path).splitlines()
    assert lines[2] == "| clinc150 | **the default** | 9 | 1e-3 | 2 | 70.0 ± 14.1 | - | 35.0 ± 7.1 | 60 | 1,500 |"
    assert (
        lines[3].startswith("| clinc150 | aligned once | 9 | 1e-3 | 3 | 66.7 ± 25.2 | -15.0 ± 7.1 | ")
        and len(lines) == 4
    )
