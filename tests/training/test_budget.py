"""Batch, epochs, learning rate and reading processes follow the number of rows where none are named."""

from __future__ import annotations

import pytest
from small_run import NoisyRows, collate, make_model, make_trainer

from etf_adapt.training import budget
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.checkpoints import list_checkpoints
from etf_adapt.training.trainer import ETFTrainer


@pytest.mark.parametrize(
    ("rows", "trained", "batch", "epochs", "rate"),
    [
        (12, 22e6, 16, 10, 2e-4),
        (12, 0.5e6, 16, 10, 1e-3),
        (367, 0.9e6, 16, 10, 7.5e-4),  # digits, micro
        (2_920, 2.2e6, 64, 6, 4e-4),  # blood cells, MobileNetV2
        (3_183, 22e6, 64, 5, 1.4e-4),  # CLINC150, MiniLM
        (3_874, 5.5e6, 64, 5, 2.3e-4),  # CIFAR-100, ViT-tiny
        (12_000, 22e6, 64, 4, 1e-4),
        (1_000_000, 22e6, 64, 4, 1e-4),
        (1_000_000, 88e6, 64, 4, 5e-5),
    ],
)
def test_fewer_rows_have_smaller_batches_and_more_epochs_and_rates_follow(rows, trained, batch, epochs, rate):
    assert budget.choose_batch_size(rows) == batch
    steps_in_epoch = -(-rows // batch)
    assert budget.choose_epochs(steps_in_epoch) == epochs
    assert budget.choose_rate(round(epochs * steps_in_epoch), trained) == rate


FREE = {"num_train_epochs": None, "learning_rate": None, "per_device_train_batch_size": None}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, [16, 10, 2e-4]),
        ({"learning_rate": 3e-3}, [16, 10, 3e-3]),
        ({"max_steps": 600}, [16, 10, 1e-4]),
        ({"per_device_train_batch_size": 44, "num_train_epochs": 100}, [44, 100, 1.8e-4]),
        ({"gradient_accumulation_steps": 2, "num_train_epochs": 70}, [16, 70, 1.7e-4]),
    ],
)
def test_what_is_named_stays(tmp_path, monkeypatch, named, expected):
    monkeypatch.setattr(budget, "SIZE", 3136)  # that of the model here
    args = make_trainer(tmp_path, **FREE | named).args
    assert [args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate] == expected


def test_the_rate_follows_what_is_left_to_train(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "SIZE", 3136)
    whole, part = (
        make_trainer(tmp_path, freeze=freeze, **FREE | {"max_steps": 600}).args for freeze in ("none", r"^(?!.*bias)")
    )
    assert whole.learning_rate == 1e-4 < part.learning_rate <= budget.HIGHEST_RATE


def test_arguments_that_name_nothing_serve_several_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "SIZE", 3136)
    args = ETFTrainingArguments(str(tmp_path), eval_strategy="no")
    rows = NoisyRows((60, 21, 7), 0), NoisyRows((1600, 20, 10), 0)
    small, large = (ETFTrainer(make_model(), args, collate, part, labels=part.labels) for part in rows)
    assert [trainer.args.per_device_train_batch_size for trainer in (small, large)] == [16, 64]
    assert small.args.learning_rate > large.args.learning_rate and args.learning_rate is None


def test_a_run_that_is_resumed_for_longer_keeps_its_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "SIZE", 3136)
    settings = {"learning_rate": None, "load_best_model_at_end": False}
    make_trainer(tmp_path, num_train_epochs=1, **settings).train()
    resumed = make_trainer(tmp_path, num_train_epochs=40, **settings)
    assert resumed.args.learning_rate < 2e-4
    resumed.restore(list_checkpoints(tmp_path)[-1])
    assert resumed.args.learning_rate == 2e-4
    with pytest.raises(ValueError, match=r"was written with learning_rate 0\.0002, and this run has 0\.01"):
        make_trainer(tmp_path, num_train_epochs=2, load_best_model_at_end=False).restore(list_checkpoints(tmp_path)[-1])


def test_processes_that_are_named_stay(tmp_path):
    assert make_trainer(tmp_path).args.dataloader_num_workers == 0
    args = make_trainer(tmp_path, dataloader_num_workers=2).args
    assert args.dataloader_num_workers == 2
