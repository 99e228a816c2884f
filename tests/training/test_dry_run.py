"""A dry run shows what a run would do, and does none of it."""

from __future__ import annotations

import re

from etf_adapt import finetune
from etf_adapt.commands.main import main


def test_it_describes_data_model_steps_time_and_memory_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["finetune", "--dry-run", "--num_train_epochs", "3", "--torch_threads", "1"])
    said = capsys.readouterr().out
    for line in (
        r"data: .*\n",
        r"example: \d: image of 8 x 8 pixels\n(example: .*\n){2}",
        r"head: etf, whitened frame to be set",
        r"trained: [\d,]+ of [\d,]+ parameters",
        r"steps: 69 \(3 epochs of 23\); 4 passes over the rows to set the head",
        r"time: about \d+ s",
        r"memory: about [\d.]+ GB",
    ):
        assert re.search(line, said), line
    assert list(tmp_path.iterdir()) == []
    assert finetune(dry_run=True, max_steps=7, torch_threads=1) is None
    assert re.search(r"steps: 7 \(", capsys.readouterr().out)
