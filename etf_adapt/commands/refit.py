"""``etf-adapt refit MODEL DATASET``: the head of any trained classifier set once more, in one pass over its training rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from etf_adapt.commands.finetune_arguments import last_name
from etf_adapt.commands.parser import Parser, add_column_flags, add_reading_flags, positive, prepare, true_or_false
from etf_adapt.errors import one_line_errors


def main(argv: Sequence[str]) -> None:
    """Refit as the command line says."""

    def change(**options: Any) -> list[str]:
        from etf_adapt.inference.refit import refit

        result = refit(**options)
        return [*result.describe(), options["output"] if result.is_set else "nothing was written"]

    run_change(_parser(), argv, change, ending="refitted")


def run_change(parser: Parser, argv: Sequence[str], change: Callable[..., list[str]], *, ending: str) -> None:
    """Change a model as the command line says, and print what ``change`` returns, with the seconds; on any processes."""
    with one_line_errors(stopped="stopped; nothing was written"):
        options = vars(parser.parse(argv))
        start = time.monotonic()
        options["output"] = options["output"] or f"{last_name(options['model'])}-{ending}"
        is_main = prepare()
        lines = change(**{name: value for name, value in options.items() if value is not None})
        if is_main:
            print("\n".join(lines), f"({time.monotonic() - start:.0f} s)")


def _parser() -> Parser:
    parser = Parser(
        "refit", description="Set the head of a trained classifier in closed form, in one pass over its training rows."
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id or short name of any classification model")
    parser.add_argument("dataset", metavar="DATASET", help="its training rows: digits, a Hub id, a file or a folder")
    parser.add_argument("--output", metavar="FOLDER", help="new folder; by default <MODEL>-refitted")
    parser.add_argument("--new_labels", action="store_true", help="the model was trained on other labels, or on none")
    parser.add_argument(
        "--held_out",
        default="auto",
        help="rows that choose and judge: auto (those known not to have trained the model), share (a tenth of the training "
        "rows, for a model that saw none of them) or none",
    )
    parser.add_argument(
        "--force", action="store_true", help="set the head also where held-out rows do not say it helps"
    )
    parser.add_argument(
        "--penalty",
        type=float,
        help="added to the eigenvalues of the covariance within the classes, in units of their mean; chosen by default",
    )
    parser.add_argument(
        "--max_rows",
        type=positive,
        metavar="N",
        help="training rows to read: of more, a sample even over the classes; by default 50,000, or 200 a class where that is "
        "more",
    )
    parser.add_argument("--pooling", choices=("stock", "mean"), help="of a text's tokens, with new labels")
    parser.add_argument("--head_path", help="module path of the head, if it is not found")
    add_row_flags(parser)
    return parser


def add_row_flags(parser: Parser) -> None:
    """Add the flags of how rows are found and read."""
    add_column_flags(parser)
    parser.add_argument("--label_column", help="column of the labels, if it is not found")
    add_reading_flags(parser)
    parser.add_argument(
        "--keep_statistics",
        type=true_or_false,
        default=True,
        metavar="BOOL",
        help="keep the sums of each class's features beside the model, for extend",
    )
