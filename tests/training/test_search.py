"""Laws of what else Trainer's constructor takes: fresh models, optimizers, losses and callbacks; and searches for settings."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import NoisyRows, collate, make_model, make_trainer, same, weights
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.trainer import ETFTrainer

COUNTS = (30, 12, 6)


def fresh():
    return make_model(drop=0.0)


def trainer_of(folder, **options):
    train = NoisyRows(COUNTS, seed=0)
    settings = {"torch_threads": 1, "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    args = ETFTrainingArguments(str(folder), **settings | options.pop("args", {}))
    if "model_init" not in options:
        options.setdefault("model", make_model())
    rows = {"train_dataset": train, "eval_dataset": NoisyRows((7, 7, 7), seed=1), "data_collator": collate}
    return ETFTrainer(args=args, labels=train.labels, **rows, **options)


@pytest.fixture
def search(monkeypatch):
    """A backend of searches in memory: walks through given trials, as that of optuna does, which need not be installed."""
    optuna = ModuleType("optuna")
    optuna.__spec__ = ModuleSpec("optuna", None)
    optuna.trial = SimpleNamespace(BaseTrial=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    done = []

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, trials):
            for number, params in enumerate(trials[:n_trials]):
                trainer.objective = None
                trainer.train(resume_from_checkpoint=None, trial=SimpleNamespace(number=number, params=params))
                trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                done.append(SimpleNamespace(objective=trainer.objective, weights=trained, trainer=vars(trainer).copy()))
            objectives = [trial.objective for trial in done[-len(trials) :]]
            best = objectives.index((max if direction == "maximize" else min)(objectives))
            return BestRun(str(best), objectives[best], trials[best])

    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    return done


def searched(trainer, *trials, **options):
    return trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna", trials=trials, **options)


@pytest.mark.slow
def test_each_trial_is_what_a_run_of_its_own_would_be(tmp_path, search):
    trials = [{"learning_rate": 1e-2}, {"learning_rate": 3e-3, "sampler": "balanced", "label_smoothing": 0.2}]
    trainer = trainer_of(tmp_path / "search", model_init=fresh)
    best = searched(trainer, *trials)
    assert best.objective == max(trial.objective for trial in search)  # balanced accuracy, not the sum of all metrics
    for number, (trial, settings) in enumerate(zip(search, trials, strict=True)):
        alone = trainer_of(tmp_path / str(number), model_init=fresh, args=settings)
        alone.train()
        assert same(trial.weights, weights(alone))
        assert trial.objective == alone.state.log_history[-2]["eval_balanced_accuracy_pooled"]
        folder = tmp_path / "search" / f"run-{number}"
        assert (folder / "checkpoint-3").is_dir() and (folder / "log.jsonl").is_file()
    assert {path.name for path in (tmp_path / "search").iterdir()} == {"run-0", "run-1"}
    with pytest.raises(ValueError, match=r"run-0.* holds checkpoint-3 of an earlier run"):
        searched(trainer, *trials)


def test_a_trial_may_choose_the_head(tmp_path, search):
    trainer = trainer_of(tmp_path, model_init=lambda trial: make_model(head=trial.params["head"] if trial else "etf"))
    searched(trainer, {"head": "linear"}, {"head": "etf"})
    assert [trial.trainer["realignment"] for trial in search] == ["never", "steps"]
    assert search[1].trainer["alignment"] and not search[0].trainer["alignment"]


@pytest.mark.slow
def test_the_least_loss_and_an_objective_of_ones_own_can_be_searched_for(tmp_path, search):
    trainer = trainer_of(tmp_path, model_init=fresh)
    searched(trainer, {"learning_rate": 1e-2}, direction="minimize")
    assert search[-1].objective == trainer.state.log_history[-2]["eval_loss"]
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "ece", False
    searched(trainer, {"seed": 2}, hp_name=lambda trial: "falling")
    assert search[-1].objective == trainer.state.log_history[-2]["eval_ece"]
    own = {"compute_objective": lambda metrics: metrics["eval_ece"], "hp_name": lambda trial: "second"}
    best = searched(trainer, {"seed": 3}, **own)
    assert (tmp_path / "second").is_dir()
    assert best.objective == trainer.state.log_history[-2]["eval_ece"]


def test_a_model_that_is_made_anew_trains_as_one_that_is_given(tmp_path):
    results = []
    for number, options in enumerate(({"model_init": fresh}, {"model": fresh()})):
        trainer = trainer_of(tmp_path / str(number), **options)
        trainer.train()
        results.append(weights(trainer))
    assert same(*results)
    for both in ({"model": None}, {"model": make_model(), "model_init": fresh}):
        with pytest.raises(ValueError, match="`model` and `model_init` are both"):
            ETFTrainer(args=ETFTrainingArguments(str(tmp_path), eval_strategy="no"), **both)
    with pytest.raises(ValueError, match="has no head and loss of etf_adapt"):
        trainer_of(tmp_path, model_init=lambda: torch.nn.Linear(2, 3))


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_a_given_optimizer_trains_with_its_own_rates(tmp_path, head, capsys):
    model = make_model(head=head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = trainer_of(tmp_path, model=model, optimizers=(optimizer, None))
    before = weights(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and not same(before, weights(trainer))
    said = capsys.readouterr().out
    assert "learning rate 0.5\n" in said
    with pytest.raises(ValueError, match=r"`head_learning_rate` .=0.1. has no effect on the optimizer that is given"):
        trainer_of(tmp_path, optimizers=(optimizer, None), args={"head_learning_rate": 0.1})


def test_a_class_of_optimizer_gets_its_options_and_the_head_ten_times_the_rate(tmp_path, capsys):
    kind = torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}
    trainer = trainer_of(tmp_path, model=make_model(head="linear"), optimizer_cls_and_kwargs=kind)
    trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.02, 0.2}
    assert "learning rate 0.02, of the head 0.2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"`optimizer_cls_and_kwargs` .=SGD. has no `lr`"):
        trainer_of(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {}))


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_a_loss_of_ones_own_takes_the_place_of_the_models(tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append((outputs.loss, labels.shape, int(num_items_in_batch)))
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    mine = trainer_of(tmp_path / "a", model=make_model(head="linear"), compute_loss_func=loss)
    mine.train()
    models = trainer_of(tmp_path / "b", model=make_model(head="linear", loss="cross_entropy"))
    models.train()
    assert same(weights(mine), weights(models))
    assert calls == [(None, (8,), 8)] * 3
    soft = trainer_of(tmp_path / "c", compute_loss_func=loss, args={"mixup": 0.4})
    soft.train()
    assert calls[-1][1] == (8, 3)


def test_callbacks_see_the_whole_life_of_the_trainer(tmp_path):
    class Watch(TrainerCallback):
        seen: list[str] = []

        def on_init_end(self, args, state, control, **kwargs):
            self.seen.append("init")

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append("step")

    trainer = trainer_of(tmp_path, callbacks=[Watch])
    trainer.train()
    assert Watch.seen == ["init", "step", "step", "step"]
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names == ["DefaultFlowCallback", "Realign", "RunLog", "ProgressPrinter", "Watch"]
    bars = make_trainer(tmp_path / "bars", disable_tqdm=False).callback_handler.callbacks
    assert [type(callback).__name__ for callback in bars][-1] == "ProgressBar"


@pytest.mark.filterwarnings("ignore:The ETF head is a random frame")
def test_training_without_a_bar_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    now = iter(np.arange(0.0, 1e6, 6.0))
    monkeypatch.setattr("etf_adapt.data.progress.time.monotonic", lambda: next(now))
    trainer = trainer_of(
        tmp_path, args={"eval_strategy": "no", "save_strategy": "no", "realign": "never", "frame": "random"}
    )
    trainer.train()
    assert "training steps: 2 of 3, 12 s" in capsys.readouterr().err
