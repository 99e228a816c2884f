"""``etf-adapt extend MODEL DATASET``: rows and classes added to a finished classifier, or taken away, without the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from etf_adapt.commands.parser import Parser
from etf_adapt.commands.refit import add_row_flags
from etf_adapt.errors import one_line_errors


def main(argv: Sequence[str]) -> None:
    """Extend as the command line says."""
    with one_line_errors():
        options = vars(_parser().parse(argv))
        start = time.monotonic()
        from etf_adapt.inference.extend import extend
        from etf_adapt.inference.finished_model import prepare_process

        options["output"] = options["output"] or f"{Path(options['model']).name}-extended"
        is_main = prepare_process()
        result = extend(**{name: value for name, value in options.items() if value is not None})
        if is_main:
            print("\n".join(result.describe()))
            print(f"{options['output']} ({time.monotonic() - start:.0f} s)")


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
