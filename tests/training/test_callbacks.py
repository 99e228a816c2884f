"""Laws of what is printed and when: threads are what the cores allow, unmet requests are named."""

from __future__ import annotations

import os

import pytest
import torch
from small_run import make_trainer

from etf_adapt.inference.launch import set_threads, unmet_requests
from etf_adapt.training.messages import describe_run


@pytest.fixture
def threads(monkeypatch):
    before = torch.get_num_threads()
    for name in (
        "ACCELERATE_MIXED_PRECISION",
        "TORCHELASTIC_RUN_ID",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
    ):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    torch.set_num_threads(before)


def test_launchers_single_threads_are_undone_and_nothing_else(threads):
    threads.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    torch.set_num_threads(1)
    assert set_threads() == 1  # no launcher: whoever set it meant it
    threads.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert set_threads() == 8
    threads.setenv("LOCAL_WORLD_SIZE", "3")
    assert set_threads() == 2
    assert set_threads(5) == 5


def test_requests_that_are_not_met_are_printed(threads):
    assert unmet_requests("NO") == []
    threads.setenv("MASTER_ADDR", "127.0.0.1")
    assert unmet_requests("NO") == []
    threads.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (warning,) = unmet_requests("NO")
    assert "several processes were asked for, but one runs" in warning
    threads.delenv("MASTER_ADDR")
    threads.setenv("ACCELERATE_USE_FSDP", "true")
    assert unmet_requests("FSDP") == []
    assert unmet_requests("MULTI_CPU") == [
        "WARNING: FSDP was asked for, but Accelerate runs MULTI_CPU on this machine."
    ]


def test_the_first_lines_describe_the_run(tmp_path):
    trainer = make_trainer(tmp_path, sampler="balanced", gradient_accumulation_steps=2, bf16=True)
    printed = "\n".join(describe_run(trainer))
    for part in (
        "runs: 1 process of 1 threads on cpu, bf16 autocast over float32 weights",
        "88 rows to train, 3 classes of 7 to 60 rows (imbalance 8.571), 21 to validate",
        "head: etf, whitened frame to be set, fixed but for an alignment every 10 steps",
        "3,136 of 3,187 parameters",
        "balanced, 32 rows a step, seed 0",
    ):
        assert part in printed


def test_output_that_is_no_terminal_gets_one_line_an_epoch_and_no_bar(tmp_path, capsys):
    make_trainer(tmp_path / "run").train()
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("epoch ")]
    assert [line.split(" ")[1] for line in lines] == ["1/2", "2/2"]
    assert all("train loss" in line and "balanced accuracy" in line for line in lines)
    assert "it/s" not in captured.out + captured.err
