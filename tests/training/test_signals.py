"""Laws of signals: a run that is asked to stop finishes its step, saves, and goes on to the weights of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slow_cases import rest_slow
from small_run import make_trainer, same, weights
from transformers import TrainerCallback

from etf_adapt.data.batches import LeftTogether, leave_pass, met_by
from etf_adapt.errors import DataError
from etf_adapt.training import signals
from etf_adapt.training.checkpoints import list_checkpoints
from etf_adapt.training.signals import RandomStates, Stopped, StopSignals

SETTINGS = {"num_train_epochs": 3, "per_device_eval_batch_size": 8, "sampler": "sqrt", "early_stopping_patience": 9}
STRATEGIES = {
    "epochs": {},
    "steps": {
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },  # 15 is best, unsaved
}


class SignalAt(TrainerCallback):
    """Send this process a signal at the ``count``-th event of a name."""

    def __init__(self, event: str, count: int, number: int = signal.SIGTERM) -> None:
        self.left, self.number = count, number
        setattr(self, event, self.send)

    def send(self, *_: object, **__: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by their strategy."""
    runs = {}
    for name, strategy in STRATEGIES.items():
        runs[name] = make_trainer(tmp_path_factory.mktemp(name), **SETTINGS, **strategy)
        runs[name].train()
    return runs


@pytest.mark.parametrize(
    ("strategy", "event", "count", "step"),
    rest_slow(
        [
            ("epochs", "on_step_begin", 6, 6),  # its epoch ends: an evaluation is due
            ("epochs", "on_prediction_step", 4, 12),  # in mid-evaluation
            ("steps", "on_step_begin", 15, 15),  # evaluated, the best so far, and no checkpoint due
            ("epochs", "on_step_begin", 2, 2),
            ("epochs", "on_evaluate", 3, 18),
            ("steps", "on_prediction_step", 2, 3),
            ("steps", "on_step_begin", 18, 18),
        ],
        fast=3,
    ),
)
def test_a_run_that_was_asked_to_stop_ends_as_the_uninterrupted_one(tmp_path, whole, strategy, event, count, step):
    settings = SETTINGS | STRATEGIES[strategy]
    trainer = make_trainer(tmp_path, callbacks=(SignalAt(event, count),), **settings)
    with pytest.raises(Stopped) as stop:
        trainer.train()
    assert stop.value.code == 128 + signal.SIGTERM
    assert trainer.state.global_step == step and list_checkpoints(tmp_path)[-1].name == f"checkpoint-{step}"
    if event == "on_prediction_step":  # the evaluation was left, not waited for
        assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry][-1:] != [step]
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole[strategy]), weights(resumed))
    assert resumed.state.best_metric == whole[strategy].state.best_metric
    assert resumed.misses == whole[strategy].misses


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_signal_after_the_last_step_is_heard_where_that_step_is_saved(tmp_path, capsys, strategy):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save_strategy": strategy, "load_best_model_at_end": strategy == "epoch"}
    trainer = make_trainer(tmp_path, callbacks=(AtTheEnd(),), num_train_epochs=1, **settings)
    with nullcontext() if strategy == "no" else pytest.raises(Stopped):
        trainer.train()  # where nothing is saved, what follows goes on
    is_told = "stopped by SIGTERM after step 6: checkpoint-6 holds it" in capsys.readouterr().out
    assert is_told == (strategy == "epoch")


def test_processes_leave_a_pass_together(monkeypatch):
    others = [0]
    monkeypatch.setattr(signals, "PartialState", lambda: SimpleNamespace(num_processes=2, device="cpu"))
    monkeypatch.setattr(signals, "gather", lambda own: torch.cat([own, torch.tensor(others)]))
    polled = StopSignals()
    polled.poll()
    others[0] = signals._LEAVES
    with pytest.raises(LeftTogether):
        polled.poll()
    others[0] = int(signal.SIGTERM)
    polled.poll(leaves=True)  # who leaves tells why
    with pytest.raises(Stopped):
        polled.poll()


def test_who_leaves_a_pass_meets_the_others_first_and_who_follows_is_silent():
    met = []
    with met_by(lambda: met.append(1)):
        assert leave_pass(DataError("row 3")) == "row 3" and met == [1]
        assert leave_pass(LeftTogether("another")) == "" and met == [1]
    assert leave_pass(DataError("row 4")) == "row 4" and met == [1]


@pytest.mark.parametrize("aligned", [1, 3])
def test_an_alignment_is_left_and_done_again(tmp_path, whole, aligned, capsys):
    trainer = make_trainer(tmp_path, **SETTINGS)
    loader, passes = trainer.rows_loader, iter(range(1, 9))

    def signalling(dataset):
        if next(passes) == aligned:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loader(dataset)

    trainer.rows_loader = signalling
    with pytest.raises(Stopped) as stop:
        trainer.train()
    assert stop.value.code == 128 + signal.SIGUSR1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "trainer.train(resume_from_checkpoint=True)"
    assert said[-2].startswith(f"stopped by SIGUSR1 after step {6 * (aligned - 1)}: ")
    resumed = make_trainer(tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole["epochs"]), weights(resumed))


def test_handlers_are_those_of_the_caller_before_and_after(tmp_path):
    def mine(*_):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    own = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGUSR1) is mine
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_a_worker_serves_on():
    program = """
import os, signal, time
from etf_adapt.training.signals import StopSignals
signals = StopSignals()
with signals:
    worker = os.fork()
    if not worker:
        time.sleep(1)
        os._exit(7)
    time.sleep(0.3)
    os.close(2)  # nobody reads what is said
    for _ in range(2):  # the whole group, twice at once: by a launcher and by whoever told it
        os.kill(worker, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.number == signal.SIGTERM
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 128 + signal.SIGINT and done.stdout == "", done.stderr


def test_random_states_come_back():
    import random

    import numpy as np
    import torch

    states = RandomStates()
    drawn = random.random(), np.random.rand(), torch.rand(1)
    states.restore()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))


@pytest.mark.slow
def test_random_kills_signals_and_flipped_bits_are_survived():
    root = Path(__file__).parents[2]
    command = [sys.executable, "tests/survive.py", "--kills", "4", "--signals", "4", "--flips", "20"]
    path = os.pathsep.join((str(root), str(root / "tests")))
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
