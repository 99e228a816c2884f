"""Flags as people type them: aliases, answers to flags that are none of ours, hyphens, and files of flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Flags of other scripts, and of former versions of transformers, that mean one of today's.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "data": "dataset",
    "data_dir": "dataset",
    "dataset_name": "dataset",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "image_column_name": "image_column",
    "label_column_name": "label_column",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_train_samples": "max_train_rows",
    "model_name_or_path": "model",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "output": "output_dir",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "resume": "resume_from_checkpoint",
    "text_column_name": "text_column",
    "text_column_names": "text_column",
    "train_batch_size": "per_device_train_batch_size",
    "train_dir": "dataset",
    "train_val_split": "validation_fraction",
    "warmup_ratio": "warmup_steps",  # below 1 a share
    "wd": "weight_decay",
}

_STAGES = (
    "one run trains, validates after each epoch and scores the test split at the end (`--evaluate_test false` leaves that "
    "alone); etf-adapt evaluate and etf-adapt predict take the model afterwards"
)
_SPLITS = (
    "put the splits into one folder, as train.csv, validation.csv and test.csv or as such folders: --dataset FOLDER"
)
# Flags of theirs that are no single one of today's: what to do instead.
ANSWERS = {
    "adafactor": "it is --optim adafactor",
    "dataset_config_name": "write the configuration behind the name: --dataset nyu-mll/glue:sst2",
    "group_by_length": "it is the default here; see --train_sampling_strategy",
    "logging_dir": "trackers choose it; tensorboard reads the variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_token": "log in (`hf auth login`) or set HF_TOKEN",
    "save_safetensors": "weights are always saved so",
    **dict.fromkeys(("do_eval", "do_predict", "do_train"), _STAGES),
    **dict.fromkeys(("num_classes", "num_labels"), "the classes are those of the label column"),
    **dict.fromkeys(("push_to_hub_model_id", "push_to_hub_organization"), "it is --hub_model_id user/name"),
    **dict.fromkeys(("test_dir", "test_file", "train_file", "validation_dir", "validation_file"), _SPLITS),
}


def translate(argv: Sequence[str]) -> list[str]:
    """Return flags with underscores and by our own names; those of ``--config FILE`` first, so that the others win."""
    words, files = [], []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in ANSWERS:
            raise ValueError(f"There is no argument `--{name}`: {ANSWERS[name]}.")
        if name == "config":
            files.append(value if equals else next(rest, ""))
        else:
            words.append(f"--{ALIASES.get(name, name)}{equals}{value}")
    if words and words[0].endswith((".json", ".yaml", ".yml")):
        files.append(words.pop(0))
    return [flag for file in files for flag in translate(flags_from_file(file))] + words


def flags_from_file(file: str) -> list[str]:
    """Turn a JSON or YAML file of arguments into flags; later flags override them."""
    import yaml

    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file of settings {file!r}.")
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON or YAML ({' '.join(str(error).split())}): mend it.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings: it must map the names of arguments to values.")
    return flags_of(settings)


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Turn the values of arguments into flags; None stands for the default."""
    flags = []
    for name, value in settings.items():
        if value is None or value == [] or value == {}:
            continue
        words = value if isinstance(value, (list, tuple)) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(word) for word in words)]
    return flags
