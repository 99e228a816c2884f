"""``etf-adapt refit MODEL DATASET``: the head of any trained classifier set once more, in one pass over its training rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from etf_adapt.commands.parser import Parser
from etf_adapt.errors import one_line_errors


def main(argv: Sequence[str]) -> None:
    """Refit as the command line says."""
    with one_line_errors():
        options = vars(_parser().parse(argv))
        start = time.monotonic()
        from etf_adapt.inference.finished_model import prepare_process
        from etf_adapt.inference.refit import refit

        options["output"] = options["output"] or f"{Path(options['model']).name}-refitted"
        is_main = prepare_process()
        result = refit(**{name: value for name, value in options.items() if value is not None})
        if is_main:
            print("\n".join(result.describe()))
            written = options["output"] if result.is_set else "nothing was written"
            print(f"{written} ({time.monotonic() - start:.0f} s)")


def _parser() -> Parser:
    parser = Parser(
        "refit",
        description="Set the head of a trained classifier in closed form, in one pass over its training rows.",
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
    parser.add_argument("--penalty", type=float, help="of the closed form, in mean eigenvalues; chosen by default")
    parser.add_argument("--pooling", choices=("stock", "mean"), help="of a text's tokens, with new labels")
    parser.add_argument("--head_path", help="module path of the head, if it is not found")
    add_row_flags(parser)
    return parser


def add_row_flags(parser: Parser) -> None:
    """Add the flags of how rows are found and read."""
    parser.add_argument("--image_column", help="column of the images, if it is not found")
    parser.add_argument("--text_column", help="column of the texts, if it is not found")
    parser.add_argument("--label_column", help="column of the labels, if it is not found")
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens of a text; by default the model's own")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at once")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes that decode images")
    parser.add_argument(
        "--keep_statistics",
        type=lambda text: text.lower() in ("true", "yes", "1"),
        default=True,
        metavar="BOOL",
        help="keep the sums of each class's features beside the model, for extend",
    )
