"""Laws of several processes: n of them draw, at each step, what one with an n-fold batch draws, and measure the same."""

from __future__ import annotations

import json
import socket
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import run_program, same

SETTINGS = {
    "sampler": "balanced",
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_total_limit": None,
    "num_train_epochs": 3,
    "eval_counts": [6, 4, 3],  # 13 rows: the last batches of two processes are filled up
    "per_device_eval_batch_size": 4,
}


def torchrun(settings, *, processes=2, killed=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}")
    return run_program(settings, launcher=launcher, failed=killed)


def parts_of(folder: Path, processes: int):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def recorded(folder: Path, processes: int):
    """Return the rows of each step over all processes, sorted, and each process's metrics."""
    parts = parts_of(folder, processes)
    rows = [sorted(chain.from_iterable(step)) for step in zip(*(part["rows"] for part in parts))]
    return rows, [part["metrics"] for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "realign"),
    [(1, {"realign": "epochs"}), (1, {"realign": "steps", "frame_penalty": 3.0}), (2, {"realign": "never"})],
)
def test_two_processes_draw_and_measure_as_one_with_twice_the_batch(tmp_path, accumulation, realign):
    # Without dropout, which each process draws for itself, the weights agree up to rounding as well. Alignments pass
    # rounding on, enlarged by the inverse of a covariance: one each epoch is what the first case bears, and the last not.
    settings = {**SETTINGS, **realign, "drop": 0.0, "gradient_accumulation_steps": accumulation}
    one = {**settings, "per_device_train_batch_size": 16, "output_dir": str(tmp_path / "one")}
    two = {**settings, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "two")}
    run_program({**one, "record": str(tmp_path / "a")})
    torchrun({**two, "record": str(tmp_path / "b")})
    rows_of_one, (metrics_of_one,) = recorded(tmp_path / "a", 1)
    rows_of_two, metrics_of_two = recorded(tmp_path / "b", 2)
    assert rows_of_two == rows_of_one and len(rows_of_one) == 18
    left, right = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    # The softmax of attention does not feel the key's bias: its gradient is rounding alone, which Adam makes large.
    assert all(torch.allclose(left[name], right[name], atol=5e-5) for name in left if not name.endswith("k_proj.bias"))
    assert metrics_of_two[0] == metrics_of_two[1]
    assert metrics_of_two[0]["eval_accuracy"] == metrics_of_one["eval_accuracy"]
    assert np.isclose(metrics_of_two[0]["eval_loss"], metrics_of_one["eval_loss"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("realign", ["epochs", "steps"])
def test_two_processes_resumed_in_mid_epoch_end_as_uninterrupted(tmp_path, realign):
    settings = {**SETTINGS, "per_device_train_batch_size": 8, "realign": realign, "realign_steps": 3}
    torchrun({**settings, "output_dir": str(tmp_path / "whole"), "record": str(tmp_path / "a")})
    torchrun({**settings, "output_dir": str(tmp_path / "killed"), "kill_at": 10}, killed=True)
    torchrun({**settings, "output_dir": str(tmp_path / "killed"), "resume": True, "record": str(tmp_path / "b")})
    whole, resumed = recorded(tmp_path / "a", 2), recorded(tmp_path / "b", 2)
    assert resumed[0] == whole[0][8:] and resumed[1] == whole[1]
    assert same(*(load_file(tmp_path / name / "weights.safetensors") for name in "ab"))


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "row"), [("eval", 12), ("alignment", 9), ("alignment", 70)])
def test_a_row_that_one_process_cannot_read_ends_all_with_its_message(tmp_path, dataset, row):
    settings = {**SETTINGS, "per_device_train_batch_size": 8, "unreadable": (dataset, row), "realign": "epochs"}
    settings["per_device_eval_batch_size"] = 2
    torchrun({**settings, "output_dir": str(tmp_path / "run"), "record": str(tmp_path)})
    assert [Path(tmp_path, f"{rank}.txt").read_text() for rank in range(2)] == [f"Row {row} cannot be read."] * 2


@pytest.mark.slow
def test_one_checkpoint_measures_and_predicts_the_same_on_one_and_two_processes(tmp_path):
    checkpoint = {**SETTINGS, "per_device_train_batch_size": 16, "output_dir": str(tmp_path / "run")}
    run_program({**checkpoint, "record": str(tmp_path / "a")})
    # A finished run that is resumed trains no step: it evaluates what it saved.
    torchrun({**checkpoint, "per_device_train_batch_size": 8, "resume": True, "record": str(tmp_path / "b")})
    (_, (one,)), (_, two) = recorded(tmp_path / "a", 1), recorded(tmp_path / "b", 2)
    assert all(metrics.keys() == one.keys() for metrics in two)
    for metrics in two:
        assert all(metrics[name] == pytest.approx(one[name], rel=1e-6) for name in one if one[name] is not None)
    (one,), two = (parts_of(tmp_path / name, processes) for name, processes in (("a", 1), ("b", 2)))
    for part in two:
        np.testing.assert_allclose(part["logits"], one["logits"], atol=1e-5)
