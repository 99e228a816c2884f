"""The files of a run's output folder: what may be written there, and in which form."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from etf_adapt.errors import OutputFolderError

ARGUMENTS_FILE = "arguments.json"
RESULTS_FILE = "all_results.json"
LOG_FILE = "log.jsonl"
PREDICTIONS_FILE = "predictions.csv"
RUN_FILES = (ARGUMENTS_FILE, RESULTS_FILE, LOG_FILE, PREDICTIONS_FILE)

_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "tokenizer*",
                "vocab*", "merges.txt", "special_tokens_map.json",
                "card.json", "class_counts.png", "recalls.png",
                "modules.json", "sentence_bert_config.json", "1_Pooling/*", "1_Dense/*", "2_Dense/*")  # fmt: skip
_PACKAGES = ("etf_adapt", "torch", "transformers", "timm", "datasets", "accelerate", "numpy")
_SECRETS = ("token", "password", "secret")


def check_output_dir(folder: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse an output folder that holds anything that this run has no leave to touch. Nothing is changed.

    An empty folder, a missing one, and that of a run that ended before its first checkpoint are always free.

    Args:
        folder: The output folder.
        resume: Whether an earlier run that lies there is to go on.
        overwrite: Whether an earlier run that lies there may be replaced. What no run wrote is never replaced.

    Raises:
        OutputFolderError: The folder holds an earlier run and neither was said, or something else.

    Example:
        >>> check_output_dir("a folder that does not exist yet")
    """
    path = Path(folder)
    if path.is_file():
        raise OutputFolderError(f"`output_dir` (={str(folder)!r}) is a file: name a folder.")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if not names:
        return
    if not (path / ARGUMENTS_FILE).is_file():
        raise OutputFolderError(
            f"`output_dir` (={str(folder)!r}) holds something that no run of this recipe wrote ({names[0]!r}): "
            "choose another folder, or an empty one."
        )
    trained = [name for name in names if name.startswith("checkpoint-") or name.endswith(".safetensors")]
    if trained and not resume and not overwrite:
        raise OutputFolderError(
            f"`output_dir` (={str(folder)!r}) holds an earlier run: go on with it (--resume_from_checkpoint last), "
            "replace it (--overwrite_output_dir), or choose another folder (--output_dir)."
        )


def remove_run_files(folder: str | os.PathLike[str]) -> None:
    """Remove the model and the reports of an earlier run from its folder, and nothing else; checkpoints stay.

    So does the card, which a person may have edited: the run renews its own sections of it at its end.

    Args:
        folder: An output folder that ``check_output_dir`` has passed with ``overwrite=True``.
    """
    path = Path(folder)
    if not (path / ARGUMENTS_FILE).is_file():
        return
    for pattern in (*_MODEL_FILES, *RUN_FILES):
        for file in path.glob(pattern):
            if file.is_file():
                file.unlink()


def write_json(file: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step, so that a reader finds the old file or the new one; what is not finite becomes null.

    Args:
        file: The file; its folder is made where it is missing.
        content: Dicts, lists, numbers (numpy's too), strings; anything else is written as its ``str``.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(
        json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    draft.replace(path)


def public_value(value: Any) -> Any:
    """Return a value as it may be published: no absolute path, and of dicts no entry that is a secret.

    Of an absolute path the part below the working folder stays, else the last name: the rest tells who ran it where.

    Args:
        value: Argument of a run.

    Returns:
        The value, ready for JSON.

    Example:
        >>> public_value("/home/me/models/vit"), public_value({"lr": 1.0, "token": "hf_x"})
        ('vit', {'lr': 1.0})
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.relpath(value) if Path(value).is_relative_to(Path.cwd()) else Path(value).name
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not any(word in str(key) for word in _SECRETS)}
        return {key: public_value(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    return _plain(getattr(value, "value", value))  # the value of an enumeration, as it is typed


def public_arguments(*groups: Any) -> dict[str, Any]:
    """Return all arguments of a run as one flat dict that may be published.

    Tokens are left out, and paths are those of ``public_value``.

    Args:
        groups: Dataclass instances, such as those that ``HfArgumentParser`` returns.

    Returns:
        The arguments by name, ready for JSON. Written to a file, the recipe reads them again.
    """
    arguments: dict[str, Any] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if field.init and not any(word in field.name for word in _SECRETS):
                arguments[field.name] = public_value(getattr(group, field.name))
    return arguments


def public_command(argv: Sequence[str]) -> str:
    """Return the command line of a run as it may be published: without tokens and private paths.

    Args:
        argv: The arguments, without the program.

    Example:
        >>> public_command(["--model", "/home/me/vit", "--hub_token", "hf_x", "--seed", "1"])
        'accelerate launch recipes/finetune.py --model vit --seed 1'
    """
    told: list[str] = []
    skip = False
    for word in argv:
        flag, equals, value = word.partition("=")
        if skip or (flag.startswith("--") and any(secret in flag for secret in _SECRETS)):
            skip = not skip and not equals
            continue
        told.append(f"{flag}={public_value(value)}" if flag.startswith("--") and equals else public_value(word))
    return shlex.join(["accelerate", "launch", "recipes/finetune.py", *told])


def describe_environment() -> dict[str, Any]:
    """Return the versions and the hardware of this process, without names of users, machines or folders.

    Returns:
        ``python``, one version for each installed package that matters, ``platform``, ``cpu_count``, ``processes`` and,
        where there is one, ``device``.
    """
    import torch

    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cpu_count"] = os.cpu_count()
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def write_log(file: str | os.PathLike[str], history: Iterable[Mapping[str, Any]]) -> None:
    """Write the training log, one JSON object a line: all that was logged at one step together.

    Args:
        file: The file, replaced where it exists.
        history: ``trainer.state.log_history``.
    """
    steps: dict[Any, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry.get("step"), {}).update(entry)
    lines = [json.dumps(_plain(entry), allow_nan=False) for entry in steps.values()]
    Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_predictions(
    file: str | os.PathLike[str],
    *,
    row_ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    confidences: Sequence[float] | np.ndarray,
    label_names: Sequence[str],
) -> None:
    """Write what the model says of each row, by class name, as comma-separated values.

    Args:
        file: The file, replaced where it exists.
        row_ids: Number of each row in its split.
        labels: True class of each row.
        predictions: Predicted class of each row.
        confidences: Calibrated probability of the predicted class.
        label_names: Name of each class.
    """
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("row_id", "label", "prediction", "confidence"))
        for row_id, label, prediction, confidence in zip(row_ids, labels, predictions, confidences, strict=True):
            writer.writerow((int(row_id), label_names[label], label_names[prediction], f"{confidence:.6f}"))


def loading_lines(folder: str | os.PathLike[str], library: str, task: str) -> str:
    """Return the lines of Python that load a finished run with a stock library.

    Args:
        folder: The output folder, or a Hub id.
        library: ``"transformers"``, ``"timm"`` or ``"sentence_transformers"``: whose layout the folder has.
        task: ``"image"`` or ``"text"``.

    Example:
        >>> print(loading_lines("out/x", "timm", "image"))
        from transformers import pipeline
        classify = pipeline("image-classification", model="out/x")
    """
    name = json.dumps(str(folder))
    if library == "sentence_transformers":
        return f"from sentence_transformers import SentenceTransformer\nscore = SentenceTransformer({name}).encode  # logits"
    pipeline = "image-classification" if task == "image" else "text-classification"
    return f'from transformers import pipeline\nclassify = pipeline("{pipeline}", model={name})'


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
