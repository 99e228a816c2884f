"""Each training row is scored by the head that would have been set without it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from slow_cases import rest_slow
from small_run import make_model, make_trainer, weights

from etf_adapt.geometry.closed_form import closed_form_vectors
from etf_adapt.heads import alignment
from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.layers import ETFHead
from etf_adapt.heads.seen_rows import Form, SeenRows, mean_norm
from etf_adapt.heads.training_logits import TrainingLogits
from etf_adapt.training import aligning


def held(num_classes=3, width=5):
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.tensor([30, 4, 11, 5, 99, 7]), torch.tensor([1, 1, 2, 0, 2, 2])
    features = torch.randn(6, width, generator=generator)
    form = Form("whitened", 1.0, True, 0.5)
    return SeenRows.of(ids, labels, features, torch.zeros(num_classes, width), form)


def test_a_head_scores_as_it_is_but_for_a_batch_that_is_named():
    head = torch.nn.Linear(5, 3)
    names = list(head.state_dict())
    heads = TrainingLogits({"head": head})
    heads.rows["head"] = rows = held()
    ids, labels = rows.row_ids[[0, 4, 2]], rows.labels[[0, 4, 2]]
    features = torch.randn(3, 5)
    plain = torch.nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(head(features), plain)
    with heads.of(labels, ids):
        assert not torch.equal(head(features), plain)
        assert torch.equal(head(features[:2]), plain[:2]), "part of a batch: whose rows these are is not known"
        heads.leaves_out = False
        assert torch.equal(head(features), plain)
    assert torch.equal(head(features), plain) and list(head.state_dict()) == names
    assert torch.equal(copy.deepcopy(head)(features), plain)


def test_the_rows_are_in_no_copy_of_a_head():
    head = torch.nn.Linear(5, 3)
    heads = TrainingLogits({"head": head})
    before = len(pickle.dumps(head))
    heads.rows["head"] = held()
    assert len(pickle.dumps(head)) == before
    (hook,) = copy.deepcopy(head)._forward_hooks.values()
    assert hook.func.__self__.rows == {} and heads.rows.keys() == {"head"}


@pytest.mark.parametrize("notes", [True, False])
def test_what_is_written_into_a_checkpoint_comes_back(notes):
    head = torch.nn.Linear(5, 3)
    heads, again = TrainingLogits({"a.b": head}), TrainingLogits({"a.b": torch.nn.Linear(5, 3)})
    heads.rows["a.b"] = rows = held()
    heads.notes = notes
    with heads.of(rows.labels[:2], rows.row_ids[:2]):
        head(torch.randn(2, 5))
    again.restore(heads.tensors(), heads.forms(), torch.device("cpu"))
    (restored,) = again.rows.values()
    assert restored.form == rows.form and restored.tensors().keys() == rows.tensors().keys()
    assert ("pending_ids" in rows.tensors()) is notes
    for name, value in rows.tensors().items():
        assert torch.equal(restored.tensors()[name], value)
    heads, restored_head = (ETFHead(5, 3) for _ in range(2))
    assert rows.realign(heads) is restored.realign(restored_head) is notes
    if notes:
        assert torch.equal(heads.weight, restored_head.weight) and torch.equal(heads.bias, restored_head.bias)
    again.restore({}, {}, torch.device("cpu"))
    assert again.rows == {}


def test_a_head_that_scores_each_token_leaves_rows_out_and_notes_nothing():
    head = torch.nn.Linear(5, 3)
    heads = TrainingLogits({"head": head})
    heads.rows["head"] = rows = held()
    with heads.of(rows.labels, rows.row_ids):
        head(torch.randn(6, 7, 5))
    assert rows.gather() == []


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
        rows = trainer._training_logits.rows[path]
        left = rows.logits(logits.clone(), features[0], batch["row_id"], batch["labels"])
        expected = trainer.model.compute_loss_from_logits(left, batch["labels"]).item()
        assert self.loss(trainer, batch) == pytest.approx(expected, rel=1e-6)
        assert expected > trainer.model.compute_loss_from_logits(logits, batch["labels"]).item()

    def test_a_fixed_cosine_head_is_aligned_by_passes(self, tmp_path):
        model = make_model(head="cosine", trainable=False)
        assert make_trainer(tmp_path, model=model).realignment == "epochs"
        with pytest.raises(ValueError, match="is for heads that are linear layers: set it to epochs or never"):
            make_trainer(tmp_path, model=model, realign="steps")

    @pytest.mark.parametrize("settings", [{"leave_one_out": False}, {"mixup": 0.2}, {"frame": "random"}])
    def test_it_can_be_had_without(self, tmp_path, settings):
        trainer = make_trainer(tmp_path / "run", **settings)
        trainer.align()
        batch = self.batch(trainer)
        if "mixup" in settings:  # rows of two classes: neither is left out
            assert trainer._training_logits.rows
            trainer._soft_labels.is_active = False
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        plain = trainer.model.compute_loss_from_logits(logits, batch["labels"]).item()
        assert self.loss(trainer, batch) == pytest.approx(plain, rel=1e-6)

    @pytest.mark.slow
    def test_a_compiled_model_trains_as_one_that_is_not(self, tmp_path):
        trained = []
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for name, settings in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"})):
            trainer = make_trainer(tmp_path / name, drop=0.0, load_best_model_at_end=False, **settings)
            trainer.train()
            trained.append(weights(trainer))
        for name, value in trained[0].items():
            torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 2, "one before and one behind the head, for all twelve steps"

    def test_a_head_that_was_aligned_before_is_set_as_this_run_would(self, tmp_path, capsys):
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1)
        align_head(trainer.model, [self.batch(trainer, len(trainer.train_dataset))], frame="means")
        trainer.train()
        assert "means frame is set anew" in capsys.readouterr().out
        assert trainer._training_logits.rows
        kept = make_trainer(tmp_path / "kept", model=trainer.model, num_train_epochs=1, realign="never")
        before = next(iter(kept.heads.values())).weight.clone()
        kept.train()
        assert torch.equal(next(iter(kept.heads.values())).weight, before)
        assert not kept._training_logits.rows

    def test_a_run_that_ends_in_mid_epoch_ends_aligned(self, tmp_path):
        trainer = make_trainer(tmp_path / "run", max_steps=2, eval_strategy="no", save_strategy="no")
        trainer.train()
        ((path, head),) = trainer.heads.items()
        (found,) = trainer.read(trainer.alignment_dataset, "aligning the head").statistics
        form = trainer._training_logits.rows[path].form
        weight, _ = closed_form_vectors(found, form.frame, penalty=form.penalty)
        torch.testing.assert_close(head.weight.double(), form.scale * weight, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chooses", [False, True])
    @pytest.mark.parametrize("sampler", rest_slow(["instance", "balanced"], fast=1))
    def test_passes_read_a_part_where_steps_read_the_rest(self, tmp_path, monkeypatch, sampler, chooses):
        monkeypatch.setattr(aligning, "MIN_READ_ROWS", 20)
        read = []

        def counted(self, dataset, what, max_rows=0, read_rows=aligning.AligningTrainer.read):
            read.append(len(dataset))
            return read_rows(self, dataset, what, max_rows)

        monkeypatch.setattr(aligning.AligningTrainer, "read", counted)
        settings = {"sampler": sampler, "load_best_model_at_end": chooses}
        trainer = make_trainer(tmp_path / "run", learning_rate=1e-12, num_train_epochs=3, **settings)
        trainer.train()
        assert trainer.alignment["rows"] == 29, "a third of 88, and all 7 of the rarest class"
        assert len(read) == (3 if chooses else 1)
        if sampler == "balanced" and chooses:
            assert 29 < max(read) < 80, "and what was not drawn since"
        else:
            assert {*read} == {29}
        # Features that stand still: what was read at any time is what one pass reads.
        rows = next(iter(trainer._training_logits.rows.values()))
        (whole,) = trainer.read(trainer.alignment_dataset, "").statistics
        for name, value in vars(rows.statistics).items():
            torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(("asked", "kept"), [(None, 1.0), (0.3, 0.3)])
    def test_in_training_no_penalty_is_chosen_by_rows_that_the_features_have_seen(self, tmp_path, capsys, asked, kept):
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1, frame_penalty=asked)
        trainer.train()
        assert f"penalty {asked or 0.01}" in capsys.readouterr().out, "of the features as pretrained"
        rows = next(iter(trainer._training_logits.rows.values()))
        assert (rows.form.penalty,) == trainer.alignment["penalties"] == (kept,)
        (head,) = trainer.heads.values()
        weight, bias = head.class_vectors()
        assert mean_norm(weight, bias, rows.features) == pytest.approx(1.0, rel=1e-5)

    @pytest.mark.parametrize(
        "settings",
        [{"realign": "epochs"}, {"freeze": "backbone"}, {"realign": "never"}, {"num_train_epochs": 0}, {}],
        ids=str,
    )
    def test_all_rows_are_read_where_steps_do_not(self, tmp_path, monkeypatch, settings):
        monkeypatch.setattr(aligning, "MIN_READ_ROWS", 20)
        trainer = make_trainer(tmp_path / "run", **settings)
        if not settings:
            assert len(trainer.sampled_rows()) == 29
            rows = [*trainer.alignment_dataset]
            trainer.alignment_dataset = [{k: v for k, v in row.items() if k != "row_id"} for row in rows]
            assert trainer.sampled_rows() is None
            trainer.alignment_dataset = [*rows[:-1], rows[-1] | {"row_id": 99}]  # numbers of another data set
        assert trainer.sampled_rows() is None

    def test_of_many_classes_a_pass_reads_some_rows_each(self, tmp_path, monkeypatch):
        monkeypatch.setattr(aligning, "MIN_READ_ROWS", 1)
        trainer = make_trainer(tmp_path / "run", counts=(9, 7, 7, 7, 2))  # a third would be two rows a class
        read = trainer.train_labels[trainer.sampled_rows()]
        assert np.bincount(read).tolist() == [5, 5, 5, 5, 2]

    @pytest.mark.parametrize("settings", [{"load_best_model_at_end": False}, {"realign_steps": 6}, {}])
    def test_a_step_that_is_ended_anew_is_not_aligned_again(self, tmp_path, monkeypatch, settings):
        monkeypatch.setattr(aligning, "MIN_READ_ROWS", 20)
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1, eval_strategy="epoch", **settings)
        trainer.train()
        state, tensors = trainer.own_state()
        assert state["realigned_at"] == trainer.state.global_step == 6
        before = {name: value.clone() for name, value in (weights(trainer) | tensors).items()}
        for ends_run in (True, False):
            trainer.realign(True, ends_run)
        after = weights(trainer) | trainer.own_state()[1]
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        trainer.state.global_step = 12
        trainer.realign(True, True)
        assert not torch.equal(before["classifier/passes"], trainer.own_state()[1]["classifier/passes"])

    def test_rows_of_very_many_classes_are_read_by_passes_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            alignment, "MAX_KEPT_NUMBERS", 2 * 3 * 16 - 1
        )  # fewer than two rows of each of three classes
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1)
        assert trainer.sampled_rows() is None
        trainer.train()
        assert not trainer._training_logits.rows and trainer.alignment["rows"] == 88

    def test_mixed_rows_are_read_by_passes_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(aligning, "MIN_READ_ROWS", 20)
        trainer = make_trainer(tmp_path / "run", num_train_epochs=1, mixup=0.2)
        trainer.train()
        rows = next(iter(trainer._training_logits.rows.values()))
        assert (rows.passes == 2).all()

    def test_a_head_that_learns_moves_away_from_what_was_left_out(self, tmp_path):
        trainer = make_trainer(tmp_path / "run", model=make_model(head="etf", trainable=True))
        trainer.align()
        assert not trainer._training_logits.rows

    def test_rows_without_numbers_are_scored_as_they_are(self, tmp_path):
        trainer = make_trainer(tmp_path / "run")
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "row_id"}
        trainer.align()
        assert not trainer._training_logits.rows
