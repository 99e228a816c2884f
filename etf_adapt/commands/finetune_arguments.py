"""Flags of ``etf-adapt finetune``, their aliases, and the checks that need neither torch nor data."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from etf_adapt.commands.flags import translate
from etf_adapt.errors import nearest_names
from etf_adapt.models.names import model_task
from etf_adapt.results import run_folder
from etf_adapt.training.settings import option

if TYPE_CHECKING:
    from etf_adapt.training.arguments import ETFTrainingArguments

ETF_SCALE = 16.0  # of the logits of an ETF head under a cross-entropy: unscaled they reach about one


@dataclass
class ModelArguments:
    """Which model, and what becomes of its head."""

    model: str = option("micro", "Short name, Hub id, timm name or folder.")
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    head: Literal["etf", "linear", "cosine", "paper"] = option(
        "etf", "Classifier: fixed simplex frame, or one to compare with."
    )
    # The names of losses.registry, which would import torch.
    loss: Literal["dot_regression", "margin_dot_regression", "cross_entropy", "focal", "logit_adjusted"] | None = (
        option(None, "By default the head's own.")
    )
    class_weights: Literal["none", "balanced"] = option(
        "none",
        "Factors of the loss: balanced weights a class by n / (K n_c), of n rows, K classes, n_c rows of class c.",
    )
    loss_options: str | None = option(None, "JSON with options of the loss (etf_adapt.losses.registry.make_loss).")
    head_trainable: bool = option(False, "Let the etf head learn, from its closed form on.")
    head_path: str | None = option(None, "Module path of the head, if it is not found.")
    pooling: Literal["stock", "mean"] | None = option(
        None, "Of a text's tokens: stock (as the model's class has it) or their mean."
    )
    peft: str | None = option(None, "Train adapters in place of the backbone: lora, or a JSON file for peft.")
    prior_adjustment: Literal["auto", "fit", "none"] = option(
        "auto", "Prior adjustment after training; auto: fit for etf heads, else none."
    )
    paper: bool = option(False, "The published method: head, loss and sampling of the paper.")
    pretrained: bool = option(True, "Start from the pretrained weights, not random ones.")
    checkpoint_path: str | None = option(
        None, "File of weights (.safetensors, .pth) for the architecture that --model names."
    )

    @property
    def is_pretrained(self) -> bool:
        """Whether the run starts from the weights that the model's name stands for."""
        return self.pretrained and self.checkpoint_path is None

    def load_options(self) -> dict[str, Any]:
        """Return the arguments of ``ETFFor....from_pretrained``."""
        same = ("head", "head_path", "pooling", "pretrained", "checkpoint_path")
        options = {name: getattr(self, name) for name in same}
        trainable = True if self.head_trainable else None
        return {**options, "trainable": trainable, "loss": self._loss(), "revision": self.model_revision}

    def _loss(self) -> dict[str, Any] | None:
        """Return the loss with its options; None for the head's own."""
        name = self.loss or {"cosine": "logit_adjusted"}.get(self.head)
        loss: dict[str, Any] | None = {"name": name} if name else None
        if loss is not None and "dot_regression" not in loss["name"] and self.head == "etf":
            loss["scale"] = ETF_SCALE
        options = {"class_weights": "balanced"} if self.class_weights == "balanced" else {}
        options |= json.loads(self.loss_options or "{}")
        if not options:
            return loss
        from etf_adapt.models.etf_model import DEFAULT_LOSSES

        return {**(loss or DEFAULT_LOSSES[self.head]), **options}

    def origin_of_weights(self, location: str) -> str | None:
        """Return where the weights come from, for the card, if the model's own configuration does not tell it."""
        if self.is_pretrained:
            return None if Path(location).is_dir() else location
        origin = "random weights" if self.checkpoint_path is None else "a file of weights"
        return f"{run_folder.public_value(self.model)} from {origin}"


@dataclass
class DataArguments:
    """Which data, and what the model sees of them."""

    dataset: str = option(
        "digits",
        "digits, a Hub id, a csv, tsv, json or parquet file, or a folder of them or of images (SPLIT/CLASS/...).",
    )
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub data set.")
    image_column: str | None = option(None, "Column of the images, if it is not found.")
    image_root: str | None = option(None, "Folder of the images that a table names.")
    text_column: list[str] | None = option(  # noqa: RUF009 - a field, as the others
        None, "Column of the texts, if it is not found; two columns are read as pairs."
    )
    label_column: str | None = option(None, "Column of the labels, if it is not found.")
    imbalance_factor: float | None = option(
        None, "Make train long-tailed: largest over smallest class count, at least 1."
    )
    imbalance_profile: Literal["exponential", "step"] = option("exponential", "Shape of the long tail.")
    class_order: Literal["label", "permuted"] = option(
        "label", "Rank of the classes by count: label order, or permuted by the seed."
    )
    validation_fraction: float = option(0.1, "Share of train for a missing validation split.")
    validation_before_long_tail: bool = option(
        False, "Cut a missing validation split before the long tail, balanced, as benchmarks do."
    )
    max_train_rows: int | None = option(None, "Train on at most so many rows.")
    image_size: int | None = option(None, "Pixels a side, for models that allow another size.")
    max_length: int | None = option(
        None, "Tokens to cut texts to, as the saved tokenizer will; by default its own, up to 512."
    )
    augment: bool = option(True, "Crop and mirror training images at random.")
    evaluate_test: bool = option(True, "Score the test split at the end; off while settings are being chosen.")

    def load_options(self) -> dict[str, Any]:
        """Return the arguments of ``load_data``."""
        others = ("dataset", "dataset_revision", "image_size", "max_length", "augment", "evaluate_test")
        options = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in others}
        return {**options, "revision": self.dataset_revision}


@dataclass
class OutputArguments:
    """Where the result goes; the folder itself is output_dir of TrainingArguments."""

    overwrite_output_dir: bool = option(False, "Replace an earlier run in output_dir.")
    dry_run: bool = option(False, "Show what a run would do, its time and memory, and stop.")
    is_named: bool = field(default=True, init=False)  # whether output_dir was given: another name is not taken then


NEWEST = ("last", "latest", "auto", "true", "yes")  # of resume_from_checkpoint: the newest one in output_dir

OWN_ARGUMENTS: list[Any] = [ModelArguments, DataArguments, OutputArguments]

# Flags that a resumed run may change: where things lie, which the checkpoint's rows and weights are checked against, and what
# is done after training.
FREE_ON_RESUME = (
    *("model", "model_revision", "pretrained", "checkpoint_path"),
    *("dataset", "dataset_revision", "evaluate_test", "prior_adjustment"),
)


def read_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, OutputArguments, list[str]]:
    """Parse and check the arguments defined here; return them, and the flags left for ETFTrainingArguments."""
    from etf_adapt.commands.dataclass_parser import Parser

    argv = translate(argv)
    parser = Parser(OWN_ARGUMENTS, add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir")
    parser.add_argument("--resume_from_checkpoint")
    model_args, data_args, output_args, shared, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if model_args.paper:
        if any(word.partition("=")[0] == "--head" for word in argv) and model_args.head != "paper":
            raise ValueError(f"`paper` (=True) contradicts `head` (={model_args.head!r}): give one of them.")
        model_args.head = "paper"
    check_loss_options(model_args.loss_options)
    if model_args.peft not in (None, "lora") and not Path(str(model_args.peft)).is_file():
        raise ValueError(
            f"`peft` (={model_args.peft!r}) is neither 'lora' nor a JSON file with a configuration of peft."
        )
    if model_args.checkpoint_path is not None and not Path(model_args.checkpoint_path).is_file():
        raise ValueError(f"`checkpoint_path` (={model_args.checkpoint_path!r}) is no file: give a file of weights.")
    if data_args.dataset == "digits" and model_task(model_args.model) == "text":
        raise ValueError(
            f"`model` (={model_args.model!r}) reads text, and digits are images: name texts with --dataset."
        )

    resume, overwrite = shared.resume_from_checkpoint, output_args.overwrite_output_dir
    if resume is not None and overwrite:
        raise ValueError(
            "`overwrite_output_dir` (=True) removes what `resume_from_checkpoint` goes on from: leave out one."
        )
    output_dir = shared.output_dir or str(Path("out", default_name(model_args, data_args, rest)))
    if shared.output_dir is None and resume is not None:
        output_dir = str(run_folder.newest_of_name(output_dir))
    output_args.is_named = bool(shared.output_dir or resume or overwrite)
    if output_args.is_named:
        run_folder.check_output_dir(output_dir, resume=resume is not None, overwrite=overwrite)
    if str(resume).lower() in NEWEST and not Path(output_dir, run_folder.ARGUMENTS_FILE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` (={resume!r}): {output_dir!r} holds no run and no complete checkpoint: leave the flag "
            "out to begin one, or name its folder (--output_dir)."
        )
    rest += ["--output_dir", output_dir, *(["--resume_from_checkpoint", resume] if resume else [])]
    return model_args, data_args, output_args, rest


def check_loss_options(text: str | None) -> None:
    """Check that the options of the loss are a JSON object; the loss itself checks their names."""
    if text is None:
        return
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`loss_options` (={text!r}) is no JSON: {error}.") from error
    if not isinstance(options, dict) or "name" in options:
        raise ValueError(
            f"`loss_options` (={text!r}) must be a JSON object of options, such as "
            """'{"form": "sphere"}'; the name of the loss is --loss."""
        )


def parse_training(argv: Sequence[str]) -> ETFTrainingArguments:
    """Parse the remaining flags, transformers' own among them; imports torch."""
    from etf_adapt.commands.dataclass_parser import Parser
    from etf_adapt.results.best_metric import check_metric
    from etf_adapt.training.arguments import ETFTrainingArguments

    parser = Parser(cast(Any, [ETFTrainingArguments]), allow_abbrev=False, add_help=False)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        flags = [f"--{entry.name}" for group in (*OWN_ARGUMENTS, ETFTrainingArguments) for entry in fields(group)]
        near = nearest_names(unknown[0].split("=")[0], flags)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help."
        raise ValueError(f"There is no argument {unknown[0]!r}: {hint}")
    if args.metric_for_best_model:
        check_metric(args.metric_for_best_model, collapse_rows=args.collapse_rows)
    if args.push_to_hub:
        from etf_adapt.hub.send import check_name_and_token

        if args.hub_model_id is None:
            raise ValueError("`push_to_hub` (=True) needs the name of a repository: add --hub_model_id user/name.")
        if os.environ.get("RANK", "0") == "0":  # which publishes
            check_name_and_token(args.hub_model_id)
    return args


def check_resumed(folder: str, arguments: Mapping[str, Any]) -> None:
    """Refuse to go on with settings other than those that the run in a folder began with."""
    from etf_adapt.training.arguments import FIXED_ON_RESUME

    file = Path(folder, run_folder.ARGUMENTS_FILE)
    begun = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = {entry.name for group in (ModelArguments, DataArguments) for entry in fields(group)} - {*FREE_ON_RESUME}
    for name in sorted(own.union(FIXED_ON_RESUME, ("sampler", "seed", "data_seed")) & begun.keys()):
        if begun[name] != arguments[name]:
            raise ValueError(
                f"`{name}` (={arguments[name]!r}) was {begun[name]!r} when the run in {folder} began: it would go on otherwise "
                "than it began. Resume with the same settings, or start another run."
            )


def default_name(model_args: ModelArguments, data_args: DataArguments, rest: Sequence[str] = ()) -> str:
    """Name a run after its data, model and head, and after the learning rate and the seed if ``rest`` gives them."""
    names = [last_name(data_args.dataset, Path(data_args.dataset).stem), last_name(model_args.model), model_args.head]
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--learning_rate", type=float)
    flags.add_argument("--seed", type=int)
    with suppress(argparse.ArgumentError):  # a value that is no number is told with those of all other flags
        given, _ = flags.parse_known_args(rest)
        names += [] if given.learning_rate is None else [f"lr{given.learning_rate:g}"]
        names += [] if given.seed is None else [f"seed{given.seed}"]
    return "-".join(names)


def last_name(source: str, name: str | None = None) -> str:
    """Return the last part of a Hub id or path, also for `.`, as part of a name; ``name`` where it is no folder."""
    path = Path(source)
    name = path.resolve().name if path.is_dir() else name or path.name
    return re.sub(r"[^\w.-]+", "_", name).strip("-._") or "data"
