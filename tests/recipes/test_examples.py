"""The examples run as they stand, without a network, and say what they promise."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "layer_decay_and_ema": "balanced accuracy of the average",
    "long_tail_a_dataset": "drawn with power 1.0",
    "plain_accelerate_loop": "balanced accuracy",
    "refit_and_extend": "ten digits, two of them from five images: balanced accuracy 8",
    "swap_a_head": "restored: True",
    "train_and_finish": "left: README.md all_results.json",
    "use_hf_trainer": "TimmWrapperForImageClassification predicts",
}


PUBLISHED = {"push_to_hub", "use_without_etf_adapt"}
ELSEWHERE = {"export_onnx"}  # tests/recipes/test_export_onnx.py


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXPECTED, *PUBLISHED, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:::etf_adapt")
@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)  # some examples make an Accelerator
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert EXPECTED[name] in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


WITHOUT_US = "import runpy, sys; sys.modules['etf_adapt'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"


@pytest.mark.slow
def test_a_model_is_published_and_used_without_us(hub, tmp_path):
    environment = hub.environment(tmp_path / "home", HF_TOKEN=hub.token)
    Image.new("RGB", (40, 30), (200, 200, 200)).save(tmp_path / "photo.jpg")

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "the same weights: True and head: whitened" in run(ROOT / "examples/push_to_hub.py", "me/digits")
    assert hub.repositories["me/digits"].private and len(hub.pushed("me/digits")) == 1
    said = run("-c", WITHOUT_US, ROOT / "examples/use_without_etf_adapt.py", "me/digits", "photo.jpg").splitlines()
    assert said[0].split()[1] == said[-1].split()[1] and said[-1].startswith("timm: ")
