"""Arguments of recipes/finetune.py, and the checks that need neither torch nor data."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from transformers import HfArgumentParser

from etf_adapt.errors import check_choice, nearest_names
from etf_adapt.models.names import model_task
from etf_adapt.results import run_folder

if TYPE_CHECKING:
    from etf_adapt.training.arguments import ETFTrainingArguments


@dataclass
class ModelArguments:
    """Which model, and what becomes of its head."""

    model: str = field(default="micro", metadata={"help": "Short name, Hub id, timm name or folder."})
    head: Literal["etf", "linear", "cosine", "paper"] = field(
        default="etf", metadata={"help": "Classifier: fixed simplex frame, or one to compare with."}
    )
    # The names of losses.registry, which would import torch.
    loss: Literal["dot_regression", "margin_dot_regression", "cross_entropy", "logit_adjusted"] | None = field(
        default=None, metadata={"help": "By default the head's own."}
    )
    loss_options: str | None = field(
        default=None, metadata={"help": "JSON with options of the loss (etf_adapt.losses.registry.make_loss)."}
    )
    head_trainable: bool = field(default=False, metadata={"help": "Train the etf head on from its start."})
    head_path: str | None = field(default=None, metadata={"help": "Module path of the head, if it is not found."})
    pooling: Literal["stock", "mean"] | None = field(
        default=None, metadata={"help": "Of a text's tokens: stock (as the model's class has it) or their mean."}
    )
    peft: str | None = field(
        default=None, metadata={"help": "Train adapters in place of the backbone: lora, or a JSON file for peft."}
    )
    prior_adjustment: Literal["auto", "fit", "none"] = field(
        default="auto", metadata={"help": "Prior adjustment after training; auto: fit for etf heads, else none."}
    )
    paper: bool = field(default=False, metadata={"help": "The published method: head, loss and sampling of the paper."})
    pretrained: bool = field(default=True, metadata={"help": "Start from the pretrained weights, not random ones."})
    checkpoint_path: str | None = field(
        default=None, metadata={"help": "File of weights (.safetensors, .pth) for the architecture that --model names."}
    )


@dataclass
class DataArguments:
    """Which data, and what the model sees of them."""

    dataset: str = field(default="digits", metadata={"help": "digits, a Hub id, a file or a folder."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if it is not found."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts, if it is not found."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it is not found."})
    imbalance_factor: float | None = field(
        default=None, metadata={"help": "Make train long-tailed: largest over smallest class count, at least 1."}
    )
    imbalance_profile: Literal["exponential", "step"] = field(
        default="exponential", metadata={"help": "Shape of the long tail."}
    )
    class_order: Literal["label", "permuted"] = field(
        default="label", metadata={"help": "Rank of the classes by count: label order, or permuted by the seed."}
    )
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of train for a missing validation split."})
    validation_before_long_tail: bool = field(
        default=False, metadata={"help": "Cut it before the long tail, balanced, as benchmarks do."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most so many rows."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels a side, for models that allow another size."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens to cut texts to; by default the model's own."}
    )
    augment: bool = field(default=True, metadata={"help": "Crop and mirror training images at random."})
    evaluate_test: bool = field(
        default=True, metadata={"help": "Score the test split at the end; off while settings are being chosen."}
    )


@dataclass
class OutputArguments:
    """Where the result goes; the folder itself is output_dir of TrainingArguments."""

    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})


DESCRIPTION = (
    "Fine-tune a pretrained image or text model on classes that are unevenly filled, and leave a stock checkpoint."
)
OWN_ARGUMENTS: list[Any] = [ModelArguments, DataArguments, OutputArguments]


class Parser(HfArgumentParser):
    """Parser that raises its errors, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a choice; argparse's own check names no nearest one."""
        if action.choices is not None:
            check_choice(action.dest, value, action.choices)


def read_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, OutputArguments, list[str]]:
    """Parse and check the arguments defined here; return them, and the flags left for ETFTrainingArguments."""
    refuse_stages(argv)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = [*flags_from_file(argv[0]), *argv[1:]]
    if "-h" in argv or "--help" in argv:
        parse_training(["--help"])
    parser = Parser(OWN_ARGUMENTS, add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir")
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    model_args, data_args, output_args, shared, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if model_args.paper:
        if "--head" in argv and model_args.head != "paper":
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

    output_dir = shared.output_dir or str(Path("out", default_name(model_args, data_args)))
    resume = shared.resume_from_checkpoint
    run_folder.check_output_dir(output_dir, resume=resume is not None, overwrite=output_args.overwrite_output_dir)
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
    from etf_adapt.training.arguments import ETFTrainingArguments

    if "--help" in argv:
        everything = Parser([*OWN_ARGUMENTS, ETFTrainingArguments], description=DESCRIPTION)
        everything.parse_args(["--help"])
    parser = Parser([ETFTrainingArguments], allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        flags = [f"--{entry.name}" for group in (*OWN_ARGUMENTS, ETFTrainingArguments) for entry in fields(group)]
        near = nearest_names(unknown[0].split("=")[0], flags)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help."
        raise ValueError(f"There is no argument {unknown[0]!r}: {hint}")
    if args.push_to_hub:
        from etf_adapt.hub.send import check_name_and_token

        if args.hub_model_id is None:
            raise ValueError("`push_to_hub` (=True) needs the name of a repository: add --hub_model_id user/name.")
        if os.environ.get("RANK", "0") == "0":  # which publishes
            check_name_and_token(args.hub_model_id)
    return args


def refuse_stages(argv: Sequence[str]) -> None:
    """Refuse the flags by which other scripts choose what to do: here --do_eval would train on the data to evaluate on."""
    names = [word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")]
    if typed := [name for name in names if name in ("do_train", "do_eval", "do_predict")]:
        raise ValueError(
            f"`--{typed[0]}` does nothing here: one run trains, validates after each epoch and scores the test split at the "
            "end. Leave it out; `--evaluate_test false` leaves the test split alone."
        )


def flags_from_file(file: str) -> list[str]:
    """Turn a JSON or YAML file of arguments into flags; later flags override them."""
    import yaml

    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file of settings {file!r}.")
    settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings: it must map the names of arguments to values.")
    flags = []
    for name, value in settings.items():
        if value is None or value == [] or value == {}:
            continue
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(word) for word in words)]
    return flags


def default_name(model_args: ModelArguments, data_args: DataArguments) -> str:
    """Name a run after its data, model and head."""
    names = (Path(data_args.dataset).stem, Path(model_args.model).name, model_args.head)
    return "-".join(re.sub(r"[^\w.-]+", "_", name) for name in names)
