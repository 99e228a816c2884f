"""Parser of a command's flags: hyphens or underscores, defaults in the help, one message for an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from etf_adapt.errors import check_choice, nearest_names


class RaisingParser(argparse.ArgumentParser):
    """Parser that raises its errors, so that they look like all others."""

    way_on = ""  # behind each error

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise ValueError(message + self.way_on)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a choice; argparse's own check names no nearest one."""
        if action.choices is not None:
            check_choice(action.dest, value, action.choices)


class Parser(RaisingParser):
    """Parser that takes ``--top-k`` for ``--top_k`` and names the nearest of an unknown flag."""

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"etf-adapt {command}", formatter_class=_Formatter, allow_abbrev=False, **options)
        self.way_on = f"; see {self.prog} --help."

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of a command line; ``--help`` prints and ends the process."""
        arguments, unknown = self.parse_known_args([with_underscores(word) for word in words])
        if unknown and not unknown[0].startswith("-"):
            raise ValueError(f"{unknown[0]!r} is one word too many; see {self.prog} --help.")
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = nearest_names(unknown[0].split("=")[0], flags)
            hint = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help."
            raise ValueError(f"There is no argument {unknown[0]!r}: {hint}")
        return arguments


class _Formatter(argparse.HelpFormatter):
    """Shows the default of each flag that has one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shows = action.option_strings and action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shows else action.help


def with_underscores(word: str) -> str:
    """Write hyphens in the name of a flag as underscores."""
    flag, equals, value = word.partition("=")
    return f"{flag[:2]}{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def positive(text: str) -> int:
    """Return an integer of at least 1, as flags are read."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def true_or_false(text: str) -> bool:
    """Return a truth value, as flags are read; any other word is refused."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return words[text.lower()]


def add_model_flags(parser: Parser) -> None:
    """Add the flags of how a model is run, common to all commands that run one."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    group.add_argument("--device", help="such as cpu, cuda:1 or mps; by default an accelerator where there is one")
    group.add_argument("--bf16", action="store_true", help="mixed precision with bfloat16")
    add_reading_flags(group)


def add_reading_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of how rows are read."""
    group.add_argument("--batch_size", type=positive, default=32, metavar="N", help="rows at once")
    group.add_argument("--max_length", type=positive, metavar="N", help="tokens of a text; by default the model's own")
    group.add_argument(
        "--num_workers", type=int, metavar="N", help="processes that decode images; by default up to 8 beside a GPU"
    )


def add_data_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Add the flags of where a data set's rows are, and return their group."""
    group = parser.add_argument_group("data")
    group.add_argument("--split", help="of a data set with several; by default test, else validation, else train")
    add_column_flags(group)
    group.add_argument("--dataset_revision", metavar="NAME", help="branch, tag or commit of a Hub data set")
    return group


def add_column_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of which columns hold the inputs."""
    group.add_argument("--image_column", metavar="NAME", help="column of the images, if it is not found")
    group.add_argument(
        "--text_column",
        nargs="+",
        metavar="NAME",
        help="column of the texts, if it is not found; two are read as pairs (after all words that are no flags)",
    )


def start(command: str) -> None:
    """Prepare this process for a model; refuse several processes, each of which would do all of the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE (={os.environ['WORLD_SIZE']}): {command} runs in one process; start it alone.")
    prepare()


def prepare() -> bool:
    """Prepare this process for a model, and return whether it is the one that prints."""
    import datasets
    import transformers

    from etf_adapt.inference.launch import join_processes, set_threads

    set_threads()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return join_processes()
