"""The examples run as they stand, without a network, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "layer_decay_and_ema": "balanced accuracy of the average",
    "long_tail_a_dataset": "drawn with power 1.0",
    "plain_accelerate_loop": "balanced accuracy",
    "swap_a_head": "restored: True",
    "use_hf_trainer": "TimmWrapperForImageClassification predicts",
}


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} >= set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error:::etf_adapt", ROOT / "examples" / f"{name}.py"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
    assert list(tmp_path.iterdir()) == []
