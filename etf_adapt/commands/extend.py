"""``etf-adapt extend MODEL DATASET``: rows and classes added to a finished classifier, or taken away, without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etf_adapt.commands.parser import Parser
from etf_adapt.commands.refit import add_row_flags, run_change


def main(argv: Sequence[str]) -> None:
    """Extend as the command line says."""

    def change(**options: Any) -> list[str]:
        from etf_adapt.inference.extend import extend

        return [*extend(**options).describe(), options["output"]]

    run_change(_parser(), argv, change, ending="extended")


def _parser() -> Parser:
    parser = Parser(
        "extend",
        description="Add rows and classes to a refitted or fine-tuned model, or take rows away, by one pass over these alone.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder with etf_statistics.safetensors")
    parser.add_argument("dataset", metavar="DATASET", nargs="?", help="rows to add: a file, a folder or a Hub id")
    parser.add_argument("--remove", metavar="DATASET", help="rows to take away, of those that the head was set from")
    parser.add_argument("--output", metavar="FOLDER", help="new folder; by default <MODEL>-extended")
    add_row_flags(parser)
    return parser
