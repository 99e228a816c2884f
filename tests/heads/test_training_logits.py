"""Each training row is scored by the head that would have been set without it."""

from __future__ import annotations

import copy

import pytest
import torch
from small_run import make_model, make_trainer, weights

from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.training_logits import LeftOutRows, TrainingLogits


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
        left = rows.logits(plain.clone(), flat, ids, labels)
    for row, (number, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        expected = plain[row].clone()
        if number in (11, 30):
            place = rows.row_ids.tolist().index(number)
            expected[..., label] += flat[row] @ rows.weight[place] + rows.bias[place]
        torch.testing.assert_close(left[row], expected)


def test_two_rows_of_one_number_are_refused():
    with pytest.raises(ValueError, match=r"`row_id` \(=4\) is the number of two training rows"):
        LeftOutRows.of(torch.tensor([4, 1, 4]), torch.zeros(3, 5), torch.zeros(3))


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


def test_what_is_written_into_a_checkpoint_comes_back():
    heads, again = (TrainingLogits({"a.b": torch.nn.Linear(5, 3)}) for _ in range(2))
    heads.left_out["a.b"], _ = held()
    again.load_tensors(heads.tensors(), torch.device("cpu"))
    for name, value in vars(heads.left_out["a.b"]).items():
        assert torch.equal(getattr(again.left_out["a.b"], name), value)
    again.load_tensors({}, torch.device("cpu"))
    assert again.left_out == {}


class TestTrainer:
    def loss(self, trainer, batch):
        trainer.model.eval()  # no dropout
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, dict(batch)).item()

    def batch(self, trainer, size=16):
        return trainer.data_collator([trainer.train_dataset[row] for row in range(size)])

    def test_the_loss_of_training_is_that_of_the_rows_left_out(self, tmp_path):
        loss = {"name": "margin_dot_regression", "margin": 3.0}  # more than any row has
        trainer = make_trainer(tmp_path / "run", model=make_model(head="etf", loss=loss))
        trainer.align()
        batch = self.batch(trainer)
        ((path, head),) = trainer.heads.items()
        features = []
        hook = head.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        hook.remove()
        rows = trainer._training_logits.left_out[path]
        left = rows.logits(logits.clone(), features[0], batch["row_id"], batch["labels"])
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

    @pytest.mark.slow
    def test_a_compiled_model_trains_as_one_that_is_not(self, tmp_path):
        trained = []
        for name, settings in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
            trainer = make_trainer(tmp_path / name, dropout=0.0, load_best_model_at_end=False, **settings)
            trainer.train()
            trained.append(weights(trainer))
        for name, value in trained[0].items():
            torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-4)

    def test_a_head_that_was_aligned_before_is_set_as_this_run_would(self, tmp_path, capsys):
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1)
        align_head(trainer.model, [self.batch(trainer, len(trainer.train_dataset))], frame="means")
        trainer.train()
        assert "means frame is set anew" in capsys.readouterr().out
        assert trainer._training_logits.left_out
        kept = make_trainer(tmp_path / "kept", model=trainer.model, num_train_epochs=1, realign_epochs=0)
        before = next(iter(kept.heads.values())).weight.clone()
        kept.train()
        assert torch.equal(next(iter(kept.heads.values())).weight, before)
        assert not kept._training_logits.left_out

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
