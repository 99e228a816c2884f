"""``etf-adapt predict MODEL INPUT``: classes of images or texts that have no labels, one row for each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etf_adapt.commands.parser import Parser, add_data_flags, add_model_flags, positive, start
from etf_adapt.errors import DataError, check_choice, one_line_errors
from etf_adapt.results.prediction_files import check_output, write_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

ON_BAD_INPUT = ("fail", "skip")


def predict(
    model: str | Path | nn.Module,
    inputs: Any,
    *,
    top_k: int = 1,
    probabilities: bool = False,
    on_bad_input: str = "fail",
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | Sequence[str] | None = None,
    dataset_revision: str | None = None,
    revision: str | None = None,
    processor: Any = None,
    device: str | torch.device | None = None,
    bf16: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    r"""Classify images or texts that have no labels, by any classification model of transformers or timm.

    The probabilities are :math:`\mathrm{softmax}(u)` of the stock model's logits u, as in ``transformers.pipeline``; the batch
    size changes them by no more than rounding. Inputs are read while the rows are taken: one batch of images ahead, or 32 of
    texts, which are batched by length.

    Args:
        model: Folder, Hub id or short name of a model; or the model itself.
        inputs: Images (of PIL) or their paths, or texts or pairs of texts, one after another; a ``datasets.Dataset``; or one
            string as on the command line: a folder of images in any layout, one image, a csv, tsv, json, jsonl, parquet or txt
            file (one text a line), any name that ``etf_adapt.load_data`` takes, or "-" for texts of the standard input.
        top_k: Classes to name for each input, at least 1.
        probabilities: Whether to add the probability of every class.
        on_bad_input: "fail": an image that cannot be read or an empty text is an error; "skip": it is left out and named in
            the log.
        split: Of a data set with several; by default test, else validation, else train.
        image_column: Column of images, where it is not found by itself.
        text_column: Column of texts, likewise; or the two columns of pairs, for a model that was trained on pairs.
        dataset_revision: Branch, tag or commit of a Hub data set.
        revision: Branch, tag or commit of a Hub model.
        processor: Tokenizer or image processor; by default the one beside the model.
        device: Where the model runs; by default an accelerator where there is one, or where a given model is.
        bf16: Whether to compute in mixed precision with bfloat16.
        options: ``batch_size`` (32), ``num_workers`` that decode images (up to 8 for many beside a GPU, else none), and
            ``max_length``, the tokens that texts are cut to: by default as many as tokenizer and model allow, which for a
            fine-tuned model is what training cut them to.

    Returns:
        One dict for each input, in their order: "row", its number from 0; "file" or "text", of pairs "text_pair" too; "label"
        and "probability"; with ``top_k`` above 1 also "label_2", "probability_2", ...; with ``probabilities`` also
        "probability:<class>" of each.

    Raises:
        DataError: A `ValueError`: an input cannot be read, there is none, or a column or split is not found.
        ValueError: The model is no classifier, or an option is invalid.
        OSError: The model or the inputs are not there.

    Example:
        >>> from etf_adapt import load_data
        >>> rows = list(predict("micro", load_data("digits").test["image"][:3], top_k=2))
        >>> [row["row"] for row in rows], list(rows[0])
        ([0, 1, 2], ['row', 'file', 'label', 'probability', 'label_2', 'probability_2'])
    """
    from etf_adapt.data.inputs import open_inputs
    from etf_adapt.inference.classifier import classify, load_classifier

    check_choice("on_bad_input", on_bad_input, ON_BAD_INPUT)
    if top_k < 1:
        raise ValueError(f"`top_k` (={top_k}) must be at least 1: it counts classes.")
    classifier = load_classifier(model, processor=processor, device=device, bf16=bf16, revision=revision)
    task, names = classifier.task, classifier.label_names
    own, other = (image_column, text_column) if task == "image" else (text_column, image_column)
    if other is not None:
        raise ValueError(f"The model reads {task}s: name their column by `{task}_column`.")
    opened = open_inputs(inputs, task=task, split=split, column=own, revision=dataset_revision)

    def rows() -> Iterator[dict[str, Any]]:
        seen = skipped = 0
        for item, found in classify(classifier, opened, **options):
            seen += 1
            if isinstance(found, str):
                if on_bad_input == "fail":
                    raise item.unreadable(found, ways="; on_bad_input='skip' leaves such inputs out")
                skipped += 1
                logger.warning("%s is left out: %s", item.describe(), found)
                continue
            row: dict[str, Any] = {"row": item.row, "file" if task == "image" else "text": item.name}
            row |= {} if item.pair is None else {"text_pair": item.pair}
            for place, index in enumerate((-found).argsort(kind="stable")[:top_k], start=1):
                ending = "" if place == 1 else f"_{place}"
                row |= {f"label{ending}": names[index], f"probability{ending}": float(found[index])}
            if probabilities:
                row |= {f"probability:{name}": float(value) for name, value in zip(names, found, strict=True)}
            yield row
        if skipped:
            logger.warning("%d of %d inputs were left out, because they cannot be read.", skipped, seen)
        if seen == skipped:
            raise DataError(f"`inputs` (={str(inputs)[:200]}) hold nothing to classify.")

    return rows()


def main(argv: Sequence[str]) -> None:
    """Predict as the command line says."""
    with one_line_errors(stopped="stopped; no file of predictions was written"):
        options = vars(_parser().parse(argv))
        output = options.pop("output")
        if output is not None:
            check_output(output)
            if Path(output).resolve() == Path(options["inputs"]).resolve():
                raise ValueError(f"`output` (={output!r}) would replace the input: choose another name.")
        start("predict")
        from tqdm import tqdm

        rows = predict(**options)
        # None: a bar in terminals alone. Not among rows that are printed there.
        bar = tqdm(rows, unit=" rows", disable=True if output is None and sys.stdout.isatty() else None)
        count = write_rows(iter(bar), output)
        if output is not None:
            print(f"{count:,} rows: {output}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        "predict",
        description="""Classify images or texts that have no labels. One row for each, in their order: row, file or text, label,
        probability. Without --output as csv on the standard output; messages and progress go to the standard error.""",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id or short name of any classification model")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        help="""folder of images in any layout; image; csv, tsv, json, jsonl or parquet; txt, one text a line; a data set of the
        Hub, or digits; - for texts of the standard input, one a line""",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output", metavar="FILE", help="predictions.csv or predictions.parquet; there when complete, or not at all"
    )
    group.add_argument("--top_k", type=positive, default=1, metavar="N", help="classes to name for each input")
    group.add_argument("--probabilities", action="store_true", help="add the probability of every class")
    group.add_argument(
        "--on_bad_input",
        choices=ON_BAD_INPUT,
        default="fail",
        help="an image that cannot be read or an empty text ends the run; or is left out, named and counted",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    return parser
