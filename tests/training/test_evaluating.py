"""Laws of evaluate and predict: what users of transformers' Trainer expect, each row once, and logits only where asked for."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from small_run import NoisyRows, collate, make_model, make_trainer
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.trainer import ETFTrainer

COUNTS = (9, 5, 3)


class Unlabelled(Dataset):
    """The images of ``NoisyRows`` without their labels, or with -1 in their place."""

    def __init__(self, rows, *, hidden=False):
        self.rows, self.hidden = rows, hidden

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        found = {name: value for name, value in self.rows[row].items() if name != "labels"}
        return found | ({"labels": -1} if self.hidden else {})


def collate_what_is_there(rows):
    parts = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(part) if name == "pixel_values" else torch.tensor(part) for name, part in parts.items()}


def logits_of(trainer, rows):
    with torch.no_grad():
        return trainer.model.eval()(pixel_values=rows.images).logits.numpy()


def trainer_of(folder, **options):
    train = NoisyRows(COUNTS, seed=0)
    args = ETFTrainingArguments(
        str(folder), per_device_eval_batch_size=4, torch_threads=1, max_steps=2, **options.pop("args", {})
    )
    return ETFTrainer(make_model(), args, collate, train, NoisyRows(COUNTS, seed=1), labels=train.labels, **options)


def test_the_constructor_is_the_stock_one_with_two_names_more():
    stock, ours = (list(inspect.signature(kind.__init__).parameters.values()) for kind in (Trainer, ETFTrainer))
    assert [parameter.name for parameter in ours[: len(stock)]] == [parameter.name for parameter in stock]
    assert all(mine.default == theirs.default for mine, theirs in zip(ours, stock, strict=False))
    assert [parameter.name for parameter in ours[len(stock) :]] == ["alignment_dataset", "labels"]


def test_the_lines_of_every_tutorial_give_the_classes(tmp_path):
    trainer = trainer_of(tmp_path)
    rows = NoisyRows(COUNTS, seed=2)
    predictions, label_ids, metrics = trainer.predict(rows)
    np.testing.assert_allclose(predictions, logits_of(trainer, rows), atol=1e-5)
    assert np.array_equal(label_ids, rows.labels)
    assert np.mean(np.argmax(predictions, -1) == label_ids) == metrics["test_accuracy"]
    assert trainer.predict(rows, metric_key_prefix="held").metrics["held_accuracy"] == metrics["test_accuracy"]


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_without_labels_are_predicted_and_not_scored(tmp_path, hidden):
    trainer = trainer_of(tmp_path, compute_metrics=lambda outputs: pytest.fail("there is nothing to score"))
    trainer.data_collator = collate_what_is_there
    rows = NoisyRows(COUNTS, seed=2)
    predictions, label_ids, metrics = trainer.predict(Unlabelled(rows, hidden=hidden))
    np.testing.assert_allclose(predictions, logits_of(trainer, rows), atol=1e-5)
    assert label_ids is None and not any("accuracy" in name or "loss" in name for name in metrics)
    with pytest.raises(ValueError, match="rows to evaluate have no `labels`"):
        trainer.evaluate(Unlabelled(rows, hidden=hidden))


def test_a_single_row_without_a_label_is_named(tmp_path):
    trainer = trainer_of(tmp_path)
    rows = NoisyRows(COUNTS, seed=2)
    rows.labels[4] = -100
    with pytest.raises(ValueError, match=r"`labels` .=-1 at row 4. must be at least 0"):
        trainer.predict(rows)


def test_evaluation_keeps_no_logits_unless_metrics_need_them(tmp_path, monkeypatch):
    kept = []
    loop = ETFTrainer.evaluation_loop
    monkeypatch.setattr(
        ETFTrainer, "evaluation_loop", lambda *args, **kwargs: kept.append(loop(*args, **kwargs)) or kept[-1]
    )
    trainer_of(tmp_path).evaluate()
    trainer_of(tmp_path, compute_metrics=lambda outputs: {}).evaluate()
    assert kept[0].predictions is None and kept[1].predictions.shape == (sum(COUNTS), 3)


def test_own_metrics_are_added_under_the_prefix_and_win(tmp_path):
    seen = []

    def metrics(outputs: EvalPrediction):
        seen.append(outputs)
        return {"top": outputs.predictions.argmax(-1).mean(), "eval_named": np.float32(2.0), "accuracy": 0.5}

    trainer = trainer_of(tmp_path, compute_metrics=metrics)
    found = trainer.evaluate()
    logits, labels = seen[0]  # as older scripts unpack it
    assert logits.shape == (sum(COUNTS), 3) and np.array_equal(labels, trainer.eval_dataset.labels)
    assert (
        found["eval_top"] == logits.argmax(-1).mean() and found["eval_named"] == 2.0 and found["eval_accuracy"] == 0.5
    )
    assert type(found["eval_named"]) is float and "eval_balanced_accuracy" in found


def test_own_metrics_choose_the_best_checkpoint(tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trainer_of(
        tmp_path,
        compute_metrics=lambda outputs: {"mine": next(scores)},
        args={**steps, "metric_for_best_model": "mine"},
    )
    trainer.args.max_steps = 3
    trainer.train()
    assert trainer.state.best_metric == 0.9 and trainer.state.best_global_step == 2


def test_what_is_made_of_the_logits_is_kept_in_their_place(tmp_path):
    seen = []
    options = {
        "compute_metrics": lambda outputs: seen.append(outputs.predictions) or {},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1),
    }
    trainer = trainer_of(tmp_path, **options)
    trainer.evaluate()
    chosen = logits_of(trainer, trainer.eval_dataset).argmax(-1)
    assert np.array_equal(seen[0], chosen) and np.array_equal(trainer.predict(trainer.eval_dataset).predictions, chosen)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: (logits, labels)
    with pytest.raises(ValueError, match=r"`preprocess_logits_for_metrics` .=tuple. must return one tensor"):
        trainer.evaluate()


def test_several_validation_sets_are_scored_by_name(tmp_path, capsys):
    sets = {"near": NoisyRows(COUNTS, seed=1), "far": NoisyRows((4, 4, 4), seed=2)}
    with pytest.raises(ValueError, match=r"must begin with the name .* say near_balanced_accuracy_pooled, for example"):
        make_trainer(tmp_path, eval_dataset=sets)
    trainer = make_trainer(tmp_path, eval_dataset=sets, metric_for_best_model="far_accuracy", num_train_epochs=1)
    trainer.train()
    assert trainer.state.best_metric == trainer.evaluate()["eval_far_accuracy"]
    said = capsys.readouterr().out
    assert "29 to validate" in said and "validation near: balanced" in said and "validation far: balanced" in said
