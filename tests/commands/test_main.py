"""Laws of the command line: what it answers before anything heavy is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from etf_adapt.commands.main import COMMANDS, main
from etf_adapt.commands.parser import Parser

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "{'torch', 'transformers', 'timm', 'datasets', 'accelerate', 'sklearn', 'pyarrow'}"


def test_the_console_script_is_the_dispatcher():
    (entry,) = re.findall('^etf-adapt = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    module, _, name = entry.partition(":")
    assert getattr(import_module(module), name) is main


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS), ["predict", "a", "b", "--topk=1"]]
)
def test_help_and_wrong_flags_wait_for_no_framework(words):
    program = f"""
import runpy, sys
sys.argv[1:] = {words}
try:
    runpy.run_module("etf_adapt", run_name="__main__")
except SystemExit:
    pass
print(sorted({HEAVY} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: etf-adapt" in done.stdout or "did you mean --top_k" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["predct", "a"],
            "'evaluate', 'refit', 'extend', 'publish'; did you mean 'predict'?",
        ),
        (["predict", "a", "b", "--top_kk", "3"], "There is no argument '--top_kk': did you mean --top_k"),
        (
            ["predict", "a", "b", "--on-bad-input", "skp"],
            "`on_bad_input` (='skp') must be one of 'fail', 'skip'; did you mean",
        ),
        (["predict", "a", "b.png", "c.png"], "'c.png' is one word too many"),
        (["predict", "a"], "the following arguments are required: INPUT"),
        (["predict", "a", "b", "--top_k", "0"], "0 must be at least 1"),
        (
            ["predict", "a", "b", "--output", "rows.txt"],
            "`output` (='rows.txt') must be a file that ends in .csv or .parquet",
        ),
        (["predict", "a", "b", "--output", "none/rows.csv"], "there is no folder 'none'"),
        (["predict", "a", "b.csv", "--output", "./b.csv"], "would replace the input"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_hyphens_and_underscores_are_the_same():
    parser = Parser("predict")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("text")
    for words in (["--top-k", "3"], ["--top_k", "3"], ["--top-k=3"]):
        assert vars(parser.parse(["a-b", *words])) == {"top_k": 3, "text": "a-b"}


def test_a_reader_that_leaves_early_ends_the_command_in_silence(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from etf_adapt.commands import main, publish\n"
    program += "def long(words):\n    for _ in range(100_000): print('a line')\n"
    program += "publish.main = long\nmain.main(['publish'])"
    done = subprocess.run(
        f'{sys.executable} -c "$PROGRAM" | head -1',
        shell=True,
        env={"PROGRAM": program, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "a line\n" and done.stderr == ""
