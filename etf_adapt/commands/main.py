"""The console script ``etf-adapt``: finds a command by its name and hands it the rest of the line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import etf_adapt
from etf_adapt.errors import check_choice, one_line_errors

# A command NAME is the function `main` of the file NAME, which is imported when it is called.
COMMANDS = {
    "finetune": "Fine-tune a pretrained model on a data set; the result is a stock checkpoint.",
    "predict": "Classify images or texts that have no labels; one row for each.",
    "evaluate": "Score a model on a split of a data set.",
    "refit": "Set the head of a trained model in closed form, in one pass over its rows.",
    "extend": "Add rows or classes to a finished model, or take them away.",
    "publish": "Publish a finished folder on the Hub.",
}
USAGE = """usage: etf-adapt COMMAND ...

Fine-tune pretrained models on imbalanced classes, and use the result.

{commands}

etf-adapt COMMAND --help lists the flags of a command. Exit codes: 2 a wrong argument or file, 1 a failed run,
3 a finished run that could not be published, 128 + the number of a signal that stopped it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with one_line_errors():
        if words[0] in ("-h", "--help"):
            print(USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())))
        elif words[0] == "--version":
            print(f"etf_adapt {etf_adapt.__version__}")
        else:
            check_choice("command", words[0], COMMANDS)
            _run(words[0], words[1:])


def _run(command: str, words: Sequence[str]) -> None:
    """Run a command; a reader of its output that leaves early, such as ``head``, ends it in silence."""
    try:
        import_module(f"etf_adapt.commands.{command}").main(words)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        raise SystemExit(1) from None
