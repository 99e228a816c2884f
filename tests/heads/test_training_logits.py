"""Each training row is scored by the head that would have been set without it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from small_run import make_model, make_trainer, weights

from etf_adapt.geometry.frames import LEAVABLE, NEED_INTERCEPT, closed_form_vectors, metric_root
from etf_adapt.geometry.leave_one_out import left_out_changes
from etf_adapt.geometry.statistics import ClassStatistics
from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.training_logits import FeatureLengths, LeftOutRows, TrainingLogits

COUNTS = (9, 4, 3, 2)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    means = 2.0 * torch.randn(len(COUNTS), 5, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(len(labels), 5, generator=generator, dtype=torch.float64) + 1.0, labels


@pytest.mark.parametrize(
    ("frame", "intercept"),
    [(frame, True) for frame in LEAVABLE] + [(frame, False) for frame in LEAVABLE if frame not in NEED_INTERCEPT],
)
def test_a_row_left_out_is_one_of_a_class_whose_mean_is_that_of_the_others(rows, frame, intercept, monkeypatch):
    """The slow reference sets all rows of the head again, with covariances, centre and shrinkage of the whole."""
    features, labels = rows
    whole = ClassStatistics.of(features, labels, len(COUNTS))
    weight, bias = closed_form_vectors(whole, frame, penalty=0.3, intercept=intercept)
    change, bias_change = left_out_changes(whole, features, labels, frame, penalty=0.3, intercept=intercept)
    for name in ("within", "center", "shrinkage"):
        value = getattr(whole, name)
        monkeypatch.setattr(ClassStatistics, name, property(lambda self, value=value: value))
    between = whole.between(centered=intercept)
    monkeypatch.setattr(ClassStatistics, "between", lambda self, *, centered: between)
    own = torch.arange(len(COUNTS))
    for row, label in enumerate(labels):
        keep = torch.arange(len(labels)) != row
        part = ClassStatistics.of(features[keep], labels[keep], len(COUNTS))
        slow, slow_bias = closed_form_vectors(part, frame, penalty=0.3, intercept=intercept)
        # Rows are centred over the classes: against another class, the changed row has moved by what it changed.
        moved = (slow[label] - slow[own != label]) - (weight[label] - weight[own != label])
        torch.testing.assert_close(moved, change[row].expand_as(moved))
        moved = (slow_bias[label] - slow_bias[own != label]) - (bias[label] - bias[own != label])
        torch.testing.assert_close(moved, bias_change[row].expand_as(moved))


def test_what_cannot_be_left_out_is_refused(rows):
    features, labels = rows
    statistics = ClassStatistics.of(features, labels, len(COUNTS))
    with pytest.raises(ValueError, match=r"`frame` \(='rotated'\)"):
        left_out_changes(statistics, features, labels, "rotated")
    alone = ClassStatistics.of(features[:-1], labels[:-1], len(COUNTS))
    with pytest.raises(ValueError, match="Class 3 has one row: it cannot be left out"):
        left_out_changes(alone, features[:-1], labels[:-1], "means")


def held():
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([30, 4, 11])
    return LeftOutRows.of(ids, torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)), ids


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3)], ids=["linear", "tokens", "convolution"])
def test_only_the_logit_of_the_own_class_of_rows_that_are_held_changes(shape):
    rows, _ = held()
    ids, labels = torch.tensor([11, 5, 30, 99]), torch.tensor([2, 0, 1, 1])
    if len(shape) == 3:
        head = torch.nn.Conv2d(5, 3, 1)
        features = torch.randn(4, 5, *shape[1:])
        flat, plain = features.movedim(1, -1), head(features).movedim(1, -1)
        logits = TrainingLogits({"head": head})
        logits.left_out["head"] = rows
        with logits.of(labels, ids):
            left = head(features).movedim(1, -1)
    else:
        head = torch.nn.Linear(5, 3)
        flat = torch.randn(*shape, 5)
        plain = head(flat)
        left = rows.logits(plain, flat, ids, labels)
    for row, (number, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        expected = plain[row].clone()
        if number in (11, 30):
            place = rows.row_ids.tolist().index(number)
            expected[..., label] += flat[row] @ rows.weight[place] + rows.bias[place]
        torch.testing.assert_close(left[row], expected)


def test_two_rows_of_one_number_are_refused():
    with pytest.raises(ValueError, match=r"`row_id` \(=4\) is the number of two training rows"):
        LeftOutRows.of(torch.tensor([4, 1, 4]), torch.zeros(3, 5), torch.zeros(3))


def test_lengths_are_float32_under_autocast():
    lengths = FeatureLengths(torch.zeros(5), torch.eye(5), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert lengths.relative(torch.randn(2, 5)).dtype == torch.float32


def test_a_head_scores_as_it_is_but_for_a_batch_that_is_named():
    head = torch.nn.Linear(5, 3)
    names = list(head.state_dict())
    heads = TrainingLogits({"head": head})
    heads.left_out["head"], ids = held()
    features, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    plain = torch.nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(head(features), plain)
    with heads.of(labels, ids):
        assert not torch.equal(head(features), plain)
        assert torch.equal(head(features[:2]), plain[:2]), "part of a batch: whose rows these are is not known"
    assert torch.equal(head(features), plain) and list(head.state_dict()) == names
    assert torch.equal(copy.deepcopy(head)(features), plain)


@pytest.mark.parametrize("root", [None, 2.0 * torch.eye(5)], ids=["means", "whitened"])
def test_what_is_written_into_a_checkpoint_comes_back(root):
    heads, again = (TrainingLogits({"a.b": torch.nn.Linear(5, 3)}) for _ in range(2))
    heads.left_out["a.b"], ids = held()
    heads.lengths["a.b"] = FeatureLengths(torch.ones(5), root, 0.3)
    again.load_tensors(heads.tensors(), torch.device("cpu"))
    features = torch.randn(3, 5)
    assert torch.equal(again.left_out["a.b"].changes(features, ids), heads.left_out["a.b"].changes(features, ids))
    assert torch.equal(again.lengths["a.b"].relative(features), heads.lengths["a.b"].relative(features))
    again.load_tensors({}, torch.device("cpu"))
    assert again.left_out == again.lengths == {}


@pytest.mark.parametrize("intercept", [True, False])
def test_logits_over_the_lengths_are_cosines_in_the_metric(rows, intercept):
    features, labels = rows
    statistics = ClassStatistics.of(features, labels, len(COUNTS))
    weight, bias = closed_form_vectors(statistics, "whitened", penalty=0.3, intercept=intercept)
    root = metric_root(statistics, "whitened", penalty=0.3, intercept=intercept)
    center = statistics.center if intercept else torch.zeros(5, dtype=torch.float64)
    matrix = statistics.within + 0.3 * statistics.within.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(matrix))
    lengths = FeatureLengths(center, root, 1.0).to(torch.device("cpu")).relative(features)
    white, means = (features - center) @ root.T, (statistics.means - center) @ root.T
    cosines = torch.nn.functional.normalize(white, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    logits = (features @ weight.T + bias) / lengths.unsqueeze(1)
    torch.testing.assert_close(logits.float(), (cosines - cosines.mean(dim=1, keepdim=True)).float())


@pytest.mark.parametrize("frame", ["discriminant", "ridge", "nearest_mean"])
def test_frames_whose_rows_differ_in_length_have_no_metric(rows, frame):
    with pytest.raises(ValueError, match="differ in length"):
        metric_root(ClassStatistics.of(*rows, len(COUNTS)), frame)


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3)], ids=["linear", "tokens", "convolution"])
def test_logits_are_divided_by_the_length_of_their_feature(shape):
    head = torch.nn.Conv2d(5, 3, 1) if len(shape) == 3 else torch.nn.Linear(5, 3)
    features = torch.randn(4, 5, *shape[1:]) if len(shape) == 3 else torch.randn(*shape, 5)
    plain = head(features)
    logits = TrainingLogits({"head": head})
    logits.lengths["head"] = FeatureLengths(torch.ones(5), 2.0 * torch.eye(5), 0.5)
    rows = features.movedim(1, -1) if len(shape) == 3 else features
    lengths = 4.0 * (rows - 1.0).norm(dim=-1)
    with logits.of(torch.zeros(4, dtype=torch.int64)):
        expected = plain / lengths.unsqueeze(1 if len(shape) == 3 else -1)
        torch.testing.assert_close(head(features), expected)
    logits.remove()
    with logits.of(torch.zeros(4, dtype=torch.int64)):
        assert torch.equal(head(features), plain)


class TestTrainer:
    def loss(self, trainer, batch):
        trainer.model.eval()  # no dropout
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, dict(batch)).item()

    def batch(self, trainer):
        return trainer.data_collator([trainer.train_dataset[row] for row in range(16)])

    @pytest.mark.parametrize("over_lengths", [False, True])
    def test_the_loss_of_training_is_that_of_the_rows_left_out(self, tmp_path, over_lengths):
        loss = {"name": "margin_dot_regression", "margin": 3.0}  # more than any row has
        model = make_model(head="etf", loss=loss)
        trainer = make_trainer(tmp_path / "run", model=model, feature_lengths=over_lengths)
        trainer.align()
        batch = self.batch(trainer)
        ((path, head),) = trainer.heads.items()
        features = []
        hook = head.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        hook.remove()
        scores = trainer._training_logits
        left = scores.left_out[path].logits(logits, features[0], batch["row_id"], batch["labels"])
        assert bool(scores.lengths) == over_lengths
        if over_lengths:
            left = left / scores.lengths[path].relative(features[0]).unsqueeze(1)
            logits = logits / scores.lengths[path].relative(features[0]).unsqueeze(1)
        expected = trainer.model.compute_loss_from_logits(left, batch["labels"]).item()
        assert self.loss(trainer, batch) == pytest.approx(expected, rel=1e-6)
        assert expected > trainer.model.compute_loss_from_logits(logits, batch["labels"]).item()

    @pytest.mark.parametrize("settings", [{"leave_one_out": False}, {"mixup": 0.2}, {"frame": "random"}])
    def test_it_can_be_had_without(self, tmp_path, settings):
        trainer = make_trainer(tmp_path / "run", **settings)
        trainer.align()
        batch = self.batch(trainer)
        if "mixup" in settings:  # rows of two classes: neither is left out
            assert trainer._training_logits.left_out
            trainer._soft_labels.is_active = False
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        plain = trainer.model.compute_loss_from_logits(logits, batch["labels"]).item()
        assert self.loss(trainer, batch) == pytest.approx(plain, rel=1e-6)

    def test_a_compiled_model_trains_as_one_that_is_not(self, tmp_path):
        trained = []
        for name, settings in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
            trainer = make_trainer(tmp_path / name, dropout=0.0, load_best_model_at_end=False, **settings)
            trainer.train()
            trained.append(weights(trainer))
        for name, value in trained[0].items():
            torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("frame", ["whitened", "means", "ridge"])
    def test_the_mean_length_of_the_centred_logits_is_one(self, tmp_path, frame):
        options = {"frame": frame, "leave_one_out": False, "feature_lengths": True}
        trainer = make_trainer(tmp_path / "run", dropout=0.0, **options)
        trainer.align()
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
        for labels in (None, batch["labels"]):  # as the layer is, and as training sees it
            with torch.no_grad(), nullcontext() if labels is None else trainer._training_logits.of(labels):
                logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
            centred = logits - logits.mean(dim=1, keepdim=True)
            assert centred.norm(dim=1).mean().item() == pytest.approx(1.0, rel=1e-3)

    def test_a_head_that_was_aligned_before_is_set_as_this_run_would(self, tmp_path, capsys):
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1, feature_lengths=True)
        align_head(trainer.model, trainer._alignment_loader(mixed=False), frame="discriminant")
        trainer.train()
        assert "discriminant frame is set anew" in capsys.readouterr().out
        assert trainer._training_logits.left_out and trainer._training_logits.lengths
        settings = {"num_train_epochs": 1, "realign_epochs": 0, "feature_lengths": True}
        kept = make_trainer(tmp_path / "kept", model=trainer.model, **settings)
        before = next(iter(kept.heads.values())).weight.clone()
        kept.train()
        assert torch.equal(next(iter(kept.heads.values())).weight, before)
        assert not kept._training_logits.left_out and not kept._training_logits.lengths

    def test_a_run_that_ends_in_mid_epoch_ends_aligned(self, tmp_path):
        trainer = make_trainer(tmp_path / "run", max_steps=2, eval_strategy="no", save_strategy="no")
        trainer.train()
        weight = next(iter(trainer.heads.values())).weight.clone()
        trainer.align()
        torch.testing.assert_close(next(iter(trainer.heads.values())).weight, weight)

    def test_a_head_that_learns_moves_away_from_what_was_left_out(self, tmp_path):
        trainer = make_trainer(tmp_path / "run", model=make_model(head="etf", trainable=True))
        trainer.align()
        assert not trainer._training_logits.left_out

    def test_rows_without_numbers_are_scored_as_they_are(self, tmp_path):
        trainer = make_trainer(tmp_path / "run")
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "row_id"}
        trainer.align()
        assert not trainer._training_logits.left_out
